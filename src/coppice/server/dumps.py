"""What was in an engine when it died, for the operator: JSON lines, without anybody's text.

One file a death: a line about the death, then one for each live request. Prompts, tokens,
stop strings and grammars are user data and stay out unless asked for.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

import coppice
from coppice.engine.request import Grammar, SamplingParams
from coppice.errors import ConfigError
from coppice.server.deaths import Death
from coppice.server.replay import LiveRequest

log = logging.getLogger("coppice.server.dumps")

MAX_FILES, MAX_BYTES = 20, 4 << 20
PREFIX, SUFFIX = "crash-", ".jsonl"
Phase = Literal["waiting", "started", "parked"]


class DeathLine(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How the engine died; ``requests`` were in it, ``poisoned`` is the one it died of."""

    time: float
    version: str
    code: str
    message: str
    own_doing: bool
    restarts: int
    requests: int
    poisoned: str | None = None


class ChoiceLine(msgspec.Struct, kw_only=True):
    """One open choice: how many tokens it has, of which so many were guessed right."""

    index: int
    tokens: int
    drafted: int
    accepted: int


class SamplingLine(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Sampling parameters: all numbers, and of what is text only how much there is."""

    numbers: dict[str, float | bool | None]
    stop: int = 0
    logit_bias: int = 0
    grammar: str | None = None


class TextLine(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What was asked and answered, in tokens and as written; only where dumps may hold it."""

    prompt: list[int]
    choices: dict[int, list[int]]
    stop: tuple[str, ...] = ()
    logit_bias: dict[int, float] = {}
    grammar: Grammar | None = None


class RequestLine(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request that was in the engine. ``crashes`` came before this death."""

    id: str
    tenant: str
    key: str
    phase: Phase
    crashes: int
    age_s: float
    left_s: float | None
    priority: int
    speculate: str
    prompt_tokens: int
    choices: list[ChoiceLine]
    sampling: SamplingLine
    alone: bool = False
    text: TextLine | None = None


class Dumps:
    """Writes dumps into a folder and keeps the latest of them.

    Args:
        folder: made with mode 0700 where it does not exist; its files have mode 0600.
        with_text: whether prompts, tokens, stop strings and grammars may be in them.
    """

    def __init__(self, folder: Path, *, with_text: bool = False) -> None:
        self._folder = folder
        self._with_text = with_text

    def require_folder(self) -> None:
        """Make the folder now, rather than find out at the first death.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise ConfigError(
                f"Crash dumps cannot be written to {self._folder} ({error.strerror}); name a "
                "folder of this user's.", param="dump_dir",
            ) from error  # fmt: skip

    def engine_died(
        self, death: Death, lost: Iterable[LiveRequest], alone: LiveRequest | None, restarts: int
    ) -> Path | None:
        """Write what was in a dead engine.

        Args:
            death: how it died.
            lost: the requests that were in it, as they were.
            alone: the one that was tried alone; if the engine died of itself, it is poisoned.
            restarts: of the engine before.

        Returns:
            The file, or ``None`` where it could not be written; that is logged and no more.
        """
        lines = [self._line(live, live is alone) for live in lost]
        poisoned = alone.request.id if alone is not None and death.own_doing else None
        head = DeathLine(
            time=time.time(), version=coppice.__version__, code=death.error.code,
            message=death.error.message, own_doing=death.own_doing, restarts=restarts,
            requests=len(lines), poisoned=poisoned,
        )  # fmt: skip
        try:
            path = self._write([msgspec.json.encode(line) for line in (head, *lines)])
        except OSError as error:
            log.warning("No crash dump was written to %s: %s", self._folder, error)
            return None
        log.error("What was in the engine is told in %s", path)
        return path

    def _write(self, lines: list[bytes]) -> Path:
        self._folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        name = f"{PREFIX}{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{time.time_ns()}{SUFFIX}"
        path = self._folder / name
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            left = MAX_BYTES
            for line in lines:
                if len(line) >= left:
                    file.write(b'{"truncated":true}\n')
                    break
                left -= len(line) + 1
                file.write(line + b"\n")
        for old in sorted(self._folder.glob(f"{PREFIX}*{SUFFIX}"), key=_number)[:-MAX_FILES]:
            old.unlink(missing_ok=True)
        return path

    def _line(self, live: LiveRequest, alone: bool) -> RequestLine:
        request = live.request
        return RequestLine(
            id=request.id,
            tenant=request.tenant,
            key=request.key,
            phase="parked" if live.parked else "started" if live.started else "waiting",
            crashes=live.crashes,
            age_s=round(time.monotonic() - live.submitted_s, 3),
            left_s=None if live.left_s is None else round(live.left_s, 3),
            priority=request.priority,
            speculate=request.speculate,
            prompt_tokens=len(request.prompt),
            choices=[
                ChoiceLine(index=index, tokens=len(choice.tokens), drafted=choice.drafted,
                           accepted=choice.accepted)
                for index, choice in live.open.items()
            ],
            sampling=_sampling(request.sampling),
            alone=alone,
            text=_text(live) if self._with_text else None,
        )  # fmt: skip


def _number(path: Path) -> tuple[int, str]:
    made = path.name.removesuffix(SUFFIX).rpartition("-")[2]
    return (int(made) if made.isdecimal() else 0), path.name


def _sampling(params: SamplingParams) -> SamplingLine:
    values = {name: getattr(params, name) for name in params.__struct_fields__}
    numbers = {name: v for name, v in values.items() if v is None or isinstance(v, int | float)}
    return SamplingLine(
        numbers={name: v for name, v in numbers.items() if name != "grammar"},
        stop=len(params.stop) + len(params.stop_token_ids),
        logit_bias=len(params.logit_bias),
        grammar=params.grammar.kind if params.grammar else None,
    )


def _text(live: LiveRequest) -> TextLine:
    params = live.request.sampling
    return TextLine(
        prompt=live.request.prompt,
        choices={index: choice.tokens for index, choice in live.open.items()},
        stop=params.stop,
        logit_bias=params.logit_bias,
        grammar=params.grammar,
    )
