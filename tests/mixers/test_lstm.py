"""The LSTM against torch.nn.LSTM, which is run as a module, with its own packed sequences."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from statetrack import LSTM


def layer_and_original(hidden_size=None):
    torch.manual_seed(0)
    ours = LSTM(6, hidden_size=hidden_size).double()
    theirs = nn.LSTM(6, hidden_size or 6, batch_first=True).double()
    theirs.load_state_dict(ours.lstm.state_dict())
    return ours, theirs


@pytest.mark.parametrize("hidden_size", [None, 9])
def test_outputs_states_and_gradients_equal_those_of_pytorch(hidden_size):
    ours, theirs = layer_and_original(hidden_size)
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    y, state = ours.scan(x)
    h, (last, cell) = theirs(x)
    expected = h @ ours.o_proj.weight.T
    assert torch.allclose(y, expected)
    assert torch.allclose(state["h"], last[0])
    assert torch.allclose(state["c"], cell[0])
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(getattr(ours.lstm, name).grad, parameter.grad), name


def test_packed_sequences_equal_those_of_pytorch():
    ours, theirs = layer_and_original()
    sequences = [torch.randn(length, 6, dtype=torch.float64) for length in (3, 5, 3, 1)]
    start = {name: torch.randn(4, 6, dtype=torch.float64) for name in ("h", "c")}
    y, state = ours.scan(torch.cat(sequences)[None], start, torch.tensor([0, 3, 8, 11, 12]))
    h, (last, cell) = theirs(pack_sequence(sequences, enforce_sorted=False), (start["h"][None], start["c"][None]))
    padded, lengths = pad_packed_sequence(h, batch_first=True)
    expected = torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)]) @ ours.o_proj.weight.T
    assert torch.allclose(y[0], expected)
    assert torch.allclose(state["h"], last[0])
    assert torch.allclose(state["c"], cell[0])


def test_a_wrong_option_is_refused():
    with pytest.raises(ValueError, match="lstm has no eigenvalue_range: "):
        LSTM(6, eigenvalue_range=(-1, 1))
    with pytest.raises(ValueError, match="hidden_size of lstm must be a positive integer"):
        LSTM(6, hidden_size=0)
    assert LSTM(6).transition(torch.randn(1, 2, 6)) is None


@pytest.mark.parametrize(("channels", "rows"), [(7, 2), (9, 2), (8, 1), (8, 3)])
def test_inputs_and_states_of_other_sizes_are_refused(channels, rows):
    mixer = LSTM(8)
    with pytest.raises(ValueError, match=r"an LSTM with D = 8 takes x \[B, T, 8\] and states \[B, 8\]"):
        mixer.scan(torch.randn(2, 3, channels), mixer.init_state(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_on_a_cpu_asks_for_no_lstm_in_bfloat16(dtype):
    """Which oneDNN has on some CPUs alone; whatever is not matrix products in a model may come in either dtype."""
    mixer, x = LSTM(8), torch.randn(2, 5, 8).to(dtype)
    expected = mixer(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer.scan(x)
    assert {y.dtype, state["h"].dtype, state["c"].dtype} == {torch.bfloat16}
    assert (y.float() - expected).norm() <= 1e-2 * expected.norm()
    y.float().sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())
