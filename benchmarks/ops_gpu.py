"""The recurrences on one GPU beside flash-linear-attention and mamba-ssm: the rows of `python -m benchmarks.ops speed`.

Every row is one op at one shape in bfloat16: keys of length 1 and beta in [0, 2], decays in (0, 1) because the peers
take their logarithms, the median time of a forward and of a forward with its backward, the peak memory beyond what is
allocated before the call, and the memory floor, that is inputs read once and outputs written once at the device's own
copy bandwidth. The peer is timed in the same process. flash-linear-attention tunes itself for about 100 s an op and
shape; in the rows `sweep-*`, one op at several lengths, it does so at the first and keeps what it has found.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from statetrack.ops import Precision, linear_recurrence
from statetrack.transition import Diagonal, Discretized, Householder, LowRank, Transition

_MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One op at one shape: `n` factors a token, with a decay or without; a scan has D channels with n numbers each."""

    name: str
    b: int
    t: int
    h: int
    d: int
    n: int = 1
    gated: bool = False
    kind: str = "delta rule"
    precision: Precision = "default"

    @property
    def op(self) -> str:
        if self.kind != "delta rule":
            return self.kind
        gated = "gated " if self.gated else ""
        return f"{gated}delta rule" if self.n == 1 else f"{gated}DeltaProduct"

    @property
    def peer(self) -> str:
        return "mamba-ssm" if self.kind == "selective scan" else "flash-linear-attention"


ROWS = [
    Row("wide", 1, 8192, 96, 128),
    Row("gated", 1, 8192, 96, 128, gated=True),
    Row("product2", 1, 8192, 96, 128, n=2),
    Row("product2-gated", 1, 8192, 96, 128, n=2, gated=True),
    Row("product3", 1, 8192, 96, 128, n=3),
    Row("long", 1, 65536, 8, 128),
    Row("b2", 2, 16384, 16, 128),
    Row("b4", 4, 2048, 16, 128),
    Row("b4-wide", 4, 4096, 64, 128),
    Row("d256", 8, 2048, 32, 256),
    Row("d64", 8, 1024, 8, 64),
    Row("small-40", 256, 40, 4, 32),
    Row("small-64", 256, 64, 4, 32),
    Row("small-255", 256, 255, 4, 32),
    Row("simple-wide", 1, 8192, 96, 128, kind="simple GLA"),
    Row("simple-b4", 4, 2048, 16, 128, kind="simple GLA"),
    Row("simple-d64", 8, 1024, 8, 64, kind="simple GLA"),
    Row("gla-wide", 1, 8192, 96, 128, kind="GLA"),
    Row("gla-b4", 4, 2048, 16, 128, kind="GLA"),
    Row("gla-d64", 8, 1024, 8, 64, kind="GLA"),
    Row("scan-wide", 8, 2048, 1, 2048, n=16, kind="selective scan"),
    Row("scan-long", 1, 65536, 1, 2048, n=16, kind="selective scan"),
    Row("scan-small", 256, 64, 1, 256, n=16, kind="selective scan"),
    Row("rwkv-b8", 8, 2048, 32, 64, kind="RWKV-7"),
    Row("rwkv-b1", 1, 8192, 32, 64, kind="RWKV-7"),
    Row("kda-b4", 4, 2048, 16, 128, kind="KDA"),
    Row("simple-long", 1, 65536, 8, 128, kind="simple GLA"),
    Row("gla-long", 1, 65536, 8, 128, kind="GLA"),
    Row("rwkv-long", 1, 65536, 8, 64, kind="RWKV-7"),
    Row("wide-high", 1, 8192, 96, 128, precision="high"),
    Row("product2-high", 1, 8192, 96, 128, n=2, precision="high"),
    Row("gla-b4-high", 4, 2048, 16, 128, kind="GLA", precision="high"),
    *(Row(f"sweep-{t}", 1, t, 16, 128) for t in (512, 2048, 8192, 32768, 65536)),
]


def measure(row: Row, with_peer: bool, bandwidth: float) -> list[dict[str, Any]]:
    """The row's results, of a forward and of a forward with its backward.

    Args:
        bandwidth: bytes that the device copies in a second.
    """
    inputs = _inputs(row)
    leaves = [x for x in inputs.values() if x.requires_grad]
    out = row.b * row.t * row.h * row.d * inputs["v"].element_size()
    read = sum(x.numel() * x.element_size() for x in leaves)
    # The backward reads the inputs and the gradient of o, and writes as much as the inputs.
    floors = {"fwd": (read + out) / bandwidth * 1e3, "fwd+bwd": (3 * read + 2 * out) / bandwidth * 1e3}
    functions: dict[str, Callable[[Row, dict[str, Tensor]], Tensor]] = {"ours": _ours}
    if with_peer:
        functions["peer"] = _peer
    rows = []
    for which, floor in floors.items():
        result: dict[str, Any] = {
            "op": row.op, "B": row.b, "T": row.t, "H": row.h, "D": row.d, "n": row.n, "pass": which, "floor_ms": floor,
            "row": row.name, "precision": row.precision, "peer": row.peer if with_peer else None,
        }  # fmt: skip
        for name, function in functions.items():
            timed = _call(function, inputs, leaves, row, backward=which != "fwd")
            once = name == "peer" and row.name.startswith("sweep-")
            with _tuned_once() if once else contextlib.nullcontext():
                result[f"{name}_ms"], result[f"{name}_mib"] = median_ms(timed), _peak_mib(timed)
        if with_peer:
            result["ratio"] = result["peer_ms"] / result["ours_ms"]
        rows.append(result)
    return rows


def _inputs(row: Row) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    def keys(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(randn(*shape), dim=-1)

    b, t, h, d, n = row.b, row.t, row.h, row.d, row.n
    if row.kind == "selective scan":
        inputs = {
            "dt": torch.nn.functional.softplus(randn(b, t, h, d) - 4).bfloat16(),
            "A": -torch.arange(1.0, n + 1, device="cuda").view(1, n, 1).repeat(h, 1, d),
            "q": randn(b, t, h, n).bfloat16(),
            "write": randn(b, t, h, n).bfloat16(),
            "v": randn(b, t, h, d).bfloat16(),
        }
        return {name: x.requires_grad_() for name, x in inputs.items()}
    inputs = {"q": (keys(b, t, h, d) / d**0.5).bfloat16()}
    if row.kind in ("delta rule", "KDA"):
        inputs |= {
            "k": keys(b, t, n, h, d).bfloat16(),
            "v": randn(b, t, n, h, d).bfloat16(),
            "beta": 2 * torch.sigmoid(randn(b, t, n, h)),
        }
    else:
        inputs |= {"write": keys(b, t, h, d).bfloat16(), "v": randn(b, t, h, d).bfloat16()}
    if row.kind == "RWKV-7":
        w = keys(b, t, h, d)
        inputs |= {"w": w.bfloat16(), "u": (w * torch.sigmoid(randn(b, t, h, d))).bfloat16()}
    if row.kind in ("GLA", "RWKV-7", "KDA"):
        inputs["decay"] = torch.sigmoid(randn(b, t, h, d) + 3)
    elif row.gated or row.kind == "simple GLA":
        inputs["decay"] = torch.sigmoid(randn(b, t, h) + 3)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def _transition(row: Row, inputs: dict[str, Tensor]) -> Transition:
    if row.kind == "selective scan":
        return Discretized(inputs["dt"], inputs["A"])
    if row.kind in ("GLA", "simple GLA"):
        return Diagonal(inputs["decay"])
    if row.kind == "RWKV-7":
        return LowRank(inputs["decay"], inputs["u"], inputs["w"])
    return Householder(inputs["k"], inputs["beta"], inputs.get("decay"), normalize=True)


def _ours(row: Row, inputs: dict[str, Tensor]) -> Tensor:
    # Mamba writes dt x, which its own kernel multiplies by itself.
    v = inputs["dt"] * inputs["v"] if row.kind == "selective scan" else inputs["v"]
    return linear_recurrence(
        _transition(row, inputs), inputs["q"], v, write=inputs.get("write"), backend="triton",
        precision=row.precision,
    )[0]  # fmt: skip


def _peer(row: Row, inputs: dict[str, Tensor]) -> Tensor:
    if row.gated or row.kind == "simple GLA":
        # flash-linear-attention refuses this backward with this triton, whose result may be wrong; for its time alone
        # it may run.
        vars(importlib.import_module("fla.ops.common.chunk_o"))["TRITON_ABOVE_3_7_1"] = True
    if row.kind == "selective scan":
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        rows = {name: inputs[name][:, :, 0].mT for name in ("dt", "q", "write", "v")}
        return scan(rows["v"], rows["dt"], inputs["A"][0].mT.contiguous(), rows["write"], rows["q"]).mT.unsqueeze(2)
    if row.kind == "GLA":
        function = importlib.import_module("fla.ops.gla").chunk_gla
        return function(inputs["q"], inputs["write"], inputs["v"], g=inputs["decay"].log(), scale=1.0)[0]
    if row.kind == "simple GLA":
        function = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
        return function(inputs["q"], inputs["write"], inputs["v"], g=inputs["decay"].log(), scale=1.0)[0]
    if row.kind == "RWKV-7":
        function = importlib.import_module("fla.ops.rwkv7").chunk_rwkv7
        # Its a reads the state and its b is added to it.
        q, w, write, v, u, decay = (inputs[name] for name in ("q", "w", "write", "v", "u", "decay"))
        return function(q, decay.log().bfloat16(), write, v, w, -u, scale=1.0)[0]
    k, v, beta = (inputs[name].flatten(1, 2) for name in ("k", "v", "beta"))
    options: dict[str, Any] = {"scale": 1.0}
    if row.kind == "KDA":
        function = importlib.import_module("fla.ops.kda").chunk_kda
    elif row.n > 1:
        function = importlib.import_module("fla.ops.gated_delta_product").chunk_gated_delta_product
        options |= {"num_householder": row.n, "g": None}
    elif row.gated:
        function = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    else:
        function = importlib.import_module("fla.ops.delta_rule").chunk_delta_rule
    if "decay" in inputs:
        options["g"] = inputs["decay"].log()
    return function(q=inputs["q"], k=k, v=v, beta=beta.bfloat16(), **options)[0]


def call(row: Row, *, backward: bool) -> Callable[[], Any]:
    """Our op at the row's shape, to be called again and again: o, or with `backward` the gradients of all inputs."""
    inputs = _inputs(row)
    return _call(_ours, inputs, [x for x in inputs.values() if x.requires_grad], row, backward=backward)


def _call(
    function: Callable[[Row, dict[str, Tensor]], Tensor],
    inputs: dict[str, Tensor],
    leaves: list[Tensor],
    row: Row,
    *,
    backward: bool,
) -> Callable[[], object]:
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return function(row, inputs)

        return forward
    d_o = torch.randn(row.b, row.t, row.h, row.d, device="cuda").bfloat16()
    return lambda: torch.autograd.grad(function(row, inputs), leaves, d_o)


def kernel_times(row: Row, calls: int = 5) -> list[dict[str, Any]]:
    """Milliseconds of every kernel of our op, by its name: the mean over a few calls, from torch's profiler."""
    rows = []
    for which in ("fwd", "fwd+bwd"):
        timed = call(row, backward=which != "fwd")
        timed()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(calls):
                timed()
            torch.cuda.synchronize()
        rows += [
            {"row": row.name, "pass": which, "kernel": event.key, "ms": event.device_time_total / calls / 1e3}
            for event in profile.key_averages()
            if event.device_time_total > 0
        ]
    return rows


def median_ms(call: Callable[[], object]) -> float:
    """The median time in milliseconds; the L2 cache is cleared between calls."""
    return importlib.import_module("triton.testing").do_bench(call, warmup=50, rep=200, return_mode="median")


def _peak_mib(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / _MIB


@contextlib.contextmanager
def _tuned_once() -> Iterator[None]:
    """Triton's autotuner, where it has tuned a kernel before, takes what it found then for other sizes too."""
    autotuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    tune = autotuner.run

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        if not self.cache:
            return tune(self, *arguments, **options)
        best = next(iter(self.cache.values()))
        return self.fn.run(*arguments, **options, **best.all_kwargs())

    with mock.patch.object(autotuner, "run", run):
        yield


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a large copy on the device."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_ms(lambda: target.copy_(source)) * 1e-3)


def line(row: dict[str, Any]) -> str:
    shape = "x".join(str(row[x]) for x in "BTHD")
    text = (
        f"{row['op']:19s} n={row['n']} {shape:16s} {row['pass']:7s} {row['ours_ms']:8.3f} ms {row['ours_mib']:7.0f} MiB"
    )
    if row["peer"]:
        text += f"   {row['peer']} {row['peer_ms']:8.3f} ms {row['peer_mib']:7.0f} MiB   {row['ratio']:.2f}x"
    return f"{text}   floor {row['floor_ms']:.3f} ms"
