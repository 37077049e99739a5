"""docs/api.md is what the docstrings say."""

import pytest

from benchmarks import api


def test_the_page_is_up_to_date():
    pytest.importorskip("transformers")
    assert api.PAGE.read_text(encoding="utf-8") == api.page(), "write it again: python -m benchmarks.api"


def test_every_public_name_has_a_sentence():
    rows = [row for row in api.PAGE.read_text(encoding="utf-8").splitlines() if row.startswith("| `")]
    assert len(rows) > 100
    assert not [row for row in rows if row.endswith("|  |")]
