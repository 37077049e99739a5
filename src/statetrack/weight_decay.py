"""Which parameters weight decay may pull towards 0."""

from __future__ import annotations

from torch import nn

from statetrack.mixers import Mixer


def by_weight_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of a model: those that weight decay is for, and those that it is not for.

    It is for the matrices and convolutions of the mixers, the MLPs and the output layer. It is not for embeddings (also
    where the output layer is the transposed one), for vectors (norms, biases), and for what decides on eigenvalues
    (`Mixer.eigenvalue_parameters`): decay would pull those away from 1 and -1.

    Args:
        model: any module; its mixers and embeddings are found wherever they are.
    """
    exempt = {id(p) for module in model.modules() if isinstance(module, Mixer) for p in module.eigenvalue_parameters()}
    exempt |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim < 2 or id(parameter) in exempt else decayed).append(parameter)
    return decayed, kept
