"""Quantizations as the API has them: asked for, taken from stage to stage and from node to node, made into models.

What a node does is done by the test; how it does it is tested in `test_quantizer`.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from cluster_data import SECRET, add_model, claim, join, model_named, node_named, ready_node
from gguf_files import gguf

from api.admin import quantization as api_quantization
from localai_q import names
from localai_q.cluster.events import End, Progress
from localai_q.cluster.models import ModelConfig
from localai_q.cluster.nodes import Node
from localai_q.cluster.quantizing import MOST_ATTEMPTS, Order
from localai_q.cluster.states import JobState
from localai_q.errors import Conflict, InvalidValue, NotFound
from localai_q.services import cleaning, holders, jobs, keys, models, nodes, quantizations, retries, uploads
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import quantizations as rows

SOURCE, TEXT = "a" * 64, "b" * 64
RESULT = gguf()
SHA = hashlib.sha256(RESULT).hexdigest()
ABLE = """
- name: able
  version: "1"
  description: d
  capabilities: [quantize]
  builds: {cpu: {archive: {source: "https://x.example/able.tgz", sha256: "%s"}}}
""" % ("0" * 64)
MADE = {"sha256": SHA, "size": len(RESULT), "source_sha256": SOURCE, "source_size": 1000, "architecture": "llama",
        "perplexity": 12.5, "source_perplexity": 12.0, "bits_per_weight": 4.5, "source_bits_per_weight": 16.0,
        "kl_divergence": 0.01, "tokens": 256}  # fmt: skip
VECTORS = {**{name: MADE[name] for name in ("sha256", "size", "source_sha256", "source_size", "architecture",
                                            "bits_per_weight", "source_bits_per_weight")},
           "cosine_similarity": 0.99, "texts": 16}  # fmt: skip


@pytest.fixture
def services(services: Services, tmp_path: Path) -> Services:
    """Services with a backend that can quantize, and a model of it."""
    gallery = tmp_path / "gallery.yaml"
    gallery.write_text(ABLE)
    found = replace(services, settings=services.settings.model_copy(update={"backend_galleries": str(gallery)}))
    add_model(found, "big", source="https://host/m.gguf", sha256=SOURCE, size=1000, context_size=77, pinned=True,
              options=("a:b",))  # fmt: skip
    return found


def ask(services: Services, **order: Any) -> str:
    """The id of a new quantization."""
    return quantizations.create(services, Order(**{"model": "big", "backend": "able", **order}))["id"]


def shown(services: Services, made: str) -> dict[str, Any]:
    quantizations.advance(services)
    return quantizations.show(services, made)


def request_of(services: Services, job_id: str) -> dict[str, Any]:
    with services.db.transaction() as db:
        return job_rows.request(db, job_id)


def end(services: Services, made: str, at: Node, error: str = "", **result: Any) -> None:
    """The node ends the stage that is under way."""
    job_id = quantizations.show(services, made)["job"]
    lease = claim(services, job_id, names.node_jobs_queue(at.id), at.id)
    state = JobState.FAILED if error else JobState.DONE
    told = End(state=state, result=result or None, error={"error": error, "message": "no luck"} if error else None)
    services.leases.finish(lease, lease.last_index + 1, told, node_id=at.id)
    jobs.apply_ends(services)


def give(
    http: httpx.Client, made: str, at: Node, content: bytes = RESULT, sha256: str = SHA, secret: str = SECRET,
    part: tuple[int, int] | None = None,
) -> int:  # fmt: skip
    """The node sends its file, or a part of it; the status of the answer."""
    url = f"/api/node/{at.id}/quantizations/{made}/result/{sha256}"
    headers = {"Authorization": f"Bearer {secret}"}
    if part:
        content, headers["Content-Range"] = content[slice(*part)], f"bytes {part[0]}-{part[1] - 1}/{len(content)}"
    return http.put(url, content=content, headers=headers).status_code


def begun(services: Services, at: Node, **order: Any) -> str:
    """A quantization whose file its node makes now."""
    made = ask(services, **order)
    shown(services, made)
    end(services, made, at)
    shown(services, made)
    return made


def done(services: Services, http: httpx.Client, at: Node, says: dict[str, Any] = MADE, **order: Any) -> str:
    made = begun(services, at, **order)
    assert give(http, made, at) == 201
    end(services, made, at, **says)
    assert shown(services, made)["status"] == "completed"
    return made


def files(services: Services) -> list[str]:
    folder = services.settings.home / "files"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_from_an_order_to_a_model(services: Services, node: Node, http: httpx.Client) -> None:
    body = {
        "model": "big",
        "backend": "able",
        "quantization_type": "q8_0",
        "extra_options": {"allow_requantize": "true"},
    }
    made = http.post("/api/quantization/jobs", json=body).raise_for_status().json()
    assert (made["status"], made["name"], made["state"]) == ("queued", "big-q8_0", "open")
    installing = shown(services, made["id"])
    job = jobs.show(services, installing["job"], keys.create(services, name="b", role="admin")[0])
    assert (job["kind"], job["node"], job["subject"]) == ("install_backend", "n1", "able")
    assert request_of(services, installing["job"])["entry"]["name"] == "able"
    end(services, made["id"], node)
    making = shown(services, made["id"])
    wanted = request_of(services, making["job"])
    assert wanted == {
        "kind": "quantize", "name": "big-q8_0", "quantization": made["id"], "engine": "able", "type": "q8_0", "threads": 2,
        "source": {"source": "https://host/m.gguf", "mirrors": [], "sha256": SOURCE, "size": 1000, "parts": []}, "text": None,
        "options": {**wanted["options"], "allow_requantize": True}, "embeddings": False, "pooling": None,
    }  # fmt: skip
    lease = claim(services, making["job"], names.node_jobs_queue(node.id), node.id)
    half = Progress(stage="quantizing", done=5, total=10, unit="tensors")
    services.leases.append([(lease, lease.last_index + 1, [half])])
    working = shown(services, made["id"])
    assert (working["status"], working["progress_percent"], working["node"]) == ("quantizing", 40.0, "n1")
    assert give(http, made["id"], node) == 201
    services.leases.finish(lease, lease.last_index + 2, End(state=JobState.DONE, result=MADE), node_id=node.id)
    jobs.apply_ends(services)
    ended = shown(services, made["id"])
    assert (ended["status"], ended["progress_percent"], ended["result"]) == ("completed", 100.0, MADE)
    assert [one["id"] for one in http.get("/api/quantization/jobs").json()] == [made["id"]]
    answer = http.get(f"/api/quantization/jobs/{made['id']}/download")
    assert (answer.content, answer.headers["Content-Disposition"]) == (RESULT, 'attachment; filename="big-q8_0.gguf"')
    part = http.get(f"/api/quantization/jobs/{made['id']}/download", headers={"Range": "bytes=10-"})
    assert (part.status_code, part.content) == (206, RESULT[10:])
    told = http.post(f"/api/quantization/jobs/{made['id']}/import").raise_for_status().json()
    assert told["model_name"] == "big-q8_0"
    model = model_named(services, "big-q8_0")
    config = model.config
    assert (config.source, config.sha256, config.size) == (f"store:{SHA}", SHA, len(RESULT))
    assert (config.backend, config.context_size, config.options, config.pinned) == ("echo", 77, ("a:b",), False)
    assert (config.origin, model.facts.blocks) == ("q8_0 of big", 2)
    assert next(each for each in models.listed(services) if each["name"] == "big-q8_0")["origin"] == "q8_0 of big"
    assert shown(services, made["id"])["import_model_name"] == "big-q8_0"
    assert http.post(f"/api/quantization/jobs/{made['id']}/import", json={"name": "big"}).status_code == 409
    http.delete(f"/api/quantization/jobs/{made['id']}").raise_for_status()
    assert files(services) == [SHA], "the model has it"
    models.remove(services, "big-q8_0")
    assert files(services) == []


def test_a_file_goes_with_the_last_that_needs_it(services: Services, node: Node, http: httpx.Client) -> None:
    made = done(services, http, node)
    quantizations.import_model(services, made, "small")
    models.remove(services, "small")
    assert files(services) == [SHA]
    quantizations.remove(services, made)
    assert files(services) == []
    with pytest.raises(NotFound):
        quantizations.show(services, made)


def test_it_waits_with_the_reasons_until_a_node_can(services: Services) -> None:
    made = ask(services)
    assert shown(services, made)["message"] == "waits for a node"
    node = ready_node(services)
    nodes.heartbeat(services, node, hardware={"cpus": 2, "ram_total": 10**9, "ram_available": 10**9})
    waiting = shown(services, made)
    assert (waiting["status"], list(waiting["reasons"])) == ("queued", ["n1"])
    assert waiting["message"].startswith("waits: n1: needs 1.1 GB, ")
    nodes.heartbeat(services, node, hardware={"cpus": 2, "ram_total": 10**10, "ram_available": 10**10})
    going = shown(services, made)
    assert (going["node"], going["reasons"]) == ("n1", {})


def test_the_death_of_its_node_begins_it_elsewhere(services: Services, node: Node, http: httpx.Client) -> None:
    made = begun(services, node)
    assert give(http, made, node) == 201
    other = ready_node(services, "n2", "other")
    join(services, "n1")  # its process was started anew
    assert shown(services, made)["job"] is None
    again = shown(services, made)
    assert (again["node"], again["status"]) == ("n2", "queued")
    assert [failure["node"] for failure in again["failures"]] == ["n1"]
    assert "was started anew" in again["failures"][0]["reason"]
    assert give(http, made, node_named(services, "n1")) == 404, "it is not its any more"
    end(services, made, other)
    shown(services, made)
    assert give(http, made, other, secret="other") == 201
    end(services, made, other, **MADE)
    assert shown(services, made)["status"] == "completed"


def test_a_node_without_idle_cores_gives_it_up_before_the_file_is_made(
    services: Services, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ask(services)
    shown(services, made)
    end(services, made, node)
    nodes.drain(services, node)
    given_up = shown(services, made)
    assert (given_up["job"], given_up["reasons"], given_up["failures"]) == (None, {"n1": "draining"}, [])


@pytest.mark.parametrize("killed_before", ["note", "end"])
def test_control_that_dies_between_two_steps_goes_on_where_it_was(
    services: Services, node: Node, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, killed_before: str
) -> None:
    def advance() -> None:
        """Control is killed before it writes down what it has done, and another one follows."""
        with monkeypatch.context() as patch:
            patch.setattr(rows, killed_before, killed)
            with suppress(Killed):
                quantizations.advance(services)
        quantizations.advance(services)

    made = ask(services)
    advance()
    end(services, made, node)
    advance()
    assert give(http, made, node) == 201
    end(services, made, node, **MADE)
    advance()
    assert quantizations.show(services, made)["status"] == "completed"
    with services.db.transaction() as db:
        assert sorted(job.kind for job in job_rows.listed(db)) == ["install_backend", "quantize"]


class Killed(Exception):
    pass


def killed(*_: object, **__: object) -> None:
    raise Killed


def test_what_fails_everywhere_fails_after_some_attempts(services: Services) -> None:
    made = ask(services)
    for number in range(MOST_ATTEMPTS):
        at = ready_node(services, f"n{number}", f"s{number}")
        shown(services, made)
        end(services, made, at, error="Unavailable")
        shown(services, made)
    failed = shown(services, made)
    assert (failed["status"], failed["message"], len(failed["failures"])) == ("failed", "no luck", MOST_ATTEMPTS - 1)


def test_what_can_never_be_made_fails_at_once(services: Services, node: Node, http: httpx.Client) -> None:
    made = begun(services, node)
    give(http, made, node)
    end(services, made, node, error="InvalidValue")
    failed = shown(services, made)
    assert (failed["status"], failed["message"], failed["failures"]) == ("failed", "no luck", [])
    assert files(services) == []
    for path in ("download", "import"):
        answer = http.request("GET" if path == "download" else "POST", f"/api/quantization/jobs/{made}/{path}")
        assert (answer.status_code, "is failed" in answer.text) == (409, True)


def test_an_end_without_the_file_is_a_failure(services: Services, node: Node) -> None:
    made = begun(services, node)
    end(services, made, node, **MADE)
    assert shown(services, made)["failures"][0]["reason"] == "its file has not come to the API's store"


@pytest.mark.parametrize(
    ("name", "value"),
    [("perplexity", "good"), ("perplexity", -1), ("perplexity", 10**400), ("perplexity", None), ("kl_divergence", [1.0]),
     ("bits_per_weight", 1e300), ("size", 0), ("size", 1 << 80), ("size", 1.5), ("source_size", "x"), ("tokens", {}),
     ("architecture", "x" * 300), ("sha256", "../x"), ("source_sha256", 5), ("cosine_similarity", 1.1),
     ("cosine_similarity", "x"), ("texts", 0)],
)  # fmt: skip
def test_what_a_node_says_of_a_file_is_a_failure_where_it_makes_no_sense(
    services: Services, node: Node, http: httpx.Client, name: str, value: Any
) -> None:
    made = begun(services, node)
    assert give(http, made, node) == 201
    end(services, made, node, **{**(MADE if name in MADE else VECTORS), name: value})
    told = shown(services, made)
    assert (told["state"], told["result"]) == ("open", None)
    assert told["failures"][0]["reason"] == f"what its node says of the file is wrong at '{name}'"


def test_a_node_that_tells_no_number_fails_its_job(services: Services, node: Node, http: httpx.Client) -> None:
    made = begun(services, node)
    assert give(http, made, node) == 201
    end(services, made, node, **{**MADE, "perplexity": float("nan")})
    assert "cannot be read" in shown(services, made)["failures"][0]["reason"]


@pytest.mark.parametrize("stage", ["waiting", "installing", "making", "sent"])
def test_stopped_at_any_stage_nothing_of_it_is_left(
    services: Services, node: Node, http: httpx.Client, stage: str
) -> None:
    if stage == "waiting":
        nodes.drain(services, node)
    made = ask(services) if stage in ("waiting", "installing") else begun(services, node)
    job_id = shown(services, made)["job"]
    if stage == "sent":
        give(http, made, node)
    assert http.post(f"/api/quantization/jobs/{made}/stop").json()["status"] == "stopped"
    jobs.apply_ends(services)
    with services.db.transaction() as db:
        assert job_rows.open_jobs(db) == []
        assert not job_id or job_rows.by_id(db, job_id).state is JobState.CANCELLED
    assert give(http, made, node) == 404
    assert files(services) == []
    assert shown(services, made)["status"] == "stopped"
    assert http.post(f"/api/quantization/jobs/{made}/stop").json()["status"] == "stopped"
    http.delete(f"/api/quantization/jobs/{made}").raise_for_status()


def test_an_install_that_others_wait_for_goes_on(services: Services, node: Node) -> None:
    first, second = ask(services), ask(services, quantization_type="q8_0")
    quantizations.advance(services)
    installing = quantizations.show(services, first)["job"]
    with services.db.transaction() as db:
        rows.note(db, rows.by_id(db, second), job_id=installing, node_id=node.id)
    quantizations.stop(services, first)
    with services.db.transaction() as db:
        assert job_rows.by_id(db, installing).state is JobState.OPEN


def test_one_node_makes_one_at_a_time(services: Services, node: Node) -> None:
    first, second = ask(services), ask(services, quantization_type="q8_0")
    assert shown(services, first)["node"] == "n1"
    assert shown(services, second)["reasons"] == {"n1": "works on another quantization"}


def test_an_open_one_is_not_deleted(services: Services, node: Node) -> None:
    made = begun(services, node)
    with pytest.raises(Conflict, match="stop it first"):
        quantizations.remove(services, made)


def test_a_job_that_is_cancelled_stops_it_and_is_not_tried_again(services: Services, node: Node) -> None:
    made = begun(services, node)
    admin = keys.create(services, name="b", role="admin")[0]
    job_id = quantizations.show(services, made)["job"]
    jobs.cancel(services, job_id, admin)
    jobs.apply_ends(services)
    assert shown(services, made)["status"] == "stopped"
    with pytest.raises(Conflict, match=f"localai-q quantize retry {made}"):
        retries.retry(services, job_id, admin)


@pytest.mark.parametrize("how", ["failed", "stopped"])
def test_what_has_failed_or_was_stopped_is_tried_again_as_it_was_asked_for(
    services: Services, node: Node, http: httpx.Client, how: str
) -> None:
    made = begun(services, node, extra_options={"pure": True}, name="mine")
    give(http, made, node)
    if how == "failed":
        end(services, made, node, error="InvalidValue")
    else:
        quantizations.stop(services, made)
        jobs.apply_ends(services)
    ended = shown(services, made)
    assert ended["status"] == how
    again = http.post(f"/api/quantization/jobs/{made}/retry").raise_for_status().json()
    assert (again["id"], again["status"], again["message"], again["ended"]) == (
        made,
        "queued",
        "waits for a node",
        None,
    )
    kept = ("name", "source", "extra_options", "quantization_type", "backend", "created")
    assert [again[field] for field in kept] == [ended[field] for field in kept]
    assert again["node"] is None
    shown(services, made)
    end(services, made, node)
    assert request_of(services, shown(services, made)["job"])["options"]["pure"] is True
    assert give(http, made, node) == 201
    end(services, made, node, **MADE)
    assert shown(services, made)["status"] == "completed"


def test_what_is_tried_again_has_as_many_attempts_as_at_first(services: Services) -> None:
    made = ask(services)
    for number in range(2 * MOST_ATTEMPTS):
        if number == MOST_ATTEMPTS:
            assert (quantizations.retry(services, made)["failures"], shown(services, made)["state"]) == ([], "open")
        at = ready_node(services, f"n{number}", f"s{number}")
        shown(services, made)
        end(services, made, at, error="Unavailable")
        shown(services, made)
    assert shown(services, made)["status"] == "failed"


def test_what_is_open_done_or_not_there_is_not_tried_again(services: Services, node: Node, http: httpx.Client) -> None:
    made = begun(services, node)
    with pytest.raises(Conflict, match="is queued: only what has failed or was stopped"):
        quantizations.retry(services, made)
    give(http, made, node)
    end(services, made, node, **MADE)
    shown(services, made)
    assert http.post(f"/api/quantization/jobs/{made}/retry").status_code == 409
    assert shown(services, made)["status"] == "completed"
    assert http.post("/api/quantization/jobs/nothing/retry").status_code == 404


def test_what_its_node_has_not_stopped_yet_is_not_tried_again(services: Services, node: Node) -> None:
    made = begun(services, node)
    lease = claim(services, quantizations.show(services, made)["job"], names.node_jobs_queue(node.id), node.id)
    quantizations.stop(services, made)
    with pytest.raises(Conflict, match="has not stopped it yet"):
        quantizations.retry(services, made)
    assert shown(services, made)["status"] == "stopped"
    services.leases.finish(lease, lease.last_index + 1, End(state=JobState.CANCELLED), node_id=node.id)
    jobs.apply_ends(services)
    assert quantizations.retry(services, made)["status"] == "queued"


def test_what_has_lost_its_source_is_not_tried_again(services: Services, http: httpx.Client) -> None:
    http.put(f"/api/files/{SHA}", content=RESULT).raise_for_status()
    made = ask(services, model=f"store:{SHA}")
    quantizations.stop(services, made)
    models.forget_stored(services, {SHA})
    with pytest.raises(InvalidValue, match="has not been uploaded"):
        quantizations.retry(services, made)


def test_only_its_node_sends_its_file_and_only_the_right_one(
    services: Services, node: Node, http: httpx.Client
) -> None:
    made = begun(services, node)
    other = ready_node(services, "n2", "other")
    assert give(http, made, other, secret="other") == 404
    assert give(http, made, node, content=b"another") == 400
    assert give(http, made, node, sha256="x") == 400
    assert files(services) == []
    assert give(http, "nothing", node) == 404


def test_the_file_comes_in_parts_of_which_a_refusal_takes_none_away(
    services: Services, node: Node, http: httpx.Client
) -> None:
    made = begun(services, node)
    assert give(http, made, node, part=(0, 9)) == 308
    assert give(http, made, node, part=(10, 12)) == 416
    end(services, made, node, **MADE)
    assert shown(services, made)["failures"][0]["reason"] == "its file has not come to the API's store"
    assert len(files(services)) == 1, "another attempt goes on with it"
    quantizations.stop(services, made)
    assert files(services) == []


def test_what_comes_after_it_was_stopped_goes(services: Services, node: Node, http: httpx.Client) -> None:
    made = begun(services, node)
    give(http, made, node, part=(0, 9))
    receive = uploads.receive

    def late(*given: Any) -> uploads.Received:
        quantizations.stop(services, made)
        return receive(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "receive", late)
        assert give(http, made, node, part=(0, 12)) == 404
    assert files(services) == []


def test_its_node_is_told_who_has_its_files_and_nobody_cleans_them(services: Services, node: Node, http) -> None:
    holder = ready_node(services, "n2", "other")
    hardware = {"files": [SOURCE, TEXT], "files_address": "10.0.0.2:7000", "ram_total": 10**9, "ram_available": 1}
    nodes.heartbeat(services, holder, hardware=hardware)
    models_file = {"source": "https://host/text", "sha256": TEXT}
    models.remove(services, "big")
    made = begun(services, node, model="https://host/m.gguf", sha256=SOURCE, text=models_file)
    for sha256 in (SOURCE, TEXT):
        assert [one["name"] for one in holders.find(services, node, sha256, called="h")["holders"]] == ["n2"]
    with pytest.raises(NotFound):
        holders.find(services, holder, SOURCE, called="h")
    assert cleaning.unnamed_on(services, node_named(services, "n2")) == []
    give(http, made, node)
    end(services, made, node, **MADE)
    shown(services, made)
    nodes.heartbeat(services, node, hardware={"files": [SHA, SOURCE]})
    assert cleaning.unnamed_on(services, node_named(services, "n1")) == [SOURCE]


@pytest.mark.parametrize(
    ("order", "status", "says"),
    [
        ({"model": "ghost"}, 400, "There is no model of that name, and as a source: 'ghost' is no source"),
        ({"model": "https://host/m.gguf"}, 400, "needs its SHA-256"),
        ({"model": f"store:{TEXT}"}, 400, "has not been uploaded"),
        ({"model": "big", "sha256": SOURCE}, 400, "its file is known"),
        ({"model": "nothing"}, 400, "has no file"),
        ({"model": "ranks"}, 400, "The model 'ranks' ranks documents"),
        ({"model": "split", "parts": [{"sha256": TEXT}]}, 400, "its file is known"),
        ({"model": "hf://o/r/m-00002-of-00002.gguf"}, 400, "name the first of them, hf://o/r/m-00001-of-00002.gguf"),
        (
            {"model": "https://host/m-00001-of-00002.gguf", "sha256": TEXT},
            400,
            "m-00002-of-00002.gguf needs its SHA-256",
        ),
        ({"model": "hf://o/r/m-00001-of-00002.gguf", "parts": [{}, {}]}, 400, "needs the 1 files behind the first"),
        ({"model": "hf://o/r/m.gguf", "parts": [{"sha256": TEXT}]}, 400, "parts.0.source"),
        ({"model": f"store:{SOURCE}", "parts": [{"source": f"store:{TEXT}"}]}, 400, f"{SOURCE} has not been uploaded"),
        ({"model": "big", "backend": "echo"}, 400, "The backend 'echo' cannot quantize"),
        ({"model": "big", "text": {"source": "https://host/t"}}, 400, "needs its SHA-256"),
        ({"model": "big", "extra_options": {"imatrix": {"source": "x"}}}, 400, "no source"),
        ({"model": "big", "extra_options": {"dry_run": True}}, 400, "extra_options.dry_run"),
    ],
)
def test_what_cannot_be_made_is_refused(services: Services, http, order: dict, status: int, says: str) -> None:
    add_model(services, "nothing")
    add_model(services, "ranks", source="https://host/v.gguf", sha256=TEXT, rerank=True)
    add_model(services, "split", source="hf://o/r/m-00001-of-00002.gguf")
    answer = http.post("/api/quantization/jobs", json={"backend": "able", **order})
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]
    assert quantizations.listed(services) == []


@pytest.mark.parametrize(
    ("order", "param", "says"),
    [
        ({"model": "ghost"}, "model", "There is no model of that name, and as a source: 'ghost' is no source"),
        ({"model": "hf://o/r/m-00001-of-00002.gguf", "parts": [{}, {}]}, "parts", "Invalid value for 'parts': it"),
        ({"model": "hf://o/r/m.gguf", "mirrors": ["https://host/m.gguf"]}, "mirrors", "Mirrors go with"),
        ({"model": f"store:{SHA}", "sha256": TEXT}, "sha256", f"store:{SHA} is named by its SHA-256, which is not"),
    ],
)
def test_a_refusal_names_the_field_that_is_wrong(
    services: Services, http: httpx.Client, order: dict[str, Any], param: str, says: str
) -> None:
    http.put(f"/api/files/{SHA}", content=RESULT).raise_for_status()
    error = http.post("/api/quantization/jobs", json={"backend": "able", **order}).json()["error"]
    assert (error["param"], error["message"].startswith(says)) == (param, True), error
    assert quantizations.listed(services) == []


SEVERAL = {"source": "https://host/m-00001-of-00002.gguf", "mirrors": ("https://other/m-00001-of-00002.gguf",),
           "sha256": SOURCE, "size": 400, "parts": [{"sha256": TEXT, "size": 600}]}  # fmt: skip
BOTH = [
    {"source": f"https://host/m-0000{number}-of-00002.gguf", "mirrors": [f"https://other/m-0000{number}-of-00002.gguf"],
     "sha256": sha256, "size": size} for number, sha256, size in ((1, SOURCE, 400), (2, TEXT, 600))
]  # fmt: skip


@pytest.mark.parametrize("named", [True, False])
def test_a_source_in_several_files_becomes_a_model_in_one(
    services: Services, node: Node, http: httpx.Client, named: bool
) -> None:
    if named:
        add_model(services, "split", **SEVERAL)
        order = {"model": "split"}
    else:
        order = {"model": SEVERAL["source"], **{name: SEVERAL[name] for name in ("mirrors", "sha256", "size", "parts")}}
    holder = ready_node(services, "n2", "other")
    nodes.drain(services, holder)
    nodes.heartbeat(services, holder, hardware={"files": [TEXT], "files_address": "10.0.0.2:7000"})
    made = begun(services, node, **order)
    wanted = request_of(services, quantizations.show(services, made)["job"])["source"]
    assert [{name: value for name, value in wanted.items() if name != "parts"}, *wanted["parts"]] == BOTH
    if named:
        models.remove(services, "split")
    assert [one["name"] for one in holders.find(services, node, TEXT, called="h")["holders"]] == ["n2"]
    assert cleaning.unnamed_on(services, node_named(services, "n2")) == []
    give(http, made, node)
    end(services, made, node, **MADE)
    assert shown(services, made)["name"] == ("split-q4_k_m" if named else "m-q4_k_m")
    name = quantizations.import_model(services, made, None)["name"]
    config = model_named(services, name).config
    assert (config.source, config.parts, config.size) == (f"store:{SHA}", (), len(RESULT))


def test_what_a_model_is_for_is_told_with_it_and_learnt_of_another(
    services: Services, node: Node, http: httpx.Client
) -> None:
    add_model(services, "vectors", source="https://host/v.gguf", sha256=TEXT, embeddings=True,
              options=("x:y", "pooling:cls"))  # fmt: skip
    made = begun(services, node, model="vectors")
    request = request_of(services, quantizations.show(services, made)["job"])
    assert (request["embeddings"], request["pooling"]) == (True, "cls")
    quantizations.stop(services, made)
    jobs.apply_ends(services)
    assert not imported(services, done(services, http, node, model="https://host/v.gguf", sha256=TEXT)).embeddings
    vectors = done(services, http, node, model="https://host/w.gguf", sha256=TEXT, says=VECTORS)
    assert quantizations.show(services, vectors)["result"] == VECTORS
    assert imported(services, vectors).embeddings
    assert not imported(services, done(services, http, node)).embeddings, "as its model says"


def imported(services: Services, made: str) -> ModelConfig:
    return model_named(services, quantizations.import_model(services, made, None)["name"]).config


def test_the_size_of_what_was_uploaded_is_known(services: Services, http: httpx.Client) -> None:
    behind = gguf({"general.architecture": "llama", "more": "x"})
    for content in (RESULT, behind):
        http.put(f"/api/files/{hashlib.sha256(content).hexdigest()}", content=content).raise_for_status()
    other = hashlib.sha256(behind).hexdigest()
    made = ask(services, model=f"store:{SHA}", parts=[{"source": f"store:{other}"}])
    source = quantizations.show(services, made)["source"]
    assert (source["sha256"], source["size"]) == (SHA, len(RESULT))
    assert [(part["sha256"], part["size"]) for part in source["parts"]] == [(other, len(behind))]
    quantizations.stop(services, made)
    models.forget_stored(services, {other})
    with pytest.raises(InvalidValue, match=f"{other} has not been uploaded"):
        quantizations.retry(services, made)


def test_what_is_swept_while_it_is_asked_for_is_an_error_of_nobody(
    services: Services, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    http.put(f"/api/files/{SHA}", content=RESULT).raise_for_status()
    exists = Path.exists

    def swept(path: Path) -> bool:
        found = exists(path)
        if path.name == SHA:
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "exists", swept)
    ask(services, model=f"store:{SHA}")
    with pytest.raises(InvalidValue, match="has not been uploaded"):
        ask(services, model=f"store:{SHA}")


def test_there_are_not_more_than_can_be_kept(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizations, "MOST", 1)
    ask(services)
    with pytest.raises(Conflict, match="delete some"):
        ask(services)


def test_the_backends_that_can(services: Services, http: httpx.Client) -> None:
    found = {one["name"]: one for one in http.get("/api/quantization/backends").json()}
    assert "echo" not in found
    assert found["able"]["nodes"] == []
    assert {"q4_k_m", "q8_0"} <= set(found["able"]["types"])


def test_its_progress_is_told_as_events_up_to_its_end(
    services: Services, node: Node, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_quantization, "LOOK", 0.01)
    made = begun(services, node)
    give(http, made, node)
    told = []
    with http.stream("GET", f"/api/quantization/jobs/{made}/progress") as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                told.append(json.loads(line.removeprefix("data: ")))
                if len(told) == 1:
                    end(services, made, node, **MADE)
                    quantizations.advance(services)
    assert [event["status"] for event in told] == ["queued", "completed"]
    assert told[-1] == {
        "job_id": made, "status": "completed", "progress_percent": 100.0, "message": "", "output_file": f"store:{SHA}",
        "extra_metrics": {name: value for name, value in MADE.items() if not isinstance(value, str)},
    }  # fmt: skip


def test_one_that_waits_is_an_operation_that_can_be_cancelled(services: Services, http: httpx.Client) -> None:
    made = ask(services)
    (operation,) = http.get("/api/operations").json()["operations"]
    assert (operation["jobID"], operation["taskType"], operation["isQueued"]) == (made, "quantization", True)
    http.post(f"/api/operations/{made}/cancel").raise_for_status()
    assert shown(services, made)["status"] == "stopped"
    assert http.get("/api/operations").json()["operations"] == []
    assert http.post("/api/operations/nothing/cancel").status_code == 404


def test_a_stage_that_has_ended_is_not_pruned_before_it_is_learnt_of(services: Services, node: Node) -> None:
    made = begun(services, node)
    end(services, made, node, error="InvalidValue")
    assert jobs.prune(services, older_than=0.0, states=(), kinds=()) == 1, "the install"
    assert shown(services, made)["status"] == "failed"
    assert jobs.prune(services, older_than=0.0, states=(), kinds=()) == 1
