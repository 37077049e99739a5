"""Where metrics go beside metrics.jsonl: tensorboard, Weights & Biases, trackio."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from statetrack.plain import to_data
from statetrack.pretraining.config import PretrainConfig


@dataclass
class Sink:
    """One place.

    Attributes:
        log: takes named numbers and the step.
        close: called at the end.
    """

    log: Callable[[dict[str, float], int], object]
    close: Callable[[], object]

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Takes a line of metrics: its numbers as `kind/name`, tables of numbers as `kind/name/key`."""
        numbers: dict[str, float] = {}
        for name, value in record.items():
            parts = {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
            numbers |= {
                f"{record['kind']}/{key}": part for key, part in parts.items() if isinstance(part, (int, float))
            }
        self.log(numbers, step)


def open_sinks(directory: Path, config: PretrainConfig) -> list[Sink]:
    """The places that a config asks for.

    Raises:
        ModuleNotFoundError: if the package for one of them is missing.
    """
    logging, sinks = config.execution.logging, []
    if logging.tensorboard:
        _require("tensorboard", "pip install 'statetrack[pretrain]'")
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(directory / "tensorboard"))

        def log(numbers: dict[str, float], step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        sinks.append(Sink(log, writer.close))
    for package in ("wandb", "trackio"):
        if (project := getattr(logging, package)) is not None:
            module = _require(package, f"pip install {package}")
            options = {"project": project, "name": directory.name, "config": to_data(config)}
            module.init(**options, **({"dir": str(directory), "resume": "allow"} if package == "wandb" else {}))
            sinks.append(Sink(lambda numbers, step, module=module: module.log(numbers, step=step), module.finish))
    return sinks


def _require(package: str, how: str) -> Any:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(f"logging to {package} needs the package {package}: {how}", name=package) from None
