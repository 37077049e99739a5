"""Batches of prepared tokens: the same ones for any number of ranks and workers, and after any interruption."""

import itertools
import pickle

import numpy as np
import pytest
import torch

from statetrack import ModelConfig
from statetrack.data import PackedBatches, PackedRows, PackedTokens, PrepareConfig, TextSource, prepare

T = 16


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    for name, words in (("a", "alpha"), ("b", "beta")):
        (place / name).mkdir()
        for index in range(25):
            (place / name / f"{index:02d}.txt").write_text(f"{words} {index} " * (index % 7 + 1))
    sources = [TextSource(name, str(place / name)) for name in "ab"]
    prepare(sources, place / "out", PrepareConfig(tokenizer="bytes", held_out=0.1, shard_bytes=400))
    return place / "out"


@pytest.fixture
def tokens(directory):
    return PackedTokens(directory)


def take(batches, count):
    return list(itertools.islice(batches, count))


def rows(batch):
    """The windows of a batch, in their order."""
    return [tuple(row.tolist()) for row in batch.ids[0].reshape(-1, T)]


def equal(first, second):
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("ids", "labels", "cu_seqlens"))


def test_any_piece_of_the_stream_can_be_read(tokens):
    ids, starts = tokens.read(0, tokens.num_tokens)
    assert (ids == 256).sum() == len(starts)
    for start, stop in ((0, 1), (5, 5), (17, 333), (380, 420), (tokens.num_tokens - 9, tokens.num_tokens)):
        piece, begins = tokens.read(start, stop)
        assert np.array_equal(piece, ids[start:stop])
        assert np.array_equal(begins, starts[(starts >= start) & (starts < stop)] - start)
    with pytest.raises(ValueError, match="tokens lie in 0"):
        tokens.read(0, tokens.num_tokens + 1)


def test_a_batch_has_windows_labels_and_boundaries(tokens):
    batches = PackedBatches(tokens, sequence_length=T, batch_size=3)
    ids, starts = tokens.read(0, tokens.num_tokens)
    windows = {tuple(ids[i * T : (i + 1) * T].tolist()): i for i in range(batches.num_windows)}
    for batch in take(batches, 5):
        assert batch.ids.shape == batch.labels.shape == (1, 3 * T)
        expected = {0, T, 2 * T, 3 * T}
        for row, window in enumerate(rows(batch)):
            at = windows[window] * T
            assert torch.equal(batch.labels[0, row * T : (row + 1) * T], torch.from_numpy(ids[at + 1 : at + T + 1]))
            expected |= {int(start - at + row * T) for start in starts if at <= start < at + T}
        assert batch.cu_seqlens.tolist() == sorted(expected)


def test_an_epoch_has_every_window_once_and_the_next_another_order(tokens):
    batches = PackedBatches(tokens, sequence_length=T, batch_size=2, seed=3)
    steps = batches.steps_per_epoch
    drawn = [window for batch in take(batches, 2 * steps) for window in rows(batch)]
    ids, _ = tokens.read(0, tokens.num_tokens)
    every = sorted(tuple(ids[i * T : (i + 1) * T].tolist()) for i in range(batches.num_windows))
    first, second = drawn[: 2 * steps], drawn[2 * steps :]
    left_out = batches.num_windows - 2 * steps
    assert left_out in (0, 1)
    assert len(set(every) - set(first)) <= left_out
    assert first != second
    other = [
        window
        for batch in take(PackedBatches(tokens, sequence_length=T, batch_size=2, seed=4), steps)
        for window in rows(batch)
    ]
    assert other != first


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_the_batches_of_one(tokens, world_size):
    whole = take(PackedBatches(tokens, sequence_length=T, batch_size=6), 9)
    ranks = [
        take(PackedBatches(tokens, sequence_length=T, batch_size=6, rank=rank, world_size=world_size), 9)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        together = [row for shares in zip(*(rows(rank[step]) for rank in ranks), strict=True) for row in shares]
        assert together == rows(batch)


def test_any_step_is_a_place_to_go_on(tokens):
    options = {"sequence_length": T, "batch_size": 4, "seed": 1}
    whole = take(PackedBatches(tokens, **options), 3 * PackedBatches(tokens, **options).steps_per_epoch)
    for start in (1, 7, len(whole) // 2, len(whole) - 1):
        rest = take(PackedBatches(tokens, start_step=start, **options), len(whole) - start)
        assert all(map(equal, rest, whole[start:]))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tokens, workers):
    options = {"sequence_length": T, "batch_size": 4, "start_step": 2, "rank": 1, "world_size": 2}
    expected = take(PackedBatches(tokens, **options), 8)
    got = take(PackedBatches(tokens, **options).loader(workers), 8)
    assert all(map(equal, got, expected))


def test_a_stream_goes_to_other_processes_without_its_maps(tokens):
    tokens.read(0, 9)
    copy = pickle.loads(pickle.dumps(tokens))
    assert len(pickle.dumps(tokens)) < 20_000
    assert np.array_equal(copy.read(0, 99)[0], tokens.read(0, 99)[0])


def test_domains_and_splits_are_streams_of_their_own(directory):
    whole, a, b = (PackedTokens(directory, "train", domains) for domains in (None, ["a"], ["b"]))
    assert whole.num_tokens == a.num_tokens + b.num_tokens
    text = bytes(x for x in b.read(0, b.num_tokens)[0].tolist() if x < 256).decode()
    assert "beta" in text
    assert "alpha" not in text
    assert PackedTokens(directory, "held_out").num_tokens < whole.num_tokens


def test_rows_for_the_trainer_reset_the_state_where_documents_begin(tokens):
    from statetrack.hf import StatetrackConfig, StatetrackForCausalLM

    data = PackedRows(tokens, T)
    assert len(data) == tokens.num_tokens // T
    ids, starts = tokens.read(0, tokens.num_tokens)
    torch.manual_seed(0)
    model = StatetrackForCausalLM(StatetrackConfig.of(ModelConfig(vocab_size=257, d_model=16))).double().eval()
    chosen = [index for index in range(len(data)) if ((starts > index * T) & (starts < (index + 1) * T)).any()][:3]
    batch = {name: torch.stack([data[index][name] for index in chosen]) for name in data[0]}
    logits = model(**batch).logits
    for row, index in enumerate(chosen):
        cuts = [0, *(int(s) - index * T for s in starts if index * T < s < (index + 1) * T), T]
        assert torch.equal(batch["input_ids"][row], torch.from_numpy(ids[index * T : (index + 1) * T]))
        alone = [model(batch["input_ids"][row : row + 1, a:b]).logits for a, b in itertools.pairwise(cuts)]
        assert torch.allclose(logits[row], torch.cat(alone, 1)[0])
    with pytest.raises(IndexError, match="windows, got"):
        data[len(data)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "must be at least 1"),
        ({"start_step": -1}, "start_step at least 0"),
        ({"rank": 2, "world_size": 2}, "got rank 2 of 2"),
        ({"world_size": 3}, "world_size divide batch_size = 4"),
        ({"sequence_length": 10**6}, r"needs 4,000,001 tokens, and there are "),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        PackedBatches(tokens, **{"sequence_length": T, "batch_size": 4, **options})


def test_what_is_not_there_is_named(directory, tokens):
    with pytest.raises(ValueError, match="split must be train or held_out, got 'test'"):
        PackedTokens(directory, "test")
    with pytest.raises(ValueError, match="has no domain 'c'; it has a, b"):
        PackedTokens(directory, domains=["c"])
    with pytest.raises(ValueError, match=r"sequence_length must lie in 1\.\."):
        PackedRows(tokens, tokens.num_tokens + 1)


def test_the_boundaries_of_a_batch_stay_on_the_host(tokens):
    batch = next(iter(PackedBatches(tokens, sequence_length=T, batch_size=2)))
    moved = batch.to("meta")
    assert moved.ids.device.type == moved.labels.device.type == "meta"
    assert moved.cu_seqlens is batch.cu_seqlens
