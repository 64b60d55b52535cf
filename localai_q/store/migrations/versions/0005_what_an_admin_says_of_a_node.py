"""What an admin says of a node."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0005'
down_revision = '0004'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('nodes', sa.Column('drain', sa.Boolean(), server_default=sa.text('false'), nullable=False))
    labels = sa.Column('labels', postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False)
    op.add_column('nodes', labels)


def downgrade() -> None:
    op.drop_column('nodes', 'labels')
    op.drop_column('nodes', 'drain')
