"""Wheels that nodes have compiled for others."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0012'
down_revision = '0013'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        'wheels',
        sa.Column('digest', sa.Text(), nullable=False),
        sa.Column('key', postgresql.JSONB(), nullable=False),
        sa.Column('sha256', sa.Text(), nullable=False),
        sa.Column('size', sa.BigInteger(), nullable=False),
        sa.Column('node', sa.Text(), nullable=False),
        sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
        sa.PrimaryKeyConstraint('digest', name=op.f('wheels_pkey')),
    )
    op.create_index(op.f('wheels_sha256_idx'), 'wheels', ['sha256'])


def downgrade() -> None:
    op.drop_table('wheels')
