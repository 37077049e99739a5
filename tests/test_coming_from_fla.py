"""docs/coming-from-fla.md: its names exist, and its operations are those of FLA's own torch functions."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks.common import fla_if_installed
from statetrack import Diagonal, Householder, LowRank, ModelConfig, linear_recurrence, mixer_configs

TEXT = (Path(__file__).parents[1] / "docs" / "coming-from-fla.md").read_text(encoding="utf-8")


def naive(path, name):
    """A function of FLA's `fla/ops`."""
    pytest.importorskip("einops")
    if (module := fla_if_installed(path)) is None:
        pytest.skip("flash-linear-attention is not installed")
    return getattr(module, name)


def test_what_the_tables_call_options_are_options():
    known = {field.name for config in (*mixer_configs().values(), ModelConfig) for field in fields(config)}
    known |= mixer_configs().keys()
    rows = TEXT.partition("## Layers")[2].partition("## Operations")[0]
    ours = [row.split("|")[2] for row in re.findall(r"^\| `.*\|$", rows, re.MULTILINE)]
    named = {re.split(r"[=(]", name)[0].strip() for cell in ours for name in re.findall(r"`([^`]+)`", cell)}
    named -= {"available_backends", "ModelConfig", "DeltaNet"}
    assert len(named) > 25
    assert named <= known


@pytest.fixture
def inputs():
    b, t, h, k = 2, 9, 3, 8
    unit = [F.normalize(torch.randn(b, t, h, k), dim=-1) for _ in range(4)]
    return {
        "q": torch.randn(b, t, h, k),
        "k": unit[0],
        "v": torch.randn(b, t, h, k),
        "a": unit[1],
        "b": 0.5 * unit[2],
        "beta": 2 * torch.rand(b, t, h),
        "g": F.logsigmoid(torch.randn(b, t, h)),
        "channels": F.logsigmoid(torch.randn(b, t, h, k)),
        "state": torch.randn(b, h, k, k),
    }


def by_heads(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def delta_rule(i):
    o, state = naive("delta_rule/naive", "delta_rule_recurrence")(
        *by_heads(i["q"], i["k"], i["v"], i["beta"]), initial_state=i["state"]
    )
    return o.transpose(1, 2), state


def gated(i):
    return naive("kda/naive", "naive_recurrent_kda")(
        i["q"], i["k"], i["v"], i["channels"], i["beta"], initial_state=i["state"], output_final_state=True
    )


def gla(i):
    return naive("gla/naive", "naive_recurrent_gla")(
        i["q"], i["k"], i["v"], i["channels"], initial_state=i["state"], output_final_state=True
    )


def dplr(i):
    o, state = naive("generalized_delta_rule/dplr/naive", "dplr_recurrence")(
        *by_heads(i["q"], i["k"], i["v"], i["a"], i["b"], i["channels"]), initial_state=i["state"]
    )
    return o.transpose(1, 2), state


def ours(transition):
    def run(i):
        factors = isinstance(built := transition(i), Householder)
        v = i["v"].unsqueeze(2) if factors else i["v"]
        q, write = i["q"] * i["q"].shape[-1] ** -0.5, None if factors else i["k"]
        return linear_recurrence(built, q, v, write=write, initial_state=i["state"])

    return run


@pytest.mark.parametrize(
    ("theirs", "transition"),
    [
        (delta_rule, lambda i: Householder(i["k"].unsqueeze(2), i["beta"].unsqueeze(2))),
        (gated, lambda i: Householder(i["k"].unsqueeze(2), i["beta"].unsqueeze(2), decay=i["channels"].exp())),
        (gla, lambda i: Diagonal(i["channels"].exp())),
        (dplr, lambda i: LowRank(i["channels"].exp(), u=-i["b"], w=i["a"])),
    ],
    ids=["delta_rule", "kda", "gla", "dplr"],
)
def test_an_operation_is_theirs(theirs, transition, inputs):
    for mine, other in zip(ours(transition)(inputs), theirs(inputs), strict=True):
        torch.testing.assert_close(mine, other.float(), atol=1e-5, rtol=1e-5)
