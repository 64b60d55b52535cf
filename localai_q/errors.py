"""The one error tree. Owns what can go wrong, with the HTTP status and OpenAI error type of each.

It leaves the turning of an error into a response to `api.errors`. An error's message is written for the person who
reads it: what was wrong, where, and what to do.
"""

from __future__ import annotations

from typing import Any, ClassVar


class LocalAIError(Exception):
    """Something failed in the server."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    retry_after: int | None = None  # seconds after which it is worth another try

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        self.message = message or (self.__doc__ or "").strip()
        self.param = param
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        """The error as OpenAI shows it: `{"error": {"message", "type", "param", "code"}}`."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


class InvalidRequest(LocalAIError):
    """The request is malformed."""

    status = 400
    type = "invalid_request_error"


class InvalidJSON(InvalidRequest):
    """The body is not valid JSON."""

    code = "invalid_json"


class InvalidType(InvalidRequest):
    """A field has the wrong type."""

    code = "invalid_type"


class InvalidValue(InvalidRequest):
    """A field has a value that is out of range."""

    code = "invalid_value"


class MissingParameter(InvalidRequest):
    """A required field is missing."""

    code = "missing_required_parameter"


class UnknownParameter(InvalidRequest):
    """A field is not known."""

    code = "unknown_parameter"


class UnsupportedParameter(InvalidRequest):
    """A field is known to OpenAI's API and not served here."""

    code = "unsupported_parameter"


class ContextTooLong(InvalidRequest):
    """The prompt does not fit into the model's context."""

    code = "context_length_exceeded"


class UnsupportedByModel(InvalidRequest):
    """The model cannot do what was asked of it."""

    code = "unsupported_by_model"


class Unauthenticated(LocalAIError):
    """No API key was given. Send it as 'Authorization: Bearer KEY'."""

    status = 401
    type = "invalid_request_error"
    code = "missing_api_key"


class BadKey(Unauthenticated):
    """The API key is wrong or was revoked."""

    code = "invalid_api_key"


class Forbidden(LocalAIError):
    """This key may not do that."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class ModelDisabled(Forbidden):
    """An admin has disabled the model."""

    code = "model_disabled"


class NotFound(LocalAIError):
    """There is nothing here."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """There is no such model."""

    code = "model_not_found"


class Gone(NotFound):
    """What was here is kept no longer."""

    status = 410
    code = "gone"


class MethodNotAllowed(LocalAIError):
    """This method is not allowed here."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class Conflict(LocalAIError):
    """The state does not allow that."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class BodyTooLarge(LocalAIError):
    """The body is too large."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class WrongOffset(LocalAIError):
    """This part of a file does not belong behind what is there."""

    status = 416
    type = "invalid_request_error"
    code = "wrong_offset"


class TooManyUploads(LocalAIError):
    """Too many files are being uploaded (LOCALAI_Q_MAX_UPLOADS). Try again when one has ended, or DELETE one."""

    status = 429
    type = "rate_limit_error"
    code = "too_many_uploads"
    retry_after = 30


class Busy(LocalAIError):
    """Too many requests wait for this model. Try again later."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retry_after = 2


class Cancelled(LocalAIError):
    """The job was cancelled."""

    status = 499
    type = "server_error"
    code = "cancelled"


class Paused(Cancelled):
    """The job was paused. Trying it again goes on from where it is: localai-q jobs retry."""


class GenerationFailed(LocalAIError):
    """The model's backend failed while it worked on this request."""

    code = "backend_failed"


class Unavailable(LocalAIError):
    """The cluster cannot accept requests at the moment. Try again soon."""

    status = 503
    type = "service_unavailable"
    code = "unavailable"
    retry_after = 2


class NodeGone(Unavailable):
    """The node ended before this was done."""


class NoRoom(Unavailable):
    """The disk has no room for that."""

    status = 507
    code = "no_room"


class WrongContent(Unavailable):
    """What came is not the file that was wanted."""


class Stopping(Unavailable):
    """This process is being stopped. Come back for the answer, or send the request again."""


class ModelUnavailable(Unavailable):
    """The model could not be loaded."""

    code = "model_load_failed"


class ModelLoading(Unavailable):
    """The model is being loaded, which takes longer than this request may wait. Try again later."""

    type = "model_loading"
    code = "model_loading"
    loading: dict[str, Any] | None = None

    retry_after = 5

    @classmethod
    def of(cls, loading: dict[str, Any]) -> ModelLoading:
        """The error for a load that is so far: LocalAI's `loading` object, which clients get with it."""
        error = cls(f"The model '{loading['model']}' is being loaded. Try again later.")
        error.loading = loading
        error.retry_after = min(max(loading["eta_seconds"] or 0, 5), 300)
        return error

    def body(self) -> dict[str, Any]:
        """OpenAI's error, with `loading` in it."""
        return {"error": {**super().body()["error"], "loading": self.loading}}


class DeadlineExceeded(LocalAIError):
    """The job took longer than LOCALAI_REQUEST_TIMEOUT allows."""

    status = 504
    type = "timeout"
    code = "deadline_exceeded"


class StartupError(LocalAIError):
    """A process cannot start. The message is one line that names the fix."""

    code = "startup"


def all_errors(root: type[LocalAIError] = LocalAIError) -> dict[str, type[LocalAIError]]:
    """Every error by its class name."""
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(all_errors(child))
    return found


def to_record(error: LocalAIError) -> dict[str, Any]:
    """The error as it is stored with a job and sent between processes: `{"error", "message", "param"}`."""
    return {"error": type(error).__name__, "message": error.message, "param": error.param}


def from_record(record: dict[str, Any]) -> LocalAIError:
    """The error that `to_record` wrote; of an unknown kind, a plain `GenerationFailed`."""
    kind = all_errors().get(str(record.get("error")), GenerationFailed)
    return kind(str(record.get("message") or "") or None, param=record.get("param"))
