"""Text to token ids: bytes, byte-level BPE trained on the text itself, or any tokenizer of transformers.

In the token files every document begins with the separator, a token that stands for the beginning and the end of a
document: a model predicts the first token of a document from it, and it after the last.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SEPARATOR = "<|endoftext|>"
# What marks a tokenizer that was made here, in its tokenizer_config.json.
_MARK = "statetrack_tokenizer"
# One of them is in every directory with a tokenizer of transformers.
_TOKENIZER_FILES = ("*token*", "vocab*", "*.model")
# Longer documents are encoded in pieces, as the memory of an encoding is many times that of its text.
_PIECE = 2**20


class TextTokenizer(ABC):
    """Text to token ids.

    Attributes:
        vocab_size: how many token ids there are, the separator included.
        separator: the id of the separator.
    """

    vocab_size: int
    separator: int

    def encode(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """The token ids of each document, without separators, int64."""
        waiting: list[str] = []
        counts: list[int] = []
        size = 0
        for document in documents:
            pieces = list(_pieces(document))
            waiting += pieces
            counts.append(len(pieces))
            size += len(document)
            if size >= _PIECE:
                yield from self._joined(waiting, counts)
                waiting, counts, size = [], [], 0
        yield from self._joined(waiting, counts)

    def _joined(self, pieces: list[str], counts: list[int]) -> Iterator[np.ndarray]:
        encoded = iter(self._encode(pieces))
        for count in counts:
            yield np.concatenate([np.asarray(next(encoded), np.int64) for _ in range(count)])

    @abstractmethod
    def _encode(self, texts: Sequence[str]) -> Iterable[Sequence[int]]: ...

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes the files from which `load_tokenizer` and `AutoTokenizer` make it again."""


class _BytePairs(TextTokenizer):
    """A byte-level BPE of the package tokenizers."""

    kind = "bpe"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        self.separator = tokenizer.token_to_id(SEPARATOR)

    def _encode(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        return (encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def save(self, directory: Path) -> None:
        self.tokenizer.save(str(directory / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {"bos_token": SEPARATOR, "eos_token": SEPARATOR, "pad_token": SEPARATOR, "padding_side": "left"}
        config |= {"model_input_names": ["input_ids", "attention_mask"], _MARK: self.kind}
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class _Bytes(_BytePairs):
    """The bytes of UTF-8, a token each; the same ids as the BPE without merges that is saved for it."""

    kind = "bytes"

    def _encode(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        return (np.frombuffer(text.encode(), np.uint8) for text in texts)  # pyright: ignore[reportReturnType]


class _Transformers(TextTokenizer):
    """A tokenizer of transformers."""

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"the tokenizer {name} needs transformers, which comes with: pip install 'statetrack[hf]'",
                name="transformers",
            ) from None
        try:
            # Without the argument transformers may ask, on the terminal, whether to run code of the checkpoint.
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"the tokenizer {name} can't be read: {' '.join(str(error).split())}") from None
        self.vocab_size = len(self.tokenizer)
        separators = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        if separators == (None, None):
            raise ValueError(f"the tokenizer {name} has neither bos_token nor eos_token to separate documents with")
        self.separator = separators[1] if separators[0] is None else separators[0]

    def _encode(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(list(texts), **options)["input_ids"] if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def save(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(directory)


def byte_tokenizer() -> TextTokenizer:
    """Bytes: the ids 0 to 255, and 256 for the separator."""
    tokenizers = _tokenizers()
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    _byte_level(tokenizer, use_regex=False)
    tokenizer.add_special_tokens([tokenizers.AddedToken(SEPARATOR, special=True)])
    return _Bytes(tokenizer)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A byte-level BPE trained on texts; no text is out of its reach, whatever it was trained on.

    Raises:
        ValueError: if vocab_size has no room for all bytes and the separator.
    """
    tokenizers = _tokenizers()
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (the bytes and the separator), got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    _byte_level(tokenizer, use_regex=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[SEPARATOR], initial_alphabet=sorted(_byte_letters()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _BytePairs(tokenizer)


def load_tokenizer(name: Path | str) -> TextTokenizer:
    """The tokenizer "bytes", one that `save` has written to a directory, or one of transformers, by directory or name.

    Raises:
        ValueError: if there is none, its files are damaged, or it has no token to separate documents with.
        ModuleNotFoundError: if transformers is needed and missing.
    """
    if str(name) == "bytes":
        return byte_tokenizer()
    directory = Path(name)
    if directory.is_dir() and not any(next(directory.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        raise ValueError(f"{name} has no tokenizer: the files tokenizer.json and tokenizer_config.json are missing")
    config, file = directory / "tokenizer_config.json", directory / "tokenizer.json"
    kind = _kind(config) if config.exists() else None
    for ours in (_BytePairs, _Bytes):
        if ours.kind == kind:
            try:
                return ours(_tokenizers().Tokenizer.from_file(str(file)))
            except ModuleNotFoundError:
                raise
            except Exception as error:  # the package has no exception of its own
                message = " ".join(str(error).split())
                raise ValueError(f"{file} is missing or damaged ({message}); copy the tokenizer again") from None
    return _Transformers(str(name))


def _kind(config: Path) -> str | None:
    try:
        return json.loads(config.read_text(encoding="utf-8")).get(_MARK)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is no JSON object ({error}); copy the tokenizer again") from None


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "text is tokenized by the package tokenizers, which comes with: pip install 'statetrack[data]'",
            name="tokenizers",
        ) from None
    return tokenizers


def _byte_level(tokenizer: Any, *, use_regex: bool) -> None:
    tokenizers = _tokenizers()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level BPE: printable ones for themselves, others beyond 255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _pieces(document: str) -> Iterator[str]:
    """A document in pieces of bounded size, cut after line ends where there are any."""
    start = 0
    while len(document) - start > _PIECE:
        line_end = document.rfind("\n", start, start + _PIECE) + 1
        stop = line_end or start + _PIECE
        yield document[start:stop]
        start = stop
    yield document[start:]
