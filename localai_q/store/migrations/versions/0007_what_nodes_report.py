"""What nodes report of their replicas, and what was measured."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = '0007'
down_revision = '0006'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('nodes', sa.Column('reported_at', sa.DateTime(timezone=True)))
    report = sa.Column('report', postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False)
    op.add_column('nodes', report)
    op.create_table(
        'measures',
        sa.Column('node_id', sa.Text(), nullable=False),
        sa.Column('model_id', sa.Text(), nullable=False),
        sa.Column('tokens_per_second', sa.Float(), server_default=sa.text('0'), nullable=False),
        sa.Column('load_seconds', sa.Float(), server_default=sa.text('0'), nullable=False),
        sa.Column('updated_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
        sa.ForeignKeyConstraint(['model_id'], ['models.id'], name=op.f('measures_model_id_fkey'), ondelete='CASCADE'),
        sa.ForeignKeyConstraint(['node_id'], ['nodes.id'], name=op.f('measures_node_id_fkey'), ondelete='CASCADE'),
        sa.PrimaryKeyConstraint('node_id', 'model_id', name=op.f('measures_pkey')),
    )


def downgrade() -> None:
    op.drop_table('measures')
    op.drop_column('nodes', 'report')
    op.drop_column('nodes', 'reported_at')
