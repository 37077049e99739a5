"""The Triton kernels for one token: under Triton's interpreter with TRITON_INTERPRET=1, and on a GPU (marked `gpu`)."""

from dataclasses import replace

import pytest
import torch
from cases import relative_error
from test_step import KINDS, make_case
from torch.utils._pytree import tree_map_only
from triton_cases import interpreted, on_gpu

from statetrack.ops import triton_step
from statetrack.ops.step import in_place_steps

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def check(case):
    """Both forms of the step against the reference, and which memory the state after it has."""
    expected = case.with_tensors({name: x.double() for name, x in case.tensors().items()}).run("reference")
    arguments = (case.transition, case.q, case.v, case.write)
    before = case.initial_state.clone()
    o, state = triton_step.run(*arguments, case.initial_state)
    assert torch.equal(case.initial_state, before)
    with in_place_steps():
        o_in_place, after = triton_step.run(*arguments, before)
    assert after is before
    assert torch.equal(after, state)
    assert torch.equal(o_in_place, o)
    assert o.dtype == case.v.dtype
    assert relative_error(o, expected[0]) < TOLERANCE[case.v.dtype]
    assert relative_error(state, expected[1]) < 1e-6


@interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_token_agrees_with_the_reference(kind, dtype):
    check(make_case(kind, dtype))


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_state_it_starts_from_zeros(kind):
    case = make_case(kind, torch.float32)
    case = replace(case, initial_state=None)
    o, state = triton_step.run(case.transition, case.q, case.v, case.write, None)
    expected = case.run("reference")
    assert relative_error(o, expected[0]) < 1e-6
    assert relative_error(state, expected[1]) < 1e-6


@interpreted
def test_keys_of_length_zero_do_nothing():
    case = make_case("householder", torch.float32)
    state = case.initial_state
    still = replace(case, transition=replace(case.transition, k=torch.zeros_like(case.transition.k)))
    assert torch.equal(triton_step.run(still.transition, still.q, still.v, None, state)[1], state)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_linear_recurrence_comes_here_for_a_single_token(kind):
    case = make_case(kind, torch.float32, (1, 1, 2, 5, 7))
    expected, state = case.run("reference"), case.initial_state.clone()
    with in_place_steps():
        o, after = replace(case, initial_state=state).run("triton")
    assert after is state
    assert relative_error(o, expected[0]) < 1e-6
    assert relative_error(state, expected[1]) < 1e-6
    o, after = replace(case, q=case.q.requires_grad_()).run("triton")  # with a gradient, a backend that has one
    assert o.requires_grad


@interpreted
@pytest.mark.parametrize("kind", ["householder, channel", "diagonal, head", "low rank, channel", "discretized"])
def test_operators_say_what_they_overwrite(kind, monkeypatch):
    calls = []
    for name in ("_householder_op", "_diagonal_op", "_low_rank_op", "_discretized_op"):
        operator = getattr(triton_step, name)

        def record(*arguments, operator=operator):
            calls.append((operator, tree_map_only(torch.Tensor, torch.clone, arguments)))
            return operator(*arguments)

        monkeypatch.setattr(triton_step, name, record)
    case = make_case(kind, torch.float32)
    triton_step.run(case.transition, case.q, case.v, case.write, case.initial_state)
    with in_place_steps():
        triton_step.run(case.transition, case.q, case.v, case.write, case.initial_state)
    assert len(calls) == 2
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@interpreted
@pytest.mark.parametrize("kind", ["householder", "diagonal, channel", "low rank, head", "discretized, lower end"])
def test_a_compiled_and_an_exported_step_overwrite_the_state(kind):
    case = make_case(kind, torch.float32)
    names, tensors = zip(*case.tensors().items(), strict=True)

    class Step(torch.nn.Module):
        def forward(self, *xs):
            with in_place_steps():
                return case.with_tensors(dict(zip(names, xs, strict=True))).run("triton")[0]

    expected, end = case.run("reference")
    torch._dynamo.reset()
    compiled = torch.compile(Step(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Step(), tuple(x.clone() for x in tensors)).module()
    for step in (compiled, exported):
        inputs = [x.clone() for x in tensors]
        assert relative_error(step(*inputs), expected) < 1e-6
        assert relative_error(inputs[names.index("initial_state")], end) < 1e-6


def test_what_is_not_served_is_said(monkeypatch):
    monkeypatch.setattr("statetrack.ops.triton_common.HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = make_case("diagonal, head", torch.float32)

    def reason(case):
        return triton_step.supports(case.transition, case.q, case.v, case.write, case.initial_state) or ""

    assert reason(case) == ""
    assert "does not serve float64" in reason(make_case("diagonal, head"))
    assert "have no backward" in reason(replace(case, v=case.v.clone().requires_grad_()))
    assert "up to 256 channels, not 300" in reason(replace(case, q=torch.zeros(2, 1, 3, 300)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("sizes", [(1, 16, 2, 128, 128), (64, 4, 1, 40, 72), (3, 2, 3, 256, 200)], ids=str)
def test_a_token_on_a_gpu(kind, dtype, sizes):
    check(on_gpu(make_case(kind, dtype, sizes)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["householder", "diagonal, channel", "low rank, head", "discretized"])
def test_a_captured_step_goes_on_from_the_state_it_has_written(kind):
    case = on_gpu(make_case(kind, torch.float32, (2, 4, 1, 64, 64)))
    state = case.initial_state.clone()

    def step(state):
        with in_place_steps():
            return triton_step.run(case.transition, case.q, case.v, case.write, state)[0]

    expected = case.initial_state.clone()
    outputs = [step(expected) for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step(state)
    for output in outputs:
        graph.replay()
        assert torch.equal(o, output)
    assert torch.equal(state, expected)
