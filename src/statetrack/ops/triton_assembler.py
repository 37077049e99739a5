"""The assembler of the Triton kernels on Hopper: the newer one of the two that come with Triton.

`ptxas` of CUDA 12.8, which Triton 3.6 and 3.7 take for Hopper, lets some kernels with tiles of different widths read a
uniform register before its value is in it: the address of a matrix in shared memory is then wrong, and with it the
gradients, or the address is outside and the program stops. Later versions don't. Triton has one of them in its wheel
too, for later cards, and from 3.9 on uses that for Hopper as well. docs/kernels.md says which kernels and sizes were
wrong, and what else such versions have done.
"""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

_HOPPER = 90
_FIRST_RIGHT = (12, 9)
_PATH = "TRITON_PTXAS_PATH"


def use_newer_assembler(kernel: Any) -> None:
    """Lets a kernel, a function of `triton.jit`, be assembled for Hopper by a version that is right about it.

    Other people's kernels in the same process are left as they are, and all kernels if the user has chosen an
    assembler (TRITON_PTXAS_PATH or `triton.knobs.nvidia.ptxas`). Objects that are not kernels, and kernels of the
    interpreter, are ignored.

    Warns, when the first kernel is compiled, if there is no such version that this machine's driver can be trusted to
    take.
    """
    prepare = getattr(kernel, "_do_compile", None)
    if prepare is None or hasattr(prepare, "__wrapped__"):
        return

    @wraps(prepare)
    def prepare_kernel(*arguments: Any, **options: Any) -> Any:
        # What this calls, or a thread in the background. Triton sets it anew for every device, before it comes here.
        if not hasattr(kernel.compile, "__wrapped__"):
            kernel.compile = _assembled(kernel.compile)
        return prepare(*arguments, **options)

    kernel._do_compile = prepare_kernel


_in_place: ContextVar[Any] = ContextVar("the assembler in the place of Triton's", default=None)


def _assembled(compile_kernel: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(compile_kernel)
    def compile_with(*arguments: Any, **options: Any) -> Any:
        # Triton says what it compiles for; the current device may be another, in a thread of its own for one.
        token = _in_place.set(_newer(options.get("target")))
        try:
            return compile_kernel(*arguments, **options)
        finally:
            _in_place.reset(token)

    return compile_with


def _newer(target: Any) -> Any:
    """The assembler to take in the place of Triton's own, or None; a target of None is the current device."""
    target = target or import_module("triton").runtime.driver.active.get_current_target()
    nvidia = import_module("triton.knobs").nvidia
    if target.backend != "cuda" or target.arch != _HOPPER or _chosen_by_the_user(nvidia):
        return None
    compiler = import_module("triton.backends.nvidia.compiler")
    own = compiler.get_ptxas(target.arch)
    if _version(own) >= _FIRST_RIGHT:
        return None
    try:
        newer = nvidia.ptxas_blackwell
    except RuntimeError:
        newer = own
    # A driver takes what is assembled by its own generation of CUDA, of which torch's is one, and by earlier ones.
    generation = int((torch.version.cuda or "12").split(".")[0])
    if _version(newer) < _FIRST_RIGHT or _version(newer)[0] > generation:
        _warn(own.version)
        return None
    _let_it_be_replaced()
    return newer


def _chosen_by_the_user(nvidia: Any) -> bool:
    # torch.compile sets the variable by itself where torch brings an assembler along.
    path, torchs = os.environ.get(_PATH), Path(torch.__file__).parent
    return "ptxas" in vars(nvidia) or (path is not None and torchs not in Path(path).parents)


def _version(tool: Any) -> tuple[int, ...]:
    return tuple(map(int, tool.version.split(".")))


@cache
def _warn(version: str) -> None:
    warnings.warn(
        f"ptxas {version}, with which Triton assembles kernels for this GPU, makes gradients of narrow heads wrong; "
        f"let {_PATH} name one of CUDA 12.9 or later that the driver supports",
        stacklevel=2,
    )


@cache
def _let_it_be_replaced() -> None:
    """Lets Triton's compiler, where it asks for the assembler and for its name in keys, look at `_in_place` first.

    It has no argument for either, and an environment variable would hold for other threads and their kernels too.
    """
    compiler: Any = import_module("triton.backends.nvidia.compiler")
    get_ptxas, get_version = compiler.get_ptxas, compiler.get_ptxas_version

    @wraps(get_ptxas)
    def ptxas(*arguments: Any, **options: Any) -> Any:
        return _in_place.get() or get_ptxas(*arguments, **options)

    @wraps(get_version)
    def version(*arguments: Any, **options: Any) -> Any:
        tool = _in_place.get()
        return _full_version(tool.path) if tool else get_version(*arguments, **options)

    compiler.get_ptxas, compiler.get_ptxas_version = ptxas, version


@cache
def _full_version(path: str) -> str:
    return subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout
