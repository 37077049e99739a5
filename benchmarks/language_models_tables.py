"""The Markdown tables of `benchmarks.language_models`: its runs, and what they differ by beside two seeds of one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]

PAIRS = (
    ("DeltaNet, [-1, 1] against [0, 1]", "deltanet-widened", "deltanet"),
    ("Mamba, [-1, 1] against [0, 1]", "mamba-widened", "mamba"),
    ("[-1, 1], DeltaProduct n = 2 against DeltaNet", "deltaproduct-widened", "deltanet-widened"),
    ("[-1, 1], Mamba against DeltaNet", "mamba-widened", "deltanet-widened"),
    ("flash-linear-attention's DeltaNet against ours", "fla-deltanet-widened", "deltanet-widened"),
)
NOISE = ("one setting, seed 1 against seed 0", "deltanet-widened-seed1", "deltanet-widened")


def title(record: Record) -> str:
    """`DeltaProduct n = 2 [-1, 1], seed 0`."""
    names = {"deltanet": "DeltaNet", "deltaproduct": "DeltaProduct", "mamba": "Mamba"}
    lo, hi = record["eigenvalue_range"]
    factors = record["num_householder"] or 1
    text = f"{names[record['mixer']]}{f' n = {factors}' if factors > 1 else ''} [{lo}, {hi}], seed {record['seed']}"
    return text if record["by"] == "statetrack" else f"{record['by']}: {text}"


def tables(records: Sequence[Record]) -> str:
    """All of it, of the runs that there are."""
    domains = list(dict.fromkeys(domain for record in records for domain in record["held_out"]))
    ends = {domain: _ends(records, domain) for domain in domains}
    columns = [(domain, length) for domain in domains for length in ends[domain]]
    heads = [f"{domain}, {int(length):,}" for domain, length in columns]
    text = (
        "Perplexity on held-out text with the state carried over so many tokens; speed is the median of training.\n\n"
    )
    text += _table(
        ["run", "parameters", "tokens", "of them unique", *heads, "tokens/s", "MFU", "GB", "device"],
        ([title(record), *_costs(record)[:3], *_found(record, columns), *_costs(record)[3:]] for record in records),
    )
    by_name = {record["name"]: record for record in records if record["finished"]}
    rows = [
        [name, *(_difference(by_name[one], by_name[other], *column) for column in columns)]
        for name, one, other in (NOISE, *PAIRS)
        if one in by_name and other in by_name
    ]
    if rows:
        text += "\nDifferences in nats a token; below 0 the first of the two is better.\n\n"
        text += _table(["first against second", *heads], rows)
    return text


def _ends(records: Iterable[Record], domain: str) -> list[str]:
    """The shortest and the longest length that a domain was judged at."""
    lengths = sorted({length for record in records for length in record["held_out"].get(domain, {})}, key=int)
    return list(dict.fromkeys([lengths[0], lengths[-1]]))


def _found(record: Record, columns: Iterable[tuple[str, str]]) -> list[str]:
    if not record["finished"]:
        return ["not finished" for _ in columns]
    found = (record["held_out"].get(domain, {}).get(length) for domain, length in columns)
    return ["–" if value is None else f"{value:.3f}" for value in found]


def _costs(record: Record) -> list[str]:
    parameters, mfu, memory = record["parameters"], record["mfu"], record["peak_memory_gb"]
    return [
        "–" if parameters is None else f"{parameters / 1e6:.1f} M",
        f"{record['tokens'] / 1e6:.1f} M",
        f"{record['unique_tokens'] / 1e6:.1f} M",
        f"{record['tokens_per_second']:,.0f}",
        "–" if mfu is None else f"{mfu:.1%}",
        "–" if memory is None else f"{memory:.1f}",
        record["device"],
    ]


def _difference(one: Record, other: Record, domain: str, length: str) -> str:
    found = [record["held_out"].get(domain, {}).get(length) for record in (one, other)]
    return "–" if None in found else f"{math.log(found[0]) - math.log(found[1]):+.4f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
