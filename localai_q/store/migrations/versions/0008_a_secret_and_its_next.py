"""A node's next secret, and when it was last told what a replica of it is to do."""

import sqlalchemy as sa
from alembic import op

revision = '0008'
down_revision = '0007'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('nodes', sa.Column('next_secret_hash', sa.Text(), server_default='', nullable=False))
    op.add_column('nodes', sa.Column('rotate', sa.Boolean(), server_default=sa.text('false'), nullable=False))
    op.add_column('replicas', sa.Column('told_at', sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_column('replicas', 'told_at')
    op.drop_column('nodes', 'rotate')
    op.drop_column('nodes', 'next_secret_hash')
