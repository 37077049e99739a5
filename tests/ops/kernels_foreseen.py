"""Prints, as JSON, which kernels of training steps were not foreseen, and which were foreseen for nothing.

For every mixer, of a model's forward and backward: [mixer, number of kernels, not foreseen, foreseen for nothing].
A process of its own for `test_triton_ahead.py`: triton's interpreter must be off, and a stand-in takes the place of its
driver. Nothing is compiled or launched.
"""

import json
import sys
from unittest import mock

import torch

from benchmarks.kernel_resources import key_of, stand_in_for_hopper
from statetrack.config import from_data
from statetrack.model import LanguageModel, ModelConfig
from statetrack.ops import triton_ahead, triton_common


def main(mixer: str, processors: int) -> list:
    torch.manual_seed(0)
    options = {} if mixer == "slstm" else {"backend": "triton"}
    config = {"vocab_size": 4, "d_model": 64, "num_layers": 2, "mixer": {"name": mixer, **options}}
    model = LanguageModel(from_data(ModelConfig, config))
    launched, foreseen, late = set(), set(), []

    def launch(*given):
        call, triton_ahead._here.call = triton_ahead._here.call, None
        if call and any(isinstance(x, torch.Tensor) and x.requires_grad for x in call[2]):
            triton_ahead.rehearse(*call, lambda *given: foreseen.add(key_of(*given)))
        key = key_of(*given)
        if key not in foreseen | launched:
            late.append(key)
        launched.add(key)

    with (
        mock.patch.object(triton_common, "interpreted", return_value=True),
        mock.patch.object(triton_common, "multiprocessors", return_value=processors),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        triton_ahead.visited(launch),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(torch.randint(4, (3, 640))).float().sum().backward()
    return [mixer, len(launched), late, sorted(name for name, _ in foreseen - launched)]


if __name__ == "__main__":
    stand_in_for_hopper()
    for mixer in sys.argv[2:]:
        print(json.dumps(main(mixer, int(sys.argv[1]))))
