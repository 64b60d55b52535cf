"""Sources against servers on loopback that speak as Hugging Face, registries of images and S3 do."""

import hashlib
import json
import os
import platform
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from file_server import FileServer, Remote, Seen, serve

from localai_q.config import Settings, load_settings
from localai_q.errors import Forbidden, InvalidValue, NotFound, StartupError, Unavailable
from workers.node.fetcher import Wanted, fetch
from workers.node.sources import Access, origin
from workers.node.store import Store

CONTENT = os.urandom(1 << 20)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "PAUSE", 0.0)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")


def get(root: Path, source: str, settings: Settings, sha256: str | None = None) -> Path:
    return fetch(Wanted(source=source, sha256=sha256), root, Access(settings, "", "n1", "s"), lambda _: None)


# --- Hugging Face: the settings' endpoint may be a private mirror, without more


def hub(server: FileServer, **more: object) -> Settings:
    return load_settings(**{"hf_endpoint": server.url, "disk_spare": 0, **more})


def lfs(server: FileServer, *, at: str = "/cdn/blob", path: str = "/o/r/resolve/main/dir/m.gguf") -> Remote:
    """A file of a repository as the hub has it: a redirect that says what it leads to."""
    server.put("/cdn/blob", Remote(CONTENT, etag='"cdn"'))
    headers = {"X-Linked-ETag": f'"{DIGEST}"', "X-Linked-Size": str(len(CONTENT)), "ETag": '"git"'}
    remote = Remote(location=at, headers=headers)
    server.put(path, remote)
    return remote


def test_the_hub_tells_what_a_file_is(tmp_path: Path, server: FileServer) -> None:
    with serve() as cdn:
        lfs(server, at=cdn.put("/blob", Remote(CONTENT)))
        found = get(tmp_path, "huggingface://o/r/dir/m.gguf", hub(server, allow_private_sources=True))
    assert (found.name, found.read_bytes()) == (DIGEST, CONTENT)
    assert [seen.method for seen in server.seen] == ["HEAD", "GET"]


def test_a_token_goes_to_the_hub_and_nowhere_else(tmp_path: Path, server: FileServer) -> None:
    with serve() as cdn:
        remote = lfs(server, at=cdn.put("/blob", Remote(CONTENT)), path="/o/r/resolve/v1.0/m.gguf")
        remote.key = "Bearer hf_x"
        settings = hub(server, allow_private_sources=True)
        with pytest.raises(Forbidden, match=r"does not let this node have it \(401\): set HF_TOKEN on the node"):
            get(tmp_path, "hf://o/r/m.gguf@v1.0", settings)
        found = get(tmp_path, "hf://o/r/m.gguf@v1.0", hub(server, hf_token="hf_x", allow_private_sources=True))
        assert found.name == DIGEST
        assert "authorization" not in cdn.seen[0].headers


def test_the_hub_may_send_on_within_itself_before_it_tells(tmp_path: Path, server: FileServer) -> None:
    lfs(server)
    server.put("/old/r/resolve/main/m.gguf", Remote(location="/o/r/resolve/main/dir/m.gguf"))
    assert get(tmp_path, "huggingface://old/r/m.gguf", hub(server)).name == DIGEST


def test_a_hub_that_leads_to_a_private_address_is_not_followed_there(tmp_path: Path, server: FileServer) -> None:
    with serve() as cdn:
        lfs(server, at=cdn.put("/blob", Remote(CONTENT)))
        with pytest.raises(InvalidValue, match="an address of this cluster; LOCALAI_Q_ALLOW_PRIVATE_SOURCES"):
            get(tmp_path, "huggingface://o/r/dir/m.gguf", hub(server))
        assert cdn.seen == []


def test_a_file_that_is_not_what_the_hub_or_the_model_says(tmp_path: Path, server: FileServer) -> None:
    lfs(server)
    with pytest.raises(Unavailable, match=f"its SHA-256 is {DIGEST}, expected {'0' * 64}"):
        get(tmp_path, "huggingface://o/r/dir/m.gguf", hub(server), sha256="0" * 64)
    server.put("/cdn/blob", Remote(bytes(len(CONTENT))))
    with pytest.raises(Unavailable, match=f"expected {DIGEST}"):
        get(tmp_path, "huggingface://o/r/dir/m.gguf", hub(server))
    server.put("/cdn/blob", Remote(CONTENT + b"x"))
    with pytest.raises(Unavailable, match=rf"a file of {len(CONTENT) + 1} bytes, expected {len(CONTENT)}"):
        get(tmp_path, "huggingface://o/r/dir/m.gguf", hub(server))


def test_a_file_that_the_hub_keeps_in_git_is_taken_as_it_comes(tmp_path: Path, server: FileServer) -> None:
    server.put("/o/r/resolve/main/m.gguf", Remote(CONTENT, etag='"0123"', cuts=[1 << 19]))
    assert get(tmp_path, "huggingface://o/r/m.gguf", hub(server)).name == DIGEST


def test_a_file_that_the_hub_does_not_have(tmp_path: Path, server: FileServer) -> None:
    with pytest.raises(NotFound, match=r"cannot fetch huggingface://o/r/none.gguf: 127.0.0.1 has no such file"):
        get(tmp_path, "huggingface://o/r/none.gguf", hub(server))


# --- registries

LAYER = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{DIGEST}", "size": len(CONTENT)}
LICENSE = {"mediaType": "application/vnd.ollama.image.license", "digest": f"sha256:{'1' * 64}", "size": 5}


ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
OWN = {"digest": f"sha256:{'1' * 64}", "platform": {"os": sys.platform, "architecture": ARCHITECTURE}}
OTHER = {"digest": f"sha256:{'2' * 64}", "platform": {"os": "unknown", "architecture": "unknown"}}


class Registry:
    """A registry that gives a token to anybody, and nothing without it."""

    def __init__(self, server: FileServer, repository: str = "library/tiny") -> None:
        self.server = server
        self.repository = repository
        self.manifest({"mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": [LICENSE, LAYER]}, "latest")
        server.put(f"/v2/{repository}/blobs/sha256:{DIGEST}", self._kept(CONTENT))
        server.answer = self._answer

    def manifest(self, document: dict[str, object], reference: str) -> str:
        """Its digest."""
        body = json.dumps(document).encode()
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        for name in (reference, digest):
            self.server.put(f"/v2/{self.repository}/manifests/{name}", self._kept(body))
        return digest

    def _kept(self, content: bytes) -> Remote:
        challenge = f'Bearer realm="{self.server.url}/token",service="tests",scope="repository:{self.repository}:pull"'
        return Remote(content, key="Bearer anybody", headers={"WWW-Authenticate": challenge})

    def _answer(self, seen: Seen) -> Remote | None:
        parts = urlsplit(seen.path)
        if parts.path == "/token":
            asked = parse_qs(parts.query)
            known = asked == {"service": ["tests"], "scope": [f"repository:{self.repository}:pull"]}
            return Remote(json.dumps({"token": "anybody" if known else "nobody"}).encode())
        return self.server.files.get(parts.path)


def library(server: FileServer) -> Settings:
    return load_settings(ollama_registry=server.url, disk_spare=0)


def test_a_model_of_ollamas_library(tmp_path: Path, server: FileServer) -> None:
    Registry(server)
    found = get(tmp_path, "ollama://tiny", library(server))
    assert (found.name, found.read_bytes()) == (DIGEST, CONTENT)
    assert get(tmp_path, "ollama://library/tiny:latest", library(server)) == found
    with pytest.raises(NotFound, match=r"127.0.0.1 has no such file \(404\)"):
        get(tmp_path, "ollama://tiny:70b", library(server))


def test_a_token_of_a_registry_must_come_from_a_public_address(tmp_path: Path, server: FileServer) -> None:
    registry = Registry(server)
    with serve() as inner:
        challenge = {"WWW-Authenticate": f'Bearer realm="{inner.url}/token"'}
        server.files[f"/v2/{registry.repository}/manifests/latest"].headers = challenge
        with pytest.raises(InvalidValue, match="an address of this cluster"):
            get(tmp_path, "ollama://tiny", library(server))
        assert inner.seen == []


def test_an_artifact_of_any_registry(tmp_path: Path, server: FileServer) -> None:
    registry = Registry(server, "models/tiny")
    settings = load_settings(allow_private_sources=True, disk_spare=0)
    titled = {
        **LAYER,
        "mediaType": "application/octet-stream",
        "annotations": {"org.opencontainers.image.title": "m.gguf"},
    }
    digest = registry.manifest({"layers": [{**LICENSE, "mediaType": "text/plain"}, titled]}, "v1")
    registry.manifest(
        {"mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [{"digest": digest}]}, "many"
    )
    variants = [OTHER, {"digest": digest, "platform": OWN["platform"]}]
    registry.manifest({"mediaType": "application/vnd.oci.image.index.v1+json", "manifests": variants}, "platforms")
    for number, reference in enumerate((":v1", ":many", ":platforms", f"@{digest}")):
        source = f"oci://{server.host}/models/tiny{reference}"
        assert get(tmp_path / str(number), source, settings).name == DIGEST
    with pytest.raises(InvalidValue, match="an address of this cluster"):
        get(tmp_path, f"oci://{server.host}/models/tiny:v1", load_settings())


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"layers": []}, r"which layer of the image is the file; its layers: none"),
        ({"layers": [LICENSE, {**LICENSE, "digest": f"sha256:{'2' * 64}"}]}, r"its layers: application/vnd.ollama"),
        ({"layers": [{**LAYER, "digest": "sha512:" + "0" * 128}]}, r"which is no SHA-256"),
        ({"layers": "many"}, r"its layers: none"),
        ({"manifests": [{"digest": "sha256:" + "1" * 64}] * 2}, r"the image has 2 variants, and 0 of them"),
        ({"manifests": [OTHER, OTHER]}, r"the image has 2 variants, and 0 of them"),
        ({"manifests": [OWN, OWN]}, r"the image has 2 variants, and 2 of them"),
    ],
)
def test_images_that_are_no_model(
    tmp_path: Path, server: FileServer, manifest: dict[str, object], message: str
) -> None:
    Registry(server).manifest(manifest, "latest")
    with pytest.raises((InvalidValue, Unavailable), match=message):
        get(tmp_path, "ollama://tiny", library(server))


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b"[" * 100_000, b"x" * (5 << 20)])
def test_answers_that_are_no_manifest(tmp_path: Path, server: FileServer, body: bytes) -> None:
    Registry(server)
    server.files["/v2/library/tiny/manifests/latest"].content = body
    with pytest.raises(Unavailable, match=r"cannot be read|is no object|more than 4 MiB"):
        get(tmp_path, "ollama://tiny", library(server))


def test_a_manifest_that_is_not_the_one_that_was_named(tmp_path: Path, server: FileServer) -> None:
    registry = Registry(server, "models/tiny")
    digest = registry.manifest({"layers": [LAYER]}, "v1")
    server.files[f"/v2/models/tiny/manifests/{digest}"].content = b'{"layers": []}'
    with pytest.raises(Unavailable, match=f"the manifest {digest} has another content"):
        get(tmp_path, f"oci://{server.host}/models/tiny@{digest}", load_settings(allow_private_sources=True))


# --- S3


def bucket(server: FileServer, **more: object) -> Settings:
    return load_settings(**{"s3_endpoint": server.url, "disk_spare": 0, **more})


def signed_by(seen: Seen, host: str, secret: str) -> bool:
    """Whether this request carries the signature of who knows the secret, as an S3 server checks it."""
    parts = urlsplit(seen.path)
    asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
    given = asked.pop("X-Amz-Signature", "")
    auth = S3SigV4QueryAuth(Credentials("id", secret), "s3", "us-east-1")
    request = AWSRequest("GET", f"http://{host}{parts.path}", params=asked, headers={"host": host})
    request.context["timestamp"] = asked.get("X-Amz-Date", "")
    return given == auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)


def test_an_object_is_fetched_with_the_nodes_own_credentials_and_resumed(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very secret")
    server.put("/models/a%20dir/m.gguf", Remote(CONTENT, etag='"1"', cuts=[1 << 19]))
    assert get(tmp_path, "s3://models/a dir/m.gguf", bucket(server), DIGEST).read_bytes() == CONTENT
    assert len(server.seen) == 2
    assert all(signed_by(seen, server.host, "very secret") for seen in server.seen)
    assert not signed_by(server.seen[0], server.host, "another")


def test_an_object_that_everybody_may_read_needs_no_credentials(tmp_path: Path, server: FileServer) -> None:
    server.put("/models/m.gguf", Remote(CONTENT))
    assert get(tmp_path, "s3://models/m.gguf", bucket(server), DIGEST).name == DIGEST
    assert server.seen[0].path == "/models/m.gguf"


def test_a_signed_url_is_in_no_message(tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very secret")
    server.put("/models/m.gguf", Remote(CONTENT, cuts=[0] * 9))
    with pytest.raises(Unavailable) as caught:
        get(tmp_path, "s3://models/m.gguf", bucket(server), DIGEST)
    assert "Signature" not in caught.value.message
    notes = [path.read_text() for path in Store(tmp_path).folder.glob(".*.note")]
    assert not any("Signature" in note for note in notes)


@pytest.mark.parametrize("value", ["minio.lan", "ftp://minio", "http://user:pass@minio"])
def test_an_endpoint_that_is_no_address_is_refused(value: str) -> None:
    with pytest.raises(StartupError, match="needs the form https://HOST"):
        load_settings(s3_endpoint=value)


@pytest.mark.parametrize("value", ["files", "s3://", "s3://UPPER", "s3://files?x", "https://files"])
def test_a_bucket_of_files_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(StartupError, match="needs the form s3://BUCKET"):
        load_settings(file_bucket=value)
