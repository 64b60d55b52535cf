"""What jobs have said."""

import sqlalchemy as sa
from alembic import op

revision = '0015'
down_revision = '0011'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        'job_logs',
        sa.Column('job_id', sa.Text(), nullable=False),
        sa.Column('text', sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(['job_id'], ['jobs.id'], name=op.f('job_logs_job_id_fkey'), ondelete='CASCADE'),
        sa.PrimaryKeyConstraint('job_id', name=op.f('job_logs_pkey')),
    )


def downgrade() -> None:
    op.drop_table('job_logs')
