"""The Flask application: blueprints, guards, errors, request ids. Owns no endpoint itself."""

from __future__ import annotations

import re

from flask import Flask, Response, g, request
from werkzeug.routing import BaseConverter

from api import errors, jobs, loads, node, public
from api.admin import backends, models, quantization
from api.admin import routes as admin
from api.auth import guard
from api.bodies import Request
from api.openai.routes import blueprint
from api.web import make_web, web
from localai_q.config import Settings
from localai_q.names import new_id

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Id(BaseConverter):
    """An id of ours in a path, as `localai_q.names` makes them."""

    regex = "[a-z0-9]{1,64}"


def create_app(settings: Settings) -> Flask:
    """The application of a web process."""
    app = Flask("api", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body
    app.request_class = Request
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.strict_slashes = False
    app.url_map.converters["id"] = Id
    app.extensions["localai_q"] = make_web(settings)
    openai = (blueprint("openai_v1", "/v1"), blueprint("openai", None))
    admins = (admin.routes, backends.routes, models.routes, quantization.routes)
    for routes in (public.routes, node.routes, jobs.routes, loads.routes, *admins, *openai):
        app.register_blueprint(routes)
    errors.register(app)
    app.before_request(_name_request)
    app.before_request(guard)
    app.after_request(_sign)
    return app


def _name_request() -> None:
    """Take the request id that a proxy gave, if it is one; else make one."""
    given = request.headers.get("X-Request-Id", "")
    g.request_id = given if REQUEST_ID.fullmatch(given) else new_id()


def _sign(response: Response) -> Response:
    response.headers["X-Request-Id"] = g.get("request_id", "")
    if "job_id" in g:
        response.headers["X-LocalAI-Job"] = g.job_id
    endpoint = request.url_rule.rule if request.url_rule else "unknown"
    web().metrics.requests.labels(endpoint, str(response.status_code)).inc()
    return response
