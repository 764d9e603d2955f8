"""How many sessions may be between their first and last turn: additive up, multiplicative down."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class SessionWindow:
    """Lets sessions in while KV pages and cores suffice for all that are in.

    Open to all until a pressure first passes its high mark. Then the window is what is in, one
    wider when both are low and somebody waits, and narrower by ``shrink`` when one is high; not
    twice within two turns of every session, since a change takes that long to show. Below
    ``idle`` with nobody waiting it is open again. Who is in is never put out.

    Attributes:
        low: of KV pages; below it the window widens. 1 is no wall: not all are kept at a time.
        high: of KV pages; above it the window narrows.
        high_cpu: of tool places.
        idle: pressures below it need no window.
        shrink: factor.

    Source: MARS (2026), external control plane; constants are ours.
    """

    low: float = 1.0
    high: float = 1.15
    high_cpu: float = 1.5
    idle: float = 0.5
    shrink: float = 0.7
    size: int | None = None
    _inside: set[str] = field(default_factory=set)
    _turned_away: bool = False
    _turns: int = 0

    def gate(self, session: str) -> bool:
        """See `Admission`."""
        if not session or session in self._inside:
            return True
        if self.size is not None and len(self._inside) >= self.size:
            self._turned_away = True
            return False
        self._inside.add(session)
        return True

    def feedback(self, kv_pressure: float, cpu_pressure: float, now: float) -> None:
        """See `Admission`. Counts turns, not seconds."""
        del now
        self._turns += 1
        inside = len(self._inside)
        high = kv_pressure > self.high or cpu_pressure > self.high_cpu
        if self.size is None:
            if high:
                self.size, self._turns = max(1, inside), 0
        elif max(kv_pressure, cpu_pressure) < self.idle and not self._turned_away:
            self.size = None
        elif self._turns >= 2 * inside:
            if high:
                self.size = max(1, int(self.shrink * min(inside, self.size)))
            elif kv_pressure < self.low and cpu_pressure < self.high_cpu and self._turned_away:
                self.size = max(self.size, inside) + 1
            self._turns, self._turned_away = 0, False

    def leave(self, session: str) -> None:
        """See `Admission`."""
        self._inside.discard(session)
