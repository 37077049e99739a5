"""Compiles the kernels of a training step, and prints as JSON [name, PTX version, "here" or "background"] of each.

A process of its own for `test_triton_ahead.py`, with an empty folder for compiled kernels: triton's interpreter must be
off. Where there is no GPU, a stand-in takes the place of triton's driver, and launches compile and do no more.

    python tests/ops/kernels_ahead.py THREADS [exit | interrupt]

With `exit` or `interrupt` it ends so while kernels are being compiled, and prints nothing.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
from importlib import import_module
from unittest import mock

import torch

from benchmarks.kernel_resources import stand_in_for_hopper
from statetrack.config import from_data
from statetrack.model import LanguageModel, ModelConfig
from statetrack.ops import triton_ahead, triton_common

GPU = torch.cuda.is_available()


def main(threads: int, ending: str | None) -> None:
    compiler = import_module("triton.compiler")
    compile_kernel, compiled = compiler.compile, []

    def note(source, **options):
        kernel = compile_kernel(source, **options)
        where = "background" if threading.current_thread().name.startswith("statetrack") else "here"
        version = kernel.asm["ptx"].split(".version ")[1].split()[0]
        compiled.append([source.name, version, where])
        if ending and [where for *_, where in compiled].count("background") == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return kernel

    compiler.compile = note
    if ending == "exit":
        signal.signal(signal.SIGINT, lambda *_: sys.exit(3))
    triton_ahead._work = triton_ahead._Work(threads)
    with contextlib.ExitStack() as stack:
        if not GPU:
            stand_in_for_hopper()
            for patch in (
                mock.patch.object(triton_common, "interpreted", return_value=True),
                mock.patch.object(triton_ahead, "_trains", lambda x: x.requires_grad),
                mock.patch.object(torch.cuda, "current_device", return_value=0),
                mock.patch.object(triton_common, "multiprocessors", return_value=1),
                triton_ahead.visited(lambda name, kernel, given, options: kernel.warmup(*given, grid=(1,), **options)),
            ):
                stack.enter_context(patch)
        gradients = step()
    print(json.dumps({"compiled": sorted(compiled), "gradients": gradients if GPU else None}))


def step() -> str:
    torch.manual_seed(0)
    config = {"vocab_size": 4, "d_model": 64, "num_layers": 2, "mixer": {"name": "gla", "backend": "triton"}}
    device = "cuda" if GPU else "cpu"
    model = LanguageModel(from_data(ModelConfig, config)).to(device)
    with torch.autocast(device, torch.bfloat16):
        logits = model(torch.randint(4, (3, 640)).to(device))
    logits.float().square().sum().backward()
    numbers = torch.cat([x.grad.flatten().float().cpu() for x in model.parameters()])
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
