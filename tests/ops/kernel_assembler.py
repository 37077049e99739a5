"""Compiles one of the kernels for a Hopper GPU that isn't there, and prints which assembler did it and is in the key.

With `background` Triton does it in threads. A process of its own, as the driver is replaced.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib import import_module

import torch

from benchmarks.kernel_resources import stand_in_for_hopper
from statetrack.ops.triton_common import kernels

triton = import_module("triton")
keys = []
get_cache_key = triton.compiler.compiler.get_cache_key


def note(*arguments, **options):
    keys.append(get_cache_key(*arguments, **options))
    return keys[-1]


triton.compiler.compiler.get_cache_key = note
stand_in_for_hopper()


@triton.jit
def other(x):
    triton.language.store(x, 1.0)


def assembler(kernel, *arguments, **options):
    background = import_module("triton.runtime._async_compile").AsyncCompileMode
    with ThreadPoolExecutor(1) as pool, background(pool) if "background" in sys.argv else nullcontext():
        compiled = kernel.warmup(*arguments, grid=(1,), **options)
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    key = next(x for x in ("12.8", "12.9") if f"release {x}" in keys[-1])
    return [compiled.asm["ptx"].split(".version ")[1].split()[0], key]


x = torch.zeros(1)
print(
    json.dumps({
        "ours": assembler(kernels("parts").sum_parts, x, x, 1, N=1, BP=256, BN=16),
        "another's": assembler(other, x),
        "left as it was": import_module("triton.backends.nvidia.compiler").get_ptxas(90).version,
    })
)  # fmt: skip
