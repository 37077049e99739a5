"""What all operators share."""

import inspect

import torch

import statetrack.model  # noqa: F401 - all functions are defined


def test_functions_with_a_context_of_their_own_carry_their_signature():
    functions = [
        function
        for function in torch.autograd.Function.__subclasses__()
        if function.__module__.startswith("statetrack.") and "setup_context" in vars(function)
    ]
    assert len(functions) >= 7
    for function in functions:
        kept = vars(function.forward)
        signature = kept.pop("__signature__")
        try:
            assert inspect.signature(function.forward) == signature, function
        finally:
            kept["__signature__"] = signature
        assert inspect.signature(function.forward) is signature
