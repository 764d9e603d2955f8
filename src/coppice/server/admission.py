"""Who is let in: bounds on places, prompts, pages and lateness, before and after tokenizing."""

from __future__ import annotations

import math
import random
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from coppice.engine.request import Request
from coppice.errors import CapacityError, RequestError
from coppice.server.config import ServerConfig
from coppice.server.engine_client import AsyncEngine
from coppice.server.pressure import Pressure

CHARS_PER_TOKEN = 3.0
"""Estimate used before the exact count is known; English text has about four."""
FIRST_RATE_TOK_S = 1000.0
"""Prefill rate assumed until one was measured."""
RETRY_MIN_S, RETRY_MAX_S = 1.0, 60.0
SPREAD_S = 2.0
"""Those turned away together are told to come back at different times, up to so far apart."""


@dataclass(slots=True)
class Load:
    """Work asked for or promised: sequences, prompt tokens yet to be read, KV pages."""

    sequences: int = 0
    prompt_tokens: int = 0
    pages: int = 0

    def add(self, other: Load, sign: int = 1) -> None:
        """Add (or with ``sign=-1`` take away) another load, in place."""
        self.sequences += sign * other.sequences
        self.prompt_tokens += sign * other.prompt_tokens
        self.pages += sign * other.pages


_SMALLEST = Load(sequences=1)


class Permit:
    """A place inside; give it back with `release`, once or more."""

    def __init__(self, admission: Admission, tenant: str, load: Load) -> None:
        self._admission = admission
        self._tenant = tenant
        self._load: Load | None = load
        self._coming = True

    def hand_over(self) -> None:
        """The engine has the requests: which of them wait is known from now on."""
        if self._load is not None and self._coming:
            self._admission.coming_tokens -= self._load.prompt_tokens
            self._coming = False

    def resize(self, load: Load, *, share: float = 1.0) -> None:
        """Replace the estimate by the exact load; may be refused, the place is then lost."""
        self.release(finished=False)
        self._admission.check(self._tenant, load, share=share)
        self._load, self._coming = load, True
        self._admission.take(self._tenant, load)

    def release(self, *, finished: bool = True) -> None:
        """Leave."""
        if self._load is not None:
            self.hand_over()
            self._admission.give_back(self._tenant, self._load, finished=finished)
            self._load = None


class Admission:
    """Keeps the sums of what was promised and refuses what would exceed the bounds.

    A caller over its own share is refused with 429, anybody else with 503; the time to try
    again comes from the measured rates of prefill and of finished sequences.

    Cost: a few additions and a look at each live request per call.
    """

    def __init__(self, config: ServerConfig, engine: AsyncEngine) -> None:
        self._config = config
        self._engine = engine
        self.promised = Load()
        self.coming_tokens = 0
        """Prompt tokens promised to calls the engine does not have yet."""
        self._tenants: Counter[str] = Counter()
        self._finish_times: deque[tuple[float, int]] = deque(maxlen=64)
        self._pressure = Pressure(config.overload_wait_s)

    def admit(self, tenant: str, load: Load, *, share: float = 1.0) -> Permit:
        """Take a place for ``load``.

        Args:
            tenant: whose share it counts against.
            load: the work, estimated or exact.
            share: largest fraction of all places this tenant may hold.

        Raises:
            CapacityError: no place; 429 or 503 with the time to wait.
        """
        self.check(tenant, load, share=share)
        self.take(tenant, load)
        return Permit(self, tenant, load)

    def check(self, tenant: str, load: Load, *, share: float = 1.0) -> None:
        """Raise `CapacityError` (or `RequestError`, when it could never fit)."""
        self._check_sequences(tenant, load, share)
        self._check_waiting(load)
        self._check_pages(load)
        self._check_memory()
        self._check_pressure(load)

    def require_place(self, tenant: str, *, share: float = 1.0) -> None:
        """Raise `CapacityError` when not even the smallest call would be let in."""
        self._check_sequences(tenant, _SMALLEST, share)
        self._check_memory()
        self._check_pressure(_SMALLEST)

    def take(self, tenant: str, load: Load) -> None:
        """Count a load that was checked."""
        self.promised.add(load)
        self.coming_tokens += load.prompt_tokens
        self._tenants[tenant] += load.sequences

    def give_back(self, tenant: str, load: Load, *, finished: bool) -> None:
        """Stop counting a load."""
        self.promised.add(load, -1)
        self._tenants[tenant] -= load.sequences
        if not self._tenants[tenant]:
            del self._tenants[tenant]
        if finished:
            self._finish_times.append((time.monotonic(), load.sequences))

    def waiting_tokens(self) -> int:
        """Prompt tokens promised that the engine has not begun to answer."""
        live = self._engine.live.values()
        waiting = (len(r.request.prompt) for r in live if not (r.started or r.parked))
        return self.coming_tokens + sum(waiting)

    def max_waiting_tokens(self) -> int:
        """The bound on waiting prompt tokens, from the measured prefill rate."""
        return int(self._config.max_waiting_s * self._prefill_rate())

    def max_pages(self) -> int:
        """The bound on promised pages."""
        facts = self._engine.facts
        return int(facts.num_pages * self._config.pages_overcommit) if facts else 0

    def _check_sequences(self, tenant: str, load: Load, share: float) -> None:
        most = self._config.max_in_flight
        if load.sequences > most:
            raise RequestError(
                f"The request asks for {load.sequences} sequences, this server runs {most} at "
                "once; send fewer prompts or a smaller n.", param="n",
            )  # fmt: skip
        own = max(1, math.floor(most * share))
        if share < 1.0 and self._tenants[tenant] + load.sequences > own:
            raise CapacityError(
                f"Your share is {own} sequences at once; wait for some to end.",
                retry_after_s=self._until_free(self._tenants[tenant] + load.sequences - own),
                status=429, code="share_exceeded",
            )  # fmt: skip
        over = self.promised.sequences + load.sequences - most
        if over > 0:
            raise CapacityError(
                f"All {most} places are taken; try again later.",
                retry_after_s=self._until_free(over), code="too_many_requests",
            )  # fmt: skip

    def _check_waiting(self, load: Load) -> None:
        waiting = self.waiting_tokens()
        over = waiting + load.prompt_tokens - self.max_waiting_tokens()
        if over > 0 and waiting > 0:  # into an empty queue anything that fits the context goes
            raise CapacityError(
                f"{waiting} prompt tokens wait already; try again later.",
                retry_after_s=_clamp(over / self._prefill_rate()), code="queue_full",
            )  # fmt: skip

    def _check_pages(self, load: Load) -> None:
        most = self.max_pages()
        if load.pages and self.promised.pages and self.promised.pages + load.pages > most:
            raise CapacityError(
                "The KV cache is promised to other requests; try again later.",
                retry_after_s=self._until_free(1), code="pages_promised",
            )  # fmt: skip

    def _check_memory(self) -> None:
        stats = self._engine.stats
        if stats is not None and stats.short_of_memory:
            raise CapacityError(
                "The machine is short of memory; try again later.",
                retry_after_s=self._until_free(1) + random.uniform(0.0, SPREAD_S),
                code="short_of_memory",
            )

    def _check_pressure(self, load: Load) -> None:
        if self._pressure.refuses(
            self._engine.live.values(),
            waiting=self.waiting_tokens(),
            more=load.prompt_tokens,
            rate_tok_s=self._prefill_rate(),
        ):
            raise CapacityError(
                "More is asked of this server than it can do, and answers begin late; try again "
                "later.", code="overloaded",
                retry_after_s=self._until_free(1) + random.uniform(0.0, SPREAD_S),
            )  # fmt: skip

    def _prefill_rate(self) -> float:
        stats = self._engine.stats
        measured = stats.prefill_rate_tok_s if stats else 0.0
        return measured if measured > 0 else FIRST_RATE_TOK_S

    def _until_free(self, places: int) -> float:
        if len(self._finish_times) < 2:  # noqa: PLR2004 - no rate from one point
            return 2.0
        span = time.monotonic() - self._finish_times[0][0]
        rate = sum(count for _, count in self._finish_times) / max(span, 1e-3)
        return _clamp(places / rate)


def estimate(characters: int, *, sequences: int) -> Load:
    """Load of a request not yet tokenized."""
    return Load(sequences, math.ceil(characters / CHARS_PER_TOKEN))


def exact(requests: Iterable[Request], page_size: int) -> Load:
    """Load of tokenized requests; prompt pages are shared by a request's sequences."""
    load = Load()
    for request in requests:
        n = request.sampling.n
        prompt_pages = math.ceil(len(request.prompt) / page_size)
        total = math.ceil((len(request.prompt) + (request.sampling.max_tokens or 0)) / page_size)
        load.add(Load(n, len(request.prompt), prompt_pages + n * (total - prompt_pages)))
    return load


def _clamp(seconds: float) -> float:
    return min(max(seconds, RETRY_MIN_S), RETRY_MAX_S)
