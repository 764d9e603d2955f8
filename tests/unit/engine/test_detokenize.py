"""Streamed text equals the whole decode, and stop strings do not depend on the grouping."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coppice.engine.detokenize import TextAssembler
from coppice.models.tokenizer import Tokenizer, TokenizerFacts
from tests.kits import toy_tokenizers

LEVEL = Tokenizer(
    toy_tokenizers.byte_level(), TokenizerFacts(special_tokens={"eos_token": "<|im_end|>"})
)
FALLBACK = Tokenizer(
    toy_tokenizers.byte_fallback(), TokenizerFacts(special_tokens={"bos_token": "<s>"})
)
GEMMA = Tokenizer(toy_tokenizers.byte_fallback(strip=False), TokenizerFacts())
TOKENIZERS = {
    "byte_level": LEVEL,
    "byte_fallback": FALLBACK,
    "gemma": GEMMA,
    "metaspace": Tokenizer(toy_tokenizers.metaspace(), TokenizerFacts()),
    "words": Tokenizer(toy_tokenizers.words(), TokenizerFacts()),
}
TEXTS = st.text(alphabet="ab stop.\n🙂👩‍👧你好é", max_size=40)
names = pytest.mark.parametrize("name", list(TOKENIZERS))


def ids_of(tokenizer: Tokenizer, text: str, noise: list[int]) -> list[int]:
    """Encoded text with random ids strewn in: cut characters, invalid bytes, specials."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    for value in noise:
        ids.insert(value % (len(ids) + 1), value % (tokenizer.vocab_size + 2))
    return ids


def run(tokenizer, ids, sizes, **options):
    """Push ids in groups of the given sizes; text, stop reason and kept tokens."""
    assembler = TextAssembler(tokenizer, **options)
    parts, start = [], 0
    for size in sizes:
        parts.append(assembler.push(ids[start : start + size]))
        start += size
    parts.append(assembler.push(ids[start:]))
    parts.append(assembler.flush())
    return "".join(parts), assembler.stop_reason, assembler.num_tokens


@names
@settings(max_examples=100, deadline=None)
@given(
    text=TEXTS,
    noise=st.lists(st.integers(0, 5000), max_size=8),
    sizes=st.lists(st.integers(0, 5), max_size=20),
    skip=st.booleans(),
)
def test_streamed_equals_whole_decode(name, text, noise, sizes, skip):
    tokenizer = TOKENIZERS[name]
    ids = ids_of(tokenizer, text, noise)
    got, stop, kept = run(tokenizer, ids, sizes, skip_special_tokens=skip)
    assert got == tokenizer.decode(ids, skip_special_tokens=skip)
    assert stop is None
    assert kept == len(ids)


@names
@settings(max_examples=100, deadline=None)
@given(
    text=TEXTS,
    noise=st.lists(st.integers(0, 5000), max_size=4),
    sizes=st.lists(st.integers(0, 5), max_size=20),
    stop=st.lists(
        st.one_of(st.sampled_from(["stop", "top.", " ", "ab", "好", "🙂", "\n\n"]), TEXTS),
        max_size=3,
    ),
    include=st.booleans(),
)
def test_stop_does_not_depend_on_grouping(name, text, noise, sizes, stop, include):
    tokenizer = TOKENIZERS[name]
    ids = ids_of(tokenizer, text, noise)
    options = {"stop": stop, "include_stop": include}
    one_by_one = run(tokenizer, ids, [1] * len(ids), **options)
    assert run(tokenizer, ids, sizes, **options) == one_by_one
    got, reason, kept = one_by_one
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    ends = [(whole.find(s) + len(s), whole.find(s), s) for s in stop if s and s in whole]
    if not ends:
        assert (got, reason, kept) == (whole, None, len(ids))
        return
    end, start, expected = min(ends)
    assert reason == expected
    assert got == whole[: end if include else start]


def test_stop_string_over_three_tokens_is_never_shown():
    ids = [id_ for part in ("a ST", "O", "P b") for id_ in LEVEL.encode(part)]
    assembler = TextAssembler(LEVEL, stop=["STOP"])
    shown = [assembler.push([id_]) for id_ in ids]
    assert "".join(shown) + assembler.flush() == "a "
    assert assembler.stop_reason == "STOP"
    assert assembler.num_tokens < len(ids)
    assert assembler.push(ids) == ""


def test_false_alarm_is_released_at_once():
    assembler = TextAssembler(LEVEL, stop=["stopped"])
    assert assembler.push(LEVEL.encode("a stop")) == "a "
    assert assembler.push(LEVEL.encode("n")) == "stopn"


def test_incomplete_character_is_held_and_replaced_at_the_end():
    ids = LEVEL.encode("🙂")
    assert len(ids) > 1
    assembler = TextAssembler(LEVEL)
    assert assembler.push(ids[:-1]) == ""
    assert assembler.flush() == "\ufffd"
    assert assembler.flush() == ""


def test_eos_is_counted_and_hidden_unless_asked_for():
    eos = LEVEL.eos_ids[0]
    ids = [*LEVEL.encode("ab"), eos]
    plain = TextAssembler(LEVEL, skip_special_tokens=False)
    assert plain.push(ids, stop_token=True) + plain.flush() == "ab"
    assert plain.num_tokens == len(ids)
    kept = TextAssembler(LEVEL, skip_special_tokens=False, include_stop=True)
    assert kept.push(ids, stop_token=True) + kept.flush() == "ab<|im_end|>"


def test_min_tokens_lets_an_early_stop_string_pass():
    ids = [LEVEL.token_id(letter) for letter in "xaxa"]
    assembler = TextAssembler(LEVEL, stop=["a"], min_tokens=3)
    assert assembler.push(ids) == "xax"
    assert assembler.num_tokens == 4


def test_leading_space_is_kept_when_continuing_a_prompt():
    ids = FALLBACK.encode("the", add_special_tokens=False)
    assert TextAssembler(FALLBACK).push(ids) == "the"
    assert TextAssembler(FALLBACK, keep_leading_space=True).push(ids) == " the"


def test_token_texts_give_bytes_and_offsets():
    ids = LEVEL.encode("ab🙂c")
    assembler = TextAssembler(LEVEL)
    text = assembler.push(ids) + assembler.flush()
    assert b"".join(token.bytes for token in assembler.tokens) == "ab🙂c".encode()
    for entry in assembler.tokens:
        if "\ufffd" not in entry.text:
            assert text[entry.offset :].startswith(entry.text)


def test_random_bytes_of_every_length():
    rng = random.Random(7)
    for tokenizer in TOKENIZERS.values():
        for _ in range(200):
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(30))]
            got, _, _ = run(tokenizer, ids, [rng.randrange(4) for _ in range(10)])
            assert got == tokenizer.decode(ids, skip_special_tokens=True)
