"""Where documents come from: text files, JSON Lines, parquet, datasets of Hugging Face; always in the same order."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}
_DATASET = "hf:"


@dataclass(frozen=True)
class TextSource:
    """Documents of one domain.

    Attributes:
        domain: what the documents are called together, such as "code"; held-out text is kept apart by domain.
        location: a file or a directory, of which all files are read, sorted by path; or `hf:NAME`, `hf:NAME:SPLIT` or
            `hf:NAME:CONFIG:SPLIT` for a dataset of Hugging Face, where NAME may be a directory that
            `save_to_disk` has written.
    """

    domain: str
    location: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w-]*", self.domain):
            raise ValueError(f"a domain is a word of letters, digits, - and _, such as code; got {self.domain!r}")

    @classmethod
    def of(cls, text: str) -> TextSource:
        """The source `DOMAIN=LOCATION`, or `LOCATION` of the domain "text"."""
        domain, equals, location = text.partition("=")
        return cls(domain, location) if equals else cls("text", text)

    def documents(
        self,
        text_field: str = "text",
        suffixes: tuple[str, ...] = (),
        max_file_bytes: int | None = None,
        on_skip: Callable[[Path], None] = lambda path: None,
    ) -> Iterator[str]:
        """The documents that are not empty, in an order that only the source determines.

        A file .jsonl or .parquet holds a document a row, one with any other name is a document. Each of them may be
        compressed with gzip or xz (.gz, .xz), but for parquet.

        Args:
            text_field: field or column with the text.
            suffixes: read only the files of a directory that end so; all if empty.
            max_file_bytes: skip larger files of a directory.
            on_skip: told of each file that is no UTF-8 text, which is skipped.

        Raises:
            ValueError: if there is no such file, it is damaged, or a row is no JSON object or lacks the field.
            ModuleNotFoundError: if the package that reads it is missing.
        """
        if self.location.startswith(_DATASET):
            texts = _dataset_texts(self.location.removeprefix(_DATASET), text_field)
        else:
            texts = _file_texts(_files(Path(self.location), suffixes, max_file_bytes), text_field, on_skip)
        return (text for text in texts if text)


def _files(path: Path, suffixes: tuple[str, ...], max_file_bytes: int | None) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"there is no file or directory {path}")
    found = [
        (file.relative_to(path).as_posix(), file)
        for file in path.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and (not suffixes or file.name.endswith(suffixes))
        and (max_file_bytes is None or file.stat().st_size <= max_file_bytes)
    ]
    if not found:
        raise ValueError(f"{path} has no files" + (f" that end in {' or '.join(suffixes)}" if suffixes else ""))
    return [file for _, file in sorted(found)]


def _file_texts(files: list[Path], text_field: str, on_skip: Callable[[Path], None]) -> Iterator[str]:
    for file in files:
        packed = file.suffix if file.suffix in _OPENERS else ""
        kind = Path(file.name.removesuffix(packed)).suffix
        if kind == ".parquet":
            yield from _parquet_texts(file, text_field)
        elif kind == ".jsonl":
            yield from _json_texts(file, _OPENERS.get(packed, open), text_field)
        else:
            with _OPENERS.get(packed, open)(file, "rb") as stream, _undamaged(file):
                data = stream.read()
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                on_skip(file)
            else:
                yield text


def _json_texts(file: Path, opener: Callable[..., IO[Any]], text_field: str) -> Iterator[str]:
    with opener(file, "rb") as stream:
        lines = enumerate(stream, 1)
        while True:
            with _undamaged(file):
                number, line = next(lines, (0, b""))
            if not number:
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise ValueError(f"{file}, line {number}: not UTF-8") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not valid JSON ({error})") from None
            text = _field(row, text_field, f"{file}, line {number}")
            # JSON can say what no text has: one half of a pair of surrogates.
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"{file}, line {number}: the text has half of a surrogate pair, which is no character"
                ) from None
            yield text


def _parquet_texts(file: Path, text_field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "parquet files need pyarrow, which comes with: pip install 'statetrack[data]'", name="pyarrow"
        ) from None
    try:
        table = parquet.ParquetFile(file)
    except ArrowException as error:
        raise ValueError(f"{file} is damaged, or no parquet file: {error}") from None
    if text_field not in table.schema_arrow.names:
        raise ValueError(f"{file} has no column {text_field!r}; it has {', '.join(table.schema_arrow.names)}")
    for batch in table.iter_batches(columns=[text_field]):
        for number, text in enumerate(batch.column(0).to_pylist()):
            yield _field({text_field: text}, text_field, f"{file}, row {number}")


def _dataset_texts(name: str, text_field: str) -> Iterator[str]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "datasets of Hugging Face need the package datasets: pip install datasets", name="datasets"
        ) from None
    parts = name.split(":")
    if len(parts) > 3:
        raise ValueError(f"a dataset is hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, got hf:{name}")
    split = parts[-1] if len(parts) > 1 else "train"
    if any((Path(parts[0]) / name).exists() for name in ("state.json", "dataset_dict.json")):  # of save_to_disk
        found = datasets.load_from_disk(parts[0])
        rows = found[split] if isinstance(found, datasets.DatasetDict) else found
    else:
        rows = datasets.load_dataset(parts[0], parts[1] if len(parts) == 3 else None, split=split)
    for number, row in enumerate(rows):
        yield _field(row, text_field, f"hf:{name}, row {number}")


@contextmanager
def _undamaged(file: Path) -> Iterator[None]:
    """Names the file whose compressed contents can't be read."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{file} is damaged or cut short: {error}") from None


def _field(row: Any, text_field: str, place: str) -> str:
    if not isinstance(row, dict) or text_field not in row:
        known = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{place}: there is no field {text_field!r}, but {known}; say which one with text_field")
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{place}: the field {text_field!r} must be a string, got {type(text).__name__}")
    return text or ""
