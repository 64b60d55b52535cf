"""Quantizations."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0013'
down_revision = '0015'
branch_labels = None
depends_on = None


def upgrade() -> None:
    empty: dict[str, Any] = {'server_default': sa.text("''"), 'nullable': False}
    op.create_table(
        'quantizations',
        sa.Column('id', sa.Text(), nullable=False),
        sa.Column('name', sa.Text(), nullable=False),
        sa.Column('state', sa.Text(), server_default=sa.text("'open'"), nullable=False),
        sa.Column('spec', postgresql.JSONB(), nullable=False),
        sa.Column('node_id', sa.Text()),
        sa.Column('job_id', sa.Text()),
        sa.Column('failures', postgresql.JSONB(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column('reasons', postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column('output', sa.Text()),
        sa.Column('result', postgresql.JSONB()),
        sa.Column('error', sa.Text(), **empty),
        sa.Column('imported', sa.Text(), **empty),
        sa.Column('ended_at', sa.DateTime(timezone=True)),
        sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
        sa.PrimaryKeyConstraint('id', name=op.f('quantizations_pkey')),
    )


def downgrade() -> None:
    op.drop_table('quantizations')
