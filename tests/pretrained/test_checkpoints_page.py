"""The examples of docs/checkpoints.md run, and its table is the registry."""

import re
from pathlib import Path

from checkpoints import save
from transformers import MambaConfig, MambaForCausalLM

from statetrack.pretrained import sources

TEXT = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, state_size=3)
    save(MambaForCausalLM(config), tmp_path / "mamba-130m-hf")
    capsys.readouterr()
    scope = {}
    for code in re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL):
        exec(compile(code, "docs/checkpoints.md", "exec"), scope)
    wide, opening = (float(number) for number in re.findall(r"tensor\(([\d.e-]+)", capsys.readouterr().out))
    assert opening < 1e-6
    assert wide > 1e-4
    assert len(scope["ends"]) == 2


def test_the_table_has_every_source():
    table = TEXT.partition("| `model_type` |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sources().keys()
