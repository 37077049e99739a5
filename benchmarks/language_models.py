"""Language models of 30M parameters pre-trained on code, mathematics and English with both eigenvalue ranges.

    make corpora                                        # once: the text and its tokens, in runs/corpora
    python -m benchmarks.language_models runs/corpora/tokens --out results/language-models
    python -m benchmarks.language_models --out results/language-models     # only the table and the figure again

Every run reads the same tokens in the same order (of its seed) through `statetrack.pretraining.loop.pretrain`; beside
ours, on a GPU where it is installed, the DeltaNet of flash-linear-attention of the same sizes. After a run its
perplexity on held-out text of each domain is taken with the state carried over one to sixteen times the length it was
trained on. Runs that summary.json in --out has finished are skipped, so that several calls add up; with several GPUs
each has a run of its own at a time. Checkpoints and models stay in --work.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import language_models_peer as peer
from benchmarks.common import environment
from benchmarks.language_models_tables import tables
from statetrack.data import PackedTokens, read_manifest
from statetrack.files import atomic_write
from statetrack.language_models import CausalModel, load_causal_model, perplexity
from statetrack.pretraining.config import PretrainConfig, config_of, read_tables
from statetrack.pretraining.loop import PretrainProgress, pretrain
from statetrack.pretraining.processes import Processes, processes
from statetrack.pretraining.run import PretrainRun, fingerprint

_SUMMARY = "summary.json"
_POINTS = 300
"""Points of a loss curve, at most."""

_PACKAGES = ["triton", "transformers", "flash-linear-attention"]


@dataclass(frozen=True)
class Model:
    """One of the runs.

    Attributes:
        name: as --only takes it.
        mixer: of the preset.
        eigenvalue_range: of the mixer.
        seed: of the initial weights and of the order of the data.
        by: "statetrack" or "flash-linear-attention".
    """

    name: str
    mixer: str
    eigenvalue_range: tuple[int, int]
    seed: int = 0
    by: str = "statetrack"


MODELS = (
    Model("deltanet", "deltanet", (0, 1)),
    Model("deltanet-widened", "deltanet", (-1, 1)),
    Model("fla-deltanet-widened", "deltanet", (-1, 1), by="flash-linear-attention"),
    Model("deltaproduct-widened", "deltaproduct", (-1, 1)),
    Model("mamba", "mamba", (0, 1)),
    Model("mamba-widened", "mamba", (-1, 1)),
    Model("deltanet-widened-seed1", "deltanet", (-1, 1), seed=1),
)


def config(model: Model, options: argparse.Namespace) -> PretrainConfig:
    """The config of a run: that of all, with `--set` laid over it, and as many steps as `--tokens` asks for."""
    data = read_tables(
        {
            "model": {
                "preset": f"{model.mixer}-{options.size}",
                "eigenvalue_range": list(model.eigenvalue_range),
            },
            "data": {
                "directory": str(options.data),
                "sequence_length": 2048,
                "batch_size": 64,
                "separate_documents": False,
            },
            "training": {"precision": "bfloat16", "seed": model.seed},
            "optimizer": {"learning_rate": 2e-3},
            "schedule": {},
            "execution": {"micro_batch_size": 32, "log_every": 10, "evaluate_every": 0, "keep_checkpoints": 1},
        },
        options.set,
    )
    steps = math.ceil(options.tokens / (data["data"]["sequence_length"] * data["data"]["batch_size"]))
    data["training"].setdefault("steps", steps)
    data["schedule"].setdefault("warmup_steps", min(100, steps // 4))
    # A run that is stopped writes one anyhow.
    data["execution"].setdefault("checkpoint_every", steps)
    return config_of(data, read_manifest(options.data)["vocab_size"])


def train_and_judge(
    model: Model, options: argparse.Namespace, own: Processes, deadline: float, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The record of a run: without perplexities if it had no time to end, None if it had none for a line of metrics."""
    settings = config(model, options)
    if own.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    metrics: list[dict[str, Any]]

    def show(progress: PretrainProgress) -> None:
        mfu = "" if progress.mfu is None else f", MFU {progress.mfu:.1%}"
        say(
            f"step {progress.step}/{progress.steps}, loss {progress.loss:.4f}, "
            f"{progress.tokens_per_second:,.0f} tokens/s{mfu}, {progress.seconds:.0f} s"
        )

    def late() -> bool:
        return time.monotonic() > deadline

    if model.by == "statetrack":
        run = PretrainRun(options.work / model.name)
        pretrain(settings, run, own, on_progress=show, on_message=say, should_stop=late)
        metrics = [line for line in run.read_metrics() if line["kind"] == "training"]
        if not metrics:
            return None
        causal = load_causal_model(run.path, own.device) if metrics[-1]["step"] == settings.training.steps else None
    else:
        trained, metrics = peer.train(settings, own, on_progress=show, should_stop=late)
        causal = peer.Windows(trained) if metrics[-1]["step"] == settings.training.steps else None
    return _record(model, settings, own, metrics, causal, options.held_out_tokens)


def _record(
    model: Model,
    settings: PretrainConfig,
    own: Processes,
    metrics: list[dict[str, Any]],
    causal: CausalModel | None,
    held_out_tokens: int,
) -> dict[str, Any]:
    length, last = settings.data.sequence_length, metrics[-1]
    # In the first line are kernels that were compiled.
    timed = metrics[1:] or metrics
    there = (PackedTokens(settings.data.directory).num_tokens - 1) // length * length
    mixer = settings.model.mixer_pattern[0]
    cuda = own.device.type == "cuda"
    began = time.perf_counter()
    held_out = {} if causal is None else _perplexities(causal, settings, own, held_out_tokens)
    return {
        "name": model.name,
        "by": model.by,
        "mixer": model.mixer,
        "eigenvalue_range": list(model.eigenvalue_range),
        "num_householder": getattr(mixer, "num_householder", None),
        "seed": settings.training.seed,
        "finished": causal is not None,
        "parameters": None if causal is None else causal.num_parameters,
        "tokens": last["tokens"],
        "unique_tokens": min(last["tokens"], there),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in timed),
        "mfu": None if last["mfu"] is None else statistics.median(line["mfu"] for line in timed),
        "peak_memory_gb": last["memory_gb"],
        "skipped_steps": last["skipped"],
        "loss": [[line["tokens"], round(line["loss"], 5)] for line in thinned(metrics)],
        "held_out": held_out,
        "seconds": last["seconds"],
        "held_out_seconds": round(time.perf_counter() - began, 1),
        "device": torch.cuda.get_device_name(own.device) if cuda else "cpu",
        "environment": environment(_PACKAGES),
    }


def thinned(lines: Sequence[Any]) -> list[Any]:
    """At most `_POINTS` of them, evenly spread, the last one too."""
    every = -(-len(lines) // _POINTS)
    return list(lines[::-1][::every][::-1])


def _perplexities(
    causal: CausalModel, settings: PretrainConfig, own: Processes, tokens: int
) -> dict[str, dict[str, float]]:
    """Perplexity by domain and length, computed in the precision of training."""
    length = settings.data.sequence_length
    bf16 = settings.training.precision == "bfloat16"
    with torch.autocast(own.device.type, torch.bfloat16, enabled=bf16):
        found = perplexity(causal, settings.data.directory, [length * 2**i for i in range(5)], tokens=tokens)
    return {domain.domain: {str(loss.stop): round(loss.perplexity, 4) for loss in domain.by_length} for domain in found}


class Summary:
    """The file summary.json of --out, and what is drawn from it.

    Args:
        out: the directory.
        settings: what all its runs have in common; None to take what is there.
    """

    def __init__(self, out: Path, settings: dict[str, Any] | None) -> None:
        self.out, self.file = out, out / _SUMMARY
        there = json.loads(self.file.read_text()) if self.file.exists() else None
        if settings is None and there is None:
            sys.exit(f"{self.file} is not there: give the directory of prepared data, and the runs begin")
        if settings is not None and there is not None and there["settings"] != settings:
            sys.exit(
                f"{self.file} has runs with other settings or on other data: {there['settings']}; choose another --out"
            )
        self.settings = there["settings"] if there is not None else settings
        self.records: dict[str, dict[str, Any]] = {} if there is None else {r["name"]: r for r in there["results"]}

    def finished(self, model: Model) -> bool:
        return self.records.get(model.name, {}).get("finished", False)

    def add(self, record: dict[str, Any]) -> None:
        """Takes the record of a run in, in place of an earlier one of its name, and writes all files."""
        self.records[record["name"]] = record
        order = [model.name for model in MODELS]
        self.records = dict(sorted(self.records.items(), key=lambda item: order.index(item[0])))
        data = {
            "what": "language models trained on the same tokens; loss: [tokens read, nats a token of a batch]; "
            "held_out: perplexity by domain and by how many tokens the state is carried over",
            "settings": self.settings,
            "results": list(self.records.values()),
        }
        self.out.mkdir(parents=True, exist_ok=True)
        atomic_write(self.file, json.dumps(data, indent=1) + "\n")
        self.show()

    def show(self) -> None:
        """Writes the table and, where matplotlib is installed, the figure."""
        records = list(self.records.values())
        atomic_write(self.out / "summary.md", tables(records))
        try:
            from benchmarks.language_models_plot import draw
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
            print("matplotlib is not installed: the figure is left as it is", flush=True)
        else:
            draw(records, self.out / "curves.svg")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the runs of a summary have in common."""
    return {
        "size": options.size,
        "tokens": options.tokens,
        "held_out_tokens": options.held_out_tokens,
        "set": sorted(options.set),
        "learning_rate": config(MODELS[0], options).optimizer.learning_rate,
        "data": {"fingerprint": fingerprint(options.data), **read_manifest(options.data)["tokens"]},
    }


def run_here(pending: Sequence[Model], options: argparse.Namespace, summary: Summary, deadline: float) -> bool:
    """One after the other on one device; whether none has failed."""
    well = True
    with processes(options.device) as own:
        for model in pending:
            if time.monotonic() > deadline:
                print(f"{model.name}: no time left for it", flush=True)
                continue
            try:
                record = train_and_judge(model, options, own, deadline, _teller(model))
                if record is not None:
                    summary.add(record)
            except Exception:  # the others are runs of their own
                traceback.print_exc()
                well = False
            gc.collect()
            if own.device.type == "cuda":
                torch.cuda.empty_cache()
    return well


def run_on_all(
    pending: Sequence[Model], options: argparse.Namespace, summary: Summary, deadline: float, gpus: Sequence[str]
) -> bool:
    """Each in a process of its own, one at a time on each GPU; whether none has failed."""
    free: queue.Queue[str] = queue.Queue()
    for gpu in gpus:
        free.put(gpu)

    def one(model: Model) -> dict[str, Any] | None:
        gpu, out = free.get(), options.work / f"{model.name}-alone"
        try:
            (out / _SUMMARY).unlink(missing_ok=True)
            minutes = (deadline - time.monotonic()) / 60
            if minutes <= 0:
                print(f"{model.name}: no time left for it", flush=True)
                return None
            command = [sys.executable, "-m", "benchmarks.language_models", str(options.data), "--out", str(out)]
            command += ["--work", str(options.work), "--tokens", str(options.tokens), "--size", options.size]
            command += ["--held-out-tokens", str(options.held_out_tokens)]
            command += ["--only", model.name, *(part for text in options.set for part in ("--set", text))]
            if math.isfinite(minutes):
                command += ["--minutes", str(minutes)]
            subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu}, check=True)
            file = out / _SUMMARY
            return json.loads(file.read_text())["results"][0] if file.exists() else None
        finally:
            free.put(gpu)

    well = True
    with ThreadPoolExecutor(len(gpus)) as pool:
        for future in [pool.submit(one, model) for model in pending]:
            try:
                record = future.result()
            except (subprocess.CalledProcessError, OSError) as error:
                print(error, file=sys.stderr, flush=True)
                well = False
            else:
                if record is not None:
                    summary.add(record)
    return well


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = [str(index) for index in range(torch.cuda.device_count())]
    return every if named is None else named.split(",")[: len(every)]


def _teller(model: Model) -> Callable[[str], None]:
    return lambda text: print(f"{model.name}: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="what `statetrack data prepare` has written")
    parser.add_argument("--out", type=Path, default=Path("results/language-models"))
    parser.add_argument("--work", type=Path, default=Path("runs/language-models"), help="checkpoints and models")
    parser.add_argument("--only", nargs="+", choices=[model.name for model in MODELS], metavar="NAME")
    parser.add_argument("--tokens", type=lambda text: int(float(text)), default=100_000_000, help="of each run")
    parser.add_argument("--held-out-tokens", type=int, default=2**18, help="of each domain, at each length")
    parser.add_argument("--size", default="30m", help="of the presets")
    parser.add_argument("--minutes", type=float, default=math.inf, help="training stops after so many")
    parser.add_argument("--set", action="append", default=[], help="a value of every config, such as data.batch_size=8")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    if options.data is None:
        Summary(options.out, None).show()
        return
    summary = Summary(options.out, settings_of(options))
    pending = [m for m in MODELS if not summary.finished(m) and m.name in (options.only or [x.name for x in MODELS])]
    if not peer.installed():
        for model in [m for m in pending if m.by != "statetrack"]:
            print(f"{model.name}: needs a GPU and flash-linear-attention, left out", flush=True)
            pending.remove(model)
    gpus = [] if options.device == "cpu" else visible_gpus()
    several = len(gpus) > 1 and len(pending) > 1
    well = not pending or (
        run_on_all(pending, options, summary, deadline, gpus)
        if several
        else run_here(pending, options, summary, deadline)
    )
    with contextlib.suppress(FileNotFoundError):
        print((options.out / "summary.md").read_text())
    if not well:
        sys.exit(1)


if __name__ == "__main__":
    main()
