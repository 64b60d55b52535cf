"""Runs migrations on the connection that `localai_q.store.migrate` hands over."""

from alembic import context

from localai_q.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
