"""The boundaries of packed sequences are read once, not by every layer: a read of a GPU's tensor waits for it."""

import gc
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from statetrack import LanguageModel, ModelConfig, mixer_config, mixer_configs
from statetrack.ops.packing import Packing, groups_of, on_host, packing_of, padded_rows, segments_of

BOUNDARIES = [0, 1, 1, 4, 9, 16, 20]

READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten.equal.default,
}


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU: scalars, shapes that depend on data, and whole tensors by `tolist`."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ("tolist", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))

    def _counted(self, method):
        def call(*args, **kwargs):
            self.count += 1
            return method(*args, **kwargs)

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indexed = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default)
        masks = indexed and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += func in READS or masks
        return func(*args, **(kwargs or {}))


def make(name, num_layers):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(vocab_size=7, d_model=16, num_layers=num_layers, mixer=mixer_config(name)()))


@pytest.mark.parametrize("recomputed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", mixer_configs())
@pytest.mark.thin(2)
def test_more_layers_read_no_more(name, recomputed, monkeypatch):
    counts = []
    for num_layers in (1, 4):
        model, ids, cu_seqlens = make(name, num_layers), torch.randint(7, (1, 20)), torch.tensor(BOUNDARIES)
        if recomputed:
            model.checkpoint_blocks(partial(checkpoint, use_reentrant=False))
        with monkeypatch.context() as patches, Reads(patches) as reads:
            model(ids, cu_seqlens).sum().backward()
        assert reads.count > 0
        counts.append(reads.count)
        with monkeypatch.context() as patches, Reads(patches) as again:
            model(ids, cu_seqlens).sum().backward()
        counts.append(again.count)
    first, _, first_of_four, again_of_four = counts
    assert first_of_four == first
    assert again_of_four <= 2  # the check of the ids, on a CPU alone
    assert counts[1] == again_of_four


@pytest.mark.parametrize("name", mixer_configs())
@pytest.mark.thin(2)
def test_boundaries_on_the_host_leave_nothing_to_read_from_the_device(name):
    # Nothing can be read from a tensor without data, so whatever a layer reads, forward or backward, is an error here.
    model = make(name, 4).to("meta")
    ids = torch.zeros(1, 20, dtype=torch.long, device="meta")
    logits = model(ids, torch.tensor(BOUNDARIES))
    logits.sum().backward()
    assert logits.shape == (1, 20, 7)
    assert all(parameter.grad is not None for parameter in model.blocks[0].mixer.parameters())


def test_boundaries_that_change_are_read_again():
    cu_seqlens = torch.tensor([0, 2, 5])
    before = packing_of(cu_seqlens)
    assert packing_of(cu_seqlens) is before
    cu_seqlens[1] = 4
    assert packing_of(cu_seqlens).lengths == [4, 1]
    assert before.lengths == [2, 3]


def test_what_is_made_is_kept_as_long_as_its_boundaries(monkeypatch):
    made = []
    monkeypatch.setattr(Packing, "__del__", lambda self: made.append(self.lengths), raising=False)
    cu_seqlens, x = torch.tensor([0, 2, 5]), torch.randn(1, 5, 3)
    assert padded_rows(cu_seqlens, x) is padded_rows(cu_seqlens, x)
    assert groups_of(cu_seqlens, x) is not groups_of(cu_seqlens, x, alike=True)
    gc.collect()
    assert made == []
    del cu_seqlens
    gc.collect()
    assert made == [[2, 3]]


def test_a_model_can_be_trained_with_the_boundaries_of_an_evaluation():
    model, ids = make("deltanet", 2), torch.randint(7, (1, 20))
    cu_seqlens = torch.tensor(BOUNDARIES)
    with torch.inference_mode():
        evaluated = model(ids, cu_seqlens)
        assert torch.equal(model(ids, cu_seqlens + 0), evaluated)  # boundaries that inference mode made
        assert not on_host(cu_seqlens + 0).is_inference()
    logits = model(ids, cu_seqlens)
    logits.sum().backward()
    assert torch.allclose(logits, evaluated, atol=1e-6)


def test_groups_and_rows_give_back_what_they_took():
    cu_seqlens, x = torch.tensor(BOUNDARIES), torch.randn(1, 20, 3)
    states = torch.randn(6, 2)
    rows = padded_rows(cu_seqlens, x)
    assert rows.unpack(x).shape == (6, 7, 3)
    assert torch.equal(rows.pack(rows.unpack(x)), x)
    for alike in (False, True):
        groups = groups_of(cu_seqlens, x, alike=alike)
        assert torch.equal(groups.join_tokens([take(x, torch.nan) for take in groups.groups]), x)
        taken = [states[take.sequences] for take in groups.groups]
        assert torch.equal(groups.join_states(taken, states), states)
        assert torch.equal(groups.join_states(taken, None)[1], torch.zeros(2))
        assert all(take.real is None for take in groups.groups) or not alike


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("lengths", [[3, 0, 1, 7, 7, 2], [20], [1] * 20, [0, 20, 0]])
def test_segments_have_as_many_steps_as_the_longest_sequence_and_lose_nothing(lengths, alike):
    x, states = torch.randn(1, 20, 3), torch.randn(len(lengths), 2)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    segments = segments_of(cu_seqlens, x, alike=alike)
    taken = [take(x) for take in segments.groups]
    assert sum(len(rows) for rows in taken) == max(lengths)
    assert torch.equal(segments.join_tokens(taken), x)
    padded = sum(rows.shape[0] * rows.shape[1] for rows in taken)
    assert padded == 20 if alike else padded <= 1.2 * 20
    ended = [states[take.sequences] for take in segments.groups]
    assert torch.equal(segments.join_states(ended, states), states)
    for take, rows, (steps, places) in zip(segments.groups, taken, segments.ends, strict=True):
        assert torch.equal(segments.order[places], take.sequences)
        assert torch.equal(rows[steps, places], x[0, cu_seqlens[take.sequences + 1] - 1])
