"""Tiny checkpoints, and what both sides make of them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

FLA = Path(__file__).parents[1] / "fixtures" / "fla"


def spread(model, seed=0):
    """Random weights large enough for every gate and norm to be seen."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not name.endswith("A_log"):
                parameter.normal_(0, 1.2 * parameter.shape[1] ** -0.5)
            elif parameter.ndim == 3:
                parameter.uniform_(-0.5, 1)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save(model, path):
    spread(model).save_pretrained(path)
    return path


def run(logits_of, model, ids):
    """Logits, and the gradients of their cross-entropy with some labels by the number of elements and the norm."""
    model.zero_grad()
    logits = logits_of(ids)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach()


def close(a, b, tolerance=1e-5):
    return (a - b).norm() <= tolerance * b.norm()


def change(path, **options):
    """Rewrites options in config.json; None takes one out."""
    file = Path(path) / "config.json"
    data = json.loads(file.read_text()) | options
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def change_weights(path, function):
    """Rewrites model.safetensors."""
    file = Path(path) / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in function(load_file(file)).items()}, file)
