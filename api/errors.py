"""Errors become HTTP here, and nowhere else."""

from __future__ import annotations

import logging

import redis
from flask import Flask, Response, current_app, g, jsonify, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from localai_q.errors import BodyTooLarge, InvalidRequest, LocalAIError, MethodNotAllowed, NotFound, Unavailable

log = logging.getLogger(__name__)


def register(app: Flask) -> None:
    """Have every error answered in OpenAI's shape."""
    app.register_error_handler(LocalAIError, respond)
    app.register_error_handler(redis.RedisError, _broker)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(Exception, _unforeseen)


def respond(error: LocalAIError) -> Response:
    """The error as a response."""
    response = jsonify(error.body())
    response.status_code = error.status
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def _broker(error: redis.RedisError) -> Response:
    log.warning("Redis: %s", error)
    return respond(Unavailable("The queue (Redis) cannot be reached at the moment. Try again soon."))


def _http(error: HTTPException) -> Response:
    """What Flask itself refuses, in our words."""
    match error.code:
        case 404:
            return respond(NotFound(f"Unknown request URL: {request.method} {request.path}. See docs/api.md."))
        case 405:
            allowed = ", ".join(sorted(set(getattr(error, "valid_methods", None) or []) - {"HEAD", "OPTIONS"}))
            response = respond(MethodNotAllowed(f"{request.method} is not allowed for {request.path}; use {allowed}."))
            response.headers["Allow"] = allowed
            return response
        case 413:
            assert isinstance(error, RequestEntityTooLarge)
            most = request.max_content_length
            setting = (
                "LOCALAI_Q_MAX_BODY allows" if most == current_app.config["MAX_CONTENT_LENGTH"] else "allowed here"
            )
            return respond(BodyTooLarge(f"The body is larger than {setting} ({most} bytes)."))
    return respond(InvalidRequest(error.description or "The request cannot be read."))


def _unforeseen(error: Exception) -> Response:
    log.error("request %s failed", g.get("request_id"), exc_info=error)
    return respond(LocalAIError(f"Something failed in the server. Its log has request {g.get('request_id')}."))
