"""What was fetched for models, found without a look at all jobs."""

import sqlalchemy as sa
from alembic import op

revision = '0014'
down_revision = '0012'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        'jobs_fetches_idx', 'jobs', ['model_id', 'created_at'], postgresql_where=sa.text("kind = 'fetch_model'")
    )


def downgrade() -> None:
    op.drop_index('jobs_fetches_idx', table_name='jobs')
