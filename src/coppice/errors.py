"""Every exception Coppice raises on purpose.

Four families, split by who must act: the client (`RequestError`, 4xx), time
(`CapacityError`, 429/503 with a retry time), us (`EngineError`, 5xx) and the person
who starts the program (`ConfigError`, exit code 2). Each class owns a stable
``code`` that appears in HTTP responses, metric labels and the documentation.

This module imports nothing of Coppice.
"""

from __future__ import annotations


class CoppiceError(Exception):
    """Base of all errors that carry a stable code and one sentence that says what to do.

    Args:
        message: one sentence for the reader, naming the next action.
        param: the request field or setting at fault, if one is.
        code: a narrower stable code than the class default.
    """

    code = "coppice_error"
    status = 500
    exit_code = 1

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class RequestError(CoppiceError):
    """The request cannot be served as written; sending it again will not help."""

    code = "invalid_request"
    status = 400
    exit_code = 2


class ContextOverflowError(RequestError):
    """Prompt (plus requested tokens) does not fit the context window."""

    code = "context_overflow"


class TemplateError(RequestError):
    """The chat template failed, or ran over its time or size cap."""

    code = "template_error"


class GrammarError(RequestError):
    """A schema, regex or grammar is invalid, unsupported, impossible or too large."""

    code = "grammar_error"


class AuthenticationError(RequestError):
    """A key is missing, wrong or expired."""

    code = "unauthorized"
    status = 401


class ForbiddenError(RequestError):
    """The key or the origin may not use this route."""

    code = "forbidden"
    status = 403


class NotFoundError(RequestError):
    """The route, model or request id does not exist."""

    code = "not_found"
    status = 404


class LimitError(RequestError):
    """A transport limit was exceeded (body, headers, time); ``status`` is set per case."""

    code = "limit_exceeded"
    status = 413

    def __init__(
        self, message: str, *, status: int = 413, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status


class CapacityError(CoppiceError):
    """There is no room now; the same request may succeed after ``retry_after_s``."""

    code = "overloaded"
    status = 503

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float = 1.0,
        status: int = 503,
        code: str | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s
        self.status = status


class EngineError(CoppiceError):
    """A fault on our side."""

    code = "engine_error"
    status = 500


class EngineDeadError(EngineError):
    """The engine process is gone."""

    code = "engine_dead"
    status = 503


class RowFaultError(EngineError):
    """One request's rows failed inside a step; its neighbours are unharmed."""

    code = "row_fault"


class TakenOverError(RequestError):
    """Another reader reads the stream now; it can have one at a time."""

    code = "taken_over"
    status = 409


class NameInUseError(RequestError):
    """Another resumable stream of the tenant runs under this X-Request-Id."""

    code = "request_id_in_use"
    status = 409


class PoisonedError(EngineError):
    """The engine process died each time it worked on this request; it is not tried again."""

    code = "poisoned"


class ConfigError(CoppiceError):
    """A setting, file or flag is wrong; nothing was started."""

    code = "config_error"
    status = 500
    exit_code = 2


class CheckpointError(ConfigError):
    """A checkpoint is missing, truncated, contradictory or unsafe."""

    code = "checkpoint_error"


class UnsupportedModelError(CheckpointError):
    """The checkpoint is well formed but of an architecture or format not built here."""

    code = "unsupported_model"
