"""A sequence over several processes: outputs, the final state and all gradients are those of one process."""

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks

from statetrack import LanguageModel, ModelConfig, mixer_config, mixer_configs
from statetrack.split_in_time import local_piece, split_in_time, sum_gradients

NAMES = [name for name in mixer_configs() if name != "attention"]
TOKENS = 11  # pieces of 4, 4 and 3


def make(names, num_layers=2):
    torch.manual_seed(0)
    mixer = tuple(mixer_config(name)() for name in names)
    return LanguageModel(
        ModelConfig(vocab_size=7, d_model=16, num_layers=num_layers, mlp_ratio=1, mixer=mixer)
    ).double()


def loss_of(logits, weights):
    return (logits * weights).sum()


def compare(rank, ranks, path, mixers):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    try:
        for names in mixers:
            model = make(names)
            ids = torch.randint(7, (2, TOKENS + 2))
            weights = torch.randn(2, TOKENS, 7, dtype=torch.float64)
            start = [{name: x.detach() for name, x in layer.items()} for layer in model.scan(ids[:, :2])[1]]
            for given in (start, None):  # a state, or none: that is learned by some mixers
                compare_one(model, ids[:, 2:], weights, given, (rank, ranks), names)
    finally:
        dist.destroy_process_group()


def compare_one(model, ids, weights, start, place, names):
    rank, ranks = place
    model.zero_grad()
    logits, state = model.scan(ids, start)
    loss_of(logits, weights).backward()
    expected = [(None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    model.zero_grad()
    with split_in_time(model):
        piece, after = model.scan(local_piece(ids), start if rank == 0 else None)
        loss_of(piece, local_piece(weights)).backward()
    sum_gradients(model)
    assert torch.allclose(piece, local_piece(logits), atol=1e-12), names
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        assert parameter.grad is not None
        assert (parameter.grad - gradient).norm() <= 1e-10 * (1 + gradient.norm()), names
    with torch.no_grad(), split_in_time(model):
        assert torch.allclose(model.scan(local_piece(ids), start if rank == 0 else None)[0], piece), names
    if rank == ranks - 1:
        for layer, layer_after in zip(state, after, strict=True):
            assert all(torch.allclose(layer[name], x) for name, x in layer_after.items()), names
    assert torch.allclose(model.scan(ids, start)[0], logits)  # outside nothing has changed


def run(tmp_path, ranks, mixers):
    run_ranks(compare, (ranks, tmp_path / "store", mixers), ranks)


def test_two_processes_equal_one(tmp_path):
    run(tmp_path, 2, [("gated_deltaproduct", "mlstm"), ("retnet", "slstm"), ("homogeneous_deltaproduct",)])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
def test_more_processes_equal_one_for_every_mixer(tmp_path, ranks):
    run(tmp_path, ranks, [(name,) for name in NAMES])


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="attention can't be split in time"), split_in_time(make(["attention"])):
        pass
    model = make(["deltanet"])
    with split_in_time(model), pytest.raises(ValueError, match="packed or padded sequences"):
        model.scan(torch.zeros(1, 4, dtype=torch.long), cu_seqlens=torch.tensor([0, 2, 4]))
    assert "scan" not in vars(model.blocks[0].mixer)
    model.checkpoint_blocks(lambda function, *arguments: function(*arguments))
    with pytest.raises(ValueError, match="turn checkpoint_blocks off"), split_in_time(model):
        pass
    with pytest.raises(ValueError, match="at least a token for each"):
        local_piece(torch.zeros(2, 0))
