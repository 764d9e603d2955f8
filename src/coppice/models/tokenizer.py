"""A model's tokenizer: text to ids, ids to text, and the exact bytes of every token.

Reads the Hugging Face files of a folder (``tokenizer.json``, ``tokenizer_config.json``,
``special_tokens_map.json``, ``generation_config.json``, ``config.json``, chat templates) or is
built from a GGUF file's metadata. No torch here: the HTTP process uses it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from coppice.errors import (
    CheckpointError,
    ContextOverflowError,
    RequestError,
    UnsupportedModelError,
)
from coppice.models.token_text import DecoderSpec, TextStream, read_decoder

MAX_FILE_BYTES = 256 << 20
MAX_TEMPLATE_BYTES = 1 << 20
SHORT_CHARS = 2048
"""Text this short is tokenized on the spot: cheaper than a change of thread."""
NAMED_SPECIALS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

PROBE = "Probe 0 \N{GRINNING FACE}\U0010fffd\n"
"""Text with a word, a digit, an emoji and a character no vocabulary has."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizerFacts:
    """What the files beside ``tokenizer.json`` say.

    Attributes:
        special_tokens: named special tokens (``bos_token``, …) to their text.
        eos_ids: every id that ends a sequence.
        add_bos: forces (or forbids) a leading BOS; ``None`` leaves it to the tokenizer.
        chat_templates: by name; ``default`` is the usual one.
    """

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    add_bos: bool | None = None
    chat_templates: Mapping[str, str] = field(default_factory=dict)


class Tokenizer:
    """Text to token ids and back; see the module's docstring.

    Args:
        backend: the ``tokenizers`` object; its truncation and padding are switched off, since
            nothing may be cut silently.
        facts: see `TokenizerFacts`.

    Raises:
        UnsupportedModelError: its decoder is of a kind no supported model uses.
    """

    def __init__(self, backend: tokenizers.Tokenizer, facts: TokenizerFacts) -> None:
        backend.no_truncation()
        backend.no_padding()
        _mark_special(backend, facts.special_tokens.values())
        self._backend = backend
        self._decoder = read_decoder(backend.decoder.__getstate__() if backend.decoder else None)
        self._added = backend.get_added_tokens_decoder()
        self._warned = False
        self._bytes: dict[int, bytes] = {}
        self._pieces: dict[int, str | None] = {}
        self.special_tokens: dict[str, str] = dict(facts.special_tokens)
        self.special_ids = frozenset(id_ for id_, token in self._added.items() if token.special)
        self.bos_id = self._named_id("bos_token")
        self.pad_id = self._named_id("pad_token")
        self.chat_templates: dict[str, str] = dict(facts.chat_templates)
        highest = max(self._added, default=-1)
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=True), highest + 1)
        eos = self._named_id("eos_token")
        named = () if eos is None else (eos,)
        self.eos_ids = tuple(
            dict.fromkeys(id_ for id_ in (*facts.eos_ids, *named) if 0 <= id_ < self.vocab_size)
        )
        self._prefix, self._strip_bos = self._bos_plan(facts.add_bos)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read a checkpoint folder's tokenizer.

        Raises:
            CheckpointError: a file is missing, too large or malformed.
            UnsupportedModelError: there is only a SentencePiece ``tokenizer.model``.
        """
        root = Path(folder)
        path = root / "tokenizer.json"
        if not path.is_file():
            if (root / "tokenizer.model").is_file():
                raise UnsupportedModelError(
                    f"{root} has only a SentencePiece tokenizer.model; save it once with "
                    "transformers' AutoTokenizer to get a tokenizer.json."
                )
            raise CheckpointError(f"{root} has no tokenizer.json; copy it beside the weights.")
        data = _read_bytes(path)
        return cls(parse_backend(data, str(path)), _folder_facts(root))

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Read the tokenizer of a model: a checkpoint folder or a ``.gguf`` file.

        Raises:
            CheckpointError, UnsupportedModelError: as `from_folder` and ``open_gguf``.
        """
        if Path(path).suffix == ".gguf":
            from coppice.models.gguf.file import open_tokenizer

            return open_tokenizer(path)
        return cls.from_folder(path)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, max_chars: int | None = None
    ) -> list[int]:
        """Token ids of ``text``; special tokens written in it are recognised.

        Args:
            text: any string without lone surrogates.
            add_special_tokens: put the model's BOS (or whatever it wants) around the text. A
                rendered chat template already holds them, so pass ``False`` there.
            max_chars: refuse longer text before any work is done.

        Raises:
            ContextOverflowError: more than ``max_chars`` characters.
            RequestError: the text is not encodable as UTF-8, or not with this vocabulary.
        """
        if max_chars is not None and len(text) > max_chars:
            raise ContextOverflowError(
                f"The prompt has {len(text)} characters and at most {max_chars} can fit the "
                "context window; shorten it."
            )
        try:
            ids = self._split(text, add_special_tokens)
        except (UnicodeError, TypeError) as error:
            raise RequestError("The text holds lone surrogates; send valid Unicode.") from error
        except Exception as error:
            if type(error) is not Exception:  # which is what the library raises itself
                raise
            raise RequestError(f"The model's tokenizer cannot read this text: {error}.") from error
        if add_special_tokens:
            if self._strip_bos and ids[:1] == [self.bos_id]:
                ids = ids[1:]
            ids = self._prefix + ids
        self._warn_double_bos(ids)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of the whole sequence; ids outside the vocabulary contribute nothing."""
        known = [id_ for id_ in ids if 0 <= id_ < 1 << 32]
        (text,) = self._backend.decode_batch([known], skip_special_tokens=skip_special_tokens)
        return str(text)

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes one token stands for; empty for an id the vocabulary lacks.

        Special tokens give the UTF-8 of their name. A SentencePiece word keeps its leading
        space, which ``decode`` drops at the start of a text.
        """
        cached = self._bytes.get(token)
        if cached is None:
            piece = self.piece(token)
            cached = b"" if piece is None else self._decoder.token_bytes(piece)
            self._bytes[token] = cached
        return cached

    def piece(self, token: int) -> str | None:
        """The vocabulary entry as written in the file, or ``None``."""
        try:
            return self._pieces[token]
        except KeyError:
            inside = 0 <= token < self.vocab_size
            piece = self._backend.id_to_token(token) if inside else None
            self._pieces[token] = piece
            return piece

    def token_id(self, piece: str) -> int | None:
        """The id of a vocabulary entry, for example a special token's text."""
        found: int | None = self._backend.token_to_id(piece)
        return found

    def text_stream(self, *, keep_leading_space: bool = False) -> TextStream:
        """An incremental decoder; feed it `piece` values (see `TextStream`)."""
        return self._decoder.stream(keep_leading_space=keep_leading_space)

    def chat_template(self, *, tools: bool = False) -> str | None:
        """The template to use, see `chat_template_name`."""
        name = self.chat_template_name(tools=tools)
        return None if name is None else self.chat_templates[name]

    def chat_template_name(self, *, tools: bool = False) -> str | None:
        """Which template to use: ``tool_use`` when there are tools and one is named so."""
        names = ("tool_use", "default") if tools else ("default",)
        return next((name for name in names if name in self.chat_templates), None)

    def require_vocab(self, model_vocab_size: int) -> None:
        """Check that every id fits the model's embedding.

        Raises:
            CheckpointError: the tokenizer belongs to another model.
        """
        if self.vocab_size > model_vocab_size:
            raise CheckpointError(
                f"The tokenizer has {self.vocab_size} tokens and the model only "
                f"{model_vocab_size}; use the tokenizer that came with the weights."
            )

    @property
    def decoder(self) -> DecoderSpec:
        """How its tokens become text."""
        return self._decoder

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with the vocabulary, specials or chat templates."""
        digest = hashlib.sha256(self._backend.to_str().encode("utf-8", "replace"))
        rest = [self.special_tokens, self.eos_ids, self._prefix, self._strip_bos]
        digest.update(json.dumps([*rest, self.chat_templates], sort_keys=True).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def vocabulary_fingerprint(self) -> str:
        """Sixteen hex digits that change with the tokens and their ids only."""
        vocabulary = sorted(self._backend.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]

    def _split(self, text: str, add_special_tokens: bool) -> list[int]:
        # NOTE: `encode` holds the interpreter's lock: a long text would stop all other threads,
        # the server's event loop with them. A batch does not; for short texts it costs more.
        if len(text) <= SHORT_CHARS:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        else:
            batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids = batch[0].ids
        return ids

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.token_id(text)

    def _bos_plan(self, add_bos: bool | None) -> tuple[list[int], bool]:
        """Ids to prefix, and whether the tokenizer's own BOS must go."""
        if add_bos is None or self.bos_id is None:
            return [], False
        adds = self._backend.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]
        return ([self.bos_id] if add_bos and not adds else []), (adds and not add_bos)

    def _warn_double_bos(self, ids: list[int]) -> None:
        if self.bos_id is not None and ids[:2] == [self.bos_id] * 2 and not self._warned:
            self._warned = True
            _log.warning(
                "A prompt begins with two BOS tokens; drop the one in the text or encode with "
                "add_special_tokens=False. Answers get worse with both. (Said once.)"
            )


def _mark_special(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Named special tokens count as special even where ``tokenizer.json`` forgot to say so."""
    added = backend.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    missing = [t for t in texts if t not in special and backend.token_to_id(t) is not None]
    backend.add_special_tokens(missing)


def parse_backend(data: bytes, origin: str) -> tokenizers.Tokenizer:
    """Build the ``tokenizers`` object from JSON.

    Bytes, not text: one rare character would make the text four times as large as the file.

    Raises:
        CheckpointError: the bytes are not a tokenizer; ``origin`` is named in the message.
    """
    with refusing(origin):
        backend = tokenizers.Tokenizer.from_buffer(data)
        # Some contradictions (an unknown token that does not exist) only show in use.
        backend.decode(backend.encode(PROBE).ids)
    return backend


@contextmanager
def refusing(origin: str) -> Iterator[None]:
    """Turn whatever ``tokenizers`` raises on bad data into a `CheckpointError`.

    The library raises bare ``Exception``, and its Rust panics arrive as a ``BaseException``
    of their own.
    """
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(
                f"{origin} is not a readable tokenizer ({str(error)[:200]}); download it again."
            ) from error
        raise


def _check_size(path: Path, limit: int) -> None:
    if path.stat().st_size > limit:
        raise CheckpointError(f"{path} is larger than {limit} bytes; is it the right file?")


def _read_bytes(path: Path) -> bytes:
    try:
        _check_size(path, MAX_FILE_BYTES)
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _read_text(path: Path, limit: int) -> str:
    try:
        _check_size(path, limit)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or ``{}`` when the file does not exist."""
    if not path.is_file():
        return {}
    try:
        text = _read_text(path, MAX_FILE_BYTES)
        value = json.loads(text)
        if "\\ud" in text.lower():  # half of a surrogate pair is valid JSON, but no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object; download it again.")
    return value


def _folder_facts(root: Path) -> TokenizerFacts:
    config = _read_json(root / "tokenizer_config.json")
    named = _read_json(root / "special_tokens_map.json")
    named.update({key: config[key] for key in NAMED_SPECIALS if config.get(key) is not None})
    specials = {}
    for key in NAMED_SPECIALS:
        value = named.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            specials[key] = text
    model = _read_json(root / "config.json")
    nested = model.get("text_config")
    sources = [_read_json(root / "generation_config.json"), model, nested]
    eos = [
        id_
        for source in sources
        if isinstance(source, dict)
        for id_ in eos_list(source.get("eos_token_id"))
    ]
    add_bos = config.get("add_bos_token")
    return TokenizerFacts(
        special_tokens=specials,
        eos_ids=tuple(dict.fromkeys(eos)),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        chat_templates=_folder_templates(root, config),
    )


def eos_list(value: object) -> list[int]:
    """``eos_token_id`` as configurations write it: absent, one id or a list.

    Raises:
        CheckpointError: anything else.
    """
    ids: Iterable[object] = value if isinstance(value, list) else [value]
    kept = [id_ for id_ in ids if id_ is not None]
    if not all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in kept):
        raise CheckpointError(f"eos_token_id must be an id or a list of ids, not {value!r:.80}.")
    return [id_ for id_ in kept if isinstance(id_, int)]


def _folder_templates(root: Path, config: dict[str, Any]) -> dict[str, str]:
    templates: dict[str, str] = {}
    inline = config.get("chat_template")
    if isinstance(inline, str):
        templates["default"] = inline
    elif isinstance(inline, list):
        for entry in inline:
            match entry:
                case {"name": str(name), "template": str(text)}:
                    templates[name] = text
                case _:
                    raise CheckpointError("chat_template in tokenizer_config.json is malformed.")
    elif inline is not None:
        raise CheckpointError("chat_template in tokenizer_config.json is malformed.")
    if (root / "chat_template.jinja").is_file():
        templates["default"] = _read_text(root / "chat_template.jinja", MAX_TEMPLATE_BYTES)
    for path in sorted((root / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _read_text(path, MAX_TEMPLATE_BYTES)
    return templates
