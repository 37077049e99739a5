"""The pages in docs/ that teach run as they stand, each from top to bottom."""

import re
from pathlib import Path

import pytest

from statetrack import mixer_configs

DOCS = Path(__file__).resolve().parents[1] / "docs"
ELSEWHERE = {"checkpoints": "needs a checkpoint, which tests/pretrained/test_checkpoints_page.py makes"}
PAGES = [
    page
    for page in sorted(DOCS.glob("*.md"))
    if page.stem not in ELSEWHERE and "```python" in page.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_in_order(page, capsys):
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(code, page.name, "exec"), names)
    assert capsys.readouterr().out


def test_there_is_a_page_on_theory():
    assert "theory" in [page.stem for page in PAGES]


def test_the_table_of_models_names_mixers_that_exist():
    table = (DOCS / "models.md").read_text(encoding="utf-8").partition("| mixer | transition")[2].partition("\n\n")[0]
    names = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert names >= {"deltanet", "mamba2", "gla", "mlstm", "rwkv7", "retnet", "attention"}
    assert names <= mixer_configs().keys()
