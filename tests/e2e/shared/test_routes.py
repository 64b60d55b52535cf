"""Every route has a guard, and whatever is not listed as public here answers nobody without a key."""

import re
from collections.abc import Iterator

import httpx
import pytest
from e2e_cluster import Cluster
from flask import Flask

PUBLIC = {("GET", "/healthz"), ("GET", "/readyz"), ("POST", "/api/node/register")}


@pytest.fixture(scope="module")
def app(cluster: Cluster) -> Iterator[Flask]:
    """The application as a web process of this cluster makes it, on the cluster's own stores."""
    from api.app import create_app
    from localai_q.config import load_settings

    state = cluster.state()
    made = create_app(
        load_settings(home=cluster.home, database_url=state["database_url"], redis_url=state["redis_url"])
    )
    yield made
    made.extensions["localai_q"].stop()


def routes(app: Flask) -> list[tuple[str, str]]:
    """Every method and path."""
    return [
        (method, rule.rule)
        for rule in app.url_map.iter_rules()
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"} or rule.methods or set())
    ]


def test_every_route_belongs_to_a_blueprint_with_a_guard(app: Flask) -> None:
    from api.auth import GUARDS

    for rule in app.url_map.iter_rules():
        blueprint, dot, _ = rule.endpoint.partition(".")
        assert dot, f"{rule.rule} is outside of every blueprint"
        assert blueprint in GUARDS, rule.rule
    assert set(app.blueprints) == set(GUARDS)


def test_the_public_routes_are_just_these(app: Flask) -> None:
    public = {(method, path) for method, path in routes(app) if _endpoint(app, path).startswith("public.")}
    assert public == PUBLIC


def _endpoint(app: Flask, path: str) -> str:
    return next(rule.endpoint for rule in app.url_map.iter_rules() if rule.rule == path)


def test_every_other_route_answers_401_or_403_without_a_key_and_with_a_wrong_one(app: Flask, cluster: Cluster) -> None:
    private = [(method, path) for method, path in routes(app) if (method, path) not in PUBLIC]
    assert len(private) > 25
    with httpx.Client(base_url=cluster.base_url) as client:
        for method, path in private:
            url = re.sub("<[^>]*>", "x", path)
            for headers in ({}, {"Authorization": "Bearer lai-wrong"}):
                response = client.request(method, url, headers=headers)
                assert response.status_code in (401, 403), (method, path, headers, response.text)


def test_a_valid_key_is_no_node_secret(app: Flask, cluster: Cluster) -> None:
    node_id = cluster.ready["node_ids"][0]
    for method, path in routes(app):
        if _endpoint(app, path).startswith("node."):
            url = re.sub("<[^>]*>", "x", path.replace("<node_id>", node_id))
            assert cluster.http.request(method, url).status_code == 403, path


def test_options_and_head_show_nothing_either(app: Flask, cluster: Cluster) -> None:
    for _, path in routes(app):
        if path not in {public for _, public in PUBLIC}:
            response = httpx.options(cluster.base_url + re.sub("<[^>]*>", "x", path))
            assert response.status_code in (401, 403), path


def test_there_is_no_static_folder(app: Flask) -> None:
    assert app.static_folder is None
