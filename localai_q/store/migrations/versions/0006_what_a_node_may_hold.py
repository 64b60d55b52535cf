"""What an admin lets a node hold, and which wishes of models are not met."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0006'
down_revision = '0005'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('nodes', sa.Column('vram_budget', sa.Text(), server_default='', nullable=False))
    op.add_column('nodes', sa.Column('max_replicas_per_model', sa.Integer(), nullable=True))
    op.add_column('models', sa.Column('unmet', postgresql.JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column('models', 'unmet')
    op.drop_column('nodes', 'max_replicas_per_model')
    op.drop_column('nodes', 'vram_budget')
