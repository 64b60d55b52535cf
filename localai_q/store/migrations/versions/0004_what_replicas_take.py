"""What replicas take."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0004'
down_revision = '0003'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('models', sa.Column('facts', postgresql.JSONB(), nullable=True))
    op.add_column('replicas', sa.Column('used_at', sa.DateTime(timezone=True), nullable=True))
    for name in ('reserved', 'reserved_vram', 'unseen'):
        op.add_column('replicas', sa.Column(name, sa.BigInteger(), server_default=sa.text('0'), nullable=False))
    op.add_column('replicas', sa.Column('context_size', sa.Integer(), server_default=sa.text('0'), nullable=False))


def downgrade() -> None:
    for name in ('context_size', 'unseen', 'reserved_vram', 'reserved', 'used_at'):
        op.drop_column('replicas', name)
    op.drop_column('models', 'facts')
