"""The files of a checkpoint in the layout of transformers: config.json beside safetensors, in one file or in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from statetrack.pretrained.source import CheckpointError
from statetrack.weights import WeightsError, read_tensors


def model_directory(directory: Path) -> Path:
    """Where the files of a model are: of a pre-training run in its `model`, of anything else in the directory itself.

    Raises:
        CheckpointError: if the run has no model yet.
    """
    if not (directory / "config.json").is_file() or "pretraining" not in read_config(directory):
        return directory
    if not (directory / "model" / "config.json").is_file():
        raise CheckpointError(
            f"{directory} has no model yet, which is written when its training ends; to go on: statetrack pretrain "
            f"--out {directory}"
        )
    return directory / "model"


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
        CheckpointError: if there is no such directory or file, or it holds no JSON object.
    """
    if not directory.is_dir():
        raise CheckpointError(f"there is no directory {directory}; a checkpoint must be downloaded first")
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory} is no checkpoint: it has no config.json")
    return _read_object(file)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json names.

    Raises:
        CheckpointError: if there are none, they are pickled, or a file is missing or damaged.
    """
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return _read(whole)
    if index.is_file():
        return _read_shards(directory, _read_object(index))
    if any(directory.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{directory} has pytorch_model.bin only, which is a pickle and may run any code when it is read; "
            "convert it to model.safetensors"
        )
    raise CheckpointError(f"{directory} has no model.safetensors and no model.safetensors.index.json")


def _read_shards(directory: Path, index: dict[str, Any]) -> dict[str, Tensor]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"model.safetensors.index.json of {directory} has no weight_map of names to files")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise CheckpointError(f"a shard must be a file in {directory} itself, got {name!r}")
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} lacks the shard {name} that its index names")
        shard = _read(directory / name)
        if repeated := sorted(weights.keys() & shard.keys()):
            raise CheckpointError(f"{directory} has {', '.join(repeated)} in more than one shard")
        weights |= shard
    if absent := sorted(places.keys() - weights.keys()):
        raise CheckpointError(f"the shards of {directory} lack {', '.join(absent)}, which their index names")
    return weights


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(file)[0]
    except WeightsError as error:
        raise CheckpointError(f"{error}; download it again") from None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(data).__name__}")
    return data
