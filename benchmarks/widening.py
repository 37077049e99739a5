"""A checkpoint of another project learns parity once its range is opened: transformers' Mamba, three ways.

    python -m benchmarks.widening                  # three seeds, minutes on a CPU: results/cpu/widening.json

`transformers` trains its own Mamba on even pairs, which eigenvalues in [0, 1] suffice for, and saves it.
Its step sizes have projections of full rank, as docs/recipe.md wants them of a Mamba that tracks states.
`from_pretrained` reads it as it is, with `widening="preserve"` and with `eigenvalue_range=(-1, 1)`, and each of the
three is fine-tuned on parity at lengths of at most 40, with the same data and options.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from benchmarks.common import ROOT, environment, write_results
from statetrack import LanguageModel, from_pretrained, seeds
from statetrack.evaluation import evaluate
from statetrack.tasks import Task, get_task

WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "preserve": {"widening": "preserve"},
    "reinterpret": {"eigenvalue_range": (-1, 1)},
}
LONGEST = 40
LENGTHS = (40, 256, 1_000, 10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--first", type=int, default=3000, help="the first seed")
    parser.add_argument("--pretraining-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1000, help="of fine-tuning")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="where accuracy is measured")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "cpu" / "widening.json")
    options = parser.parse_args()

    torch.set_num_threads(1)
    console, rows = Console(), []
    for seed in range(options.first, options.first + options.seeds):
        with tempfile.TemporaryDirectory() as directory:
            pretrain(Path(directory), seed, options.pretraining_steps)
            for way, arguments in WAYS.items():
                rows.append({"seed": seed, "way": way, **measure(directory, arguments, seed, options)})
                console.print(rows[-1], highlight=False)
    results = {"environment": environment(["transformers"]), "options": describe(options), "runs": rows}
    write_results(options.out, results)
    console.print(table(rows, options.lengths))


def pretrain(directory: Path, seed: int, steps: int) -> None:
    """Trains `transformers`' Mamba on even pairs and saves it as a checkpoint of that project."""
    import transformers

    torch.manual_seed(seed)
    transformers.utils.logging.set_verbosity_error()  # its selective scan says that it is the slow one
    config = transformers.MambaConfig(
        vocab_size=4,
        hidden_size=64,
        num_hidden_layers=2,
        state_size=16,
        time_step_rank=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.MambaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids, labels = get_task("even_pairs").sample(64, LONGEST, seeds.generator("widening pretraining", seed, step))
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(directory)


def measure(directory: str, arguments: dict[str, Any], seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What one way of reading a checkpoint computes before fine-tuning, and after it."""
    model = from_pretrained(directory, **arguments)
    before = accuracy(model, get_task("even_pairs"), [LONGEST], seed)
    began = time.perf_counter()
    fine_tune(model, seed, options.steps)
    seconds = time.perf_counter() - began
    ends = [p.detach().clamp(-1, 0) for name, p in model.named_parameters() if name.endswith("lower_end")]
    return {
        "even_pairs_before": before[str(LONGEST)],
        "parity_after": accuracy(model, get_task("parity"), options.lengths, seed),
        "lowest_end": min((float(end.min()) for end in ends), default=None),
        "fine_tuning_seconds": round(seconds, 1),
    }


def fine_tune(model: LanguageModel, seed: int, steps: int) -> None:
    """The loop of docs/checkpoints.md: AdamW, a group of its own for the lower ends, and the z-loss of the recipe."""
    parity = get_task("parity")
    ends = [p for name, p in model.named_parameters() if name.endswith("lower_end")]
    others = [p for name, p in model.named_parameters() if not name.endswith("lower_end")]
    groups = [{"params": others, "lr": 3e-3}] + ([{"params": ends, "lr": 2e-2}] if ends else [])
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    model.train()
    for step in range(steps):
        generator = seeds.generator("widening fine-tuning", seed, step)
        length = int(torch.randint(1, LONGEST + 1, (), generator=generator))
        ids, labels = parity.sample(64, length, generator)
        logits = model(ids).flatten(0, 1)
        loss = F.cross_entropy(logits, labels.flatten()) + 0.1 * torch.logsumexp(logits, -1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def accuracy(model: LanguageModel, task: Task, lengths: list[int], seed: int) -> dict[str, float]:
    """The share of fresh sequences whose label at each length is right."""
    return {str(result.length): result.accuracy for result in evaluate(model.eval(), task, lengths, seed=seed)}


def describe(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "out"}


def table(rows: list[dict[str, Any]], lengths: list[int]) -> Table:
    """Medians over the seeds."""
    shown = Table("read", "even pairs before", *(f"parity at {length:,}" for length in lengths))
    for way in WAYS:
        members = [row for row in rows if row["way"] == way]
        before = statistics.median(row["even_pairs_before"] for row in members)
        after = [statistics.median(row["parity_after"][str(length)] for row in members) for length in lengths]
        shown.add_row(way, f"{before:.1%}", *(f"{value:.1%}" for value in after))
    return shown


if __name__ == "__main__":
    main()
