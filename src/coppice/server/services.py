"""What routes work with: one object per server process."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from fastapi import Request

from coppice.engine.messages import ModelFacts
from coppice.errors import CapacityError, NotFoundError
from coppice.server.admission import Admission
from coppice.server.bodies import BodyBudget
from coppice.server.calls import Calls
from coppice.server.config import ServerConfig
from coppice.server.engine_client import AsyncEngine
from coppice.server.keys import Key, KeyRing
from coppice.server.ledger import Ledger
from coppice.server.metrics import Metrics
from coppice.server.resumable import Resumables
from coppice.server.text import TextService

Phase = Literal["open", "announced", "closed"]


@dataclass(slots=True)
class Services:
    """The parts of a server.

    Attributes:
        phase: ``announced`` while draining but still accepting, ``closed`` after that.
        text: set once the tokenizer is loaded.
        bodies: what bodies may take together.
        streams: those that can be taken up.
    """

    config: ServerConfig
    engine: AsyncEngine
    keys: KeyRing
    ledger: Ledger
    admission: Admission
    calls: Calls
    metrics: Metrics
    bodies: BodyBudget
    streams: Resumables
    text: TextService | None = None
    phase: Phase = "open"
    started: float = field(default_factory=time.monotonic)
    started_unix: int = field(default_factory=lambda: int(time.time()))

    @property
    def state(self) -> str:
        """One word for health checks: ``ok`` when new work is welcome."""
        if self.phase != "open":
            return "draining"
        if self.text is None and self.engine.state in ("ready", "loading"):
            return "loading"
        if self.engine.state != "ready":
            return self.engine.state
        return "stalled" if self.engine.silence.strange else "ok"

    def require_open(self) -> tuple[TextService, ModelFacts]:
        """The text service and the model's facts, if new work may come in.

        Raises:
            CapacityError: loading, restarting or draining.
        """
        if self.phase == "closed":
            raise CapacityError(
                "The server is shutting down; ask another one.", retry_after_s=5.0,
                code="draining",
            )  # fmt: skip
        if self.text is None or self.engine.facts is None or self.engine.state != "ready":
            state = "loading" if self.engine.state == "ready" else self.engine.state
            raise CapacityError(
                f"The model is not there yet ({state}); try again soon.",
                retry_after_s=self.engine.back_in_s,
                code=f"engine_{state}",
            )  # fmt: skip
        return self.text, self.engine.facts

    def require_text(self) -> TextService:
        """The text service of a model that has been loaded.

        Raises:
            CapacityError: it is still loading.
        """
        if self.text is None:
            raise CapacityError(
                "The model is not there yet; try again soon.",
                retry_after_s=self.engine.back_in_s,
                code="engine_loading",
            )
        return self.text

    @property
    def model_name(self) -> str | None:
        """The name clients use."""
        facts = self.engine.facts
        return self.config.served_name or (facts.name if facts else None)

    def require_model(self, name: str | None) -> None:
        """Accept the served name, or none at all.

        Raises:
            NotFoundError: another model was named.
        """
        if name is not None and name != self.model_name:
            raise NotFoundError(
                f"There is no model {name[:80]!r} here; this server has {self.model_name!r}.",
                param="model", code="model_not_found",
            )  # fmt: skip

    def session_warnings(self) -> list[str]:
        """Why naming a session changes nothing, where it does not."""
        facts = self.engine.facts
        if facts is None or facts.knows_sessions:
            return []
        return ["sessions change nothing here; start the server with --order sessions"]


def services_of(request: Request) -> Services:
    """The services of the application a request came to."""
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


def caller_of(request: Request) -> Key:
    """The key the guard identified."""
    key = request.scope["state"]["key"]
    assert isinstance(key, Key)
    return key
