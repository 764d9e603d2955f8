"""JSON from strangers: bounded before it is parsed, strict while it is."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from fastapi import Request
from fastapi.routing import APIRoute

from coppice.errors import CapacityError, RequestError
from coppice.server.errors import BodyProblem
from coppice.server.services import services_of

MAX_DEPTH = 64
MAX_NUMBER_CHARS = 40
MAX_CONTAINERS = 200_000
MAX_VALUES = 500_000
MAX_NAMES = 100_000
SHORT_BYTES = WINDOW_BYTES = 64 << 10
LARGE_BYTES = 1 << 20
_LONG_NUMBER = re.compile(rb"[0-9.eE+-]{%d}" % (MAX_NUMBER_CHARS + 1))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_TO_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def parse_json(body: bytes | bytearray) -> Any:
    """Parse a JSON document, refusing what a later layer might choke on.

    Refused: other encodings than UTF-8, a byte-order mark, nesting over `MAX_DEPTH`, more
    than `MAX_CONTAINERS` lists and objects, `MAX_NAMES` names or `MAX_VALUES` values,
    numbers over `MAX_NUMBER_CHARS` characters or out of range, NaN and infinities, names
    that occur twice in one object, and lone surrogates.

    Raises:
        RequestError: with code ``invalid_json``.

    Cost: a few passes at C speed; no recursion before the depth is known.
    """
    if body.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        _refuse("The body starts with a byte-order mark; send plain UTF-8.")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(f"The body is not UTF-8 (byte {error.start}).")
    _check_size(_without_strings(body))
    may_hold_surrogates = _SURROGATE.search(body) is not None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        _refuse(f"The body is not valid JSON: {error.msg} (character {error.pos}).")
    except RecursionError:  # unreachable for text that passed the depth check
        _refuse(f"The body is nested deeper than {MAX_DEPTH}.")
    if may_hold_surrogates:
        _check_surrogates(value)
    return value


def _without_strings(body: bytes | bytearray) -> bytearray:
    """The document without its strings, a window at a time: pieces take several times its size."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # escapes: no quote is left inside
    made, inside = bytearray(), False
    for start in range(0, len(plain), WINDOW_BYTES):
        parts = plain[start : start + WINDOW_BYTES].split(b'"')
        made += b"".join(parts[inside::2])
        inside ^= len(parts) % 2 == 0
    return made


def _check_size(bare: bytearray) -> None:
    """Bound depth and number of values of a document without its strings."""
    _check_depth(bare)
    if bare.count(b",") >= MAX_VALUES:
        _refuse(f"The body holds more than {MAX_VALUES} values.")
    if bare.count(b":") > MAX_NAMES:
        _refuse(f"The body holds more than {MAX_NAMES} names.")
    if _LONG_NUMBER.search(bare):
        _refuse(f"A number has more than {MAX_NUMBER_CHARS} characters.")


def _check_depth(bare: bytearray) -> None:
    # Each round removes the innermost pairs, so the number of rounds is the depth. What
    # does not cancel is malformed, and the parser says so better; but a long run of opening
    # brackets must not reach its recursion.
    brackets = bare.translate(_TO_BRACKETS, _NOT_BRACKETS)
    if len(brackets) > 2 * MAX_CONTAINERS:
        _refuse(f"The body holds more than {MAX_CONTAINERS} lists and objects.")
    if b"[" * (MAX_DEPTH + 1) in brackets:
        _refuse(f"The body is nested deeper than {MAX_DEPTH}.")
    for _ in range(MAX_DEPTH):
        shorter = brackets.replace(b"[]", b"")
        if len(shorter) == len(brackets):
            break
        brackets = shorter
    if len(brackets) > MAX_DEPTH or b"[]" in brackets:
        _refuse(f"The body is nested deeper than {MAX_DEPTH}, or its brackets do not match.")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        _refuse(f"The name {twice[:60]!r} occurs twice in one object.")
    return made


def _no_constant(name: str) -> NoReturn:
    _refuse(f"{name} is not JSON; numbers must be finite.")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse(f"The number {text[:20]} is out of range.")
    return value


def _check_surrogates(value: Any) -> None:
    if isinstance(value, str):
        if any("\ud800" <= char <= "\udfff" for char in value):
            _refuse("A string holds half of a surrogate pair, which is not text.")
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_surrogates(name)
            _check_surrogates(item)
    elif isinstance(value, list):
        for item in value:
            _check_surrogates(item)


def _refuse(sentence: str) -> NoReturn:
    raise RequestError(sentence, code="invalid_json")


class BoundedRequest(Request):
    """A request whose ``json()`` is `parse_json` and whose body counts against a budget."""

    held_bytes = 0
    _text: bytearray | None = None

    async def body(self) -> bytes:
        """The first byte, if there is one: FastAPI asks no more, and would keep all of them."""
        if self._text is None:
            try:
                self._text = await self._read()
            except CapacityError as error:
                raise BodyProblem(error) from None
        return bytes(self._text[:1])

    async def _read(self) -> bytearray:
        budget = services_of(self).bodies
        body = bytearray()
        async for chunk in self.stream():
            body += chunk
            if len(body) > SHORT_BYTES:
                budget.take(len(body) - self.held_bytes)
                self.held_bytes = len(body)
        return body

    async def json(self) -> Any:
        """Parse the body; see `parse_json`. Works once: the text is not kept."""
        await self.body()
        assert self._text is not None
        body, self._text = self._text, bytearray()
        try:
            if len(body) <= SHORT_BYTES:
                return parse_json(body)
            async with services_of(self).bodies.parsing:
                return await asyncio.to_thread(parse_json, body)
        except RequestError as error:
            raise BodyProblem(error) from None


class BoundedRoute(APIRoute):
    """A route that reads its body through `BoundedRequest`."""

    def get_route_handler(self) -> Any:
        """FastAPI's handler, given our request class."""
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Any:
            made = BoundedRequest(request.scope, request.receive)
            try:
                return await handle(made)
            finally:
                services_of(request).bodies.give(made.held_bytes)
                if made.held_bytes > LARGE_BYTES:  # a refusal refers to itself, and to the body
                    asyncio.get_running_loop().call_soon(gc.collect)

        return bounded
