"""The assembler of the Triton kernels on Hopper: the newer one of the two that come with Triton.

Triton 3.6 to 3.8 have two versions of NVIDIA's `ptxas`, and take the older one for Hopper. That one, of CUDA 12.8, lets
some kernels with tiles of different widths read a uniform register before anything is written to it: the address of a
matrix in shared memory is then wrong, and with it the gradients, or the address is outside and the program stops. From
3.9 on Triton itself takes the newer one. `python -m benchmarks.kernel_resources` looks for such reads in the machine
code; docs/kernels.md says which kernels and sizes had them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

_HOPPER = 90
_CHOSEN_BY_THE_USER = "TRITON_PTXAS_PATH"


def use_newer_assembler(kernel: Any) -> None:
    """Lets a kernel, a function of `triton.jit`, be assembled for Hopper as Triton 3.9 does.

    Other people's kernels, and all if TRITON_PTXAS_PATH names an assembler, are left as they are. What is not a kernel
    is too, and so is one of the interpreter.
    """
    compile_kernel = getattr(kernel, "_do_compile", None)
    if compile_kernel is not None and not isinstance(compile_kernel, _Compile):
        kernel._do_compile = _Compile(compile_kernel)


class _Compile:
    def __init__(self, compile_kernel: Callable[..., Any]) -> None:
        self.compile_kernel = compile_kernel

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        target = import_module("triton").runtime.driver.active.get_current_target()
        if target.backend != "cuda" or target.arch != _HOPPER or _CHOSEN_BY_THE_USER in os.environ:
            return self.compile_kernel(*arguments, **options)
        with _newer_assembler():
            return self.compile_kernel(*arguments, **options)


@contextmanager
def _newer_assembler() -> Iterator[None]:
    nvidia = import_module("triton.knobs").nvidia
    # A part of the names of compiled kernels on the disk.
    version = import_module("triton.backends.nvidia.compiler").get_ptxas_version
    with nvidia.scope():
        nvidia.ptxas = nvidia.ptxas_blackwell.path
        version.cache_clear()
        try:
            yield
        finally:
            version.cache_clear()
