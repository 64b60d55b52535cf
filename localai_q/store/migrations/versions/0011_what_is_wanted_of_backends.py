"""What is wanted of backends on nodes."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0011'
down_revision = '0008'
branch_labels = None
depends_on = None


def upgrade() -> None:
    now: dict[str, Any] = {'server_default': sa.text('now()'), 'nullable': False}
    op.create_table(
        'backend_wishes',
        sa.Column('node_id', sa.Text(), nullable=False),
        sa.Column('backend', sa.Text(), nullable=False),
        sa.Column('op', sa.Text(), nullable=False),
        sa.Column('operation', sa.Text(), nullable=False),
        sa.Column('entry', postgresql.JSONB()),
        sa.Column('state', sa.Text(), server_default=sa.text("'open'"), nullable=False),
        sa.Column('attempts', sa.Integer(), server_default=sa.text('0'), nullable=False),
        sa.Column('last_error', sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column('next_try', sa.DateTime(timezone=True), **now),
        sa.Column('job_id', sa.Text()),
        sa.Column('created_at', sa.DateTime(timezone=True), **now),
        sa.ForeignKeyConstraint(['node_id'], ['nodes.id'], name=op.f('backend_wishes_node_id_fkey'), ondelete='CASCADE'),
        sa.PrimaryKeyConstraint('node_id', 'backend', name=op.f('backend_wishes_pkey')),
    )
    op.create_index(op.f('backend_wishes_operation_idx'), 'backend_wishes', ['operation'])


def downgrade() -> None:
    op.drop_table('backend_wishes')
