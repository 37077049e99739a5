"""What the tests of the operations share: tolerances, and the comparison of a backend with the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from statetrack.ops import Precision, linear_recurrence
from statetrack.transition import Transition

# The relative error that a backend may have in its outputs, final states and gradients, by the dtype of its inputs; the
# reference computes in float64 from the same, already rounded inputs. States are float32 for all but float64.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Case:
    """The arguments of one call of `linear_recurrence`."""

    transition: Transition
    q: Tensor
    v: Tensor
    write: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Every floating-point argument by its name, those of the transition included."""
        pairs = [(f.name, getattr(owner, f.name)) for owner in (self.transition, self) for f in fields(owner)]
        return {name: x for name, x in pairs if isinstance(x, Tensor) and x.is_floating_point()}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Case:
        names = {f.name for f in fields(self.transition)}
        transition = replace(self.transition, **{k: x for k, x in tensors.items() if k in names})
        return replace(self, transition=transition, **{k: x for k, x in tensors.items() if k not in names})

    def run(self, backend: str, precision: Precision = "default") -> tuple[Tensor, Tensor]:
        return linear_recurrence(
            self.transition,
            self.q,
            self.v,
            write=self.write,
            initial_state=self.initial_state,
            cu_seqlens=self.cu_seqlens,
            backend=backend,
            precision=precision,
        )


def results(case: Case, backend: str, precision: Precision = "default") -> dict[str, Tensor]:
    """The output, the final state, and the gradient of every tensor for a fixed random weighting of the two."""
    inputs = {name: x.detach().clone().requires_grad_() for name, x in case.tensors().items()}
    o, state = case.with_tensors(inputs).run(backend, precision)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (o, state)]
    # The weights are rounded to the dtype of the outputs first, so that two dtypes are asked for the same gradient.
    weights = [w.to(torch.bfloat16).to(x.dtype) for w, x in zip(weights, (o, state), strict=True)]
    gradients = torch.autograd.grad([o, state], list(inputs.values()), weights)
    named = {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}
    return {"o": o.detach(), "final state": state.detach(), **named}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm; the absolute error where `expected` is all zeros."""
    assert actual.shape == expected.shape
    expected = expected.double()
    difference = torch.linalg.vector_norm(actual.double() - expected).item()
    scale = torch.linalg.vector_norm(expected).item()
    return difference / scale if scale > 0 else difference


def check_against_reference(case: Case, backend: str, tolerance: float | None = None) -> None:
    """Compares all results of a backend with those of the reference in float64 for the same inputs.

    Args:
        tolerance: None takes it from `TOLERANCE` by the dtype of `v`.
    """
    exact = results(case.with_tensors({name: x.double() for name, x in case.tensors().items()}), "reference")
    with uninitialized_memory_is_nan():
        computed = results(case, backend)
    assert computed["o"].dtype == case.v.dtype
    any_float64 = any(x.dtype == torch.float64 for x in case.tensors().values())
    assert computed["final state"].dtype == (torch.float64 if any_float64 else torch.float32)
    limit = TOLERANCE[case.v.dtype] if tolerance is None else tolerance
    errors = {name: relative_error(computed[name], expected) for name, expected in exact.items()}
    # `not <=`, because NaN compares as false.
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    assert not wrong, f"relative errors above {limit:g} of backend {backend!r}: {wrong}"


def check_neighbours(case: Case, backend: str) -> None:
    """That NaN in one of three packed sequences stays there: in outputs, final states and gradients."""
    assert case.cu_seqlens is not None
    assert len(case.cu_seqlens) == 4
    first, last = case.cu_seqlens[1:3].tolist()
    tokens = case.v.shape[1]
    broken = {name: x.clone() for name, x in case.tensors().items()}
    for x in broken.values():
        if x.shape[:2] == (1, tokens):
            x[:, first:last] = torch.nan
    expected, found = results(case, backend), results(case.with_tensors(broken), backend)
    for name, x in expected.items():
        if x.shape[:2] == (1, tokens):
            ours = [torch.cat([y[:, :first], y[:, last:]], 1) for y in (x, found[name])]
        elif x.shape[0] == 3:  # a state for each sequence
            ours = [y[[0, 2]] for y in (x, found[name])]
        else:
            continue
        assert torch.equal(*ours), name
    assert found["o"][:, first:last].isnan().all()


@contextmanager
def uninitialized_memory_is_nan() -> Iterator[None]:
    """`torch.empty` returns NaN, so that an element which nobody writes is seen."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
