"""The chunked cross-entropy: PyTorch's own in values and gradients, and no tensor with the logits of all tokens."""

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from statetrack import LanguageModel, ModelConfig, cross_entropy, mixer_config
from statetrack.cross_entropy import IGNORE, linear_cross_entropy, peak_bytes
from statetrack.ops.triton_common import CHECKED_ON_A_CARD

VOCAB = 31


@pytest.fixture(params=[1, 7, 2**24])
def chunked(request, monkeypatch):
    """Chunks of one token, of seven, and a single one."""
    monkeypatch.setattr(cross_entropy, "_LOGITS_ON_CPU", request.param * VOCAB)


def case(shape=(3, 8), d_model=5, dtype=torch.float64):
    x = torch.randn(*shape, d_model, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, d_model, dtype=dtype, requires_grad=True)
    bias = torch.randn(VOCAB, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCAB, shape)
    labels[0, ::2] = IGNORE
    return x, weight, bias, labels


def plain(x, weight, labels, bias=None, z_loss=0.0, reduction="mean"):
    logits, labels = F.linear(x, weight, bias).flatten(0, -2), labels.flatten()
    asked = (labels != IGNORE).to(logits.dtype)
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    losses = losses + z_loss * asked * torch.logsumexp(logits, -1).square()
    return losses if reduction == "none" else losses.sum() / asked.sum()


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("z_loss", [0.0, 1e-2, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_cross_entropy_of_pytorch(with_bias, z_loss):
    x, weight, bias, labels = case()
    inputs = (x, weight, bias) if with_bias else (x, weight)
    bias = bias if with_bias else None
    found = linear_cross_entropy(x, weight, labels, bias, z_loss=z_loss)
    expected = plain(x, weight, labels, bias, z_loss)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    gradients = torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    assert all(g.dtype == torch.float64 for g in gradients[0])
    with torch.no_grad():
        losses = linear_cross_entropy(x, weight, labels, bias, z_loss=z_loss, reduction="none")
        assert losses.shape == labels.shape
        torch.testing.assert_close(losses.flatten(), plain(x, weight, labels, bias, z_loss, "none"))
        assert torch.equal(linear_cross_entropy(x, weight, labels, bias, z_loss=z_loss), found)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_what_wants_a_gradient_gets_one(frozen):
    x, weight, bias, labels = case()
    inputs = [x, weight, bias]
    inputs[frozen].requires_grad_(False)
    linear_cross_entropy(x, weight, labels, bias).backward()
    assert [i for i, tensor in enumerate(inputs) if tensor.grad is None] == [frozen]


def test_logits_of_any_size_have_a_finite_loss():
    x, weight, _, labels = case(dtype=torch.float32)
    found = linear_cross_entropy(1e4 * x, 1e4 * weight, labels)
    expected = plain(1e4 * x.double(), 1e4 * weight.double(), labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(found, (x, weight)))


def test_without_a_label_the_mean_is_nan_as_that_of_pytorch():
    x, weight, _, labels = case()
    labels.fill_(IGNORE)
    assert linear_cross_entropy(x, weight, labels).isnan()
    assert plain(x, weight, labels).isnan()


@pytest.mark.usefixtures("chunked")
def test_in_bfloat16_it_is_as_near_to_exact_as_pytorch():
    x, weight, _, labels = case((4, 40), 64, torch.float32)
    with torch.no_grad():  # of trained models: logits of a few units
        weight *= 0.3
    exact = plain(x.double(), weight.double(), labels)
    wanted = torch.autograd.grad(exact, (x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        found, reference = linear_cross_entropy(x, weight, labels), plain(x, weight, labels)
    gradients, references = (torch.autograd.grad(loss, (x, weight)) for loss in (found, reference))
    assert found.dtype == torch.float32
    assert abs(found - exact) <= 1e-3 * exact
    for gradient, rounded, w in zip(gradients, references, wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - w).norm() <= 1.1 * (rounded - w).norm() <= 0.02 * w.norm()


def test_weights_in_bfloat16_have_gradients_in_bfloat16():
    x, weight, bias, labels = case(dtype=torch.bfloat16)
    loss = linear_cross_entropy(x, weight, labels, bias)
    loss.backward()
    assert loss.dtype == torch.float32
    assert {t.grad.dtype for t in (x, weight, bias)} == {torch.bfloat16}
    assert loss.item() == pytest.approx(plain(x.double(), weight.double(), labels, bias.double()).item(), rel=1e-2)


class _Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_no_tensor_has_the_logits_of_all_tokens(precision, monkeypatch):
    vocab, d_model, tokens, chunk = 512, 16, 1024, 64
    monkeypatch.setattr(cross_entropy, "_LOGITS_ON_CPU", chunk * vocab)
    config = ModelConfig(vocab_size=vocab, d_model=d_model, num_layers=1, mixer=mixer_config("deltanet")())
    model = LanguageModel(config)
    ids = torch.randint(vocab, (8, tokens // 8))
    with _Largest() as largest, torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        model(ids, labels=ids, z_loss=1e-4).backward()
    assert chunk * vocab <= largest.numel < tokens * vocab / 4
    with _Largest() as largest, torch.no_grad():
        model.scan_losses(ids, ids)
    assert chunk * vocab <= largest.numel < tokens * vocab / 4
    with _Largest() as largest:  # the check itself sees logits where there are any
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    assert largest.numel >= tokens * vocab


@pytest.mark.parametrize("tokens", [100, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_needs_at_once_is_known(dtype, tokens, monkeypatch):
    vocab, d_model = 3000, 64
    monkeypatch.setattr(cross_entropy, "_LOGITS_ON_CPU", 500 * vocab)
    x = torch.randn(tokens, d_model, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, d_model, requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    tracker = MemTracker()
    tracker.track_external(x, weight, labels)
    before = x.nbytes + weight.nbytes + labels.nbytes
    with tracker, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        linear_cross_entropy(x, weight, labels)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - before
    assert peak == pytest.approx(peak_bytes(tokens, vocab, d_model, dtype, device="cpu"), rel=0.1)


def test_the_kernel_needs_a_chunk_of_logits_and_nothing_beside_it(monkeypatch):
    """Of 65,536 tokens, a vocabulary of 32,000 and width 768, beside the gradients and the copy of the weight."""
    found = {}
    for priority in (0, CHECKED_ON_A_CARD):
        monkeypatch.setattr(cross_entropy.triton_cross_entropy, "PRIORITY", priority)
        found[priority] = peak_bytes(65_536, 32_000, 768, torch.bfloat16)
    logits, gradients = cross_entropy.LOGITS // 32_000 * 32_000, 32_000 * 768 * 4 + 65_536 * 768 * 2
    copy = 32_000 * 768 * 2
    assert found[0] == 10 * logits + gradients + copy
    assert found[CHECKED_ON_A_CARD] == 2 * logits + gradients + 2 * copy
    assert found[0] < 65_536 * 32_000 * 4 / 4


@pytest.mark.usefixtures("chunked")
def test_it_compiles_in_one_graph():
    x, weight, bias, labels = case(dtype=torch.float32)

    def loss(x, weight, bias):
        return linear_cross_entropy(x, weight, labels, bias, z_loss=1e-3)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected, found = loss(x, weight, bias), compiled(x, weight, bias)
    torch.testing.assert_close(found, expected)
    inputs = (x, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))


def make(tied=False, **options):
    torch.manual_seed(0)
    mixer = (mixer_config("gated_deltanet")(num_heads=2), mixer_config("mlstm")(num_heads=2))
    config = ModelConfig(vocab_size=VOCAB, d_model=8, num_layers=2, mixer=mixer, tie_embeddings=tied, **options)
    return LanguageModel(config).double()


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["rows", "packed", "padded"])
def test_the_loss_of_a_model_is_that_of_its_logits(kind, tied, chunked):
    model = make(tied, residual_in_float32=tied)
    ids, labels = torch.randint(VOCAB, (2, 2, 12))
    options, labels_of_logits = {}, labels
    if kind == "packed":
        ids, labels, options = ids.view(1, -1), labels.view(1, -1), {"cu_seqlens": torch.tensor([0, 5, 24])}
        labels_of_logits = labels
    if kind == "padded":
        mask = torch.rand(2, 12) < 0.7
        options, labels_of_logits = {"mask": mask}, labels.masked_fill(~mask, IGNORE)
    expected = plain(model(ids, **options), torch.eye(VOCAB, dtype=torch.float64), labels_of_logits, z_loss=0.1)
    wanted = gradients_of(model, expected)
    found = model(ids, **options, labels=labels, z_loss=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients_of(model, found), wanted, rtol=1e-9, atol=1e-12)


def test_losses_of_tokens_go_on_from_a_state():
    model = make()
    ids, labels = torch.randint(VOCAB, (2, 2, 12))
    expected = F.cross_entropy(model(ids).mT, labels, reduction="none")
    first, state = model.scan_losses(ids[:, :5], labels[:, :5])
    second, _ = model.scan_losses(ids[:, 5:], labels[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), expected)
    assert not first.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "sum"}, "reduction must be mean or none, got 'sum'"),
        ({"reduction": "none"}, "no gradient here"),
        ({"labels": torch.zeros(3, 7, dtype=torch.long)}, r"labels must be integers \[...\] = \(3, 8\)"),
        ({"labels": torch.zeros(3, 8)}, "got torch.float32"),
        ({"weight": torch.zeros(VOCAB, 6)}, "don't fit together"),
        ({"bias": torch.zeros(VOCAB + 1)}, "don't fit together"),
    ],
)
def test_bad_input_is_refused(change, message):
    x, weight, bias, labels = case()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"x": x, "weight": weight, "bias": bias, "labels": labels, **change})


@pytest.mark.parametrize("label", [-1, VOCAB])
def test_labels_out_of_range_are_refused(label):
    x, weight, _, labels = case()
    labels[1, 1] = label
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(x, weight, labels)


def test_it_has_no_second_derivative():
    x, weight, _, labels = case()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(x, weight, labels), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), weight)


def test_no_tokens_have_no_loss():
    x, weight, _, _ = case()
    none, labels = x.detach()[0, :0].requires_grad_(), torch.empty(0, dtype=torch.long)
    with torch.no_grad():
        assert linear_cross_entropy(none, weight, labels, reduction="none").shape == (0,)
    loss = linear_cross_entropy(none, weight, labels)
    assert loss.isnan()
    loss.backward()
    assert none.grad is not None
    assert none.grad.shape == none.shape
