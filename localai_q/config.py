"""Settings: the only reader of the environment, and where a machine's data lies. Decides nothing else.

Names that LocalAI has keep LocalAI's spelling (`LOCALAI_…`); names that only this project has begin with `LOCALAI_Q_`.
What `localai-q up` has generated once (ports, secrets) stands in `state.json` of the home folder and serves as the
default of the settings of the same name, so that every process and the command line find the same cluster.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import platformdirs
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from localai_q.cluster.amounts import amount, part_of
from localai_q.cluster.builds import BUILDS, Build
from localai_q.cluster.disk import SPARE
from localai_q.cluster.nodes import MOST_SLOTS
from localai_q.errors import StartupError

BUILTIN = "builtin"  # what this version comes with is listed under this,
EXTERNAL = "external"  # and backends that admins have given the archive of under this
GALLERY = re.compile(r"[^/@\n]{1,100}")
ADDRESS = re.compile(r"(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})")


def _words(text: str) -> list[str]:
    """What stands in a list with spaces or commas."""
    return [word for word in re.split(r"[\s,]+", text) if word]


def _named_places(value: str) -> dict[str, str]:
    """Places by their names, those without one by their number."""
    if not value.lstrip().startswith("["):
        return {str(number): place for number, place in enumerate(_words(value), 1)}
    try:
        places = [(str(each["name"]), str(each["url"])) for each in json.loads(value)]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError('needs the form [{"name": "mine", "url": "https://HOST/index.yaml"}]') from error
    if len(dict(places)) < len(places):
        raise ValueError("needs another name for each gallery")
    if wrong := [name for name, _ in places if name in (BUILTIN, EXTERNAL) or not GALLERY.fullmatch(name)]:
        raise ValueError(f"needs another name than {wrong[0]!r}: neither '{BUILTIN}' nor '{EXTERNAL}', and 1 to 100 characters "
                         "without '/' and '@'")  # fmt: skip
    return dict(places)


class Settings(BaseSettings):
    """Every setting, with its default. Times are seconds, sizes bytes, unless the name says otherwise."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True)

    home: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("localai_q"), validation_alias="LOCALAI_Q_HOME"
    )
    log_level: str = Field("INFO", validation_alias="LOCALAI_LOG_LEVEL")

    # Where the web process listens, and what it allows.
    address: str = Field("127.0.0.1:8080", validation_alias="LOCALAI_ADDRESS")
    web_workers: int = Field(1, ge=1, le=64, validation_alias="LOCALAI_Q_WEB_WORKERS")
    request_timeout: float = Field(600.0, gt=0, validation_alias="LOCALAI_REQUEST_TIMEOUT")
    load_wait: float = Field(60.0, ge=0, validation_alias="LOCALAI_MODEL_LOAD_WAIT")  # of whole answers; 0: no bound
    max_body: int = Field(20 << 20, gt=0, validation_alias="LOCALAI_Q_MAX_BODY")
    max_upload: int = Field(200 << 30, gt=0, validation_alias="LOCALAI_Q_MAX_UPLOAD")
    max_uploads: int = Field(16, ge=1, le=10_000, validation_alias="LOCALAI_Q_MAX_UPLOADS")  # that are on their way
    # How long an upload that was cut off, or that nothing names, is kept.
    upload_ttl: float = Field(24 * 3600.0, gt=0, validation_alias="LOCALAI_Q_UPLOAD_TTL")
    max_waiting: int = Field(1024, gt=0, validation_alias="LOCALAI_Q_MAX_WAITING")  # jobs in line for one model
    no_model: bool = Field(False, validation_alias="LOCALAI_Q_NO_MODEL")  # a new registry gets no default model
    web_drain: float = Field(3.0, ge=0, validation_alias="LOCALAI_Q_WEB_DRAIN")  # for streams, when it must stop
    stalled_client: float = Field(60.0, gt=0, validation_alias="LOCALAI_Q_STALLED_CLIENT")
    stalled_job: Literal["cancel", "grace"] = Field("cancel", validation_alias="LOCALAI_Q_STALLED_JOB")
    expose_node: bool = Field(False, validation_alias="LOCALAI_EXPOSE_NODE_HEADER")

    # Replicas that have read the beginning of a prompt get it, unless they are busier than others by more than this.
    prefix_cache: bool = Field(True, validation_alias="LOCALAI_DISTRIBUTED_PREFIX_CACHE")
    prefix_cache_ttl: float = Field(300.0, gt=0, validation_alias="LOCALAI_DISTRIBUTED_PREFIX_CACHE_TTL")
    prefix_cache_entries: int = Field(65_536, ge=1, validation_alias="LOCALAI_Q_PREFIX_CACHE_ENTRIES")
    min_prefix_match: float = Field(0.3, gt=0, le=1, validation_alias="LOCALAI_Q_MIN_PREFIX_MATCH")
    balance_abs_threshold: int = Field(2, gt=0, validation_alias="LOCALAI_Q_BALANCE_ABS_THRESHOLD")
    balance_rel_threshold: float = Field(1.5, gt=0, validation_alias="LOCALAI_Q_BALANCE_REL_THRESHOLD")

    # Scheduling rules that hold again at each start: JSON, or the path of a YAML file.
    model_scheduling: str = Field("", validation_alias="LOCALAI_MODEL_SCHEDULING")
    model_scheduling_config: Path | None = Field(None, validation_alias="LOCALAI_MODEL_SCHEDULING_CONFIG")

    # The stores. Empty: what `localai-q up` embeds.
    database_url: str = Field("", validation_alias="LOCALAI_DATABASE_URL")
    redis_url: str = Field("", validation_alias="LOCALAI_REDIS_URL")
    # What nodes are told to reach Redis by, when it is not `redis_url` with the host that the node called.
    public_redis_url: str = Field("", validation_alias="LOCALAI_Q_PUBLIC_REDIS_URL")

    # How long a lease lives unrenewed; how long a journal can be read after its job's end.
    lease: float = Field(10.0, gt=0.5, validation_alias="LOCALAI_Q_LEASE")
    journal_ttl: float = Field(600.0, gt=0, validation_alias="LOCALAI_Q_JOURNAL_TTL")
    journal_max: int = Field(100_000, gt=0, validation_alias="LOCALAI_Q_JOURNAL_MAX")  # entries of one job

    # Nodes.
    registration_token: str = Field("", validation_alias="LOCALAI_REGISTRATION_TOKEN")
    auto_approve: bool = Field(False, validation_alias="LOCALAI_AUTO_APPROVE_NODES")
    register_to: str = Field("", validation_alias="LOCALAI_REGISTER_TO")
    node_name: str = Field("", validation_alias="LOCALAI_NODE_NAME")
    heartbeat: float = Field(10.0, gt=0, validation_alias="LOCALAI_HEARTBEAT_INTERVAL")
    load_stall: float = Field(300.0, ge=1, validation_alias="LOCALAI_Q_LOAD_STALL")  # of a load in which nothing moves
    secret_days: float = Field(30.0, gt=0, validation_alias="LOCALAI_Q_NODE_SECRET_DAYS")  # that a node keeps a secret
    # After so long a backend ends in which a request goes on that was cancelled or is late. A slow processor may need a
    # minute for the piece of a long prompt before whose end nothing can be cancelled.
    cancel_patience: float = Field(120.0, ge=1, validation_alias="LOCALAI_Q_CANCEL_PATIENCE")
    drain_timeout: float = Field(4.0, ge=0, validation_alias="LOCALAI_Q_DRAIN_TIMEOUT")
    # Of the memory that models lie in: bytes, 8GB, or 50%. Empty: all of it.
    vram_budget: str = Field("", validation_alias="LOCALAI_VRAM_BUDGET")
    max_replicas_per_model: int = Field(1, ge=1, le=MOST_SLOTS, validation_alias="LOCALAI_MAX_REPLICAS_PER_MODEL")
    backends_path: Path | None = Field(None, validation_alias="LOCALAI_BACKENDS_PATH")
    # A further package index for one kind of hardware, as {"cuda12": "https://HOST/whl/cu124"}.
    backend_indexes: dict[Build, str] = Field(default_factory=dict, validation_alias="LOCALAI_Q_BACKEND_INDEXES")
    # The kinds of hardware besides the CPU that backends here may be made for, as "cuda12 vulkan"; "cpu": none of them.
    # Empty: what the machine can.
    backend_builds: str = Field("", validation_alias="LOCALAI_Q_BACKEND_BUILDS")
    # The wheels that this machine has compiled, of all its nodes.
    wheel_cache: Path = Field(
        default_factory=lambda: platformdirs.user_cache_path("localai_q") / "wheels",
        validation_alias="LOCALAI_Q_WHEEL_CACHE",
    )
    # Files (by their whole path) and URLs of lists of further backends, with spaces or commas between them, or in LocalAI's
    # form: [{"name": "mine", "url": "https://HOST/index.yaml"}].
    backend_galleries: str = Field("", validation_alias="LOCALAI_Q_BACKEND_GALLERIES")
    # The same of models.
    galleries: str = Field("", validation_alias="LOCALAI_GALLERIES")
    auto_upgrade: bool = Field(False, validation_alias="LOCALAI_AUTO_UPGRADE_BACKENDS")  # by control, every six hours
    models_path: Path | None = Field(None, validation_alias="LOCALAI_MODELS_PATH")
    child_spec: Path | None = Field(None, validation_alias="LOCALAI_Q_CHILD_SPEC")  # set by a node for its children
    # Where a node gives its models to other nodes, and by what they reach that. Empty: as it reaches the API itself.
    files_address: str = Field("", validation_alias="LOCALAI_HTTP_ADDR")
    advertised_files_address: str = Field("", validation_alias="LOCALAI_ADVERTISE_HTTP_ADDR")
    shared_models: bool = Field(False, validation_alias="LOCALAI_DISTRIBUTED_SHARED_MODELS")
    # Folders of a node, besides that of its models, that models may be imported from, with colons between them.
    import_folders: str = Field("", validation_alias="LOCALAI_Q_IMPORT_FOLDERS")
    # Where a node gets models from.
    allow_private_sources: bool = Field(False, validation_alias="LOCALAI_Q_ALLOW_PRIVATE_SOURCES")
    hf_endpoint: str = Field("https://huggingface.co", validation_alias="HF_ENDPOINT")
    hf_token: str = Field("", validation_alias="HF_TOKEN")
    ollama_registry: str = Field("https://registry.ollama.ai", validation_alias="LOCALAI_Q_OLLAMA_REGISTRY")
    s3_endpoint: str = Field("", validation_alias="AWS_ENDPOINT_URL_S3")  # empty: Amazon's
    # Files by their SHA-256, which nodes look for before a source is asked: s3://BUCKET or s3://BUCKET/FOLDER. Empty: none.
    file_bucket: str = Field("", validation_alias="LOCALAI_Q_FILE_BUCKET")
    # Bytes that stay free when a model comes, or 5 % of it, where that is more; and that cleaning keeps free.
    disk_spare: int = Field(SPARE, ge=0, le=1 << 60, validation_alias="LOCALAI_Q_DISK_SPARE")
    clean_grace: float = Field(600.0, ge=0, validation_alias="LOCALAI_Q_CLEAN_GRACE")  # of files that no model names

    # The command line's way to a cluster; empty: the one of this home folder.
    api_url: str = Field("", validation_alias="LOCALAI_Q_API")
    api_key: str = Field("", validation_alias="LOCALAI_API_KEY")

    # Flower, and what `up` has made.
    flower_port: int = Field(0, validation_alias="LOCALAI_Q_FLOWER_PORT")
    flower_password: str = Field("", validation_alias="LOCALAI_Q_FLOWER_PASSWORD")

    @field_validator("address")
    @classmethod
    def _has_port(cls, value: str) -> str:
        host, colon, port = value.rpartition(":")
        if not colon or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
            raise ValueError("needs the form HOST:PORT, as 127.0.0.1:8080 or :8080")
        return f"{host or '0.0.0.0'}:{port}"  # noqa: S104  (':8080' means every address, as LocalAI has it)

    @field_validator("files_address", "advertised_files_address")
    @classmethod
    def _is_an_address(cls, value: str, info: ValidationInfo) -> str:
        found = ADDRESS.fullmatch(value)
        least = 0 if info.field_name == "files_address" else 1  # 0: a free one
        if value and not (found and least <= int(found[1]) < 65536):
            raise ValueError("needs the form HOST:PORT, as 10.0.0.5:50050")
        return value

    @field_validator("file_bucket")
    @classmethod
    def _is_a_bucket(cls, value: str) -> str:
        if value and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^/?#]+)*/?", value):
            raise ValueError("needs the form s3://BUCKET or s3://BUCKET/FOLDER")
        return value.rstrip("/")

    @field_validator("hf_endpoint", "ollama_registry", "s3_endpoint")
    @classmethod
    def _is_a_web_address(cls, value: str) -> str:
        if value and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", value):
            raise ValueError("needs the form https://HOST or https://HOST:PORT")
        return value

    @field_validator("backend_builds")
    @classmethod
    def _are_builds(cls, value: str) -> str:
        if not set(_words(value)) <= set(BUILDS):
            raise ValueError(f"needs one or several of {', '.join(BUILDS)}, with spaces or commas between them")
        return value

    @property
    def builds(self) -> list[str]:
        """The builds of backends that this node may have, besides those for the processor."""
        return _words(self.backend_builds) or list(BUILDS)

    @field_validator("import_folders")
    @classmethod
    def _are_folders(cls, value: str) -> str:
        if any(not place.startswith("/") for place in value.split(":") if place):
            raise ValueError("needs whole paths of folders, with colons between them")
        return value

    @property
    def import_places(self) -> tuple[Path, ...]:
        """The folders that models may be imported from, one by one."""
        return tuple(Path(place) for place in self.import_folders.split(":") if place)

    @field_validator("galleries", "backend_galleries")
    @classmethod
    def _are_galleries(cls, value: str) -> str:
        if not all(re.match(r"/|https?://[^\s/?#@]|github:", place) for place in _named_places(value).values()):
            raise ValueError("needs whole paths or https://… URLs")
        return value

    @property
    def model_galleries(self) -> dict[str, str]:
        """The galleries of models: where they are, by their names."""
        return _named_places(self.galleries)

    @property
    def named_backend_galleries(self) -> dict[str, str]:
        """The galleries of backends: where they are, by their names."""
        return _named_places(self.backend_galleries)

    @field_validator("backend_indexes")
    @classmethod
    def _are_web_addresses(cls, value: dict[Build, str]) -> dict[Build, str]:
        for url in value.values():
            cls._is_a_web_address(url)
        return value

    @field_validator("database_url")
    @classmethod
    def _names_our_driver(cls, value: str) -> str:
        """The URL as SQLAlchemy needs it, which takes a bare 'postgresql://' for a driver that is not installed."""
        scheme, separator, rest = value.partition("://")
        return f"postgresql+psycopg2://{rest}" if separator and scheme in ("postgres", "postgresql") else value

    @field_validator("vram_budget")
    @classmethod
    def _is_an_amount(cls, value: str) -> str:
        return amount(value) if value else value

    def budget_of(self, total: int) -> int:
        """The bytes of so many that models may use."""
        return part_of(total, self.vram_budget)

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def base_url(self) -> str:
        """The URL by which this machine reaches its own web process."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)  # noqa: S104
        return f"http://{host}:{self.port}"

    @property
    def api_of_node(self) -> str:
        """The API that a node of this machine registers with: on a machine that is given the stores, its own."""
        return self.register_to or (self.base_url if self.redis_url else "")

    @property
    def node_home(self) -> Path:
        """Where a node keeps its identity, its backends and its models."""
        return self.home / "nodes" / self.effective_node_name

    @property
    def backends_of_node(self) -> Path:
        """Where a node keeps its backends."""
        return self.backends_path or self.node_home / "backends"

    @property
    def effective_node_name(self) -> str:
        return self.node_name or socket.gethostname().split(".")[0]

    def require_stores(self) -> Self:
        """These settings, or a `StartupError` when they name no database or no Redis."""
        missing = [
            n for n, v in (("LOCALAI_DATABASE_URL", self.database_url), ("LOCALAI_REDIS_URL", self.redis_url)) if not v
        ]
        if missing:
            raise StartupError(
                f"{' and '.join(missing)} must be set: run 'localai-q up', which brings its own Postgres and Valkey"
            )
        return self


def state_file(home: Path) -> Path:
    """Where `localai-q up` keeps what it generated once."""
    return home / "state.json"


def read_state(home: Path) -> dict[str, Any]:
    """What `localai-q up` generated; nothing where it never ran."""
    try:
        state: dict[str, Any] = json.loads(state_file(home).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StartupError(f"cannot read {state_file(home)} ({reason}): LOCALAI_Q_HOME names the folder") from error
    return state


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, so that no reader and no failure of power ever leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file or a folder on the disk, not in memory only."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_settings(**overrides: Any) -> Settings:
    """Settings from `overrides` (by field name), then the environment, then `state.json`, then the defaults.

    Raises:
        StartupError: a setting has a value that cannot be used; the message names it.
    """
    try:
        first = Settings(**_by_alias(overrides))
        state = {name: value for name, value in read_state(first.home).items() if name not in first.model_fields_set}
        return Settings(**_by_alias({**state, **overrides})) if state else first
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        raise StartupError(f"{name}={problem.get('input')!r} {problem['msg'].removeprefix('Value error, ')}") from error


def _by_alias(values: dict[str, Any]) -> dict[str, Any]:
    fields = Settings.model_fields
    return {str(fields[name].validation_alias): value for name, value in values.items() if name in fields}


@cache
def settings() -> Settings:
    """The settings of this process, read once. A process that is given both stores makes the secrets that are missing."""
    found = load_settings()
    if found.database_url and found.redis_url and not (found.registration_token and found.flower_password):
        ensure_secrets(found.home)
        found = load_settings()
    return found


def ensure_secrets(home: Path) -> None:
    """Generate the secrets of a cluster that `state.json` lacks; several processes may do so at once.

    Raises:
        StartupError: the home folder cannot be written.
    """
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (home / ".state.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = read_state(home)
            made = {
                "registration_token": f"lq-{secrets.token_urlsafe(24)}",
                "flower_password": secrets.token_urlsafe(18),
            }
            if missing := {name: value for name, value in made.items() if not state.get(name)}:
                write_private(state_file(home), json.dumps({**state, **missing}, indent=2) + "\n")
    except OSError as error:
        raise StartupError(
            f"cannot write to {home} ({error.strerror}): set LOCALAI_Q_HOME to a folder that you can write"
        ) from error


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of this process with `changes`, for a child; a change to the empty string removes the name."""
    merged = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value or name not in changes}


def share_metrics(home: Path) -> None:
    """Have prometheus_client, imported after this, share its counters with child processes by files in `home`.

    Raises:
        StartupError: the folder for them cannot be made.
    """
    folder = home / "run" / "metrics"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(
            f"cannot write to {folder} ({error.strerror}): set LOCALAI_Q_HOME to a folder that you can write"
        ) from error
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)


def exit_on_startup_error(error: StartupError) -> SystemExit:
    """The exit that says in one line why a process cannot start."""
    print(f"localai-q: {error.message}", file=sys.stderr, flush=True)  # noqa: T201
    return SystemExit(1)
