"""Structured output: from a schema, regex or grammar to a mask of allowed tokens per step.

The work is llguidance's (derivative-based regular expressions and an Earley parser, so
time is linear in the text for regular expressions; look-around and back references do not
exist). Compilation drops the interpreter lock and is bounded by `_JSON_LIMITS` and
`_LARK_LIMITS`; before admission a cell (`coppice.engine.cell`) compiles to refuse what is
wrong, the engine compiles again to use it. Whitespace in JSON is at most one space, or a
newline with up to 32 spaces, so a constrained answer cannot run on in blanks.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from coppice.engine.json_schema import parse_schema
from coppice.engine.request import Grammar
from coppice.errors import ConfigError, GrammarError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

    from coppice.engine.grammar_state import GrammarState

MAX_SOURCE_BYTES = 64 << 10
MAX_TOOLS_BYTES = 1 << 20
V = TypeVar("V")
CACHE_ENTRIES, CHECKED_ENTRIES = 32, 4096
"""A compiled grammar takes some 200 KiB and two milliseconds, that it was checked 32 bytes."""
PROBE_STEPS = 16
JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r" |\n[ ]{0,32}"}
"""llguidance's ``x-guidance`` options; a client's own are refused."""

_JSON_LIMITS = LLParserLimits(
    initial_lexer_fuel=150_000, max_items_in_row=8000, verbose_errors=False
)
_LARK_LIMITS = LLParserLimits(
    initial_lexer_fuel=60_000, max_items_in_row=500, step_max_items=20_000, verbose_errors=False
)
"""Fuel is memory, too: compiling takes some 200 bytes for a unit of it."""


class GrammarTokenizer(Protocol):
    """What compilation needs of `coppice.models.tokenizer.Tokenizer`."""

    vocab_size: int
    eos_ids: tuple[int, ...]

    @property
    def special_ids(self) -> Iterable[int]:
        """Ids that are not text."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Exact bytes of a token, empty for an unused id."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...


class _Recent(Generic[V]):
    """The values used last, so many of them; safe in threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[bytes, V] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: bytes) -> V | None:
        """The value, now the last used, or ``None``."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: bytes, value: V) -> None:
        """Keep a value in place of the one unused for longest."""
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._most:
                self._values.popitem(last=False)


class GrammarCompiler:
    """Compiles grammars for one tokenizer and remembers the last of them; safe in threads.

    Raises:
        ConfigError: the tokenizer has no ending token, so nothing could ever end.
    """

    def __init__(self, tokenizer: GrammarTokenizer) -> None:
        if not tokenizer.eos_ids:
            raise ConfigError("Structured output needs a tokenizer with an EOS token.")
        self._tokenizer = tokenizer
        self._backend: LLTokenizer | None = None
        self._building = threading.Lock()
        self._num_words = -(-tokenizer.vocab_size // 32)
        self._compiled: _Recent[LLMatcher] = _Recent(CACHE_ENTRIES)
        self._checked: _Recent[bool] = _Recent(CHECKED_ENTRIES)

    def check(self, grammar: Grammar) -> None:
        """Compile, try the first steps and remember that it went well.

        Raises:
            GrammarError: invalid, unsupported (the keyword or construct is named),
                impossible, or too large or complex.
        """
        key = _key(grammar)
        if not self._checked.get(key):
            self._fresh(grammar)
            self._checked.put(key, True)

    def compile(self, grammar: Grammar) -> GrammarState:
        """A fresh state at the grammar's start; raises as `check` does."""
        from coppice.engine.grammar_state import GrammarState  # numpy: not for the cell

        key = _key(grammar)
        matcher = self._compiled.get(key)
        if matcher is None:
            matcher = self._fresh(grammar)
            self._compiled.put(key, matcher)
        return GrammarState(matcher.deep_copy(), self._num_words)

    def _fresh(self, grammar: Grammar) -> LLMatcher:
        with self._building:
            if self._backend is None:
                self._backend = _build(self._tokenizer)
        json_like = grammar.kind in ("json_schema", "json_object", "tools")
        limits = _JSON_LIMITS if json_like else _LARK_LIMITS
        matcher = LLMatcher(self._backend, to_llguidance(grammar), limits=limits, log_level=0)
        if matcher.is_error():
            raise GrammarError(_explain(grammar, matcher.get_error()), param=_param(grammar))
        self._probe(grammar, matcher.deep_copy())
        return matcher

    def _probe(self, grammar: Grammar, matcher: LLMatcher) -> None:
        """Walk a few steps, so that what fails at once is refused before admission."""
        known = (1 << self._tokenizer.vocab_size) - 1
        text = known & ~sum(1 << token for token in set(self._tokenizer.eos_ids))
        for step in range(PROBE_STEPS):
            allowed = known & int.from_bytes(matcher.compute_bitmask(), "little")
            if matcher.is_error():
                raise GrammarError(_explain(grammar, matcher.get_error()), param=_param(grammar))
            if not step and (not allowed or matcher.is_stopped()):
                raise GrammarError(
                    "The grammar allows no text at all; check its start rule.",
                    param=_param(grammar),
                )
            texts = allowed & text
            if matcher.is_stopped() or not texts:
                return
            matcher.consume_token((texts & -texts).bit_length() - 1)  # the lowest set bit


def _key(grammar: Grammar) -> bytes:
    text = f"{grammar.kind}\0{grammar.source}"
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def to_llguidance(grammar: Grammar) -> str:
    """The grammar in llguidance's own format.

    Raises:
        GrammarError: too large, or a schema that `parse_schema` refuses.
    """
    limit = MAX_TOOLS_BYTES if grammar.kind == "tools" else MAX_SOURCE_BYTES
    if len(grammar.source.encode("utf-8", "replace")) > limit:
        raise GrammarError(
            f"The grammar is larger than {limit >> 10} KiB; make it smaller.",
            param=_param(grammar),
        )
    try:
        return _translate(grammar)
    except ValueError as error:  # lone surrogates, numbers JSON cannot hold
        raise GrammarError(_explain(grammar, str(error)), param=_param(grammar)) from None


def _translate(grammar: Grammar) -> str:
    made: str
    match grammar.kind:
        case "json_schema":
            made = schema_grammar(parse_schema(grammar.source))
        case "json_object":
            made = schema_grammar({"type": "object"})
        case "regex":
            made = LLMatcher.grammar_from_regex(grammar.source)
        case "grammar" | "tools":
            made = LLMatcher.grammar_from_lark(grammar.source)
    return made


def schema_grammar(schema: Any) -> str:
    """Turn a checked schema into llguidance's form, with bounded whitespace."""
    as_object = schema if isinstance(schema, dict) else {} if schema else {"enum": []}
    made: str = LLMatcher.grammar_from_json_schema(json.dumps(as_object), overrides=JSON_OPTIONS)
    return made


class _Vocabulary:
    """A tokenizer as `TokenizerWrapper` wants it."""

    def __init__(self, tokenizer: GrammarTokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_ids[0]
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(t) for t in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted({*tokenizer.special_ids, *tokenizer.eos_ids})
        self.greedy: LLTokenizer | None = None

    def __call__(self, text: bytes | str) -> Sequence[int]:
        """Tokenize as the model was taught, or greedily where that is not exact."""
        data = text if isinstance(text, bytes) else text.encode()
        try:
            ids = self._tokenizer.encode(data.decode(), add_special_tokens=False)
        except UnicodeDecodeError:
            ids = []
        if b"".join(self.tokens[i] for i in ids) == data or self.greedy is None:
            return ids
        return list(self.greedy.greedy_tokenize(data.decode("utf-8", "replace")))


def _build(tokenizer: GrammarTokenizer) -> LLTokenizer:
    vocabulary = _Vocabulary(tokenizer)
    backend = LLTokenizer(
        TokenizerWrapper(vocabulary),
        n_vocab=tokenizer.vocab_size,
        eos_token=list(tokenizer.eos_ids),
    )
    vocabulary.greedy = backend
    return backend


def _explain(grammar: Grammar, error: str) -> str:
    kind = {"json_schema": "JSON schema", "regex": "regular expression"}.get(
        grammar.kind, "grammar"
    )
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error:")]
    if "NoExtension" in error:
        return f"The {kind} allows no text at all; check where it starts."
    if "oneOf" in error:
        return f"The {kind} has oneOf branches that overlap; use anyOf instead."
    reason = said[0].removeprefix("error:").strip() if said else first_line(error)
    return f"The {kind} cannot be used: {reason}."


def first_line(error: str) -> str:
    """What llguidance said, short enough to be passed on."""
    line = error.strip().splitlines()[0] if error.strip() else "unknown reason"
    return line.rstrip(".")[:300]


def _param(grammar: Grammar) -> str:
    return {"tools": "tools", "regex": "regex", "grammar": "grammar"}.get(
        grammar.kind, "response_format"
    )
