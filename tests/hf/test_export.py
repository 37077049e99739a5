"""A directory with the code in it: it loads, computes and is saved again where statetrack can't be imported."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import check_imports, get_relative_import_files
from transformers.utils import logging

from statetrack import LanguageModel, ModelConfig, mixer_config
from statetrack.hf import StatetrackForCausalLM, export

logging.disable_progress_bar()

# What stands in for an environment without the package, and without the one that it brings along.
ELSEWHERE = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if path is None and name in ("statetrack", "dacite"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

first, second, tensors = sys.argv[1:]
data = load_file(tensors)
model = AutoModelForCausalLM.from_pretrained(first, trust_remote_code=True)
model.save_pretrained(second)
again = AutoModelForCausalLM.from_pretrained(second, trust_remote_code=True)
generated = again.generate(data["ids"], attention_mask=data["mask"], max_new_tokens=5, do_sample=False, pad_token_id=0)
save_file({"logits": model(data["ids"]).logits.detach().contiguous(), "generated": generated}, tensors)
assert "statetrack" not in sys.modules
"""


def make(name="deltanet"):
    torch.manual_seed(0)
    mixer = (mixer_config(name)(), mixer_config("attention")())
    return LanguageModel(ModelConfig(vocab_size=300, d_model=16, mixer=mixer)).double().eval()


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def elsewhere(tmp_path, first, second, tensors):
    modules = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ELSEWHERE, str(first), str(second), str(tensors)]
    result = subprocess.run(command, capture_output=True, text=True, env=modules, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_an_exported_model_needs_no_statetrack(tmp_path):
    model, first, second, tensors = make(), tmp_path / "first", tmp_path / "second", tmp_path / "io.safetensors"
    torch.manual_seed(1)
    ids, mask = torch.randint(1, 300, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    export(model, first)
    save_file({"ids": ids, "mask": mask}, tensors)
    elsewhere(tmp_path, first, second, tensors)
    found = load_file(tensors)
    assert torch.allclose(found["logits"], model(ids), rtol=1e-12, atol=1e-12)
    ours = StatetrackForCausalLM.of(model)
    assert torch.equal(
        found["generated"],
        ours.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0),
    )
    # Saved again there, it is as complete as before, and this package reads it.
    code = [f"{name}.py" for name in ("modeling_statetrack", "statetrack_sources")]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in code)
    read = AutoModelForCausalLM.from_pretrained(second, trust_remote_code=False)
    assert type(read) is StatetrackForCausalLM
    assert torch.allclose(read(ids).logits, model(ids), rtol=1e-12, atol=1e-12)


def test_the_code_lives_beside_the_installed_package(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    model, ids = make("mamba"), torch.randint(1, 300, (2, 9))
    for name in ("one", "two"):  # the second finds the package loaded
        export(model, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["model_type"] = f"statetrack_{name}"  # what this package has not registered comes from the directory
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        read = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert type(read).__module__.endswith("modeling_statetrack")
        assert type(read.model) is not LanguageModel
        assert torch.allclose(read(ids).logits, model(ids), rtol=1e-12, atol=1e-12)


def test_a_hub_finds_all_files_that_the_code_needs(tmp_path):
    export(make(), tmp_path)
    (loader, sources) = (tmp_path / f"{name}.py" for name in ("modeling_statetrack", "statetrack_sources"))
    assert get_relative_import_files(loader) == [str(sources)]
    # A hub checks each file alone, and refuses one whose imports can't be had.
    assert check_imports(loader) == ["statetrack_sources"]
    assert check_imports(sources) == []
    names: dict = {}
    exec(sources.read_text(encoding="utf-8"), names)
    assert any(name.endswith("mixers/rwkv7.py") for name in names["SOURCES"])
    assert "MIT License" in names["SOURCES"]["dacite/LICENSE"]
    assert not [name for name in names["SOURCES"] if "tasks" in name or "theory" in name]


def test_the_tokenizer_and_a_card_go_along(tmp_path):
    model = StatetrackForCausalLM.of(make())
    export(model, tmp_path / "model", byte_tokenizer(), max_shard_size="10KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", padding_side="left")
    batch = tokenizer(["parity: 0110", "10"], return_tensors="pt", padding=True, return_token_type_ids=False)
    generated = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 15)
    assert tokenizer.decode(batch["input_ids"][0]) == "parity: 0110"
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "mixer `deltanet+attention`" in card
    assert getattr(model.config, "auto_map", None) is None  # the model itself is as before


def test_a_model_that_answers_with_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="output_size must be vocab_size"):
        export(LanguageModel(ModelConfig(vocab_size=4, output_size=2)), tmp_path)
