"""Structured output: what is accepted, what is refused and how, masks, rollback, the cache."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from coppice.engine.grammar import CACHE_ENTRIES, GrammarCompiler
from coppice.engine.grammar_state import GrammarState
from coppice.engine.json_schema import parse_schema
from coppice.engine.request import Grammar, SamplingParams
from coppice.engine.sampler import SamplerState, sample
from coppice.errors import ConfigError, GrammarError
from coppice.models.tokenizer import Tokenizer

BUNDLED = Path(__file__).parents[3] / "src/coppice/models/bundled/target"


class ByteTokenizer:
    """EOS, the 256 bytes, a few longer tokens, a special one."""

    eos_ids = (0,)
    special_ids = frozenset({0, 260})
    tokens = (b"<eos>", *(bytes([i]) for i in range(256)), b"true", b'{"', b'":', b"<special>")
    vocab_size = len(tokens)

    def token_bytes(self, token: int) -> bytes:
        return self.tokens[token]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [b + 1 for b in text.encode()]


TOKENIZER = ByteTokenizer()
COMPILER = GrammarCompiler(TOKENIZER)


def schema(value) -> Grammar:
    return Grammar("json_schema", value if isinstance(value, str) else json.dumps(value))


def allowed(state: GrammarState) -> set[int]:
    bits = np.unpackbits(state.mask().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def accepts(grammar: Grammar, text: str, compiler: GrammarCompiler = COMPILER) -> bool:
    state = compiler.compile(grammar)
    for byte in text.encode():
        if byte + 1 not in allowed(state):
            return False
        state.accept(byte + 1)
    return state.is_complete


def generate(grammar: Grammar, tokenizer, compiler: GrammarCompiler, seed: int) -> bytes | None:
    """A random answer under the grammar through the real sampler; ``None`` if it never ends."""
    state = compiler.compile(grammar)
    rng = np.random.default_rng(seed)
    bias = {token: 2.0 for token in tokenizer.eos_ids}
    sampler = SamplerState(
        SamplingParams(seed=seed, logit_bias=bias), [], tokenizer.vocab_size, 0, tokenizer.eos_ids
    )
    out = b""
    for position in range(400):
        row = torch.from_numpy(rng.normal(0, 1, (1, tokenizer.vocab_size)).astype(np.float32))
        token = int(sample(row, [sampler], [position], [state.mask()]).tokens[0])
        assert token in allowed(state)
        state.accept(token)
        if token in tokenizer.eos_ids:
            return out
        out += tokenizer.token_bytes(token)
        if state.is_stopped:
            return out
    return None


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8, "pattern": "^[a-z]*$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (schema(PERSON), '{"name": "bob", "age": 7}', '{"name": "bob"}'),
        (schema(PERSON), '{"name":"","age":7,"tags":["a"]}', '{"name":"","age":7,"tags":["c"]}'),
        (schema(PERSON), '{\n  "name": "a",\n  "age": 1\n}', '{"name":"A","age":1}'),
        (schema({"type": "integer", "multipleOf": 7}), "14", "15"),
        (schema({"anyOf": [{"const": 1}, {"type": "null"}]}), "null", "2"),
        (schema({"$ref": "#/$defs/a", "$defs": {"a": {"type": "boolean"}}}), "true", "1"),
        (Grammar("json_object", ""), '{"a": [1, {"b": null}]}', "[1]"),
        (Grammar("regex", "(ab|c)+d?"), "abccd", "abd d"),
        (Grammar("regex", "^[0-9]{3}-[0-9]{4}$"), "555-1234", "5555-123"),
        (Grammar("grammar", 'start: "a" x\nx: "b" | "(" x ")"'), "a((b))", "a((b)"),
    ],
)
def test_grammars_accept_and_refuse_text(grammar, good, bad):
    assert accepts(grammar, good)
    assert not accepts(grammar, bad)


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        (schema({"not": {"type": "string"}}), "'not'"),
        (schema({"type": "array", "uniqueItems": True}), "'uniqueItems'"),
        (schema({"properties": {"a": {"if": {}, "then": {}}}}), "'if'"),
        (schema({"properties": {"a": {"contains": {}}}}), "#/properties/a"),
        (schema({"type": "string", "minLenght": 3}), "'minLenght'"),
        (schema({"type": "string", "nullable": True}), "'nullable'"),
        (schema({"x-guidance": {"whitespace_flexible": True}}), "'x-guidance'"),
        (schema({"$ref": "http://example.com/schema"}), "$ref"),
        (schema({"$ref": "#/nowhere"}), "nowhere"),
        (schema({"type": "string", "format": "shoe-size"}), "shoe-size"),
        (schema({"type": "strnig"}), "strnig"),
        (schema({"type": "string", "pattern": r"(a)\1"}), "backreferences"),
        (schema({"type": "integer", "multipleOf": 99991}), "multipleOf"),
        (schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
        (schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "incompatible types"),
        (schema({"oneOf": [{"type": "number"}, {"type": "integer"}]}), "oneOf"),
        (schema({"enum": []}), "Unsatisfiable"),
        (schema({"type": "array", "minItems": 1, "items": {"$ref": "#"}}), "impossible"),
        (schema("false"), "impossible"),
        (schema("[]"), "object or a boolean"),
        (schema("{"), "not valid JSON"),
        (schema('{"const": NaN}'), "NaN"),
        (schema('{"type": "string", "type": "integer"}'), "'type' stands twice"),
        (schema('{"const": "\\ud800"}'), "cannot be used"),
        (schema('{"minimum": 1e999}'), "cannot be used"),
        (schema("[" * 50_000), "nested deeper"),
        (schema('{"items":' * 40 + "{}" + "}" * 40), "deeper than 32"),
        (schema({"description": "x" * 70_000}), "64 KiB"),
        (Grammar("regex", r"(a)\1"), "backreferences"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("regex", "("), "unclosed group"),
        (Grammar("regex", "\ud800"), "surrogates"),
        (Grammar("regex", "(a{1000}){1000}"), "too many"),
        (Grammar("grammar", "start: nowhere"), "nowhere"),
        (Grammar("grammar", "start: a\na: a"), "no text"),
        (Grammar("grammar", "not a grammar"), "Expected"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name_and_quickly(grammar, named):
    start = time.perf_counter()
    with pytest.raises(GrammarError) as caught:
        COMPILER.check(grammar)
    assert named in caught.value.message
    assert caught.value.status == 400
    assert caught.value.param
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "hostile",
    [
        Grammar("regex", "((a{1,100}){1,100}){1,100}b"),
        Grammar("regex", "(a|b)*a(a|b){200}"),
        Grammar("regex", "(a|a)*b|(a+)+c|([a-z]*)*d"),
        Grammar("grammar", 'start: a\na: a a | "a" | a "a" a'),
        schema({"type": "array", "minItems": 900_000, "items": {"type": "string"}}),
    ],
)
def test_a_hostile_grammar_costs_bounded_time_per_step(hostile):
    try:
        state = COMPILER.compile(hostile)
        rng = random.Random(0)
        for _ in range(150):
            start = time.perf_counter()
            choices = allowed(state) - {0}
            assert time.perf_counter() - start < 1
            if not choices:
                break
            state.accept(rng.choice(sorted(choices)))
    except GrammarError:
        pass  # refused, or stopped when it became too complex


def test_finite_recursion_is_served():
    tree = {
        "type": "object",
        "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["kids"],
        "additionalProperties": False,
    }
    assert accepts(schema(tree), '{"kids": [{"kids": []}, {"kids": []}]}')
    parse_schema(json.dumps({"anyOf": [{"$ref": "#"}, {"type": "null"}]}))


def test_whitespace_cannot_go_on_for_ever():
    """vllm#13260: a constrained answer that is nothing but blanks."""
    for grammar in (Grammar("json_object", ""), schema(PERSON)):
        for blank in (" ", "\n", "\t", "\r"):
            state = COMPILER.compile(grammar)
            state.accept(ord("{") + 1)
            taken = 0
            while ord(blank) + 1 in allowed(state):
                state.accept(ord(blank) + 1)
                taken += 1
                assert taken <= 33


def test_rollback_and_fork():
    state = COMPILER.compile(Grammar("regex", "abc"))
    before = allowed(state)
    state.accept(ord("a") + 1)
    other = state.fork()
    state.accept(ord("b") + 1)
    assert allowed(other) == {ord("b") + 1}
    state.rollback(2)
    assert allowed(state) == before


def test_the_end_is_seen_and_special_tokens_are_not_text():
    state = COMPILER.compile(Grammar("regex", "(.|\n)*"))
    assert 0 in allowed(state)
    assert 260 not in allowed(state)
    state.accept(0)
    assert state.is_stopped
    done = COMPILER.compile(Grammar("regex", "a"))
    done.accept(ord("a") + 1)
    assert done.is_stopped
    assert done.is_complete


def test_a_token_outside_the_grammar_is_an_error_of_that_state_only():
    state, other = (COMPILER.compile(Grammar("regex", "abc")) for _ in range(2))
    with pytest.raises(GrammarError):
        state.accept(ord("x") + 1)
    assert allowed(other) == {ord("a") + 1}


def test_fill_mask_clears_the_padding():
    state = COMPILER.compile(Grammar("regex", "a"))
    row = np.full(20, -1, np.int32)
    state.fill_mask(row)
    assert not row[state.num_words :].any()
    assert np.array_equal(row[: state.num_words], state.mask())


def test_the_cache_is_bounded_and_shares_nothing_between_states():
    compiler = GrammarCompiler(TOKENIZER)
    for i in range(CACHE_ENTRIES + 20):
        compiler.check(Grammar("regex", f"a{i}"))
        compiler.compile(Grammar("regex", f"a{i}"))
    assert len(compiler._compiled) == CACHE_ENTRIES
    assert len(compiler._checked) == CACHE_ENTRIES + 20


def test_no_ending_token_is_a_configuration_error():
    class Endless(ByteTokenizer):
        eos_ids = ()

    with pytest.raises(ConfigError):
        GrammarCompiler(Endless())


def test_random_answers_satisfy_their_schema():
    ended = 0
    for seed in range(12):
        text = generate(schema(PERSON), TOKENIZER, COMPILER, seed)
        if text is None:
            continue
        ended += 1
        value = json.loads(text)
        assert set(value) <= {"name", "age", "tags"}
        assert isinstance(value["age"], int)
        assert 0 <= value["age"] <= 150
        assert len(value["name"]) <= 8
    assert ended >= 8


@pytest.mark.skipif(not BUNDLED.is_dir(), reason="the bundled checkpoint is not built")
def test_the_bundled_tokenizer_answers_with_json():
    tokenizer = Tokenizer.from_folder(BUNDLED)
    compiler = GrammarCompiler(tokenizer)
    text = next(
        t for seed in range(10) if (t := generate(schema(PERSON), tokenizer, compiler, seed))
    )
    assert set(json.loads(text)) >= {"name", "age"}
