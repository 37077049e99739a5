"""Checkpoints of others: files, what is refused, and the two ways to widen the range."""

import json
import resource
import shutil

import pytest
import torch
from checkpoints import FLA, change, change_weights, save
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM

import statetrack
from statetrack import EigenvalueRange, from_pretrained
from statetrack.mixers.mixer import Widening
from statetrack.pretrained import CheckpointError, sources


@pytest.fixture
def checkpoint(tmp_path):
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 3}
    return save(MambaForCausalLM(MambaConfig(**sizes)), tmp_path / "checkpoint")


def weights(model):
    return dict(model.state_dict())


def test_shards_are_read_as_one_file_is(checkpoint, tmp_path):
    whole = from_pretrained(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, checkpoint / shard)
    (checkpoint / "model.safetensors").unlink()
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = from_pretrained(checkpoint)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(sharded).items())

    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shard model-00002-of-00002.safetensors"):
        from_pretrained(checkpoint)
    shutil.copy(checkpoint / "model-00001-of-00002.safetensors", checkpoint / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="in more than one shard"):
        from_pretrained(checkpoint)
    save_file({"x": torch.zeros(1)}, checkpoint / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=f"lack .*{names[1]}.* which their index names"):
        from_pretrained(checkpoint)
    index["weight_map"][names[1]] = "../elsewhere.safetensors"
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"must be a file in .* itself, got '../elsewhere.safetensors'"):
        from_pretrained(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        from_pretrained(checkpoint)


def test_nothing_is_unpickled(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model.safetensors and no model.safetensors.index.json"):
        from_pretrained(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin only, .* convert it to model.safetensors"):
        from_pretrained(checkpoint)


def test_a_directory_that_is_no_checkpoint_is_refused(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="must be downloaded first"):
        from_pretrained("state-spaces/mamba-130m-hf")
    (checkpoint / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"damaged or cut short .*; download it again"):
        from_pretrained(checkpoint)
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a JSON object, got list"):
        from_pretrained(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        from_pretrained(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        from_pretrained(checkpoint)
    (checkpoint / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        from_pretrained(checkpoint)


@pytest.mark.parametrize("model_type", ["mamba3", "llama", None])
def test_an_unknown_model_type_is_refused(checkpoint, model_type):
    change(checkpoint, model_type=model_type)
    with pytest.raises(CheckpointError, match=rf"model_type {model_type!r}, .* those that can are .*gated_deltanet"):
        from_pretrained(checkpoint)


def test_every_missing_extra_and_misshapen_tensor_is_named(checkpoint):
    def spoil(tensors):
        tensors["strange"] = tensors.pop("backbone.norm_f.weight")
        del tensors["backbone.layers.1.mixer.D"]
        tensors["backbone.layers.0.mixer.A_log"] = torch.zeros(2, 2)
        return tensors

    change_weights(checkpoint, spoil)
    with pytest.raises(
        CheckpointError,
        match=r"missing backbone.layers.1.mixer.D, backbone.norm_f.weight; extra strange; "
        r"misshapen backbone.layers.0.mixer.A_log \(2, 2\) instead of \(16, 3\)",
    ):
        from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**6, "intermediate_size": 2 * 10**6}, r"misshapen .*\(11, 8\) instead of \(11, 1000000\)"),
        ({"num_hidden_layers": 9999}, "asks for 9,999 layers, and there are [0-9]+ tensors"),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_taken(checkpoint, changes, message):
    config = json.loads((checkpoint / "config.json").read_text()) | changes
    (checkpoint / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(checkpoint)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB, of the terabytes that it claims


def test_weights_that_are_no_numbers_of_a_model_are_refused(checkpoint):
    change_weights(checkpoint, lambda tensors: {**tensors, "backbone.norm_f.weight": torch.ones(8, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"not floating-point numbers: backbone.norm_f.weight"):
        from_pretrained(checkpoint)


def test_tied_embeddings_may_be_written_twice_if_they_are_equal(checkpoint):
    expected, name = from_pretrained(checkpoint), "backbone.embeddings.weight"
    change_weights(checkpoint, lambda tensors: {**tensors, "lm_head.weight": tensors[name].clone()})
    assert torch.equal(from_pretrained(checkpoint).embedding.weight, expected.embedding.weight)
    change_weights(checkpoint, lambda tensors: {**tensors, "lm_head.weight": tensors[name] + 1})
    with pytest.raises(CheckpointError, match=r"tied, but lm_head.weight is not backbone.embeddings.weight"):
        from_pretrained(checkpoint)


def test_the_older_name_of_the_embedding_is_read(checkpoint):
    expected = from_pretrained(checkpoint)
    change_weights(checkpoint, lambda tensors: {k.replace("embeddings.", "embedding."): v for k, v in tensors.items()})
    assert torch.equal(from_pretrained(checkpoint).embedding.weight, expected.embedding.weight)


def test_the_files_may_change_after_loading(checkpoint):
    model = from_pretrained(checkpoint)
    before = {name: tensor.clone() for name, tensor in weights(model).items()}
    size = (checkpoint / "model.safetensors").stat().st_size
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_reinterpreting_reads_the_same_weights_through_the_wider_map(checkpoint):
    native, wide = from_pretrained(checkpoint), from_pretrained(checkpoint, eigenvalue_range=(-1, 1))
    assert native.config.mixer.eigenvalue_range == EigenvalueRange(0, 1)
    assert weights(native).keys() == weights(wide).keys()
    assert all(torch.equal(tensor, weights(wide)[name]) for name, tensor in weights(native).items())
    ids = torch.randint(11, (2, 9))
    assert not torch.allclose(native(ids), wide(ids), rtol=1e-2)
    # The first layer reads the same activations on both sides.
    first, second = (model.transitions(ids)[0].eigenvalues().real for model in (native, wide))
    assert torch.allclose(second, 2 * first - 1, atol=1e-6)


@pytest.mark.parametrize("name", ["mamba", "delta_net", "gated_deltanet"])
def test_preserving_keeps_the_function_until_training_opens_the_range(name, checkpoint):
    path = checkpoint if name == "mamba" else FLA / name
    native, model = from_pretrained(path, eigenvalue_range=(0, 1)), from_pretrained(path, widening="preserve")
    if name != "mamba":  # fixtures may have any range of their own
        native = from_pretrained(path)
    ids = torch.randint(native.config.vocab_size, (2, 12))
    assert torch.allclose(model(ids), native(ids), rtol=1e-6, atol=1e-6)
    ends = [m.lower_end for m in model.modules() if isinstance(m, Widening) and m.lower_end is not None]
    assert len(ends) == model.config.num_layers
    starts = [end.detach().clone() for end in ends]
    optimizer = torch.optim.SGD(ends, lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        logits = model(ids)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        if step == 0:
            assert all(end.grad is not None and end.grad.abs().sum() > 0 for end in ends)
        optimizer.step()
    assert any((end < start).any() for end, start in zip(ends, starts, strict=True))
    assert not torch.allclose(model(ids), native(ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widening": "wider"}, "widening must be reinterpret or preserve, got 'wider'"),
        ({"widening": "preserve", "eigenvalue_range": (-0.5, 1)}, r"leave eigenvalue_range out .* got \(-0.5,1\)"),
        ({"eigenvalue_range": (1, -1)}, "-1 <= lo < hi <= 1"),
        ({"dtype": torch.int8}, "dtype must be a floating-point dtype of torch, got torch.int8"),
        ({"dtype": "float32"}, "dtype must be a floating-point dtype of torch, got 'float32'"),
    ],
)
def test_wrong_arguments_are_refused(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        from_pretrained(checkpoint, **options)


def test_the_registry_finds_the_sources():
    assert {"delta_net", "gated_deltanet", "gated_deltaproduct", "mamba", "mamba2"} <= sources().keys()
    assert statetrack.from_pretrained is from_pretrained
