"""The command line's way to the API: which cluster, which key, and errors as one line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from localai_q.cli.home import KEY_FILE, READY_FILE
from localai_q.config import Settings, settings
from localai_q.errors import InvalidValue, LocalAIError, ModelDisabled, Unavailable

Record = dict[str, Any]
Answer = TypeVar("Answer")

AWAY = (502, 503, 504)  # statuses of an API that may be back in a moment
PATIENCE = 60.0  # seconds for which who follows something waits for that
PAUSE = 0.5


class Api:
    """The API of a cluster, called with an admin key.

    The cluster is the one that LOCALAI_Q_API and LOCALAI_API_KEY name, else the one of this home folder.
    """

    def __init__(self, found: Settings) -> None:
        self.url = found.api_url.rstrip("/") or _ready(found).get("base_url") or found.base_url
        self.key = found.api_key or _key(found)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        with self.errors():
            self.http = httpx.Client(
                base_url=self.url, headers=headers, timeout=httpx.Timeout(30.0, read=None), trust_env=False
            )

    def call(self, method: str, path: str, *parts: str, **more: Any) -> Record:
        """The answer's JSON.

        Args:
            path: with `{}` for each of `parts`, which may hold any character.

        Raises:
            InvalidValue: something is no text that could be sent.
            LocalAIError: the API refused; the message is its own.
            Unavailable: it does not answer.
        """
        with self.errors():
            quoted = [quote(part, safe="") for part in parts]
        response = self.exchange(method, path.format(*quoted), **more)
        self.check(response)
        answer: Record = response.json() if response.content else {}
        return answer

    def follow(self, path: str, *parts: str) -> Record:
        """What `call` gets there, for who follows something: an API that is away is waited for.

        Raises: as `call`.
        """
        return patiently(lambda: self.call("GET", path, *parts))

    def exchange(self, method: str, path: str, **request: Any) -> httpx.Response:
        """What the API answers, also if it refuses.

        Raises:
            InvalidValue, Unavailable: as `call`.
        """
        with self.errors():
            return self.http.request(method, path, **request)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Say in one line that the cluster cannot be reached, or not be asked that."""
        try:
            yield
        except httpx.InvalidURL as error:
            raise InvalidValue(
                f"{self.url} is no URL ({error}): set LOCALAI_Q_API, as http://127.0.0.1:8080"
            ) from error
        except UnicodeError as error:
            raise InvalidValue(f"the key or an argument has characters that cannot be sent ({error})") from error
        except httpx.HTTPError as error:
            raise Unavailable(
                f"no cluster answers at {self.url} ({error}): start one with 'localai-q up', or set LOCALAI_Q_API"
            ) from error

    def check(self, response: httpx.Response) -> None:
        """Raise what the API answered, if it refused."""
        if response.is_success:
            return
        response.read()
        try:
            error = response.json()["error"]
            message, code = error["message"], error.get("code")
        except (ValueError, KeyError, TypeError, AttributeError):
            message, code = f"the API answered with status {response.status_code}", None
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN) and code != ModelDisabled.code:
            message += " (set LOCALAI_API_KEY to an admin key, or run this as the user who started the cluster)"
        raise (Unavailable if response.status_code in AWAY else LocalAIError)(message)


def patiently(ask: Callable[[], Answer]) -> Answer:
    """What `ask` returns, asked again for `PATIENCE` seconds while it raises `Unavailable`."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return ask()
        except Unavailable:
            if time.monotonic() > until:
                raise
            time.sleep(PAUSE)


def connect() -> Api:
    """The API of the cluster that this command is for."""
    return Api(settings())


def _ready(found: Settings) -> Record:
    try:
        record: Record = json.loads((found.home / READY_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return record


def _key(found: Settings) -> str:
    try:
        return (found.home / KEY_FILE).read_text().strip()
    except OSError:
        return ""
