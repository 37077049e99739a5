"""The commands, from `statetrack demo` to `statetrack mixers`. No defaults of its own beyond paths.

Those about theory (analyze, compile, verify, certify) are in `theory/commands.py`, those about data in
`data/commands.py`, `pretrain` in `pretraining/commands.py`.

Bad input ends with one sentence on standard error and exit status 2, an interruption with 130, a reader that closes the
pipe with 141.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, get_type_hints

import torch
import tyro
from rich.console import Console
from rich.table import Table

import statetrack
from statetrack.config import RunConfig, TrainingConfig, run_config
from statetrack.data.commands import Data
from statetrack.interruption import handle_again
from statetrack.machine import available_devices
from statetrack.mixers import mixer_config, mixer_configs
from statetrack.mixers.deltanet import DeltaNetConfig
from statetrack.mixers.mixer import refuse_absent
from statetrack.model import ModelConfig
from statetrack.pretraining.commands import Pretrain
from statetrack.runs import RunDirectory
from statetrack.tasks import TaskFamily, get_task, list_tasks
from statetrack.theory.commands import (
    Analyze,
    Certify,
    Compile,
    Interval,
    Language,
    Verify,
    bare_json,
    stabilized,
)
from statetrack.training import train
from statetrack.transition import EigenvalueRange

INTERRUPTED = 130
BROKEN_PIPE = 141  # 128 + the number of SIGPIPE, as shells have it


@dataclass
class Demo:
    """Train linear RNNs that can and can't track a state, on the CPU, and show why: a table and an HTML page.

    Attributes:
        out: directory of the results; an interrupted demo goes on from there, a finished one is replaced.
        workers: runs at the same time; one for each core if left out.
        seeds: seeds of every model, such as 0,1,2; those of the demo if left out.
    """

    out: Path = Path("runs/demo")
    workers: int | None = None
    seeds: str | None = None

    def __call__(self) -> int:
        from statetrack.demo import run_demo

        seeds = None if self.seeds is None else list(_integers(self.seeds, "seeds", minimum=0))
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        with stop_on_signal() as stopping:
            finished = run_demo(self.out, workers=self.workers, seeds=seeds, should_stop=stopping)
        if finished:
            return 0
        print(f"interrupted; every run has a checkpoint. To go on: statetrack demo --out {self.out}", file=sys.stderr)
        return INTERRUPTED


@dataclass
class Reproduce:
    """Run a published experiment again, or a grid of your own, and set the numbers beside the published ones.

    The same command again goes on: what is done is not repeated.

    Attributes:
        experiment: its name, as --list shows them, or a file with a grid of your own, such as mine.toml.
        list: list the experiments and their presets.
        preset: a smaller version of the experiment.
        out: directory of the results; runs/NAME, or runs/NAME-PRESET, if left out, of mine.toml runs/mine.
        seeds: seeds of every model, such as 0,1,2; those of the experiment if left out.
        only: a regular expression: only runs whose names have a match are trained, such as "parity.*deltanet". The
            table has the whole grid.
        workers: runs at the same time; one for each core or GPU if left out.
        devices: where they run, such as cpu or cuda:0,cuda:1; if left out, all GPUs, or the CPU where there are none.
        budget_minutes: stop after so many minutes, with checkpoints and with what is done on the page.
        retry_failed: let runs that have failed go on from their last checkpoints; else they stay failed.
        merge: train nothing, but put together what these directories, or files summary.json, have of the grid, such as
            the parts that several machines did. Of a run that several have the last counts, but done before failed.
        slurm: run the grid as jobs of a SLURM cluster, from a machine that can submit to it, and wait for them; the
            other options of this name say what each job asks for.
        slurm_partition: the partition; the cluster's own choice if left out.
        slurm_account: whom the time is charged to; the cluster's own choice if left out.
        slurm_minutes: time limit of a job; runs that are not done by then go on in another job.
        slurm_gpus: GPUs of a job, on one machine; 0 for CPUs.
        slurm_cpus: CPU cores of a job; one for each run at the same time if left out.
        slurm_runs: runs that a job does; one for each of its GPUs or cores if left out.
    """

    experiment: tyro.conf.Positional[str] = ""
    list: bool = False
    preset: str | None = None
    out: Path | None = None
    seeds: str | None = None
    only: str | None = None
    workers: int | None = None
    devices: str | None = None
    budget_minutes: float | None = None
    retry_failed: bool = False
    merge: tuple[Path, ...] | None = None
    slurm: bool = False
    slurm_partition: str | None = None
    slurm_account: str | None = None
    slurm_minutes: int = 240
    slurm_gpus: int = 1
    slurm_cpus: int | None = None
    slurm_runs: int | None = None

    def __call__(self) -> int:
        from statetrack.cluster import Cluster, reproduce_on_cluster
        from statetrack.experiments import load_experiment
        from statetrack.reproduce import reproductions, run_reproduction

        known = reproductions()
        if self.list:
            _show_experiments(known)
            return 0
        if self.experiment not in known and not self.experiment.endswith(".toml"):
            raise ValueError(
                f"unknown experiment {self.experiment!r}; those that can be reproduced are {', '.join(known)}, and any "
                "in a file that ends in .toml"
            )
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.budget_minutes is not None and not self.budget_minutes > 0:
            raise ValueError(f"budget_minutes must be positive, got {self.budget_minutes}")
        seeds = None if self.seeds is None else _integers(self.seeds, "seeds", minimum=0)
        experiment = load_experiment(self.experiment, seeds, self.preset)
        name = Path(self.experiment).name.removesuffix(".toml")
        out = self.out or Path("runs") / "-".join(filter(None, [name, self.preset]))
        if self.slurm and (self.devices is not None or self.budget_minutes is not None):
            raise ValueError(
                "with --slurm a job uses all its GPUs until its time is up: leave out --devices and --budget-minutes"
            )
        if self.merge is not None:
            return self._merge(experiment, out)
        with stop_on_signal() as stopping:
            if self.slurm:
                cluster = Cluster(
                    partition=self.slurm_partition,
                    account=self.slurm_account,
                    minutes=self.slurm_minutes,
                    gpus=self.slurm_gpus,
                    cpus=self.slurm_cpus,
                    runs_per_job=self.slurm_runs,
                )
                outcomes = reproduce_on_cluster(
                    experiment,
                    out,
                    cluster,
                    only=self.only,
                    workers=self.workers,
                    retry_failed=self.retry_failed,
                    should_stop=stopping,
                )
            else:
                outcomes = run_reproduction(
                    experiment,
                    out,
                    only=self.only,
                    workers=self.workers,
                    devices=_devices(self.devices),
                    budget_minutes=self.budget_minutes,
                    retry_failed=self.retry_failed,
                    should_stop=stopping,
                )
            interrupted = stopping()
        _show_files(out)
        missing = [outcome.run.name for outcome in outcomes if outcome.record is None]
        if missing:
            asked = any(re.search(self.only or "", name) for name in missing)
            goes_on = "the same command goes on" if asked else "those that were asked for are done"
            print(f"{len(missing)} of {len(outcomes)} runs are left; {goes_on}", file=sys.stderr)
        failed = sum(outcome.failed for outcome in outcomes)
        if failed:
            print(f"{failed} of {len(outcomes)} runs failed; --retry-failed lets them go on", file=sys.stderr)
        return INTERRUPTED if interrupted else 0

    def _merge(self, experiment: Any, out: Path) -> int:
        from statetrack.reproduce import merge_results

        plain = Reproduce(self.experiment, preset=self.preset, out=self.out, seeds=self.seeds, merge=self.merge)
        if other := [f.name for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)]:
            names = ", ".join("--" + name.replace("_", "-") for name in other)
            raise ValueError(f"--merge trains nothing: leave out {names}")
        if not self.merge:
            raise ValueError("--merge needs directories with results, or files summary.json; none was given")
        outcomes = merge_results(experiment, out, self.merge)
        _show_files(out)
        missing = sum(outcome.record is None for outcome in outcomes)
        failed = sum(outcome.failed for outcome in outcomes)
        if missing or failed:
            print(f"of {len(outcomes)} runs {missing} are missing and {failed} failed", file=sys.stderr)
        return 0


def _show_files(out: Path) -> None:
    print(f"the numbers: {out / 'summary.json'}, {out / 'table.md'}    the page: {out / 'report.html'}")


def _show_experiments(known: dict[str, dict[str, Any]]) -> None:
    from statetrack.experiments.experiment import read_experiment

    table = Table("experiment", "runs", "what it is", "protocol")
    for name, data in known.items():
        for preset in (None, *data.get("preset", {})):
            experiment = read_experiment(data, preset=preset)
            label = name if preset is None else f"{name} --preset {preset}"
            table.add_row(label, str(len(experiment.runs)), experiment.title, experiment.published.protocol)
    Console().print(table)


def _devices(names: str | None) -> list[str]:
    if names is None:
        return available_devices()
    return [str(_device(name)) for name in names.split(",")]


@dataclass
class Evaluate:
    """Judge a trained model on fresh sequences, or a language model on held-out text and probes, in constant memory.

    A language model is a run of `statetrack pretrain` or any directory that transformers loads. It is judged by its
    perplexity at each length, always on the same tokens, and by state-tracking probes in words.

    Attributes:
        run: a run directory, or a directory with a language model.
        lengths: positions of the labels that are judged, such as 256,10000; of a language model over how many tokens
            the state is carried, each dividing the longest. 40,256,1000,10000 if left out, or 2048,8192,32768.
        sequences: how many sequences; if left out 512, and 32 at lengths from 10,000 on; of a language model how many
            questions for each probe and length, 64 if left out.
        seed: seed of the sequences.
        task: judge on another task with the same vocabulary and labels than the one it was trained on.
        dtype: of weights and activations, if other than that of the run; states are float32 in any case.
        stabilize: set the state back on one that short words lead to, every so many tokens: a number, or auto for one
            that suits the model. The run keeps its evaluation of the model as it is.
        data: for a language model, what `statetrack data prepare` has written; without it there are the probes alone.
        domains: its domains to judge on, such as code,math; all if left out.
        tokens: tokens of each domain that are read at each length, at most; 262144 if left out.
        documents: read the beginnings of documents that are longer than the longest length, not stretches of the stream
            of all documents.
        probes: which probes to ask, such as parity,s3,code, or none; all if left out.
        probe_lengths: their lengths; 4,16,64,256 if left out.
        generation: measure the time of a generated token and the memory of what is carried after so many tokens, such
            as 256,4096,65536; beside it those of a Transformer with as many parameters, where transformers is there.
        json: also write the result to this file.
        device: cpu or cuda; if left out, cuda where there is one.
    """

    run: tyro.conf.Positional[Path]
    lengths: str | None = None
    sequences: int | None = None
    seed: int = 0
    task: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    stabilize: Interval | None = None
    data: Path | None = None
    domains: str | None = None
    tokens: int | None = None
    documents: bool = False
    probes: str | None = None
    probe_lengths: str | None = None
    generation: str | None = None
    json: Path | None = None
    device: str | None = None

    def __call__(self) -> int:
        from statetrack.language_models.causal import is_language_model

        return self._language_model() if is_language_model(self.run) else self._tracker()

    def _language_model(self) -> int:
        from statetrack.language_models.commands import evaluate_language_model

        for name in ("task", "stabilize"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name} is for runs of a task, and {self.run} is a language model")
        return evaluate_language_model(
            self.run,
            data=self.data,
            lengths=None if self.lengths is None else _integers(self.lengths, "lengths", minimum=1),
            domains=None if self.domains is None else self.domains.split(","),
            tokens=self.tokens,
            documents=self.documents,
            probes=None if self.probes is None else [] if self.probes == "none" else self.probes.split(","),
            probe_lengths=_integers(
                "4,16,64,256" if self.probe_lengths is None else self.probe_lengths, "probe_lengths", minimum=1
            ),
            questions=self.sequences,
            generation=[] if self.generation is None else _integers(self.generation, "generation", minimum=1),
            seed=self.seed,
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
            device=_device(self.device),
            json_file=self.json,
        )

    def _tracker(self) -> int:
        if not self.run.exists():
            raise ValueError(f"there is no run directory {self.run}")
        for name in ("data", "domains", "tokens", "probes", "probe_lengths", "generation"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for language models, and {self.run} is none")
        if self.documents:
            raise ValueError(f"--documents is for language models, and {self.run} is none")
        from statetrack.evaluation import evaluate, evaluation_data
        from statetrack.files import atomic_write
        from statetrack.progress import evaluation_progress
        from statetrack.report import run_origin

        lengths = _integers("40,256,1000,10000" if self.lengths is None else self.lengths, "lengths", minimum=1)
        directory, device = RunDirectory(self.run), _device(self.device)
        config = directory.read_config()
        model = directory.load_model(device)
        task = get_task(self.task or config.task)
        if (task.vocab_size, task.num_labels) != (config.model.vocab_size, config.model.output_size):
            raise ValueError(
                f"{self.run} was trained with {config.model.vocab_size} tokens and {config.model.output_size} labels; "
                f"the task {task.name} has {task.vocab_size} and {task.num_labels}"
            )
        if self.dtype is not None:
            model = model.to(getattr(torch, self.dtype))
        tracker, corrections = stabilized(model, self.stabilize)
        with evaluation_progress() as show:
            results = evaluate(
                tracker,
                task,
                lengths,
                seed=self.seed,
                sequences=self.sequences,
                device=device,
                on_progress=show,
            )
        title = ", ".join([f"{task.name}: {self.run}", *filter(None, [self.dtype])])
        table = Table("length", "accuracy", "sequences", title=title, title_justify="left")
        for result in results:
            table.add_row(f"{result.length:,}", f"{result.accuracy:.4f}", f"{result.sequences:,}")
        Console().print(table)
        data = evaluation_data(results, task, self.seed)
        if corrections is not None:
            data["stabilized"] = corrections
            print("stabilized: {states} states, corrected every {interval} tokens".format(**corrections))
        if self.task is None and self.dtype is None and self.stabilize is None:
            directory.write_evaluation(data | {"origin": run_origin(str(device))})
        if self.json is not None:
            atomic_write(self.json, json.dumps(data | {"run": str(self.run)}, indent=2) + "\n")
        return 0


@dataclass
class Report:
    """Compare trained models in a table and on one HTML page: accuracy by length, learning curves, eigenvalues.

    Of language models the page has loss curves, perplexity by length and position, probes and speed.

    Attributes:
        runs: run directories; of language models also files that `evaluate --json` has written.
        out: the page.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("report.html")

    def __call__(self) -> int:
        from statetrack.records import record_of_run
        from statetrack.report import provenance, table, write_report

        if not self.runs:
            raise ValueError("report needs at least one run directory, for example: statetrack report runs/parity")
        from statetrack.language_models.causal import is_language_model

        language_models = [path.is_file() or is_language_model(path) for path in self.runs]
        if all(language_models):
            from statetrack.language_models.commands import report_language_models

            return report_language_models(self.runs, self.out)
        if any(language_models):
            raise ValueError("a report compares language models or runs of tasks, not both; make a page for each")
        records = [record_of_run(RunDirectory(path)) for path in self.runs]
        Console().print(table(records))
        names = ", ".join(dict.fromkeys(record.task for record in records))
        write_report(
            records, self.out, title=f"{names}: {len(records)} run{'s' * (len(records) > 1)}", provenance=provenance()
        )
        print(f"wrote {self.out}")
        return 0


@dataclass(kw_only=True)
class Generate:
    """Write text with a language model, as it is drawn; in constant memory, whatever the length, without attention.

    Attributes:
        model: the directory of a pre-training run; or one with a language model and its tokenizer, as `statetrack.hf`
            saves them; any checkpoint that `from_pretrained` reads will do.
        prompt: the text to go on from.
        max_new_tokens: how many tokens are drawn at most; none after the end of a document.
        temperature: of the draws; 0 takes the most likely token always.
        top_k: draw from the so many most likely tokens only.
        seed: of the draws.
        device: cpu or cuda; if left out, cuda where there is one.
    """

    model: tyro.conf.Positional[Path]
    prompt: str = ""
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    seed: int = 0
    device: str | None = None

    def __call__(self) -> int:
        from statetrack.data.tokenizer import load_tokenizer
        from statetrack.generation import generate, streamed
        from statetrack.pretrained import from_pretrained
        from statetrack.pretrained.files import model_directory, read_config

        if not _is_text(self.prompt):
            raise ValueError("the prompt is not valid UTF-8, so that it is no text")
        place = model_directory(self.model)
        if "task" in (config := read_config(place)):  # a run, trained or compiled
            raise ValueError(
                f"{self.model} is a run of the task {config['task']}, whose model answers with labels; generate needs "
                "a language model"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0..2^63 - 1, got {self.seed}")
        device = _device(self.device)
        model, tokenizer = from_pretrained(place).to(device), load_tokenizer(place)
        (prompt,) = tokenizer.encode([self.prompt])
        tokens = generate(
            model,
            [tokenizer.separator, *prompt.tolist()],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            stop=tokenizer.separator,
            seed=self.seed,
        )
        print(self.prompt, end="", flush=True)
        for text in streamed(tokens, tokenizer.decode):
            print(text, end="", flush=True)
        print()
        return 0


@dataclass
class Tasks:
    """List the tasks, each with its algebraic class, how many generators and labels it has, and its chance level.

    Attributes:
        json: also write the list to this file; without a file to standard output.
    """

    json: Path | None = None

    def __call__(self) -> int:
        from statetrack.files import atomic_write

        rows = [_task_facts(info) for info in list_tasks()]
        if self.json is not None:
            text = json.dumps(rows, indent=2) + "\n"
            if str(self.json) == "-":
                print(text, end="")
                return 0
            atomic_write(self.json, text)
        table = Table("task, for example", "algebra", "what it asks", show_lines=True)
        for row in rows:
            facts = [row["algebraic_class"] or f"needs the package {row['needs']}"]
            if row["num_generators"] is not None:
                facts.append(f"{row['num_generators']} generators")
            if row["chance"] is not None:
                facts.append(f"{row['num_labels']} labels, chance {row['chance']:.3g}")
            table.add_row(f"{row['task']}\n{row['example']}", "\n".join(facts), row["description"])
        Console().print(table)
        return 0


def _task_facts(info: TaskFamily) -> dict[str, Any]:
    """What `statetrack tasks` says about a family: facts about its example, None where a package for it is missing."""
    facts: dict[str, Any] = dict.fromkeys(("algebraic_class", "num_generators", "vocab_size", "num_labels", "chance"))
    if not info.needs or find_spec(info.needs):
        task = get_task(info.example)
        facts = {key: getattr(task, key) for key in facts}
    return {"task": info.syntax, "example": info.example, **facts, "needs": info.needs, "description": info.description}


@dataclass(kw_only=True)
class Probes:
    """Write the state-tracking probes in words as tasks of lm-eval, the same questions that `evaluate` asks.

    Attributes:
        out: the directory to write to.
        probes: which probes, such as parity,s3,code; all if left out.
        lengths: letters of their sequences.
        questions: how many for each probe and length.
        seed: seed of the questions.
    """

    out: Path
    probes: str | None = None
    lengths: str = "4,16,64,256"
    questions: int = 64
    seed: int = 0

    def __call__(self) -> int:
        from statetrack.language_models.probes import GROUP, write_lm_eval_tasks

        names = write_lm_eval_tasks(
            self.out,
            _integers(self.lengths, "lengths", minimum=1),
            probes=None if self.probes is None else self.probes.split(","),
            questions=self.questions,
            seed=self.seed,
        )
        print(
            f"wrote {len(names)} tasks to {self.out}\nnext: python -m statetrack.lm_eval --model hf --model_args "
            f"pretrained=DIR,add_bos_token=True,max_length=131072 --include_path {self.out} --tasks {GROUP}"
        )
        return 0


@dataclass
class Mixers:
    """List the token mixers, with their options and defaults."""

    def __call__(self) -> int:
        table = Table("mixer", "what it is", "options and defaults", show_lines=True)
        for name, config in mixer_configs().items():
            options = [f"--{f.name.replace('_', '-')} {getattr(config(), f.name)}" for f in fields(config)]
            table.add_row(name, config.summary, "\n".join(options))
        Console().print(table)
        return 0


@dataclass
class Resume:
    """Go on with a run that was interrupted.

    Attributes:
        resume: the run directory.
        device: cpu or cuda; if left out, cuda where there is one.
    """

    resume: Path
    device: str | None = None

    def __call__(self) -> int:
        return _train(RunDirectory(self.resume).read_config(), self.resume, self.device)


def _train(config: RunConfig, out: Path, device: str | None) -> int:
    from statetrack.progress import training_progress

    with stop_on_signal() as stopping, training_progress(config) as show:
        result = train(config, RunDirectory(out), device=_device(device), on_progress=show, should_stop=stopping)
    if result.step < config.training.steps:
        print(
            f"interrupted at step {result.step} of {config.training.steps}, saved in {out}. "
            f"To go on: statetrack train --resume {out}",
            file=sys.stderr,
        )
        return INTERRUPTED
    print(f"trained {result.step} steps in {result.seconds:.1f} s, saved in {out}\nnext: statetrack evaluate {out}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    handle_again()
    words = bare_json(sys.argv[1:] if arguments is None else arguments)
    try:
        commands = {
            "demo": Demo,
            "reproduce": Reproduce,
            "train": _train_command(words),
            "evaluate": Evaluate,
            "report": Report,
            "analyze": Analyze,
            "compile": Compile,
            "verify": Verify,
            "certify": Certify,
            "generate": Generate,
            "pretrain": Pretrain,
            "data": tyro.conf.OmitArgPrefixes[tyro.conf.OmitSubcommandPrefixes[Data]],
            "tasks": Tasks,
            "probes": Probes,
            "mixers": Mixers,
        }
        description = (statetrack.__doc__ or "") + "\n\nStart with: statetrack demo"
        command: Callable[[], int] = tyro.extras.subcommand_cli_from_dict(
            commands, prog="statetrack", description=description, args=words, registry=_registry()
        )
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever reads the output has seen enough, as `head` has. What is buffered must not be written at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, RuntimeError, MemoryError, OverflowError, OSError, ModuleNotFoundError) as error:
        print(f"statetrack: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("statetrack: interrupted", file=sys.stderr)
        return INTERRUPTED


def _train_command(words: Sequence[str]) -> type:
    """The arguments of `train`, which depend on the mixer that the command line names; with --resume, `Resume`."""
    if any(word == "--resume" or word.startswith("--resume=") for word in words):
        return Resume
    mixer = DeltaNetConfig.name
    for index, word in enumerate(words):
        if word.startswith("--mixer="):
            mixer = word.removeprefix("--mixer=")
        elif word == "--mixer" and words[index + 1 :]:  # without a value, the parser itself will complain
            mixer = words[index + 1]
    refuse_absent(mixer_config(mixer), [_option_name(word) for word in words if word.startswith("--")])
    options = _options(mixer_config(mixer))
    model = _options(ModelConfig, without=("vocab_size", "output_size", "mixer", "norm_placement"))
    flat = tyro.conf.arg(name="")

    def run(self: Any) -> int:
        chosen = mixer_config(mixer)(**vars(self.mixer_options))
        task = self.language.task_name(self.task)
        return _train(run_config(task, chosen, vars(self.model), self.training), self.out, self.device)

    command = make_dataclass(
        "Train",
        [
            ("task", tyro.conf.Positional[str], ""),
            ("out", Path),
            ("language", Annotated[Language, flat], field(default_factory=Language)),
            ("mixer", str, mixer),
            ("device", str | None, None),
            ("mixer_options", Annotated[options, flat], field(default_factory=options)),
            ("model", Annotated[model, flat], field(default_factory=model)),
            ("training", Annotated[TrainingConfig, flat], field(default_factory=TrainingConfig)),
        ],
        namespace={"__call__": run},
        kw_only=True,
    )
    command.__doc__ = f"""Train a model on a task.

    The same command again goes on from the last checkpoint, and so does `statetrack train --resume DIR`. The options
    shown are those of --mixer {mixer}; other mixers have others.

    Attributes:
        task: the task, as `statetrack tasks` lists them; or name a language by one of the options for it.
        out: the run directory to make, or to go on with.
        mixer: the token mixer of every layer, one of {", ".join(mixer_configs())}; a hybrid of several is made in
            Python or in an experiment file, where `mixer` is a list.
        device: cpu or cuda; if left out, cuda where there is one.
    """
    return command


def _option_name(word: str) -> str:
    """`eigenvalue_range` of `--eigenvalue-range=-1,1`."""
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def _options(config: type, without: Sequence[str] = ()) -> type:
    """A dataclass with the fields of a config, less some, and its documentation, inherited fields included."""
    hints = get_type_hints(config)
    made = make_dataclass(
        config.__name__, [(f.name, hints[f.name], f) for f in fields(config) if f.name not in without], kw_only=True
    )
    sections = [(c.__doc__ or "").partition("Attributes:")[2].rstrip() for c in reversed(config.__mro__)]
    made.__doc__ = (config.__doc__ or "").partition("Attributes:")[0] + "Attributes:" + "".join(sections)
    return made


def _registry() -> tyro.constructors.ConstructorRegistry:
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def eigenvalue_range(info: Any) -> tyro.constructors.PrimitiveConstructorSpec[EigenvalueRange] | None:
        if info.type is not EigenvalueRange:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="LO,HI",
            instance_from_str=lambda words: EigenvalueRange.of(words[0]),
            is_instance=lambda value: isinstance(value, EigenvalueRange),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """A function that says whether ctrl-C or SIGTERM came; a second ctrl-C interrupts at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _integers(text: str, name: str, *, minimum: int) -> list[int]:
    try:
        values = [int(part.replace("_", "")) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{name} must be whole numbers with commas between them, such as 256,10000; got {text!r}"
        ) from None
    if min(values) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {min(values)}")
    return values


def _is_text(words: str) -> bool:
    """Whether words of the command line, which may have any bytes in them, are valid UTF-8."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; the devices are cpu and cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; the devices are cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; leave out --device or say --device cpu")
    return device


def _sentence(error: BaseException) -> str:
    """The message of an error on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror.lower()}: {error.filename}" if error.filename else error.strerror.lower()
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
