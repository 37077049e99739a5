"""Mends triton 3.6's interpreter for numpy 2.4, where an array of one element is no index any more."""

import importlib

import pytest
from triton_cases import INTERPRETED


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    if not INTERPRETED:
        return
    module = importlib.import_module("triton.runtime.interpreter")
    original = module._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(module, "_patch_lang_tensor", patch)
