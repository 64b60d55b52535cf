"""What was done once."""

import sqlalchemy as sa
from alembic import op

revision = '0002'
down_revision = '0001'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('marks',
    sa.Column('name', sa.Text(), nullable=False),
    sa.PrimaryKeyConstraint('name', name=op.f('marks_pkey'))
    )
    # A database with a key has been started, and has had its default model.
    op.execute("INSERT INTO marks (name) SELECT 'default_model' WHERE EXISTS (SELECT 1 FROM api_keys)")


def downgrade() -> None:
    op.drop_table('marks')
