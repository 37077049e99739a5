"""What the tests of the Triton kernels share: when they can run, and the comparison with the reference on a GPU.

Under Triton's interpreter, which needs TRITON_INTERPRET=1 before triton is imported and so a process of its own, they
run on any machine (`make test-kernels`). That shows that the algorithm is right, in float32, not that the compiler is.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import relative_error
from torch.utils._pytree import tree_map_only

from statetrack.ops import triton_common

needs_triton = pytest.mark.skipif(not triton_common.HAS_TRITON, reason="needs triton")
INTERPRETED = triton_common.HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs triton and TRITON_INTERPRET=1: `make test-kernels`")
FLOAT32 = {"dtype": torch.float32}
# (K, V) for a GPU, where tiles of keys are narrower than those of values, or the reverse, or neither: compilers and
# assemblers have been wrong about some of these and right about all others. 100 is no power of two.
SIZES = [*itertools.product((16, 32, 64, 128, 256), repeat=2), (160, 100), (24, 100)]


def run_compiler(*arguments, **environment):
    """What Python, given these arguments at the root of the repository, prints. Fails if its status is not 0.

    A process of its own, for a stand-in that takes the place of triton's driver, and with the interpreter off.
    """
    root = str(Path(__file__).parents[2])
    inherited = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_prepared_once(prepare):
    """That a kernel given a second time stays as it is, and that what is no kernel does at once."""
    kernel, other = SimpleNamespace(_do_compile=lambda: None), SimpleNamespace()
    prepare(kernel)
    once = kernel._do_compile
    prepare(kernel)
    prepare(other)
    assert kernel._do_compile is once
    assert not vars(other)


def short_segments(monkeypatch):
    """Segments of a few chunks, scanned at once as on a device that rows do not fill."""
    monkeypatch.setattr(triton_common, "processors", lambda device: 100)
    monkeypatch.setattr(triton_common, "_FEWEST_SEGMENTS", 2)
    monkeypatch.setattr(triton_common, "_SHORTEST_SEGMENT", 2)


def on_gpu(case):
    return case.with_tensors({name: x.cuda() for name, x in case.tensors().items()})


def check_on_gpu(case, tolerance=None):
    """As `check_against_reference`, whose weights are made on the CPU: o, the final state and every gradient.

    A second time they are the same bit for bit: what two threads do in no order need not be far from right.
    """
    case = on_gpu(case)
    limit = tolerance or {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 2e-5}[case.v.dtype]
    computed = gpu_results(case, "triton")
    exact = gpu_results(case.with_tensors({name: x.double() for name, x in case.tensors().items()}), "reference")
    errors = {name: relative_error(computed[name], expected) for name, expected in exact.items()}
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    assert not wrong, f"relative errors above {limit:g}: {wrong}"
    again = gpu_results(case, "triton")
    different = [name for name, x in computed.items() if not torch.equal(x, again[name])]
    assert not different, f"not the same the second time: {different}"


def gpu_results(case, backend, precision="default"):
    inputs = {name: x.detach().clone().requires_grad_() for name, x in case.tensors().items()}
    o, state = case.with_tensors(inputs).run(backend, precision)
    generator = torch.Generator("cuda").manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator, device="cuda").bfloat16().to(x.dtype) for x in (o, state)]
    gradients = torch.autograd.grad([o, state], list(inputs.values()), weights)
    return {"o": o.detach(), "final state": state.detach(), **dict(zip(inputs, gradients, strict=True))}


def check_operators(module, case):
    """That the operators' fake kernels and schemas tell the truth, for the arguments that a backend gives them."""
    calls = []
    inputs = {name: x.detach().clone().requires_grad_() for name, x in case.tensors().items()}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_forward_op", "_backward_op"):
            operator = getattr(module, name)

            def record(*arguments, operator=operator):
                calls.append((operator, arguments))
                return operator(*arguments)

            patch.setattr(module, name, record)
        o, state = case.with_tensors(inputs).run("triton")
        (o.sum() + state.sum()).backward()
    assert [operator for operator, _ in calls] == [module._forward_op, module._backward_op]
    for operator, arguments in calls:
        detached = tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
        torch.library.opcheck(operator, detached, test_utils=("test_schema", "test_faketensor"))


def check_compiled(case, longer):
    """That torch.compile takes a call as one graph, which then serves a longer sequence too, forward and backward."""
    names = list(case.tensors())
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    def loss(*tensors):
        o, state = case.with_tensors(dict(zip(names, tensors, strict=True))).run("triton")
        return o.square().sum() + state.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    for each in (case, longer):
        inputs = [x.requires_grad_() for x in each.tensors().values()]
        expected = torch.autograd.grad(loss(*inputs), inputs)
        computed = torch.autograd.grad(compiled(*inputs), inputs)
        assert all(torch.equal(a, b) for a, b in zip(computed, expected, strict=True))
    assert graphs == 1
