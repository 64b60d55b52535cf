"""OpenAI's addresses, and the list of models as its clients read it."""

import re
from pathlib import Path

from cluster_data import web_process

from localai_q.cluster.models import ModelConfig
from localai_q.services import keys
from localai_q.services.wiring import Services
from localai_q.store import models

FILE = "store:" + "0" * 64
DOCS = Path(__file__).parents[2] / "docs" / "api.md"


def test_openais_addresses_stand_in_the_docs_and_exist_with_and_without_v1(services: Services) -> None:
    with web_process(services.settings) as app:
        rules = {re.sub("<[^>]+>", "{name}", rule.rule) for rule in app.url_map.iter_rules()}
    ours = {rule for rule in rules if rule.startswith("/v1/")}
    assert ours >= {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/v1/models/{name}"}
    assert ours <= {f"/v1{rule}" for rule in rules}
    assert [rule for rule in ours if f"{rule}`" not in DOCS.read_text()] == []


def test_the_default_comes_first_and_what_has_no_weights_last(services: Services) -> None:
    _, key = keys.create(services, name="somebody", role="user")
    with services.db.transaction() as db:
        for name, source in (("aa-echo", ""), ("bb", FILE), ("zz", FILE), ("cc", FILE)):
            config = ModelConfig(backend="xllamacpp" if source else "echo", source=source)
            assert models.add(db, name, config, is_default=name == "zz")
    with web_process(services.settings) as app, app.test_client() as http:
        for path in ("/v1/models", "/models"):
            listed = http.get(path, headers={"Authorization": f"Bearer {key}"}).get_json()
            assert listed["object"] == "list"
            assert [model["id"] for model in listed["data"]] == ["zz", "bb", "cc", "aa-echo"]
