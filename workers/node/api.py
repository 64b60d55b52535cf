"""What a node says to the API. Owns the HTTP of a node; decides nothing."""

from __future__ import annotations

import json
import logging
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from localai_q import __version__
from localai_q.cluster.wheels import WheelKey
from localai_q.errors import Conflict, Forbidden, LocalAIError, NotFound, StartupError, Unavailable
from localai_q.names import WHEEL_HEADER
from localai_q.sending import send
from workers.identity import Identity
from workers.node.installer import certificates

log = logging.getLogger(__name__)

TIMEOUT = httpx.Timeout(10.0, connect=5.0)
FOR_OTHERS = 60.0  # seconds without a byte more after which what is a gift for other nodes is given up
POLL = 1.0  # seconds between two questions while the node waits for approval, or for the API to come up
REMIND = 30.0  # seconds between two lines that say what is waited for
PATIENCE = 5.0  # seconds before the first such line about an API that does not answer: it may be starting, too


class NodeApi:
    """The API as a registered node uses it."""

    def __init__(self, url: str, node_id: str, identity: Identity) -> None:
        self._id = node_id
        self._identity = identity
        self._http = _client(url)

    def heartbeat(self, hardware: dict[str, Any], replicas: list[dict[str, Any]]) -> dict[str, Any]:
        """Report, as `localai_q.cluster.reports.Report` has it.

        Returns `{"state", "stop": [replica ids]}`, and `rotate` if a new secret is wanted.
        """
        return self._call("POST", "heartbeat", {"hardware": hardware, "replicas": replicas})

    def report(self, replica_id: str, state: str, reason: str, hardware: dict[str, Any]) -> None:
        """Say what became of a replica, and what this machine has now."""
        body = {"state": state, "reason": reason[:4000], "hardware": hardware}
        self._call("POST", f"replicas/{replica_id}", body)

    def replica(self, replica_id: str) -> dict[str, Any]:
        """The spec of one of this node's replicas; `NotFound` when it should not run."""
        return self._call("GET", f"replicas/{replica_id}")

    def holders(self, sha256: str) -> dict[str, Any]:
        """Who has a file, as `localai_q.services.holders.find` tells it; `NotFound` of one that is not needed here."""
        return self._call("GET", f"holders/{sha256}")

    def blame(self, sha256: str, holder_id: str) -> None:
        """Say that a holder has given something else than this file."""
        self._call("POST", f"holders/{sha256}/{holder_id}/wrong", {})

    def give(self, quantization_id: str, sha256: str, path: Path, sent: Callable[[int], object]) -> None:
        """Send what was made for a quantization. `sent` is told how many bytes are there."""
        send(self, f"quantizations/{quantization_id}/result/{sha256}", path, sent)

    def wheel(self, digest: str, backend: str) -> dict[str, Any]:
        """Who has compiled a wheel, as `localai_q.services.wheels.told` tells it."""
        return self._call("GET", f"wheels/{digest}?backend={backend}")

    def give_wheel(self, key: WheelKey, sha256: str, path: Path, sent: Callable[[int], object]) -> None:
        """Give a wheel to all; `Forbidden` if no admin has labelled this node for that."""
        headers = {WHEEL_HEADER: json.dumps(key.model_dump())}
        send(self, f"wheels/{key.digest}?sha256={sha256}", path, sent, headers=headers, patience=FOR_OTHERS)

    def announce_secret(self, secret_hash: str) -> None:
        """Say what the next secret will be; from now on both count, until the next one is used."""
        self._call("POST", "secret", {"secret_hash": secret_hash})

    def unnamed(self) -> list[str]:
        """The files here, by SHA-256, that no model names."""
        return [str(sha256) for sha256 in self._call("GET", "unnamed")["files"]]

    def deregister(self) -> None:
        self._call("POST", "deregister", {})

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        secret = self._identity.secret()
        try:
            return self._ask(method, path, body, secret)
        except Forbidden:
            if (newer := self._identity.secret()) == secret:
                raise
            return self._ask(method, path, body, newer)  # the other was withdrawn on the way

    def exchange(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **request: Any
    ) -> httpx.Response:
        """What the API answers at a path of this node, also if it refuses.

        Raises:
            Unavailable: it does not, or the secret that it was asked with has just been replaced.
        """
        secret = self._identity.secret()
        response = self._request(method, path, secret, headers=headers, **request)
        if response.status_code == httpx.codes.FORBIDDEN and self._identity.secret() != secret:
            raise Unavailable("the node's secret was replaced on the way")
        return response

    def check(self, answer: httpx.Response) -> None:
        """Raise what the API has answered, if it refused."""
        if not answer.is_success:
            _raise(answer)

    def _request(
        self, method: str, path: str, secret: str, headers: Mapping[str, str] | None = None, **request: Any
    ) -> httpx.Response:
        with _errors():
            url = f"/api/node/{self._id}/{path}"
            return self._http.request(method, url, headers={**(headers or {}), **_bearer(secret)}, **request)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, secret: str) -> dict[str, Any]:
        response = self._request(method, path, secret, json=body)
        if response.status_code >= httpx.codes.BAD_REQUEST:
            _raise(response)
        try:
            answer: Any = response.json() if response.is_success else None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Unavailable(f"something else than the API answers at {response.url} ({response.status_code})")
        return dict(answer)


def register(url: str, token: str, name: str, identity: Identity, hardware: dict[str, Any]) -> dict[str, Any]:
    """Register, and wait until the node is approved. Returns the API's answer, with all that the node needs.

    Raises:
        StartupError: it can never work: a wrong token, a name that is taken, an address that is no URL.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise StartupError(f"LOCALAI_REGISTER_TO={url!r} is no URL: it needs the form http://HOST:8080")
    body = {"name": name, "token": token, "secret_hash": identity.hash, "version": __version__, "hardware": hardware}
    say_at, pending, fell_back = time.monotonic() + PATIENCE, False, False
    with _client(url) as http:
        while True:
            try:
                answer, waiting_for = _ask(http, url, name, body)
            except Conflict as error:
                if fell_back or not identity.fall_back():
                    raise StartupError(error.message) from error
                body["secret_hash"], fell_back = identity.hash, True
                continue
            if answer and "redis_url" in answer:
                return answer
            if (answer and not pending) or time.monotonic() > say_at:
                log.warning("%s", waiting_for)
                say_at = time.monotonic() + REMIND
            pending = bool(answer)
            time.sleep(POLL if answer else POLL / 4)


def _bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def _client(url: str, **more: Any) -> httpx.Client:
    """A client that asks the API itself: a proxy of the environment is for the world outside the cluster."""
    trust = ssl.create_default_context(cafile=certificates())
    return httpx.Client(base_url=url, timeout=TIMEOUT, trust_env=False, verify=trust, **more)


def _ask(http: httpx.Client, url: str, name: str, body: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    try:
        response = http.post("/api/node/register", json=body)
    except httpx.HTTPError as error:
        return None, f"waiting for the API at {url}: {error}"
    if response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        return None, f"waiting for the API at {url}: it answers {response.status_code}"
    if response.status_code >= httpx.codes.BAD_REQUEST:
        kind = Conflict if response.status_code == httpx.codes.CONFLICT else StartupError
        raise kind(f"the API at {url} refuses this node: {_message(response)}")
    try:
        answer: dict[str, Any] = response.json()
    except ValueError as error:
        raise StartupError(f"LOCALAI_REGISTER_TO={url} does not answer as this project's API does") from error
    return answer, f"this node waits for approval; on the API's machine run: localai-q nodes approve {name}"


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise Unavailable(f"the API cannot be reached: {error}") from error


def _raise(response: httpx.Response) -> None:
    if response.status_code == httpx.codes.FORBIDDEN and _error(response).get("code") == Forbidden.code:
        raise Forbidden(_message(response))
    if response.status_code == httpx.codes.NOT_FOUND:
        raise NotFound(_message(response))
    if response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        raise Unavailable(_message(response))
    raise LocalAIError(_message(response))


def _message(response: httpx.Response) -> str:
    return str(_error(response).get("message") or f"HTTP {response.status_code}")


def _error(response: httpx.Response) -> dict[str, Any]:
    """The API's own error; empty if somebody else has answered."""
    try:
        error: dict[str, Any] = response.json()["error"]
        error.get("message")
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return error
