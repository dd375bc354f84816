"""Alembic runs this file on the connection that `Database.migrate` hands it."""

from __future__ import annotations

from alembic import context

from declaim.api.store.database import Base

# Batches: SQLite cannot alter a column, so Alembic copies the table.
context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
