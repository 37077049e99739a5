"""Text to token files: what can be read, what is written, and that neither interruptions nor repetitions change it."""

import gzip
import itertools
import json
import lzma
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from statetrack.cli import main
from statetrack.data import DataError, PackedTokens, PrepareConfig, TextSource, check, load_tokenizer, prepare
from statetrack.data.tokenizer import byte_tokenizer, train_tokenizer

SMALL = PrepareConfig(tokenizer="bytes", held_out=0.25, shard_bytes=300)


def write_text(directory, count=30):
    directory.mkdir(parents=True)
    texts = [f"document {i}\n" + "naïve ☃ text " * (i % 5) for i in range(count)]
    for index, text in enumerate(texts):
        (directory / f"{index:03d}.txt").write_text(text, encoding="utf-8")
    return texts


def documents(directory, split, domains=None):
    """The documents of a split as text, read back from the tokens."""
    tokens, tokenizer = PackedTokens(directory, split, domains), load_tokenizer(directory / "tokenizer")
    ids, starts = tokens.read(0, tokens.num_tokens)
    assert (ids[starts] == tokens.separator).all()
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(ids, starts[1:])]


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_document_is_in_one_split(tokenizer, tmp_path):
    texts = write_text(tmp_path / "in")
    config = PrepareConfig(tokenizer=tokenizer, vocab_size=300, held_out=0.25, shard_bytes=300)
    manifest = prepare([TextSource("text", str(tmp_path / "in"))], tmp_path / "out", config)
    train, held_out = (documents(tmp_path / "out", split) for split in ("train", "held_out"))
    assert sorted(train + held_out) == sorted(texts)
    assert 2 <= len(held_out) <= 15
    assert train == [text for text in texts if text in train]  # in their order
    assert len(manifest["shards"]) > 3
    assert manifest["vocab_size"] == {"bytes": 257, "bpe": 300}[tokenizer]
    assert manifest["dtype"] == "uint16"
    counted = PackedTokens(tmp_path / "out").num_tokens
    assert manifest["tokens"]["train"]["text"] == counted


def test_domains_are_kept_apart(tmp_path):
    a, b = write_text(tmp_path / "a", 12), [f"other {i}" for i in range(12)]
    (tmp_path / "b.jsonl").write_text("\n\n".join(json.dumps({"text": text}) for text in b) + "\n", encoding="utf-8")
    sources = [TextSource("first", str(tmp_path / "a")), TextSource("second", str(tmp_path / "b.jsonl"))]
    prepare(sources, tmp_path / "out", SMALL)
    found = {name: documents(tmp_path / "out", "train", [name]) for name in ("first", "second")}
    assert set(found["first"]) <= set(a)
    assert set(found["second"]) <= set(b)
    assert documents(tmp_path / "out", "train", ["second", "first"]) == found["second"] + found["first"]
    # What is held out depends on the text alone, wherever it stands.
    prepare([TextSource("second", str(tmp_path / "b.jsonl"))], tmp_path / "alone", SMALL)
    assert documents(tmp_path / "alone", "train") == found["second"]


def test_files_of_all_kinds_are_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    place = tmp_path / "in"
    (place / "deep").mkdir(parents=True)
    parquet.write_table(arrow.table({"body": ["from parquet", None, ""], "n": [1, 2, 3]}), place / "c.parquet")
    with gzip.open(place / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"body": "from gzip"}\n{"body": "another"}\n')
    with lzma.open(place / "deep" / "a.txt.xz", "wb") as file:
        file.write(b"from xz")
    (place / "d.txt").write_bytes(b"\xff\xfe no text")
    (place / ".hidden").write_text("hidden")
    (place / "e.txt").write_text("")
    skipped = []
    source = TextSource("text", str(place))
    found = list(source.documents("body", on_skip=skipped.append))
    assert found == ["from gzip", "another", "from parquet", "from xz"]
    assert [path.name for path in skipped] == ["d.txt"]
    assert list(source.documents("body", suffixes=(".xz",))) == ["from xz"]
    assert list(source.documents("body", suffixes=(".txt", ".xz"), max_file_bytes=5)) == []
    with pytest.raises(ValueError, match="has no column 'text'; it has body, n"):
        list(TextSource("text", str(place / "c.parquet")).documents())


@pytest.mark.filterwarnings("ignore")  # of datasets' own pickles
def test_datasets_of_hugging_face_are_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"text": "one", "n": 1}\n{"text": "two", "n": 2}\n')
    source = TextSource.of(f"books=hf:{tmp_path / 'rows'}")
    assert source.domain == "books"
    assert list(source.documents()) == ["one", "two"]
    rows = datasets.load_dataset(str(tmp_path / "rows"), split="train", cache_dir=str(tmp_path / "cache"))
    rows.save_to_disk(str(tmp_path / "saved"))
    assert list(TextSource.of(f"hf:{tmp_path / 'saved'}").documents()) == ["one", "two"]
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "splits"))
    assert list(TextSource.of(f"hf:{tmp_path / 'splits'}:test").documents()) == ["one", "two"]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_an_interruption_changes_nothing(tokenizer, tmp_path):
    write_text(tmp_path / "in")
    source = [TextSource("text", str(tmp_path / "in"))]
    config = PrepareConfig(tokenizer=tokenizer, vocab_size=300, held_out=0.25, shard_bytes=300)
    prepare(source, tmp_path / "whole", config)
    for stop_after in (1, 2):
        calls = itertools.count(1)

        def stop(progress, calls=calls, stop_after=stop_after):
            if next(calls) == stop_after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "resumed", config, on_progress=stop)
        with pytest.raises(DataError, match="was interrupted; the same command goes on"):
            PackedTokens(tmp_path / "resumed")
    damaged = next((tmp_path / "resumed" / "train").glob("*.tokens.npy"))
    damaged.write_bytes(damaged.read_bytes()[:-1])  # as a crash of the machine may leave it
    prepare(source, tmp_path / "resumed", config)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    written = []
    prepare(source, tmp_path / "resumed", config, on_progress=written.append)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert written[-1].documents == 30


@pytest.mark.slow
def test_a_process_killed_anywhere_leaves_what_can_go_on(tmp_path):
    write_text(tmp_path / "in", 60)
    command = f"""
import os, statetrack.data.preparation as module
from statetrack.data import PrepareConfig, TextSource, prepare
written, save = [], module.atomic_write

def write(path, data):
    if len(written) == int(os.environ["KILL"]):
        (path.parent / f".{{path.name}}.tmp").write_text("half")
        os.kill(os.getpid(), 9)
    written.append(path)
    save(path, data)

module.atomic_write = write
config = PrepareConfig(tokenizer="bytes", held_out=0.25, shard_bytes=300)
prepare([TextSource("text", {str(tmp_path / "in")!r})], {str(tmp_path / "out")!r}, config)
"""
    for kill in (0, 1, 2, 4, 7):
        result = subprocess.run([sys.executable, "-c", command], env={**os.environ, "KILL": str(kill)})
        assert result.returncode == -signal.SIGKILL
    source = [TextSource("text", str(tmp_path / "in"))]
    prepare(source, tmp_path / "out", SMALL)
    prepare(source, tmp_path / "whole", SMALL)
    left = {path: data for path, data in contents(tmp_path / "out").items() if not path.name.startswith(".")}
    assert left == contents(tmp_path / "whole")
    assert check(tmp_path / "out") > 8


def test_other_text_and_other_options_need_another_directory(tmp_path):
    write_text(tmp_path / "in")
    source = [TextSource("text", str(tmp_path / "in"))]
    prepare(source, tmp_path / "out", SMALL)
    with pytest.raises(DataError, match="from other sources or with other options"):
        prepare(source, tmp_path / "out", PrepareConfig(tokenizer="bytes"))
    (tmp_path / "in" / "000.txt").write_text("changed")
    with pytest.raises(DataError, match="the text of text has changed since"):
        prepare(source, tmp_path / "out", SMALL)


def test_text_that_is_gone_is_noticed(tmp_path):
    write_text(tmp_path / "in")
    source = [TextSource("text", str(tmp_path / "in"))]
    manifest = prepare(source, tmp_path / "out", SMALL)
    total = sum(manifest["shards"][0][split]["documents"] for split in ("train", "held_out"))
    for file in sorted((tmp_path / "in").rglob("*.txt"))[total:]:
        file.unlink()
    with pytest.raises(DataError, match="the text of text has changed since"):
        prepare(source, tmp_path / "out", SMALL)


def test_a_misspelled_source_does_not_take_the_directory(tmp_path):
    write_text(tmp_path / "in")
    with pytest.raises(ValueError, match="no file or directory"):
        prepare([TextSource("text", str(tmp_path / "inn"))], tmp_path / "out", SMALL)
    other = PrepareConfig(tokenizer="bpe", vocab_size=300, held_out=0.25)
    prepare([TextSource("text", str(tmp_path / "in"))], tmp_path / "out", other)
    prepare([TextSource("text", str(tmp_path / "in"))], tmp_path / "whole", other)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("key", ["sources", "shards", "tokens", "vocab_size", "separator", "dtype", "tokenizer_files"])
def test_a_manifest_that_lacks_something_is_named(key, tmp_path):
    write_text(tmp_path / "in")
    prepare([TextSource("text", str(tmp_path / "in"))], tmp_path / "out", SMALL)
    file = tmp_path / "out" / "manifest.json"
    manifest = json.loads(file.read_text())
    for value in (None, -1, [{}]):
        file.write_text(json.dumps({**manifest, key: value}))
        with pytest.raises(DataError, match=r"manifest.json is not what was written"):
            PackedTokens(tmp_path / "out")


def test_nothing_is_read_that_was_not_written(tmp_path):
    write_text(tmp_path / "in")
    manifest = prepare([TextSource("text", str(tmp_path / "in"))], tmp_path / "out", SMALL)
    tokens, starts = (tmp_path / "out" / e["path"] for e in manifest["shards"][0]["train"]["files"])
    for file, old, new in ((tokens, b"<u2", b"|O2"), (tokens, b"NUMPY", b"numpy"), (starts, b"<i8", b"<f8")):
        data = file.read_bytes()
        file.write_bytes(data.replace(old, new, 1))
        with pytest.raises(DataError, match=f"{file.name} is not the file that was written"):
            PackedTokens(tmp_path / "out")
        file.write_bytes(data)
    for file, broken in ((tokens, b"\xff" * 8), (starts, b"\xff" * 8)):
        data = file.read_bytes()
        file.write_bytes(data[:-8] + broken)
        stream = PackedTokens(tmp_path / "out")
        with pytest.raises(DataError, match="beyond its vocabulary or documents out of order"):
            stream.read(0, manifest["shards"][0]["train"]["tokens"])
        file.write_bytes(data)


def test_hashes_find_a_changed_file(tmp_path):
    write_text(tmp_path / "in")
    manifest = prepare([TextSource("text", str(tmp_path / "in"))], tmp_path / "out", SMALL)
    assert check(tmp_path / "out") == 4 * len(manifest["shards"])
    file = tmp_path / "out" / manifest["shards"][1]["train"]["files"][0]["path"]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"text-00001\.tokens.npy is not the file that was written"):
        check(tmp_path / "out")
    assert check(tmp_path / "out", max_bytes=99) == 0
    parts = [check(tmp_path / "out", rank=rank, world_size=4) for rank in (1, 2, 3)]
    assert sum(parts) == 3 * len(manifest["shards"])
    file.unlink()
    with pytest.raises(DataError, match="lacks files of text-00001"):
        check(tmp_path / "out")


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_tokenizer(["a b ab abc"] * 9, 270)])
def test_tokenizers_are_read_again_here_and_by_transformers(make, tmp_path):
    ours, texts = make(), ["abc ☃\n\n  def", "", "x" * 5, "<|endoftext|> is text"]
    ours.save(tmp_path)
    read, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(read) is type(ours)
    assert (read.vocab_size, read.separator) == (len(theirs), theirs.eos_token_id) == (ours.vocab_size, ours.separator)
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert read.decode(ids.tolist()) == text
        assert ids.tolist() == next(iter(read.encode([text]))).tolist()
        if "<|" not in text:
            assert theirs(text)["input_ids"] == ids.tolist()
    assert list(theirs("abc")) == ["input_ids", "attention_mask"]


def test_the_bytes_are_those_of_utf_8():
    text = "naïve ☃\0\n"
    assert next(iter(byte_tokenizer().encode([text]))).tolist() == list(text.encode())


def test_training_a_tokenizer_is_deterministic(tmp_path):
    texts = [f"{i} some words and {i * i}" for i in range(200)]
    for name in "ab":
        (tmp_path / name).mkdir()
        train_tokenizer(iter(texts), 400).save(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_tokenizer_of_transformers_goes_along_whole(tmp_path):
    theirs = tmp_path / "theirs"
    train_tokenizer(["some text"] * 3, 260).save(theirs.parent)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained(theirs)
    config = json.loads((theirs / "tokenizer_config.json").read_text())
    del config["statetrack_tokenizer"]
    (theirs / "tokenizer_config.json").write_text(json.dumps(config))
    texts = write_text(tmp_path / "in")
    options = PrepareConfig(tokenizer=str(theirs), held_out=0)
    manifest = prepare([TextSource("text", str(tmp_path / "in"))], tmp_path / "out", options)
    assert (manifest["vocab_size"], manifest["separator"]) == (261, 260)
    assert documents(tmp_path / "out", "train") == texts
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer").bos_token == "<s>"
    with pytest.raises(DataError, match="has no held_out tokens of text"):
        PackedTokens(tmp_path / "out", "held_out")


def test_long_documents_are_encoded_in_pieces(monkeypatch):
    monkeypatch.setattr("statetrack.data.tokenizer._PIECE", 16)
    texts = ["a line\nanother line\n" * 5, "no line end at all " * 5, "", "short"]
    encoded = list(byte_tokenizer().encode(texts))
    assert [bytes(ids.tolist()).decode() for ids in encoded] == texts


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: TextSource.of("a b=c"), "a domain is a word of letters"),
        (lambda p: list(TextSource.of(str(p / "none")).documents()), "no file or directory"),
        (lambda p: list(TextSource.of(str(p)).documents(suffixes=(".py",))), "has no files that end in .py"),
        (lambda p: list(TextSource.of(str(p / "bad.jsonl")).documents()), "line 2: not valid JSON"),
        (lambda p: list(TextSource.of(str(p / "bad.jsonl")).documents("body")), "there is no field 'body', but text"),
        (lambda p: list(TextSource.of(str(p / "n.jsonl")).documents()), "must be a string, got int"),
        (lambda p: list(TextSource.of(str(p / "bytes.jsonl")).documents()), "bytes.jsonl, line 2: not UTF-8"),
        (lambda p: list(TextSource.of(str(p / "half.jsonl")).documents()), "half.jsonl, line 1: .*surrogate pair"),
        (lambda p: list(TextSource.of(str(p / "cut.jsonl.gz")).documents()), "cut.jsonl.gz is damaged or cut short"),
        (lambda p: list(TextSource.of(str(p / "no.txt.gz")).documents()), "no.txt.gz is damaged or cut short"),
        (lambda p: list(TextSource.of(str(p / "no.xz")).documents()), "no.xz is damaged or cut short"),
        (lambda p: list(TextSource.of(str(p / "no.parquet")).documents()), "no.parquet is damaged, or no parquet file"),
        (lambda p: list(TextSource.of("hf:a:b:c:d").documents()), "a dataset is hf:NAME"),
        (lambda p: prepare([], p / "out"), "at least one source"),
        (lambda p: prepare([TextSource.of(str(p / "empty"))], p / "out", SMALL), "the domain text has no text"),
        (lambda p: prepare([TextSource.of(str(p / "latin"))], p / "out", SMALL), "no text: 1 files were skipped"),
        (lambda p: prepare([TextSource.of(str(p / "ok"))], p, SMALL), "has files in it but no manifest.json"),
        (lambda p: prepare([TextSource.of(str(p / "ok"))], p / "ok", SMALL), "is a file; prepared data"),
        (lambda p: PackedTokens(p), "has no manifest.json"),
        (lambda p: load_tokenizer(p / "none"), "can't be read"),
        (lambda p: load_tokenizer(p / "damaged"), "damaged/tokenizer.json is missing or damaged"),
        (lambda p: load_tokenizer(p / "list"), "list/tokenizer_config.json is no JSON object"),
        (lambda p: load_tokenizer(p / "garbage"), "garbage/tokenizer_config.json is no JSON object"),
        (lambda p: PrepareConfig(seed=-1), r"seed must lie in 0\.\.2\^63 - 1"),
        (lambda p: train_tokenizer(["a"], 256), "vocab_size must be at least 257"),
        (lambda p: PrepareConfig(vocab_size=9), "vocab_size must be at least 257"),
        (lambda p: PrepareConfig(held_out=1), r"held_out must lie in \[0, 1\)"),
        (lambda p: PrepareConfig(shard_bytes=0), "shard_bytes must be at least 1"),
    ],
)
def test_bad_input_is_named(call, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", type(sys)("datasets"))
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "n.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n' * 99)[:-9])
    for name in ("no.txt.gz", "no.xz", "no.parquet", "latin"):
        (tmp_path / name).write_bytes(b"\xe9t\xe9")
    for name, text in (("damaged", '{"statetrack_tokenizer": "bpe"}'), ("list", "[]"), ("garbage", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text(text)
    (tmp_path / "ok").write_text("ok")
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_the_commands(tmp_path, capsys, monkeypatch):
    write_text(tmp_path / "in")
    words = ["data", "prepare", f"words={tmp_path / 'in'}", "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert main([*words, "--held-out", "0.25"]) == 0
    out = capsys.readouterr().out
    assert f"{PackedTokens(tmp_path / 'out').num_tokens:,}" in out
    assert main(["data", "check", str(tmp_path / "out")]) == 0
    assert "4 files are as they were written" in capsys.readouterr().out
    assert main([*words, "--held-out", "0.5"]) == 2
    assert "with other options" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["data", "prepare", "hf:anything", "--out", str(tmp_path / "hf")]) == 2
    assert "need the package datasets: pip install datasets" in capsys.readouterr().err


def test_a_model_reads_what_was_prepared(tmp_path):
    from statetrack import LanguageModel, ModelConfig
    from statetrack.data import PackedBatches

    write_text(tmp_path / "in")
    prepare([TextSource("text", str(tmp_path / "in"))], tmp_path / "out", SMALL)
    batches = PackedBatches(PackedTokens(tmp_path / "out"), sequence_length=32, batch_size=2)
    batch = next(iter(batches))
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=257, d_model=16, num_layers=1)).double()
    logits = model(batch.ids, batch.cu_seqlens)
    for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        assert torch.allclose(logits[:, start:stop], model(batch.ids[:, start:stop]))
