"""Several GPUs of one host: are the results those of one, does a run outlive a killed process, and how fast is it.

    python -m benchmarks.scaling --gpus 2 --out results/scaling/h100-x2.json

Sections, each with a time limit of its own; the file is written anew after each:

- throughput: training steps on one GPU, and on all with DDP and with FSDP2, the same sequences on each GPU.
- same-losses: `statetrack pretrain` on one process and on all at the same batch.
- resume: from a checkpoint that all have written one process goes on, with the same next losses.
- killed-rank: `kill -9` of one process ends the run within a minute, and the same command goes on.
- long-sequence: a sequence split in time over all GPUs beside the whole on one (`benchmarks.long_sequence`).

With `--device cpu` the same goes over gloo with small models: its numbers say nothing of speed. The status is 1 if a
section failed or found a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, environment, write_results
from statetrack.data import PrepareConfig, TextSource, prepare
from statetrack.pretraining.run import PretrainRun

# NVLink multicast is left off: on a host that others share it can put the GPUs out of service. Gloo looks the host's
# name up unless told where to listen, and a container's may not be found; here all processes are on one host.
_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}

_STEPS, _CHECKPOINT_EVERY = 10, 5
_LONG_STEPS, _LONG_CHECKPOINT_EVERY = 240, 20
_MOST_SECONDS_TO_END = 60.0


class SectionError(RuntimeError):
    """Why a section has no result."""


@dataclass(frozen=True)
class Setting:
    """What the sections have in common.

    Attributes:
        processes: how many, one for each GPU.
        device: "cpu" or "cuda".
        directory: where the data and the runs are.
        tolerance: the largest difference of losses, in nats, between ways of spreading a run.
        split_tolerance: the largest relative error of a sequence split in time.
    """

    processes: int
    device: str
    directory: Path
    tolerance: float
    split_tolerance: float

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, help="processes, one for each GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("results/scaling/scaling.json"))
    options = parser.parse_args()
    if options.gpus < 2:
        parser.error(f"--gpus must be at least 2, got {options.gpus}")
    if options.device == "cuda" and torch.cuda.device_count() < options.gpus:
        parser.error(f"--gpus {options.gpus} are not here: there are {torch.cuda.device_count()}; or --device cpu")
    with tempfile.TemporaryDirectory() as place:
        exact = options.device == "cpu"
        setting = Setting(options.gpus, options.device, Path(place), 1e-4 if exact else 0.02, 1e-5 if exact else 2e-3)
        sections = run_sections(setting, options.only, options.out)
    print(table(sections))
    sys.exit(0 if all(section["passed"] for section in sections.values()) else 1)


def run_sections(setting: Setting, names: list[str], out: Path) -> dict[str, dict[str, Any]]:
    """Runs sections in their order, whatever becomes of those before, and writes what there is after each."""
    about = environment(["triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13"])
    about["device"] = torch.cuda.get_device_name() if setting.device == "cuda" else "cpu"
    sections: dict[str, dict[str, Any]] = {}
    for name in (name for name in SECTIONS if name in names):
        section, limit = SECTIONS[name]
        began = time.monotonic()
        try:
            result = section(setting, began + limit)
        except (SectionError, OSError, ValueError, KeyError) as error:
            result = {"passed": False, "failure": str(error) or type(error).__name__}
        sections[name] = {"seconds": round(time.monotonic() - began, 1), "limit": limit, **result}
        write_results(out, {"environment": about, "processes": setting.processes, "sections": sections})
        print(f"{name}: {'passed' if result['passed'] else 'FAILED'}, {sections[name]['seconds']} s", flush=True)
    return sections


def throughput(setting: Setting, deadline: float) -> dict[str, Any]:
    """Weak scaling: the tokens a second of all GPUs over as many times those of one."""
    # As many sequences as 80 GB hold.
    full = {"deltanet-125m": 48, "deltaproduct-125m": 48, "deltanet-340m": 24, "deltaproduct-340m": 16}
    sizes = {"deltanet-10m": 1} if setting.tiny else full
    words = ["--presets", *sizes, "--micro-batch-size", *map(str, sizes.values()), "--device", setting.device]
    if setting.tiny:
        words += ["--sequence-length", "32", "--vocab-size", "64", "--steps", "2", "--warmup", "1"]
    else:
        words += ["--sequence-length", "2048", "--steps", "15", "--warmup", "4"]
    rows = []
    for processes, ways in ((1, ["none"]), (setting.processes, ["ddp", "fsdp"])):
        out = setting.directory / f"throughput-{processes}.json"
        _finish(_start(setting, processes, "benchmarks.pretraining", *words, "--parallelism", *ways, "--out", out),
                deadline)  # fmt: skip
        rows += json.loads(out.read_text())["results"]
    alone = {row["preset"]: row["tokens_per_second"] for row in rows if row["processes"] == 1}
    for row in rows:
        row["efficiency"] = row["tokens_per_second"] / row["processes"] / alone[row["preset"]]
    finite = all(loss == loss and abs(loss) < float("inf") for row in rows for loss in row["losses"])
    return {"passed": finite, "rows": rows}


def same_losses(setting: Setting, deadline: float) -> dict[str, Any]:
    """The losses of one process and of all, with DDP and with FSDP2, at the same batch of all together."""
    counts = {"one": 1, "fsdp": setting.processes, "ddp": setting.processes}
    launched: list[_Launched] = []
    try:
        # At once: their speed is not asked for, and most of their time is that of starting.
        for name, count in counts.items():
            way = "none" if count == 1 else name
            words = _words(setting, name, steps=_STEPS, checkpoint_every=_CHECKPOINT_EVERY, parallelism=way)
            launched.append(_start(setting, count, "statetrack", *words))
        for command in launched:
            _finish(command, deadline)
    finally:
        for command in launched:
            command.stop()
    one, *others = (_losses(PretrainRun(setting.directory / name)) for name in counts)
    ways = dict(zip(("fsdp", "ddp"), others, strict=True))
    differences = {way: _difference(one, losses, _STEPS) for way, losses in ways.items()}
    return {
        "passed": max(differences.values()) <= setting.tolerance,
        "tolerance": setting.tolerance,
        "differences": differences,
        "losses": {"one": one, **ways},
    }


def resume(setting: Setting, deadline: float) -> dict[str, Any]:
    """One process goes on from the checkpoint of all in the middle of a run."""
    run = PretrainRun(setting.directory / "fsdp")
    if not run.model_directory.exists():  # same-losses has had it, unless it was left out
        _pretrain(setting, setting.processes, "fsdp", deadline, parallelism="fsdp")
    whole = _losses(run)
    copy = setting.directory / "resumed"
    shutil.copytree(run.path, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{_STEPS:08d}")
    shutil.rmtree(copy / "model")
    kept = PretrainRun(copy).checkpoints.steps()
    if kept != [_CHECKPOINT_EVERY]:
        raise SectionError(f"the run has checkpoints of steps {kept}, and not of {_CHECKPOINT_EVERY}")
    PretrainRun(copy).truncate_metrics(_CHECKPOINT_EVERY)
    again = _pretrain(setting, 1, "resumed", deadline, parallelism="none")
    difference = _difference(whole, again, _STEPS)
    return {
        "passed": difference <= setting.tolerance,
        "tolerance": setting.tolerance,
        "difference": difference,
        "losses": {"whole": whole, "resumed": again},
    }


def killed_rank(setting: Setting, deadline: float) -> dict[str, Any]:
    """How long a run takes to end after `kill -9` of its last process, what it says, and where it goes on."""
    words = _words(setting, "killed", steps=_LONG_STEPS, checkpoint_every=_LONG_CHECKPOINT_EVERY)
    run = PretrainRun(setting.directory / "killed")
    launched = _start(setting, setting.processes, "statetrack", *words)
    try:
        while not run.checkpoints.steps():
            if launched.process.poll() is not None:
                raise SectionError(f"the run ended before its first checkpoint: {launched.end_of_output()}")
            if time.monotonic() > deadline:
                raise SectionError("no checkpoint within the time limit")
            time.sleep(0.02)
        os.kill(_rank(launched.process.pid, setting.processes - 1), signal.SIGKILL)
        began = time.monotonic()
        try:
            status = launched.process.wait(max(0.1, min(deadline - began, 2 * _MOST_SECONDS_TO_END)))
        except subprocess.TimeoutExpired:
            raise SectionError(
                f"the run went on for {time.monotonic() - began:.0f} s: {launched.end_of_output()}"
            ) from None
        seconds = time.monotonic() - began
    finally:
        launched.stop()
    text = launched.output()
    messages = re.findall(r"^statetrack: .*", text, re.MULTILINE)
    reached, saved = max(_losses(run), default=0), run.checkpoints.steps()[-1]
    losses = _pretrain(setting, 1, "killed", deadline, steps=_LONG_STEPS, checkpoint_every=_LONG_CHECKPOINT_EVERY)
    return {
        "passed": status != 0
        and seconds < _MOST_SECONDS_TO_END
        and len(messages) == 1
        and reached - saved <= 2 * _LONG_CHECKPOINT_EVERY  # one checkpoint may have been half written
        and sorted(losses) == list(range(1, _LONG_STEPS + 1)),
        "seconds_to_end": seconds,
        "status": status,
        "messages": messages,
        "step_killed": reached,
        "step_saved": saved,
        "output_end": text[-2000:],
    }


def long_sequence(setting: Setting, deadline: float) -> dict[str, Any]:
    """A sequence split in time over all GPUs beside the whole sequence on one."""
    out = setting.directory / "long-sequence.json"
    words = ["--tokens", 256 if setting.tiny else 2**20, "--device", setting.device, "--out", out]
    _finish(_start(setting, setting.processes, "benchmarks.long_sequence", *words), deadline)
    result = json.loads(out.read_text())["result"]
    errors = result["errors"]
    right = all(errors[name] <= setting.split_tolerance for name in ("logits", "gradients", "state"))
    return {"passed": right, "tolerance": setting.split_tolerance, **result}


# A limit is for a section that hangs; all of them together are ten minutes.
SECTIONS: dict[str, tuple[Callable[[Setting, float], dict[str, Any]], float]] = {
    "throughput": (throughput, 260.0),
    "same-losses": (same_losses, 90.0),
    "resume": (resume, 60.0),
    "killed-rank": (killed_rank, 120.0),
    "long-sequence": (long_sequence, 70.0),
}


def table(sections: dict[str, dict[str, Any]]) -> str:
    """The results in a line each."""
    lines = []
    for name, section in sections.items():
        lines.append(f"{name:14} {'passed' if section['passed'] else 'FAILED'} {section['seconds']:6.1f} s")
        if "failure" in section:
            lines[-1] += f"  {section['failure']}"
        elif name == "throughput":
            for row in section["rows"]:
                mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}  {row['peak_memory_gb']:.1f} GB"
                lines.append(
                    f"  {row['preset']:18} {row['processes']} x {row['parallelism']:4}"
                    f" {row['tokens_per_second']:12,.0f} tokens/s  efficiency {row['efficiency']:.1%}{mfu}"
                )
        elif name == "same-losses":
            lines[-1] += "".join(f"  {way}: {value:.2g} nats" for way, value in section["differences"].items())
        elif name == "resume":
            lines[-1] += f"  {section['difference']:.2g} nats"
        elif name == "killed-rank":
            lines[-1] += f"  ended {section['seconds_to_end']:.1f} s after kill -9, {len(section['messages'])} message"
        else:
            shown = "".join(f"  {key}: {section['errors'][key]:.1g}" for key in ("logits", "gradients", "state"))
            lines[-1] += (
                f"{shown}  {section['tokens_per_second_split']:,.0f} tokens/s, {section['speedup']:.2f} times one"
            )
    return "\n".join(lines)


def _words(setting: Setting, name: str, *, steps: int, checkpoint_every: int, parallelism: str = "auto") -> list[Any]:
    """What follows `statetrack` to pre-train a small model into the directory `name`."""
    data = setting.directory / "data"
    if not data.exists():
        text = setting.directory / "text"
        text.mkdir()
        for index in range(200):
            (text / f"{index:03d}.txt").write_text(
                "".join(f"{index} and {other} are {index + other}. " for other in range(60))
            )
        prepare([TextSource("sums", str(text))], data, PrepareConfig(tokenizer="bytes", held_out=0.05))
    length, model = (32, "deltanet-10m") if setting.tiny else (512, "deltanet-30m")
    batch = 2 * setting.processes
    config = setting.directory / f"{name}.toml"
    size = "d_model = 32\nnum_layers = 2\nmlp_size = 64" if setting.tiny else ""
    config.write_text(f"""
[model]
preset = "{model}"
eigenvalue_range = [-1, 1]
{size}
[data]
directory = "{data}"
sequence_length = {length}
batch_size = {batch}
[training]
steps = {steps}
precision = "{"float32" if setting.tiny else "bfloat16"}"
[schedule]
warmup_steps = 5
[execution]
parallelism = "{parallelism}"
log_every = 1
checkpoint_every = {checkpoint_every}
keep_checkpoints = 2
evaluate_every = 0
evaluation_sequences = 2
""")
    return ["pretrain", config, "--out", setting.directory / name, "--device", setting.device]


def _pretrain(
    setting: Setting, processes: int, name: str, deadline: float, *,
    steps: int = _STEPS, checkpoint_every: int = _CHECKPOINT_EVERY, parallelism: str = "auto",
) -> dict[int, float]:  # fmt: skip
    """The losses by step, once the run has ended."""
    words = _words(setting, name, steps=steps, checkpoint_every=checkpoint_every, parallelism=parallelism)
    _finish(_start(setting, processes, "statetrack", *words), deadline)
    return _losses(PretrainRun(setting.directory / name))


def _losses(run: PretrainRun) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in run.read_metrics() if record["kind"] == "training"}


def _difference(one: dict[int, float], other: dict[int, float], steps: int) -> float:
    if not sorted(one) == sorted(other) == list(range(1, steps + 1)):
        raise SectionError(f"the runs have losses of steps {sorted(one)} and {sorted(other)}")
    return max(abs(one[step] - other[step]) for step in one)


@dataclass(frozen=True)
class _Launched:
    """A command that runs, and the file of what it says."""

    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def end_of_output(self) -> str:
        text = self.output()
        # What a process raised, which torchrun puts before many lines of its own.
        raised = "\n".join(line for line in text.splitlines() if line.startswith("[rank"))
        return (raised or text)[-1500:]

    def stop(self) -> None:
        """Ends it with all its processes, which torchrun starts in sessions of their own."""
        if self.process.poll() is not None:
            return
        for pid in (*_descendants(self.process.pid), self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def _start(setting: Setting, processes: int, module: str, *words: object) -> _Launched:
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    command += [module, *map(str, words)]
    log = Path(tempfile.mkstemp(suffix=".log", dir=setting.directory)[1])
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, **_ENVIRONMENT, "OMP_NUM_THREADS": "1" if setting.tiny else "4", "PYTHONPATH": path}
    with log.open("wb") as file:
        return _Launched(
            subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=variables, cwd=setting.directory), log
        )


def _finish(launched: _Launched, deadline: float) -> None:
    try:
        status = launched.process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise SectionError(f"not done within the time limit; its output ends: {launched.end_of_output()}") from None
    finally:
        launched.stop()
    if status:
        raise SectionError(f"status {status}; its output ends: {launched.end_of_output()}")


def _descendants(pid: int) -> list[int]:
    """The processes below one, from Linux's /proc."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name of a process is in brackets and may hold anything.
            parent = int(file.read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(file.parent.name))
    found = [pid]
    for known in found:
        found += children.get(known, [])
    return found[1:]


def _rank(launcher: int, rank: int) -> int:
    """The process of a rank below torchrun."""
    for pid in _descendants(launcher):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in variables:
            return pid
    raise SectionError(f"torchrun has no process of rank {rank}")


if __name__ == "__main__":
    main()
