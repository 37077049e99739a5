"""Documents -> token files and a manifest, the same ones whenever it is done, and however often it was interrupted.

A prepared directory holds

manifest.json            what went in, the tokenizer, and each file with its number of tokens and its hash
tokenizer/               the tokenizer, as `AutoTokenizer` reads it too
train/DOMAIN-00000.tokens.npy   token ids, uint16 or uint32, every document after a separator
train/DOMAIN-00000.starts.npy   where the documents begin, int64
held_out/...             the same for documents that training never sees
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from statetrack.data.sources import TextSource
from statetrack.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from statetrack.files import atomic_write, file_hash

FORMAT = 1
"""Number of the layout of a prepared directory; it changes when older readers could not make sense of one."""

SPLITS: tuple[Literal["train"], Literal["held_out"]] = ("train", "held_out")


class DataError(ValueError):
    """A directory of data that can't be used, and why."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How text becomes tokens.

    Attributes:
        tokenizer: "bpe", a byte-level BPE that is trained on the text; "bytes"; or a tokenizer of transformers, by its
            directory or its name.
        vocab_size: of the BPE, the separator included.
        held_out: share of the documents, chosen by a hash of their text, that training never sees.
        text_field: field of JSON Lines, parquet and datasets that holds the text.
        suffixes: read only the files of directories that end so, such as .py; all if empty.
        max_file_bytes: skip larger files of directories; None to skip none.
        shard_bytes: text in each token file, about.
        tokenizer_bytes: text that the BPE is trained on, at most, taken evenly from all of it.
        seed: of the choice of what is held out and of what the BPE is trained on.
    """

    tokenizer: str = "bpe"
    vocab_size: int = 16384
    held_out: float = 0.01
    text_field: str = "text"
    suffixes: tuple[str, ...] = ()
    max_file_bytes: int | None = None
    shard_bytes: int = 2**26
    tokenizer_bytes: int = 2**26
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must lie in [0, 1), got {self.held_out}")
        for name in ("shard_bytes", "tokenizer_bytes", "max_file_bytes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0..2^63 - 1, got {self.seed}")
        if self.tokenizer == "bpe" and self.vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (the bytes and the separator), got {self.vocab_size}")


@dataclass(frozen=True)
class Progress:
    """How far a preparation is.

    Attributes:
        domain: the domain at work.
        documents: documents read so far, of all domains.
        tokens: tokens written so far.
        skipped: files that were no UTF-8 text.
    """

    domain: str
    documents: int
    tokens: int
    skipped: int


@dataclass
class _Shard:
    """Documents that share a file, split by whether they are held out, and a hash of all of them in order."""

    domain: str
    index: int
    documents: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    size: int = 0
    hash: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def add(self, text: str, held_out: bool) -> None:
        data = text.encode()
        self.hash.update(len(data).to_bytes(8, "little") + data)
        self.size += len(data)
        self.documents[SPLITS[held_out]].append(text)

    @property
    def name(self) -> str:
        return f"{self.domain}-{self.index:05d}"


def prepare(
    sources: Sequence[TextSource],
    out: Path | str,
    config: PrepareConfig | None = None,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Writes token files, or goes on where an interrupted call with the same arguments stopped.

    Args:
        sources: the documents; those of one domain follow each other in this order.
        out: the directory to make, or to go on with.
        config: how; None for the defaults.
        on_progress: told after each shard.

    Returns:
        The manifest, as it stands in manifest.json.

    Raises:
        DataError: if the directory holds something else, was made with other arguments, or the text has changed since.
        ValueError: for sources that can't be read or hold no text.
    """
    config = PrepareConfig() if config is None else config
    if not sources:
        raise ValueError("prepare needs at least one source, for example code=src/")
    directory = Path(out)
    domains: dict[str, list[TextSource]] = {}
    for source in sources:
        domains.setdefault(source.domain, []).append(source)
    request = {
        "format": FORMAT,
        "sources": {domain: [source.location for source in group] for domain, group in domains.items()},
        "config": json.loads(json.dumps(asdict(config))),
    }
    manifest = _begin(directory, request)
    tokenizer = _tokenizer(directory, manifest, domains, config)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    manifest |= {"vocab_size": tokenizer.vocab_size, "separator": tokenizer.separator, "dtype": dtype.name}

    done = {shard["name"]: shard for shard in manifest["shards"]}
    documents = tokens = 0
    found: set[str] = set()
    skipped: list[Path] = []
    for domain, group in domains.items():
        for shard in _shards(domain, group, config, skipped.append):
            text_hash, known = shard.hash.hexdigest(), done.get(shard.name)
            found.add(shard.name)
            if known is not None and known["text_hash"] != text_hash:
                raise _changed(domain, directory)
            if known is None or not _present(directory, known):
                known = {"name": shard.name, "domain": domain, "text_hash": text_hash}
                for split, texts in shard.documents.items():
                    known[split] = _write(directory, split, shard.name, texts, tokenizer, dtype)
                done[shard.name] = known
                manifest["shards"] = [done[name] for name in sorted(done)]
                _save(directory, manifest)
            documents += sum(known[split]["documents"] for split in SPLITS)
            tokens += sum(known[split]["tokens"] for split in SPLITS)
            on_progress(Progress(domain, documents, tokens, len(skipped)))
    if gone := sorted(done.keys() - found):
        raise _changed(done[gone[0]]["domain"], directory)
    manifest |= {"complete": True, "skipped_files": len(skipped)}
    manifest["tokens"] = {
        split: {
            domain: sum(shard[split]["tokens"] for shard in manifest["shards"] if shard["domain"] == domain)
            for domain in domains
        }
        for split in SPLITS
    }
    _save(directory, manifest)
    return manifest


def read_manifest(directory: Path | str) -> dict[str, Any]:
    """The manifest of a directory whose preparation is complete.

    Raises:
        DataError: if it is missing, of another format, not complete, or lacks a file.
    """
    place = Path(directory)
    if not (place / "manifest.json").exists():
        raise DataError(f"{place} is no prepared data: it has no manifest.json; make it with statetrack data prepare")
    manifest = _load(place)
    if manifest.get("format") != FORMAT:
        raise DataError(f"{place} has the data format {manifest.get('format')!r}; this version reads {FORMAT}")
    if not manifest.get("complete"):
        raise DataError(f"the preparation of {place} was interrupted; the same command goes on with it")
    if not _sound(manifest):
        raise DataError(f"{place / 'manifest.json'} is not what was written; prepare the data again")
    for shard in manifest["shards"]:
        if not _present(place, shard):
            raise DataError(f"{place} lacks files of {shard['name']}, or they are cut short; prepare it again")
    return manifest


def check(directory: Path | str, *, rank: int = 0, world_size: int = 1, max_bytes: int | None = None) -> int:
    """Compares the files with their hashes in the manifest, those of the tokenizer too.

    Args:
        directory: what `prepare` has written.
        rank: which part of the token files to compare, where several processes share the work.
        world_size: into how many parts they are divided.
        max_bytes: compare no token files if together they are larger; None for no limit.

    Returns:
        How many token files were compared.

    Raises:
        DataError: naming the first file that differs, or as `read_manifest` does.
    """
    place, manifest = Path(directory), read_manifest(directory)
    _check_tokenizer(place, manifest)
    files = [entry for shard in manifest["shards"] for split in SPLITS for entry in shard[split]["files"]]
    if max_bytes is not None and sum(entry["bytes"] for entry in files) > max_bytes:
        return 0
    files = files[rank::world_size]
    for entry in files:
        if file_hash(place / entry["path"]) != entry["sha256"]:
            raise DataError(f"{place / entry['path']} is not the file that was written: its hash differs")
    return len(files)


def _begin(directory: Path, request: dict[str, Any]) -> dict[str, Any]:
    if directory.exists() and not directory.is_dir():
        raise DataError(f"{directory} is a file; prepared data needs a directory of its own")
    if (directory / "manifest.json").exists():
        manifest = _load(directory)
        if {key: manifest.get(key) for key in request} == request:
            return manifest
        # Nothing is lost of a preparation that failed at once, by a misspelled source for example.
        if manifest.get("complete") is not False or manifest.get("shards") != []:
            raise DataError(f"{directory} was prepared from other sources or with other options; give a new directory")
        return _new_manifest(directory, request)
    # A process killed on the spot may have left a temporary file, whose name begins with a dot.
    if directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
        raise DataError(f"{directory} has files in it but no manifest.json; give a new or empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    return _new_manifest(directory, request)


def _new_manifest(directory: Path, request: dict[str, Any]) -> dict[str, Any]:
    from statetrack import __version__

    manifest = {**request, "statetrack": __version__, "complete": False, "shards": []}
    _save(directory, manifest)
    return manifest


def _tokenizer(
    directory: Path, manifest: dict[str, Any], domains: dict[str, list[TextSource]], config: PrepareConfig
) -> TextTokenizer:
    place = directory / "tokenizer"
    if "tokenizer_files" not in manifest:
        shutil.rmtree(place, ignore_errors=True)  # what an interruption or another attempt has left
        place.mkdir()
        if config.tokenizer == "bpe":
            made = train_tokenizer(_sample(domains, config), config.vocab_size)
        else:
            made = load_tokenizer(config.tokenizer)
        made.save(place)
        manifest["tokenizer_files"] = {file.name: file_hash(file) for file in sorted(place.iterdir())}
        _save(directory, manifest)
    _check_tokenizer(directory, manifest)
    return load_tokenizer(place)


def _check_tokenizer(directory: Path, manifest: dict[str, Any]) -> None:
    for name, expected in manifest["tokenizer_files"].items():
        file = directory / "tokenizer" / name
        if not file.is_file() or file_hash(file) != expected:
            raise DataError(f"{file} is missing or not the file that was written; prepare the data in a new directory")


def _texts(group: Iterable[TextSource], config: PrepareConfig, on_skip: Callable[[Path], None]) -> Iterator[str]:
    for source in group:
        yield from source.documents(config.text_field, config.suffixes, config.max_file_bytes, on_skip)


def _shards(
    domain: str, group: list[TextSource], config: PrepareConfig, on_skip: Callable[[Path], None]
) -> Iterator[_Shard]:
    shard, skipped = _Shard(domain, 0), 0

    def skip(path: Path) -> None:
        nonlocal skipped
        skipped += 1
        on_skip(path)

    for text in _texts(group, config, skip):
        shard.add(text, _draw("held out", text, config.seed) < config.held_out)
        if shard.size >= config.shard_bytes:
            yield shard
            shard = _Shard(domain, shard.index + 1)
    if shard.size:
        yield shard
    elif not shard.index:
        files = f": {skipped} files were skipped, as they are not UTF-8" if skipped else ""
        raise ValueError(f"the domain {domain} has no text{files}")


def _sample(domains: dict[str, list[TextSource]], config: PrepareConfig) -> Iterator[str]:
    """Training documents with `tokenizer_bytes` of text, chosen by their hashes; all of them if they have no more."""

    def training() -> Iterator[str]:
        for group in domains.values():
            for text in _texts(group, config, lambda path: None):
                if _draw("held out", text, config.seed) >= config.held_out:
                    yield text

    total = sum(len(text.encode()) for text in training())
    if not total:
        raise ValueError("there is no text to train a tokenizer on; is all of it held out?")
    share, taken = config.tokenizer_bytes / total, 0
    for text in training():
        if _draw("tokenizer", text, config.seed) < share and taken < config.tokenizer_bytes:
            taken += len(text.encode())
            yield text


def _draw(purpose: str, text: str, seed: int) -> float:
    """A number in [0, 1) that a text has for a purpose, wherever and however often it occurs."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose.encode(), salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little") / 2**64


def _write(
    directory: Path, split: str, name: str, texts: list[str], tokenizer: TextTokenizer, dtype: np.dtype
) -> dict[str, Any]:
    separator = np.array([tokenizer.separator], np.int64)
    parts: list[np.ndarray] = []
    starts: list[int] = []
    length = 0
    for ids in tokenizer.encode(texts):
        starts.append(length)
        parts += [separator, ids]
        length += 1 + len(ids)
    tokens = np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
    files = []
    (directory / split).mkdir(exist_ok=True)
    for kind, array in (("tokens", tokens), ("starts", np.array(starts, np.int64))):
        path = f"{split}/{name}.{kind}.npy"
        data = io.BytesIO()
        np.save(data, array)
        atomic_write(directory / path, data.getvalue())
        files.append({"path": path, "bytes": data.tell(), "sha256": hashlib.sha256(data.getbuffer()).hexdigest()})
    return {"documents": len(texts), "tokens": length, "files": files}


def _changed(domain: str, directory: Path) -> DataError:
    return DataError(f"the text of {domain} has changed since {directory} was begun: give a new directory")


def _sound(manifest: dict[str, Any]) -> bool:
    """Whether a complete manifest has all that its readers look up, of the right kinds."""
    try:
        domains, kinds = list(manifest["sources"]), [manifest["vocab_size"], manifest["separator"]]
        kinds += [manifest["tokens"][split][domain] for split in SPLITS for domain in domains]
        files = []
        for shard in manifest["shards"]:
            kinds += [shard[split][key] for split in SPLITS for key in ("tokens", "documents")]
            files += [(e["path"], e["bytes"], e["sha256"]) for split in SPLITS for e in shard[split]["files"]]
            if shard["domain"] not in domains or any(len(shard[split]["files"]) != 2 for split in SPLITS):
                return False
        kinds += [size for _, size, _ in files]
        texts = [manifest["dtype"], *manifest["tokenizer_files"], *manifest["tokenizer_files"].values()]
        texts += [text for path, _, digest in files for text in (path, digest)]
    except (KeyError, TypeError, AttributeError):
        return False
    return all(type(number) is int and number >= 0 for number in kinds) and all(isinstance(x, str) for x in texts)


def _present(directory: Path, shard: dict[str, Any]) -> bool:
    paths = [(directory / entry["path"], entry["bytes"]) for split in SPLITS for entry in shard[split]["files"]]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _load(directory: Path) -> dict[str, Any]:
    file = directory / "manifest.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not valid JSON ({error}); prepare the data again") from None
    if not isinstance(data, dict):
        raise DataError(f"{file} must hold a JSON object; prepare the data again")
    return data


def _save(directory: Path, manifest: dict[str, Any]) -> None:
    atomic_write(directory / "manifest.json", json.dumps(manifest, indent=2) + "\n")
