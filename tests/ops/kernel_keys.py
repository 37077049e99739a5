"""Prints, as JSON, how many different kernels an op's calls take at several batch sizes and lengths.

A process of its own for `test_triton_keys.py`: triton's interpreter must be off, and a stand-in takes the place of its
driver.
"""

import json
import sys

import torch

from benchmarks.kernel_resources import OPS, keys

SIZES = [(1, 640), (3, 2000), (2, 577), (16, 1025)]


def main(op: str, processors: int) -> None:
    counts = []
    for make in OPS[op]:
        found = [keys(make(torch.bfloat16, 32, 32, b=b, t=t), op, processors=processors) for b, t in SIZES]
        counts.append([len(found[0]), *(len(more - found[0]) for more in found[1:])])
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
