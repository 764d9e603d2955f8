"""Settings of one answer, for the verbs that ask for one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from coppice.settings import RoomConfig, setting

if TYPE_CHECKING:
    from coppice import SamplingParams


@dataclass(frozen=True, kw_only=True)
class AnswerConfig(RoomConfig):
    """How ``chat`` and ``run`` choose tokens.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    ROOM: ClassVar[str] = "answer"

    max_tokens: int = setting(256, "Most tokens in one answer.", minimum=1, maximum=2**31 - 1)
    temperature: float = setting(
        0.8, "0 takes the likeliest token; higher is wilder.", minimum=0.0, maximum=100.0
    )
    top_p: float = setting(
        0.95, "Keep the likeliest tokens up to this mass.", minimum=1e-6, maximum=1.0
    )
    top_k: int = setting(0, "Keep the K likeliest tokens; 0 keeps all.", minimum=0)
    stop: tuple[str, ...] = setting((), "Texts that end the answer.")

    def fields(self) -> dict[str, Any]:
        """The values under the names of `SamplingParams` and of the HTTP body."""
        return asdict(self)

    def params(self, seed: int | None = None) -> SamplingParams:
        """Sampling parameters for the engine in this process.

        Raises:
            RequestError: a stop text is empty or too long, or there are too many.
        """
        from coppice import SamplingParams

        return SamplingParams(seed=seed, **self.fields())
