"""Whether first tokens come late, and not just for a moment: then newcomers are refused.

A burst is let in and waits its turn. A queue that stands is another thing: it serves nobody
sooner, and everybody in it waits for all of it. So once somebody has been late for
`PATIENCE_S`, without a break and without the queue getting shorter, nobody comes in while
somebody is late, or would be so by coming in, until `CALM_S` have passed without need.

Source: Nichols and Jacobson, Controlling Queue Delay (ACM Queue 2012); Maurer, Fail at Scale
(ACM Queue 2015), for servers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

from coppice.server.replay import LiveRequest

PATIENCE_S, CALM_S = 2.0, 5.0
UNSEEN_S = 1.0
"""Longest time between two looks over which what was late stays so."""
SHORTER = 0.9
"""A queue gets shorter when it comes down to this share of its shortest."""
READINGS = 2.0
"""A first token is late after so many times what reading the prompt takes, and ``wait_s``."""


class Pressure:
    """Looks at those who wait whenever someone wants to come in.

    Args:
        wait_s: time to a first token that is borne beside the reading of the prompt; 0 bears
            everything.
        clock: monotonic seconds.

    Cost: one pass over the live requests per look.
    """

    def __init__(self, wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._wait_s = wait_s
        self._clock = clock
        self._looked_s = self._in_time_s = clock()
        self._strict_until_s = self._looked_s
        self._shortest = math.inf

    def refuses(
        self, live: Iterable[LiveRequest], *, waiting: int, more: int, rate_tok_s: float
    ) -> bool:
        """Whether a newcomer is to be turned away.

        Args:
            live: all live requests.
            waiting: prompt tokens that wait.
            more: prompt tokens of the newcomer.
            rate_tok_s: at which prompts are read.
        """
        if not self._wait_s:
            return False
        now = self._clock()
        late_since = self._late_since(live, now, rate_tok_s)
        if late_since is None:
            self._in_time_s, self._shortest = now, math.inf
        elif waiting <= SHORTER * self._shortest:
            self._in_time_s, self._shortest = now, waiting
        elif now - self._looked_s > UNSEEN_S:
            self._in_time_s = late_since
        self._looked_s = now
        needed = late_since is not None or waiting / rate_tok_s > self._borne_s(more, rate_tok_s)
        if now - self._in_time_s >= PATIENCE_S or (needed and now < self._strict_until_s):
            self._strict_until_s = now + CALM_S
        return needed and now < self._strict_until_s

    def _late_since(
        self, live: Iterable[LiveRequest], now: float, rate_tok_s: float
    ) -> float | None:
        """Since when somebody who still waits has been late.

        Sessions are not looked at: the engine's window has their first turns wait on purpose.
        """
        due = [
            each.given_s + self._borne_s(len(each.request.prompt), rate_tok_s)
            for each in live
            if not (each.started or each.parked or each.request.session)
        ]
        first = min(due, default=now)
        return first if first < now else None

    def _borne_s(self, prompt_tokens: int, rate_tok_s: float) -> float:
        return self._wait_s + READINGS * prompt_tokens / rate_tok_s
