"""What `statetrack evaluate` and `statetrack report` do with language models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from statetrack.data.tokenizer import load_tokenizer
from statetrack.files import atomic_write
from statetrack.language_models.causal import CausalModel, load_causal_model, model_directory
from statetrack.language_models.generation_costs import GenerationCost, generation_costs, transformer_beside
from statetrack.language_models.held_out import DomainPerplexity, perplexity
from statetrack.language_models.probes import ProbeResult, evaluate_probes
from statetrack.progress import evaluation_progress

LENGTHS = (2048, 8192, 32768)
TOKENS = 2**18
QUESTIONS = 64
EVALUATION = "evaluation.json"
FORMAT = "language model"


def evaluate_language_model(
    run: Path,
    *,
    data: Path | None,
    lengths: Sequence[int] | None,
    domains: Sequence[str] | None,
    tokens: int | None,
    documents: bool,
    probes: Sequence[str] | None,
    probe_lengths: Sequence[int],
    questions: int | None,
    generation: Sequence[int],
    seed: int,
    dtype: torch.dtype | None,
    device: torch.device,
    json_file: Path | None,
) -> int:
    """Judges a model, shows what came out, and keeps it: in the run, where it is a run; in `json_file`, if given.

    Raises:
        ValueError: for options that don't go together, and as `perplexity` and `evaluate_probes`.
    """
    if data is None:
        for name, value in (("lengths", lengths), ("domains", domains), ("tokens", tokens), ("documents", documents)):
            if value:
                raise ValueError(f"--{name} is about held-out text: say --data DIR, which `data prepare` has written")
        if probes == [] and not generation:
            raise ValueError("there is nothing to judge: give --data DIR or --generation, or leave out --probes none")
    model = load_causal_model(run, device, dtype)
    result: dict[str, Any] = {
        "kind": FORMAT,
        "run": str(run),
        "title": model.title,
        "num_parameters": model.num_parameters,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "data": None if data is None else str(data),
        "text": None if data is None else "documents" if documents else "concatenated",
        "seed": seed,
        "perplexity": [],
        "probes": [],
        "generation": None,
    }
    if data is not None:
        with evaluation_progress() as show:
            found = perplexity(
                model,
                data,
                lengths or LENGTHS,
                domains=domains,
                tokens=TOKENS if tokens is None else tokens,
                text="documents" if documents else "concatenated",
                on_progress=show,
            )
        result["perplexity"] = [domain.to_data() for domain in found]
        Console().print(_perplexity_table(found, f"{model.title}: {run}, perplexity with the state carried over"))
        for domain in found:
            if domain.left_out:
                print(f"{domain.domain} has too little held-out text for {', '.join(map(str, domain.left_out))} tokens")
    if probes != []:
        tokenizer = load_tokenizer(model_directory(run))
        with evaluation_progress() as show:
            answers = evaluate_probes(
                model,
                tokenizer,
                probe_lengths,
                probes=probes,
                questions=QUESTIONS if questions is None else questions,
                seed=seed,
                on_progress=show,
            )
        result["probes"] = [answer.to_data() for answer in answers]
        Console().print(_probe_table(answers, f"{model.title}: {run}, right answers"))
    if generation:
        result["generation"] = found = _generation(model, generation)
        Console().print(_generation_table(found, f"{model.title}: {run}, generation after so many tokens"))
    text = json.dumps(result, indent=2) + "\n"
    if model_directory(run) != run and dtype is None:  # a run; other directories are left as they are
        atomic_write(run / EVALUATION, text)
    if json_file is not None:
        atomic_write(json_file, text)
    return 0


def _generation(model: CausalModel, lengths: Sequence[int]) -> dict[str, Any]:
    """What generation costs a model, and the Transformer beside it."""
    models = [model]
    if (transformer := transformer_beside(model)) is not None:
        models.append(transformer)
    costs: list[list[GenerationCost]] = [[] for _ in models]
    with evaluation_progress() as show:
        for done, length in enumerate(sorted(set(lengths))):
            show(done, len(set(lengths)))
            for own, cost in zip(costs, generation_costs(models, length), strict=True):
                own.append(cost)
    cuda = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if cuda else f"cpu, threads: {torch.get_num_threads()}",
        "models": [
            {
                "title": own.title if own is model else f"{own.title}, untrained",
                "num_parameters": own.num_parameters,
                "costs": [cost.to_data() for cost in found],
            }
            for own, found in zip(models, costs, strict=True)
        ],
    }


def _generation_table(found: dict[str, Any], title: str) -> Table:
    lengths = [cost["length"] for cost in found["models"][0]["costs"]]
    table = Table("model", "", *(f"{n:,}" for n in lengths), title=title, title_justify="left")
    for model in found["models"]:
        costs = model["costs"]
        name = f"{model['title']}, {model['num_parameters'] / 1e6:.1f} M"
        table.add_row(name, "tokens/s", *(f"{cost['tokens_per_second']:,.0f}" for cost in costs))
        table.add_row("", "MB carried", *(f"{cost['state_bytes'] / 1e6:,.3f}" for cost in costs))
    return table


def _perplexity_table(found: Sequence[DomainPerplexity], title: str) -> Table:
    lengths = sorted({loss.stop for domain in found for loss in domain.by_length})
    table = Table("domain", *(f"{n:,} tokens" for n in lengths), "tokens read", title=title, title_justify="left")
    for domain in found:
        by_length = {loss.stop: loss for loss in domain.by_length}
        cells = []
        for length in lengths:
            loss = by_length.get(length)
            error = "" if loss is None or loss.stderr is None else f" ± {loss.perplexity * loss.stderr:.2g}"
            cells.append("–" if loss is None else f"{loss.perplexity:.2f}{error}")
        table.add_row(domain.domain, *cells, f"{domain.by_length[0].tokens:,}")
    return table


def _probe_table(answers: Sequence[ProbeResult], title: str) -> Table:
    lengths = sorted({answer.length for answer in answers})
    table = Table("probe", *(f"{n:,}" for n in lengths), "chance", "questions", title=title, title_justify="left")
    for name in dict.fromkeys(answer.probe for answer in answers):
        mine = {answer.length: answer for answer in answers if answer.probe == name}
        cells = [f"{100 * mine[n].accuracy:.0f}% ± {100 * mine[n].stderr:.0f}" if n in mine else "–" for n in lengths]
        first = next(iter(mine.values()))
        table.add_row(name, *cells, f"{100 * first.chance:.0f}%", str(first.questions))
    return table


def report_language_models(paths: Sequence[Path], out: Path) -> int:
    """Writes the page that compares language models.

    Raises:
        ValueError: for a model that was not judged yet, or a file that `evaluate --json` has not written.
    """
    from statetrack.report import provenance
    from statetrack.report.language import write_language_report

    entries = [_read(path) for path in paths]
    write_language_report(entries, out, provenance=provenance())
    print(f"wrote {out}")
    return 0


def _read(path: Path) -> dict[str, Any]:
    """What is known of a model: its evaluation, and under `history` the learning curve of a run."""
    file = path if path.is_file() else path / EVALUATION
    if not file.is_file():
        raise ValueError(
            f"{path} was not judged yet: statetrack evaluate {path} --data DIR; of a directory that is no run, report "
            "takes the file that --json names"
        )
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); evaluate the model again") from None
    if not isinstance(entry, dict) or entry.get("kind") != FORMAT:
        raise ValueError(f"{file} is not what statetrack evaluate writes of a language model")
    history = []
    run = Path(entry["run"]) if path.is_file() else path
    if (metrics := run / "metrics.jsonl").is_file():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if isinstance(record, dict) and isinstance(record.get("loss"), int | float):
                history.append(record)
    return entry | {"history": history, "name": path.stem if path.is_file() else path.name}
