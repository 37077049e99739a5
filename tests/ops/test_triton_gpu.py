"""The Triton backends with what torch does around an op, on a GPU: compile, graphs, autocast, checkpoints, sharding.

Values and gradients at all sizes are in the files of the backends; here every backend has one case.
"""

import os
from dataclasses import replace

import pytest
import test_diagonal
import test_discretized
import test_householder
import test_low_rank
import torch
import torch.distributed as dist
from cases import relative_error
from torch.utils.checkpoint import checkpoint
from triton_cases import gpu_results, on_gpu

from statetrack.mixers.deltanet import DeltaNetConfig, DeltaProductConfig, KimiDeltaAttentionConfig
from statetrack.mixers.gla import GLAConfig
from statetrack.mixers.mamba import MambaConfig
from statetrack.mixers.rwkv7 import RWKV7Config
from statetrack.model import LanguageModel, ModelConfig

pytestmark = pytest.mark.gpu

BFLOAT16 = {"dtype": torch.bfloat16}
CASES = {
    "householder": lambda t: test_householder.make_case(2, t, 2, 2, 32, 32, decay="head", normalize=True, **BFLOAT16),
    "householder, segments": lambda t: test_householder.make_case(1, 8 * t, 1, 1, 32, 32, normalize=True, **BFLOAT16),
    "diagonal, heads": lambda t: test_diagonal.make_case(2, t, 2, 32, 32, decay="head", **BFLOAT16),
    "diagonal, channels": lambda t: test_diagonal.make_case(2, t, 2, 32, 32, decay="channel", **BFLOAT16),
    "diagonal, segments": lambda t: test_diagonal.make_case(1, 8 * t, 1, 32, 32, decay="head", **BFLOAT16),
    "discretized": lambda t: test_discretized.make_case(2, t, 2, 16, 32, **BFLOAT16),
    "low rank": lambda t: test_low_rank.make_case(2, t, 2, 32, 32, **BFLOAT16),
    "low rank, segments": lambda t: test_low_rank.make_case(1, 8 * t, 1, 32, 32, **BFLOAT16),
}
MIXERS = {
    "deltanet": DeltaNetConfig(num_heads=2, backend="triton"),
    "deltaproduct": DeltaProductConfig(num_heads=2, backend="triton"),
    "kda": KimiDeltaAttentionConfig(num_heads=2, backend="triton"),
    "gla": GLAConfig(num_heads=2, backend="triton"),
    "mamba": MambaConfig(backend="triton"),
    "rwkv7": RWKV7Config(backend="triton"),
}


@pytest.fixture(params=list(CASES))
def make(request):
    return lambda t=150: on_gpu(CASES[request.param](t))


def loss_of(case):
    """The case's tensors, and a function of them."""
    names = list(case.tensors())

    def loss(*tensors):
        o, state = case.with_tensors(dict(zip(names, tensors, strict=True))).run("triton")
        return o.float().square().sum() + state.square().sum()

    return [x.detach().requires_grad_() for x in case.tensors().values()], loss


def gradients(loss, inputs):
    return torch.autograd.grad(loss(*inputs), inputs)


def same(actual, expected, tolerance=0.0):
    return all(relative_error(a, e) <= tolerance for a, e in zip(actual, expected, strict=True))


def test_compiled_in_one_graph_for_every_length(make):
    torch._dynamo.reset()
    compiled = {}
    for t in (150, 217):
        inputs, loss = loss_of(make(t))
        compiled.setdefault("loss", torch.compile(loss, fullgraph=True, dynamic=True))
        assert same(gradients(compiled["loss"], inputs), gradients(loss, inputs), 1e-2)


def test_captured_in_a_graph(make):
    inputs, loss = loss_of(make())
    expected = gradients(loss, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(loss, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(loss, inputs)
    for _ in range(2):
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        assert same(captured, expected)


def test_autocast_changes_nothing_inside(make):
    inputs, loss = loss_of(make())
    with torch.autocast("cuda", torch.float16):
        cast = gradients(loss, inputs)
    assert same(cast, gradients(loss, inputs))


def test_checkpoints_give_the_same_gradients(make):
    inputs, loss = loss_of(make())
    again = gradients(lambda *xs: checkpoint(loss, *xs, use_reentrant=False), inputs)
    assert same(again, gradients(loss, inputs))


def test_high_precision_rounds_results_alone(make):
    case = make()
    exact = gpu_results(case.with_tensors({name: x.double() for name, x in case.tensors().items()}), "reference")
    high = gpu_results(case, "triton", "high")
    errors = {name: relative_error(high[name], expected) for name, expected in exact.items()}
    # bfloat16 results are rounded by 1.7e-3; the feedback has 16 bits, or 21 in tf32x3.
    assert all(error < (2.5e-3 if high[name].dtype == torch.bfloat16 else 2e-4) for name, error in errors.items()), (
        errors
    )


def small_model(mixer):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=16, d_model=64, num_layers=2, mlp_ratio=2.0, mixer=mixer)
    return LanguageModel(config).cuda(), torch.randint(16, (4, 96), device="cuda")


def step_gradients(model, ids):
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_models_train_in_autocast_as_with_the_chunked_backend(mixer):
    model, ids = small_model(mixer)
    other, _ = small_model(replace(mixer, backend="chunked"))
    other.load_state_dict(model.state_dict())
    assert relative_error(step_gradients(model, ids), step_gradients(other, ids)) < 1e-2
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert a.grad is not None, name
        assert a.grad.isfinite().all(), name
        assert torch.nn.functional.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > 0.98, name


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # Inductor's advice, once a process
@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_models_compile_in_one_graph(mixer):
    torch._dynamo.reset()
    model, ids = small_model(mixer)
    with torch.no_grad():
        expected = model(ids)
        compiled = torch.compile(model, fullgraph=True)(ids)
    assert relative_error(compiled, expected) < 1e-3


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    if not dist.is_nccl_available():
        pytest.skip("needs NCCL")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = tmp_path_factory.mktemp("dist") / "store"
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_sharded_models_have_the_same_gradients(mixer, one_process):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model, ids = small_model(mixer)
    sharded, _ = small_model(mixer)
    for block in sharded.blocks:
        fsdp.fully_shard(block)
    fsdp.fully_shard(sharded)
    step_gradients(model, ids)
    step_gradients(sharded, ids)
    for (name, a), b in zip(sharded.named_parameters(), model.parameters(), strict=True):
        assert relative_error(a.grad.full_tensor(), b.grad) < 1e-3, name
