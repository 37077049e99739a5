"""The commands about theory: `statetrack analyze | compile | verify | certify`."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from statetrack.automata import Automaton
    from statetrack.model import LanguageModel, Tracker
    from statetrack.theory.requirements import Analysis


@dataclass
class Language:
    """A language, or a group, or any automaton, in one of these ways.

    Attributes:
        regex: a regular expression over single characters, such as '(ab)*'.
        alphabet: the letters of the expression, such as abc; those that occur in it if left out.
        group: a group, such as S5 or A5xZ9.
        generators: which of its elements are the letters: all, generators, swaps, 3-cycles, two, or permutations such
            as "(1 2),(1 2 3 4 5)"; without --group the group that these generate.
        automaton: a JSON file with an automaton: a table of transitions, or the arguments of automata-lib's DFA.
    """

    regex: str | None = None
    alphabet: str | None = None
    group: str | None = None
    generators: str | None = None
    automaton: Path | None = None

    def task_name(self, task: str = "") -> str:
        """The name of the task of this language.

        Args:
            task: a task's name that may stand in place of the options.

        Raises:
            ValueError: unless exactly one language is named.
        """
        by_group = self.group is not None or self.generators is not None
        named = [bool(task), self.regex is not None, by_group, self.automaton is not None]
        if sum(named) != 1:
            raise ValueError(
                "name one language: a TASK such as parity, or --regex, --group, --generators or --automaton; "
                f"got {sum(named)} of them"
            )
        if self.alphabet is not None and self.regex is None:
            raise ValueError("--alphabet goes with --regex")
        if task:
            return task
        if self.regex is not None:
            from statetrack.tasks.regular_expression import OVER

            return f"regex:{self.regex}" + (f"{OVER}{self.alphabet}" if self.alphabet is not None else "")
        if self.automaton is not None:
            return f"automaton:{self.automaton}"
        return "group:" + ":".join(part for part in (self.group, self.generators) if part is not None)

    @property
    def named(self) -> bool:
        return any(value is not None for value in (self.regex, self.group, self.generators, self.automaton))


Interval = Literal["auto"] | int
"""Tokens from one correction of a stabilized model to the next; "auto" leaves the choice to it."""

_LanguageOptions = Annotated[Language, tyro.conf.arg(name="")]


@dataclass(kw_only=True)
class Analyze:
    """Say what a language needs of a linear RNN, and which theorem says so.

    Attributes:
        task: a task, as `statetrack tasks` lists them; or name a language by one of the options for it.
        language: the language.
        monoid_limit: enumerate the transition monoid up to so many elements.
        json: write the result as JSON to this file; without a file to standard output.
        html: write a page with drawings of the automaton and its eggbox diagram.
    """

    task: tyro.conf.Positional[str] = ""
    language: _LanguageOptions = field(default_factory=Language)
    monoid_limit: int = 200_000
    json: Path | None = None
    html: Path | None = None

    def __call__(self) -> int:
        from statetrack.theory.requirements import analyze

        name = self.language.task_name(self.task)
        analysis = analyze(_automaton(name), monoid_limit=self.monoid_limit)
        if not _write_json(self.json, {"language": name, **analysis.data()}):
            _show_analysis(name, analysis)
        if self.html is not None:
            from statetrack.report.theory import write_analysis

            write_analysis(name, analysis, self.html)
            print(f"wrote {self.html}")
        return 0


@dataclass(kw_only=True)
class Compile:
    """Write a run directory with exact weights for a language: a model that is right for ever, without training.

    Attributes:
        task: a task, as `statetrack tasks` lists them; or name a language by one of the options for it.
        language: the language.
        out: the run directory to make.
        strategy: auto (one layer if that is enough, else exclusion), one_layer, exclusion (a cascade of n - 1 layers)
            or holonomy (a cascade by the Krohn-Rhodes decomposition, with the groups of the language itself).
        keys: raw for integer keys, or pair for a mixer that normalizes its keys (groups only).
    """

    task: tyro.conf.Positional[str] = ""
    out: Path
    language: _LanguageOptions = field(default_factory=Language)
    strategy: Literal["auto", "one_layer", "exclusion", "holonomy"] = "auto"
    keys: Literal["raw", "pair"] = "raw"

    def __call__(self) -> int:
        from statetrack.config import RunConfig, TrainingConfig
        from statetrack.runs import RunDirectory, RunError
        from statetrack.tasks import get_task
        from statetrack.theory import construct
        from statetrack.theory.requirements import counted

        begin = time.perf_counter()
        task = get_task(self.language.task_name(self.task))
        automaton = _automaton(task.name)
        directory = RunDirectory(self.out)
        if directory.exists():
            raise RunError(f"{self.out} holds a run already; give a new directory")
        model = construct.compile(automaton, strategy=self.strategy, keys=self.keys)
        # A run needs a training config; that no training took place is written beside the weights.
        directory.create(RunConfig(task=task.name, model=model.config, training=TrainingConfig(steps=1)))
        directory.save_weights(model, {"compiled": self.strategy})
        chosen = construct.plan(automaton, self.strategy)
        mixer = model.config.layer_mixers()[0]  # compiled models have the same in every layer
        print(
            f"compiled {_short(task.name)}: {automaton.num_states} states, {automaton.num_letters} letters\n"
            f"  {counted(model.config.num_layers, 'layer')} of {mixer.title}, {counted(chosen.num_heads, 'head')}, "
            f"state {getattr(mixer, 'head_dim', '?')} x {getattr(mixer, 'value_dim', '?')}, N = "
            f"{getattr(mixer, 'num_householder', '?')} Householder factors a token, d_model = {model.config.d_model}, "
            f"{model.num_parameters():,} parameters\n"
            f"  {chosen.theorem}: {chosen.why}\n"
            f"in {time.perf_counter() - begin:.1f} s, saved in {self.out}\nnext: statetrack verify {self.out}"
        )
        return 0


@dataclass(kw_only=True)
class Verify:
    """Prove that a model is right on every word of every length, or count its errors on random words.

    Attributes:
        run: a run directory, compiled or trained.
        task: a task as the language to compare with; the run's own if no language is named.
        language: the language.
        mode: exhaustive, words, or auto: exhaustive where the model has few enough states.
        tokens: then also read one random word of so many tokens; 0 for none.
        dtype: of weights and activations; states are float32 in any case.
        stabilize: set the state back on one that short words lead to, every so many tokens: a number, or auto for one
            that suits the model. With 1 a trained model may be proved right.
        seed: of the random words.
        json: write the result as JSON to this file; without a file to standard output.
    """

    run: tyro.conf.Positional[Path]
    task: str = ""
    language: _LanguageOptions = field(default_factory=Language)
    mode: Literal["auto", "exhaustive", "words"] = "auto"
    tokens: int = 10_000
    dtype: Literal["float32", "bfloat16"] = "float32"
    stabilize: Interval | None = None
    seed: int = 0
    json: Path | None = None

    def __call__(self) -> int:
        import torch

        from statetrack.progress import evaluation_progress
        from statetrack.runs import RunDirectory
        from statetrack.theory.verify import count_errors, verify

        if self.tokens < 0:
            raise ValueError(f"tokens must be 0 or more, got {self.tokens}")
        directory = RunDirectory(self.run)
        own = directory.read_config().task
        name = self.language.task_name(self.task) if self.language.named or self.task else own
        automaton = _automaton(name)
        model, corrections = stabilized(directory.load_model().to(getattr(torch, self.dtype)), self.stabilize)
        proof = verify(model, automaton, mode=self.mode, seed=self.seed)
        data = {"language": name, "dtype": self.dtype, "exact": proof.exact, **asdict(proof)}
        if corrections is not None:
            data["stabilized"] = corrections
        errors = proof.errors
        if self.tokens:
            with evaluation_progress() as show:
                wrong, first = count_errors(model, automaton, length=self.tokens, seed=self.seed, on_progress=show)
            data |= {"tokens": self.tokens, "token_errors": wrong, "first_token_error": first}
            errors += wrong
        if not _write_json(self.json, data):
            print(f"{_short(name)} in {self.dtype}: {proof}")
            if proof.first_error is not None:
                print(f"first wrong answer after {proof.first_error}")
            if self.tokens:
                print(f"{data['token_errors']:,} errors in one random word of {self.tokens:,} tokens")
        return 0 if errors == 0 else 1


@dataclass(kw_only=True)
class Certify:
    """Say what a trained or compiled model can never do: the spectra of its layers, and the theorems about them.

    Attributes:
        run: a run directory.
        seed: of the random words on which spectra are measured.
        json: write the result as JSON to this file; without a file to standard output.
        html: write a page with the eigenvalues of every layer in the complex plane, and those of products of tokens.
    """

    run: tyro.conf.Positional[Path]
    seed: int = 0
    json: Path | None = None
    html: Path | None = None

    def __call__(self) -> int:
        from statetrack.runs import RunDirectory
        from statetrack.theory.certify import certify

        directory = RunDirectory(self.run)
        name = directory.read_config().task
        certificate = certify(directory.load_model(), seed=self.seed)
        if not _write_json(self.json, {"run": str(self.run), "task": name, **certificate.data()}):
            print(f"{self.run} ({_short(name)})\n{certificate}")
        if self.html is not None:
            from statetrack.report.theory import write_certificate

            write_certificate(str(self.run), certificate, self.html)
            print(f"wrote {self.html}")
        return 0


def bare_json(words: Sequence[str]) -> list[str]:
    """The words of a command line with a `-` after every --json that is given no file: standard output."""
    result = []
    for index, word in enumerate(words):
        result.append(word)
        following = words[index + 1] if index + 1 < len(words) else "--"
        if word == "--json" and following.startswith("-") and following != "-":
            result.append("-")
    return result


def _automaton(name: str) -> Automaton:
    from statetrack.tasks import get_task
    from statetrack.tasks.automaton_task import AutomatonTask

    task = get_task(name)
    if not isinstance(task, AutomatonTask):
        raise ValueError(f"the task {name} is no finite automaton; theory speaks of those")
    return task.automaton


def _write_json(path: Path | None, data: object) -> bool:
    """Writes JSON to a file or, if it is `-`, to standard output; says whether nothing else should be printed there."""
    if path is None:
        return False
    text = json.dumps(data, indent=2, ensure_ascii=False)
    if str(path) == "-":
        print(text)
        return True
    from statetrack.files import atomic_write

    atomic_write(path, text + "\n")
    return False


def stabilized(model: LanguageModel, interval: Interval | None) -> tuple[Tracker, dict[str, int] | None]:
    """The model as the option --stabilize has it, and what is reported of the correction; None for none."""
    if interval is None:
        return model, None
    from statetrack.stabilize import StabilizedModel

    tracker = StabilizedModel(model, None if interval == "auto" else interval)
    return tracker, {"interval": tracker.interval, "states": len(tracker.known)}


def _short(name: str, width: int = 60) -> str:
    return name if len(name) <= width else name[: width - 3] + "..."


def _show_analysis(name: str, analysis: Analysis) -> None:
    console = Console()
    size = (
        "more elements than were enumerated" if analysis.monoid_size is None else f"{analysis.monoid_size:,} elements"
    )
    yes = {True: "yes", False: "no"}
    rows = [
        ("states of the minimal automaton", f"{analysis.states:,}"),
        ("transition monoid", size),
        ("star-free (aperiodic)", yes[analysis.aperiodic]),
        ("every letter permutes the states", yes[analysis.group]),
        ("groups in it", ", ".join(f"{g.name} ({g.order:,})" for g in analysis.groups) or "none"),
        ("solvable", yes[analysis.solvable]),
        ("primes", ", ".join(map(str, analysis.primes)) or "none"),
    ]
    if analysis.green:
        rows.append(("Green's classes", ", ".join(f"{count:,} {kind}" for kind, count in analysis.green.items())))
    if (o := analysis.one_layer_obstruction) is not None:
        e, f = (" ".join(word) or "(nothing)" for word in (o.e, o.f))
        rows.append(("one layer is not enough", f"e = {e}, f = {f}: efe is not fe from state {o.state}"))
    else:
        rows.append(("obstruction to one layer", f"none found among {analysis.obstruction_searched}"))
    facts = Table("", "", show_header=False, title=_short(name), title_justify="left")
    for row in rows:
        facts.add_row(*row)
    console.print(facts)
    for r in analysis.requirements:
        console.print(
            f"\n{r.quantity.replace('_', ' ')} {r.value}: {r.kind} by {r.theorem}, for {r.assumption}\n  {r.sentence}",
            markup=False,
            highlight=False,
        )
    print()
    quoted = shlex.quote(name)
    factors = 1 if analysis.plan is None else analysis.plan.num_householder
    layers = 1 if analysis.plan is None else analysis.plan.num_layers
    lowest = "0,1" if analysis.aperiodic else "-1,1"
    print(
        f"train:   statetrack train {quoted} --mixer deltaproduct --num-householder {factors} --num-layers {layers} "
        f"--eigenvalue-range={lowest} --out runs/trained\n"
        f"compile: statetrack compile {quoted} --out runs/compiled"
    )
