"""Mends triton 3.6's interpreter for numpy 2.4, where an array of one element is no index any more, and for time.

A launch patches `triton.language`, and so did every function that a kernel calls; and of every sum and product of
integers it was asked whether it overflows, which compiled kernels don't ask. The two took half of the time.
"""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
from triton_cases import INTERPRETED


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    if not INTERPRETED:
        return
    module = importlib.import_module("triton.runtime.interpreter")
    patch_tensor, patch_language = module._patch_lang_tensor, module._patch_lang

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(module, "_patch_lang_tensor", patch)

    # Both modules where functions look for the language, once for all that a launch calls.
    everywhere = SimpleNamespace(__globals__={"tl": module.tl, "core": module.tl.core})
    monkeypatch.setattr(module, "_patch_lang", lambda fn: patch_language(everywhere))
    monkeypatch.setattr(
        module.InterpretedFunction, "__call__", lambda self, *args, **options: self.rewrite()(*args, **options)
    )
    builder = module.interpreter_builder
    monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
