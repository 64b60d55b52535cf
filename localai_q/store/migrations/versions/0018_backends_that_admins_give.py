"""Backends that admins give."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0018'
down_revision = '0014'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        'external_backends',
        sa.Column('name', sa.Text(), nullable=False),
        sa.Column('entry', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
        sa.PrimaryKeyConstraint('name', name=op.f('external_backends_pkey')),
    )


def downgrade() -> None:
    op.drop_table('external_backends')
