"""Sampling batches of tasks: whole batches at once against loops over sequences in Python; to results/sampling.json.

Every sampler draws letters uniformly and labels them by the same automaton, B = 1024 sequences of T = 40 tokens, and
ends with the tensors that training takes. `loop` draws letter by letter, as such samplers are usually written;
`fast_loop` draws the letters of a sequence at once, the best that we know in plain Python. Times are CPU time of one
thread; as a batch takes the loops about 40 times as long, ours draws `BATCHES` in a row where they draw one.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from benchmarks.common import ROOT, environment, interleaved_cpu_times, write_results
from statetrack.automata import Automaton
from statetrack.tasks import Batch, get_task
from statetrack.tasks.automaton_task import AutomatonTask

TASKS = ("parity", "modular_addition:5", "group:S3", "group:S5", "group:A5xZ9")
BATCH_SIZE, LENGTH = 1024, 40
ROUNDS = 15
BATCHES = 40
# What evaluation reads of each of its 32 longest sequences at a time.
STREAMS, SEGMENT = 32, 2048


def loop(automaton: Automaton) -> Callable[[], Batch]:
    transitions, outputs = automaton.transitions.tolist(), automaton.outputs.tolist()
    letters, source = automaton.num_letters, random.Random(0)

    def sample() -> Batch:
        ids, labels = [], []
        for _ in range(BATCH_SIZE):
            word, answers = [], []
            state = automaton.start
            for _ in range(LENGTH):
                letter = source.randrange(letters)
                state = transitions[state][letter]
                word.append(letter)
                answers.append(outputs[state])
            ids.append(word)
            labels.append(answers)
        return Batch(torch.tensor(ids), torch.tensor(labels))

    return sample


def fast_loop(automaton: Automaton) -> Callable[[], Batch]:
    transitions, outputs = automaton.transitions.tolist(), automaton.outputs.tolist()
    letters, source = range(automaton.num_letters), random.Random(0)

    def sample() -> Batch:
        ids, labels = [], []
        for _ in range(BATCH_SIZE):
            word = source.choices(letters, k=LENGTH)
            state = automaton.start
            labels.append([outputs[state := transitions[state][letter]] for letter in word])
            ids.append(word)
        return Batch(torch.tensor(ids), torch.tensor(labels))

    return sample


def measure(name: str) -> dict[str, float]:
    task = get_task(name)
    assert isinstance(task, AutomatonTask)
    generator = torch.Generator().manual_seed(0)
    stream = task.stream(STREAMS, generator)
    in_python = {"loop": loop(task.automaton), "fast_loop": fast_loop(task.automaton)}
    for sampler, sample in in_python.items():
        ids, labels = sample()
        if not torch.equal(task.automaton.labels(ids), labels):
            raise AssertionError(f"{sampler} gives wrong labels for {name}")

    def statetrack() -> None:
        for _ in range(BATCHES):
            task.sample(BATCH_SIZE, LENGTH, generator)

    times = interleaved_cpu_times(
        {"statetrack": statetrack, **in_python, "stream": lambda: stream.next(SEGMENT)}, rounds=ROUNDS
    )
    microseconds = {
        "statetrack": times["statetrack"]["median_ms"] * 1e3 / (BATCHES * BATCH_SIZE),
        **{sampler: times[sampler]["median_ms"] * 1e3 / BATCH_SIZE for sampler in in_python},
    }
    return {
        **{f"{sampler}_us_per_sequence": round(time, 3) for sampler, time in microseconds.items()},
        **{f"{sampler}_sequences_per_second": round(1e6 / time) for sampler, time in microseconds.items()},
        **{f"speedup_over_{s}": round(microseconds[s] / microseconds["statetrack"], 1) for s in in_python},
        "stream_tokens_per_second": round(STREAMS * SEGMENT / times["stream"]["median_ms"] * 1e3),
    }


def main() -> None:
    torch.set_num_threads(1)
    rows: dict[str, dict[str, float]] = {}
    for name in TASKS:
        rows[name] = row = measure(name)
        print(
            f"{name:20} {row['statetrack_us_per_sequence']:>6} us a sequence, loop {row['loop_us_per_sequence']} "
            f"({row['speedup_over_loop']}x), fast loop {row['fast_loop_us_per_sequence']} "
            f"({row['speedup_over_fast_loop']}x), long streams {row['stream_tokens_per_second'] / 1e6:.1f} M tokens/s"
        )
    results = {
        "what": "CPU time of one thread, medians of interleaved rounds",
        "settings": {
            "batch_size": BATCH_SIZE,
            "length": LENGTH,
            "rounds": ROUNDS,
            "batches": BATCHES,
            "stream_batch_size": STREAMS,
            "stream_segment": SEGMENT,
        },
        "environment": environment(["numpy"]),
        "results": rows,
    }
    write_results(ROOT / "results" / "sampling.json", results)


if __name__ == "__main__":
    main()
