"""Tokenizer files, exact token bytes, BOS rules and hostile tokenizer.json files."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import tracemalloc

import pytest

from coppice.errors import (
    CheckpointError,
    ContextOverflowError,
    RequestError,
    UnsupportedModelError,
)
from coppice.models.tokenizer import Tokenizer, TokenizerFacts, refusing
from tests.kits import toy_tokenizers
from tests.kits.toy_tokenizers import save_folder


def test_reads_a_folder(tmp_path):
    folder = save_folder(
        toy_tokenizers.byte_level(),
        tmp_path,
        eos_token={"content": "<|im_end|>"},
        bos_token=None,
        chat_template=[
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "with tools"},
        ],
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    (folder / "config.json").write_text('{"eos_token_id": 0, "text_config": {"eos_token_id": 1}}')
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == (2, 0, 1)
    assert tokenizer.bos_id is None
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>"}
    assert tokenizer.chat_template() == "plain"
    assert tokenizer.chat_template(tools=True) == "with tools"
    text = "Hello <|im_start|> 你好 <tool_call>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.require_vocab(tokenizer.vocab_size)
    with pytest.raises(CheckpointError, match="came with"):
        tokenizer.require_vocab(tokenizer.vocab_size - 1)


def test_jinja_file_wins_over_the_inline_template(tmp_path):
    folder = save_folder(toy_tokenizers.byte_level(), tmp_path, chat_template="old")
    (folder / "chat_template.jinja").write_text("new")
    assert Tokenizer.from_folder(folder).chat_template(tools=True) == "new"


def test_truncation_in_the_file_does_not_cut_prompts(tmp_path):
    backend = toy_tokenizers.byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer.from_folder(save_folder(backend, tmp_path))
    text = "one two three four five"
    ids = tokenizer.encode(text)
    assert len(ids) != 50
    assert tokenizer.decode(ids) == text


def test_token_bytes_join_to_the_text():
    level = Tokenizer(toy_tokenizers.byte_level(), TokenizerFacts())
    text = "déjà 🙂 <|im_end|>\n"
    ids = level.encode(text)
    assert b"".join(map(level.token_bytes, ids)) == text.encode()
    fallback = Tokenizer(toy_tokenizers.byte_fallback(), TokenizerFacts())
    ids = fallback.encode("the 🙂", add_special_tokens=False)
    assert b"".join(map(fallback.token_bytes, ids)) == " the 🙂".encode()
    assert fallback.token_bytes(3 + 0xF0) == b"\xf0"
    assert level.token_bytes(-1) == level.token_bytes(10**12) == b""


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_a_long_text_gets_the_ids_that_the_library_gives_it(add_special_tokens):
    for make in (toy_tokenizers.byte_level, toy_tokenizers.byte_fallback):
        text = "déjà 🙂 one two\n" * 999
        expected = make().encode(text, add_special_tokens=add_special_tokens).ids
        tokenizer = Tokenizer(make(), TokenizerFacts())
        assert tokenizer.encode(text, add_special_tokens=add_special_tokens) == expected


@pytest.mark.parametrize(("add_bos", "expected"), [(None, 1), (True, 1), (False, 0)])
def test_bos_follows_the_configuration(add_bos, expected):
    facts = TokenizerFacts(special_tokens={"bos_token": "<s>"}, add_bos=add_bos)
    tokenizer = Tokenizer(toy_tokenizers.byte_fallback(), facts)
    assert tokenizer.encode("the").count(1) == expected
    assert tokenizer.encode("the", add_special_tokens=False).count(1) == 0


def test_bos_is_added_where_the_file_has_no_rule():
    facts = TokenizerFacts(special_tokens={"bos_token": "<|endoftext|>"}, add_bos=True)
    tokenizer = Tokenizer(toy_tokenizers.byte_level(), facts)
    assert tokenizer.encode("a")[0] == tokenizer.bos_id == 0


def test_double_bos_is_warned_about_once(caplog):
    facts = TokenizerFacts(special_tokens={"bos_token": "<s>"})
    tokenizer = Tokenizer(toy_tokenizers.byte_fallback(), facts)
    with caplog.at_level(logging.WARNING):
        assert tokenizer.encode("<s>the")[:2] == [1, 1]
        tokenizer.encode("<s>the")
    assert [record.message for record in caplog.records if "two BOS" in record.message] != []
    assert len(caplog.records) == 1


def test_refuses_text_it_cannot_take():
    tokenizer = Tokenizer(toy_tokenizers.byte_level(), TokenizerFacts())
    with pytest.raises(ContextOverflowError, match="11 characters and at most 10"):
        tokenizer.encode("a" * 11, max_chars=10)
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode("a\ud800b")


@pytest.mark.parametrize("times", [1, 20_000])
def test_refuses_words_that_neither_the_vocabulary_nor_its_unknown_token_stands_for(times):
    words = toy_tokenizers.words()
    words.model.unk_token = "<gone>"
    tokenizer = Tokenizer(words, TokenizerFacts())
    assert tokenizer.encode("a b " * times) == [1, 2] * times
    with pytest.raises(RequestError, match="cannot read this text"):
        tokenizer.encode("a b c " * times)


def test_fingerprint_follows_content():
    make = toy_tokenizers.byte_level
    plain = Tokenizer(make(), TokenizerFacts()).fingerprint
    assert plain == Tokenizer(make(), TokenizerFacts()).fingerprint
    template = TokenizerFacts(chat_templates={"default": "x"})
    assert plain != Tokenizer(make(), template).fingerprint
    assert plain != Tokenizer(make(401), TokenizerFacts()).fingerprint


def test_missing_and_sentencepiece_only_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UnsupportedModelError, match="AutoTokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b"[]"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": 1}]}'),
        ("tokenizer_config.json", b'{"eos_token": "\\ud800"}'),
        ("tokenizer_config.json", b'{"chat_template": "\\udfff"}'),
        ("generation_config.json", b'{"eos_token_id": "2"}'),
        ("config.json", b'{"eos_token_id": [true]}'),
        ("special_tokens_map.json", b"[" * 100_000),
    ],
)
def test_malformed_files_are_checkpoint_errors(tmp_path, name, content):
    folder = save_folder(toy_tokenizers.byte_level(), tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        Tokenizer.from_folder(folder)


def test_a_rare_character_does_not_make_the_file_four_times_as_large(tmp_path):
    folder = save_folder(toy_tokenizers.byte_level(), tmp_path)
    path = folder / "tokenizer.json"
    text = path.read_text().replace('"content": "<tool_call>"', '"content": "<🙂>"')
    path.write_text(text + " " * (4 << 20))
    tracemalloc.start()
    try:
        assert Tokenizer.from_folder(folder).token_id("<🙂>") is not None
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_memory_that_runs_out_is_no_damaged_file():
    with pytest.raises(MemoryError), refusing("tokenizer.json"):
        raise MemoryError


def test_unsupported_decoder_is_named(tmp_path):
    folder = save_folder(toy_tokenizers.byte_level(), tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        Tokenizer.from_folder(folder)


def test_missing_unknown_token_is_found_at_load_not_at_the_first_request(tmp_path):
    folder = save_folder(toy_tokenizers.byte_fallback(), tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"] |= {"unk_token": "<gone>", "byte_fallback": False}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match="<gone>"):
        Tokenizer.from_folder(folder)


def test_mutated_files_load_or_are_refused(tmp_path):
    rng = random.Random(11)
    for backend in (toy_tokenizers.byte_level(), toy_tokenizers.byte_fallback()):
        folder = save_folder(backend, tmp_path, eos_token="<s>")
        original = (folder / "tokenizer.json").read_bytes()
        refused = 0
        for _ in range(150):
            (folder / "tokenizer.json").write_bytes(mutate(original, rng))
            try:
                tokenizer = Tokenizer.from_folder(folder)
                tokenizer.decode(tokenizer.encode("the <s> 🙂"))
            except (CheckpointError, RequestError):
                refused += 1
        assert refused > 0


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or replace a few bytes; half of the time inside a number or name."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out))
        match rng.randrange(4):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                del out[at : at + rng.randrange(1, 40)]
            case 2:
                out[at:at] = out[at : at + rng.randrange(1, 40)]
            case _:
                out[at : at + 1] = rng.choice([b"-1", b"99999999999", b"null", b'"', b"{", b"\0"])
    return bytes(out)


def test_import_needs_no_torch():
    code = "import sys, coppice.models.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
