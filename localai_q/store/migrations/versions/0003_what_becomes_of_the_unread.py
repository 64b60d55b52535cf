"""What becomes of the unread."""

import sqlalchemy as sa
from alembic import op

revision = '0003'
down_revision = '0002'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('jobs', sa.Column('keep', sa.Text(), server_default='not', nullable=False))


def downgrade() -> None:
    op.drop_column('jobs', 'keep')
