"""sLSTM against the equations of its paper, as they are before the stabilizer, in a float64 loop with autograd."""

import pytest
import torch

from statetrack import SLSTM
from statetrack.ops.slstm import slstm


def written_out(mixer, x):
    """The paper's equations 8 to 14, one sequence [T, D] and one head at a time."""
    heads, n = mixer.num_heads, mixer.head_dim
    weights = [p.weight.view(heads, n, -1) for p in (mixer.z_proj, mixer.i_proj, mixer.f_proj, mixer.g_proj)]
    outputs = []
    for head in range(heads):
        recurrent, bias = mixer.recurrent[head].view(n, 4, n), mixer.bias[head].view(4, n)
        h = c = normalizer = torch.zeros(n, dtype=x.dtype)
        rows = []
        for token in x:
            z, i, f, o = (weights[g][head] @ token + h @ recurrent[:, g] + bias[g] for g in range(4))
            c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
            normalizer = torch.sigmoid(f) * normalizer + torch.exp(i)
            h = torch.sigmoid(o) * c / normalizer
            rows.append(h)
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, -1) @ mixer.o_proj.weight.T


def layer():
    torch.manual_seed(0)
    mixer = SLSTM(6, num_heads=2, head_dim=4, conv_size=0, output_norm=False).double()
    with torch.no_grad():
        mixer.recurrent.normal_()
        mixer.bias.normal_()
    return mixer


@pytest.mark.parametrize("pieces", [[13], [1, 4, 8]])
def test_outputs_and_gradients_equal_the_equations(pieces):
    """Also in pieces with the state handed on, through which gradients flow."""
    mixer = layer()
    x = torch.randn(2, 13, 6, dtype=torch.float64, requires_grad=True)
    state, outputs = None, []
    for piece in x.split(pieces, 1):
        y, state = mixer.scan(piece, state)
        outputs.append(y)
    actual, expected = torch.cat(outputs, 1), torch.stack([written_out(mixer, row) for row in x])
    assert torch.allclose(actual, expected, atol=1e-12)
    weights = torch.randn_like(actual)
    inputs = [x, *mixer.parameters()]
    ours, theirs = (torch.autograd.grad((y * weights).sum(), inputs) for y in (actual, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


def test_float32_is_close_to_float64():
    mixer, x = layer(), torch.randn(2, 50, 6)
    exact = mixer(x.double())
    assert (mixer.float()(x) - exact).norm() <= 1e-5 * exact.norm()


def test_gates_that_overflow_an_exponential_are_stabilized():
    """Input gates of 1000 and -1000: with them all equal, they cancel out of c / n."""
    mixer, x = layer(), torch.randn(1, 9, 6, dtype=torch.float64)
    with torch.no_grad():
        mixer.recurrent.view(2, 4, 4, 4)[:, :, 1] = 0
        mixer.i_proj.weight.zero_()
    results = []
    for level in (0.0, 1000.0, -1000.0):
        with torch.no_grad():
            mixer.bias.view(2, 4, 4)[:, 1] = level
        results.append(mixer(x))
    assert torch.allclose(results[0], results[1])
    assert torch.allclose(results[0], results[2])


def test_gradients_of_the_operator_agree_with_finite_differences():
    torch.manual_seed(0)
    parts = [torch.randn(1, 4, 2, 2, dtype=torch.float64) for _ in range(4)]
    bias, recurrent = torch.randn(2, 8, dtype=torch.float64), torch.randn(2, 2, 8, dtype=torch.float64)
    state = [torch.randn(1, 2, 2, dtype=torch.float64) for _ in range(4)]
    state[2] = state[2].exp()

    def function(*tensors):
        h, c, n, _ = slstm(tensors[:4], *tensors[4:6], (*tensors[6:], state[3]))
        return h, c / n  # what does not depend on the stabilizer

    inputs = [x.requires_grad_() for x in (*parts, bias, recurrent, *state[:3])]
    assert torch.autograd.gradcheck(function, inputs)


def test_a_wrong_option_is_refused():
    with pytest.raises(ValueError, match="slstm has no eigenvalue_range: "):
        SLSTM(8, eigenvalue_range=(-1, 1))
    with pytest.raises(ValueError, match="num_heads = 4 must divide d_model = 6"):
        SLSTM(6)
    with pytest.raises(ValueError, match="conv_size must be 0"):
        SLSTM(8, conv_size=1)
    assert SLSTM(8).transition(torch.randn(1, 2, 8)) is None


LENGTHS = [300, 2, 31, 5, 120, 9, 14, 77, 1, 40]  # as rows of the longest they would have five times the tokens


def test_slstm_goes_through_documents_side_by_side(monkeypatch):
    shapes = []

    def counted(inputs, *others):
        shapes.append(inputs[0].shape[:2])
        return slstm(inputs, *others)

    monkeypatch.setattr("statetrack.mixers.slstm.slstm", counted)
    mixer = SLSTM(8, num_heads=2)
    mixer(torch.randn(1, sum(LENGTHS), 8), torch.tensor([0, *LENGTHS]).cumsum(0))
    assert sum(steps for _, steps in shapes) == max(LENGTHS)
    assert sum(LENGTHS) <= sum(rows * steps for rows, steps in shapes) <= 1.2 * sum(LENGTHS)
