"""The tables. Queries live in the module of their family; changes of shape in `migrations`."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    }
)


def _id() -> Column[str]:
    return Column("id", Text, primary_key=True)


def _created() -> Column:  # type: ignore[type-arg]
    return Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now())


nodes = Table(
    "nodes",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    Column("state", Text, nullable=False),
    Column("approved", Boolean, nullable=False, server_default=text("false")),
    Column("secret_hash", Text, nullable=False),  # SHA-256 of the secret that the node made itself
    Column("next_secret_hash", Text, nullable=False, server_default=""),  # of one that it has not used yet
    Column("rotate", Boolean, nullable=False, server_default=text("false")),  # an admin wants it to make a new one
    Column("version", Text, nullable=False, server_default=""),
    Column("hardware", JSONB, nullable=False, server_default=text("'{}'")),
    Column("last_heartbeat", DateTime(timezone=True)),
    Column("drain", Boolean, nullable=False, server_default=text("false")),  # it is to be empty, and to stay so
    Column("labels", JSONB, nullable=False, server_default=text("'{}'")),  # that an admin has given
    Column("vram_budget", Text, nullable=False, server_default=""),  # an admin's, in his words; empty: the node's own
    Column("max_replicas_per_model", Integer),  # an admin's; null: the node's own
    Column("reported_at", DateTime(timezone=True)),
    Column("report", JSONB, nullable=False, server_default=text("'{}'")),  # {"replicas": {id: …}, "missed": [ids]}
    _created(),
)

models = Table(
    "models",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    Column("revision", Integer, nullable=False, server_default=text("1")),
    Column("backend", Text, nullable=False),
    Column("config", JSONB, nullable=False),  # `cluster.models.ModelConfig`
    Column("is_default", Boolean, nullable=False, server_default=text("false")),
    Column("facts", JSONB),  # `cluster.models.Facts`, once the file's header was read
    Column("unmet", JSONB),  # `cluster.wishes.Unmet`, while it has fewer replicas than it should
    _created(),
)

replicas = Table(
    "replicas",
    metadata,
    _id(),
    Column("model_id", ForeignKey("models.id", ondelete="CASCADE"), nullable=False),
    Column("node_id", ForeignKey("nodes.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),  # tells the replicas of a model on one node apart, from 1
    Column("revision", Integer, nullable=False),  # of the model, when the replica was placed
    Column("state", Text, nullable=False),
    Column("reason", Text, nullable=False, server_default=""),
    Column("slots", Integer, nullable=False),
    Column("job_id", Text),  # the stage that is under way
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("changed_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("told_at", DateTime(timezone=True)),  # when its node was last told again what to do with it
    Column("used_at", DateTime(timezone=True)),  # written at most every 10 s
    Column("reserved", BigInteger, nullable=False, server_default=text("0")),  # bytes of RAM that are booked for it
    Column("reserved_vram", BigInteger, nullable=False, server_default=text("0")),  # bytes of GPU memory
    Column(
        "unseen", BigInteger, nullable=False, server_default=text("0")
    ),  # of `reserved`: what its node never reports
    Column("context_size", Integer, nullable=False, server_default=text("0")),  # cut to fit; 0: as the model has it
    _created(),
    UniqueConstraint("model_id", "node_id", "number"),
)

measures = Table(
    "measures",
    metadata,
    Column("node_id", ForeignKey("nodes.id", ondelete="CASCADE"), primary_key=True),
    Column("model_id", ForeignKey("models.id", ondelete="CASCADE"), primary_key=True),
    Column("tokens_per_second", Float, nullable=False, server_default=text("0")),  # of one answer; 0: not measured
    Column("load_seconds", Float, nullable=False, server_default=text("0")),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

jobs = Table(
    "jobs",
    metadata,
    _id(),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("line", Text, nullable=False),  # the queue in which it waits
    Column("model_id", Text),  # kept when the model is deleted
    Column("node_id", Text),  # on which it must run; afterwards, where it ran
    Column("key_id", Text),  # who asked
    Column("request", JSONB),  # erased when the job ends
    Column("stream", Boolean, nullable=False, server_default=text("false")),
    Column("keep", Text, nullable=False, server_default="not"),  # what becomes of it when nobody reads it
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("error", JSONB),
    Column("result", JSONB),
    Column("prompt_tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("completion_tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("cached_tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("timings", JSONB, nullable=False, server_default=text("'{}'")),
    Column("deadline", DateTime(timezone=True)),
    Column("ended_at", DateTime(timezone=True)),
    _created(),
    Index("jobs_open_idx", "created_at", postgresql_where=text("state = 'open'")),
    Index("jobs_created_at_idx", "created_at"),
    Index("jobs_fetches_idx", "model_id", "created_at", postgresql_where=text("kind = 'fetch_model'")),
)

job_logs = Table(
    "job_logs",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("text", Text, nullable=False),  # what it said of its progress: the last of it, once it has ended
)

backend_wishes = Table(  # `cluster.backends.Wish`
    "backend_wishes",
    metadata,
    Column("node_id", ForeignKey("nodes.id", ondelete="CASCADE"), primary_key=True),
    Column("backend", Text, primary_key=True),
    Column("op", Text, nullable=False),
    Column("operation", Text, nullable=False, index=True),
    Column("entry", JSONB),
    Column("state", Text, nullable=False, server_default=text("'open'")),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("last_error", Text, nullable=False, server_default=text("''")),
    Column("next_try", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("job_id", Text),
    _created(),
)

external_backends = Table(  # that admins have given the archive of
    "external_backends",
    metadata,
    Column("name", Text, primary_key=True),
    Column("entry", JSONB, nullable=False),  # `gallery.catalog.BackendEntry`
    _created(),
)

quantizations = Table(  # `cluster.quantizing.Quantization`
    "quantizations",
    metadata,
    _id(),
    Column("name", Text, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'open'")),
    Column("spec", JSONB, nullable=False),
    Column("node_id", Text),
    Column("job_id", Text),
    Column("failures", JSONB, nullable=False, server_default=text("'[]'")),
    Column("reasons", JSONB, nullable=False, server_default=text("'{}'")),
    Column("output", Text),
    Column("result", JSONB),
    Column("error", Text, nullable=False, server_default=text("''")),
    Column("imported", Text, nullable=False, server_default=text("''")),
    Column("ended_at", DateTime(timezone=True)),
    _created(),
)

wheels = Table(  # that nodes have compiled for others
    "wheels",
    metadata,
    Column("digest", Text, primary_key=True),  # of the key
    Column("key", JSONB, nullable=False),  # `cluster.wheels.WheelKey`
    Column("sha256", Text, nullable=False, index=True),
    Column("size", BigInteger, nullable=False),  # bytes
    Column("node", Text, nullable=False),  # the name of the one that gave it, which may be gone
    _created(),
)

api_keys = Table(
    "api_keys",
    metadata,
    _id(),
    Column("name", Text, nullable=False),
    Column("role", Text, nullable=False),  # admin | user
    Column("hash", Text, nullable=False, unique=True),  # SHA-256; keys are random, so a slow hash adds nothing
    Column("hint", Text, nullable=False),  # the first characters, to tell keys apart
    Column("revoked_at", DateTime(timezone=True)),
    _created(),
)

marks = Table(
    "marks",
    metadata,
    Column("name", Text, primary_key=True),  # of something that is done once in the life of the database
)

leaders = Table(
    "leaders",
    metadata,
    Column("loop", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("until", DateTime(timezone=True), nullable=False),
    Column("beat_at", DateTime(timezone=True), nullable=False),  # when the loop was last seen at work
)
