"""The planner's memory against what autograd and PyTorch's memory tracker measure on real models."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from statetrack.mixers import mixer_configs
from statetrack.model import LanguageModel, ModelConfig
from statetrack.ops.triton_common import assuming_a_gpu
from statetrack.pretraining.optimizers import OptimizerConfig, build_optimizer
from statetrack.pretraining.parallel import GROUP_PARAMETERS, gathered_together
from statetrack.pretraining.plan import (
    CARDS,
    GIB,
    Card,
    plan,
    saved_activations,
    saved_bytes,
)
from statetrack.pretraining.presets import preset

MIXERS = ("deltanet", "gated_deltanet", "deltaproduct", "mamba")


def model_config(name, d_model=64, num_layers=3, **options):
    options = {"mlp_ratio": 2, "vocab_size": 300, "mixer": mixer_configs()[name](), **options}
    return ModelConfig(d_model=d_model, num_layers=num_layers, **options)


def predicted(config, batch, length, precision="float32"):
    return saved_activations(config, sequence_length=length, micro_batch_size=batch, precision=precision, device="cpu")


def measured(config, batch, length, *, checkpointing=0, precision="float32"):
    model = LanguageModel(config)
    if checkpointing:
        model.checkpoint_blocks(partial(checkpoint, use_reentrant=False), checkpointing)
    if precision == "bfloat16":  # as in the pre-training loop
        model.embedding.register_forward_hook(lambda module, inputs, output: output.bfloat16())
    ids = torch.randint(config.vocab_size, (batch, length + 1))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return model(ids[:, :-1], labels=ids[:, 1:])

    return saved_bytes(step, model.parameters())


@pytest.mark.parametrize(("d_model", "batch", "length"), [(64, 2, 96), (128, 3, 200)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.thin(2)
def test_what_a_real_forward_pass_saves(name, precision, d_model, batch, length):
    config = model_config(name, d_model)
    saved = predicted(config, batch, length, precision)
    total = saved.activations() + saved.norm + saved.output + sum(saved.block_weights)
    assert total == pytest.approx(measured(config, batch, length, precision=precision), rel=0.1)
    assert any(saved.block_weights) == (precision == "bfloat16")


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", MIXERS)
def test_what_checkpointing_leaves(name, every):
    config = model_config(name)
    saved = predicted(config, 2, 96)
    left = saved.activations(every)
    assert left + saved.norm + saved.output == pytest.approx(measured(config, 2, 96, checkpointing=every), rel=0.1)
    assert sum(saved.inputs) <= left < saved.activations()


def test_a_hybrid():
    mixers = (mixer_configs()["deltanet"](), mixer_configs()["attention"]())
    config = model_config("deltanet", num_layers=4, mixer=mixers)
    saved = predicted(config, 2, 96)
    assert saved.blocks[0] == saved.blocks[2] != saved.blocks[1] == saved.blocks[3]
    total = saved.activations() + saved.norm + saved.output
    assert total == pytest.approx(measured(config, 2, 96), rel=0.1)


@pytest.mark.parametrize("name", sorted(mixer_configs()))
def test_every_mixer_can_be_planned(name):
    placement = only(model_config(name), sequence_length=256, micro_batch_size=2, precision="bfloat16")
    inputs = 3 * 2 * 256 * 64 * 2
    assert 5 * inputs < placement.memory.activations < 200 * inputs


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_attention_saves_no_matrix_of_all_pairs(device):
    sizes = {"micro_batch_size": 1, "device": device}
    one, two = (
        saved_activations(model_config("attention"), sequence_length=length, **sizes).activations()
        for length in (1024, 2048)
    )
    assert two == pytest.approx(2 * one, rel=0.01)


@pytest.mark.parametrize("name", MIXERS)
def test_the_peak_of_a_step_by_pytorchs_tracker(name):
    """In float32 on one card, where nothing is gathered: weights, gradients, states and activations at their peak."""
    config = model_config(name, 256, num_layers=4, vocab_size=2000)
    with torch.device("meta"):
        model = LanguageModel(config)
        optimizer = build_optimizer(model, OptimizerConfig())
        ids = torch.zeros(4, 512, dtype=torch.long)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker, assuming_a_gpu():
            model(ids, labels=ids).backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("meta")]["Total"]
    memory = only(config, sequence_length=512, micro_batch_size=4).memory
    assert memory.gathered == 0
    assert memory.tensors == pytest.approx(peak, rel=0.15)


def only(config, **options):
    (placement,) = plan(
        config, **{"precision": "float32", "checkpointing": 0, "world_sizes": (1,), "cards": CARDS[2:3], **options}
    ).placements
    return placement


def test_optimizers_take_what_their_states_take():
    config = model_config("deltanet")
    with torch.device("meta"):
        model = LanguageModel(config)
    for name in ("adamw", "muon"):
        optimizer = build_optimizer(real := LanguageModel(config), OptimizerConfig(name=name))
        for p in real.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        tensors = [x for state in optimizer.state.values() for key, x in state.items() if key != "step"]
        memory = only(config, sequence_length=8, micro_batch_size=1, optimizer=OptimizerConfig(name=name)).memory
        assert memory.optimizer == sum(x.nbytes for x in tensors)
        assert memory.parameters == 4 * model.num_parameters()


def test_shards_shrink_and_activations_do_not():
    config = preset("deltanet-1.3b", vocab_size=32_000)
    one, eight = (only(config, sequence_length=2048, micro_batch_size=8, world_sizes=(n,)) for n in (1, 8))
    for part in ("parameters", "gradients", "optimizer"):
        assert getattr(one.memory, part) == 8 * getattr(eight.memory, part)
    assert one.memory.activations == eight.memory.activations
    assert eight.memory.gathered > 0
    assert eight.tokens_per_second == pytest.approx(8 * one.tokens_per_second)


def test_small_blocks_are_gathered_several_at_a_time_unless_they_are_computed_again():
    config = preset("deltanet-125m", vocab_size=32_000)
    options = {"sequence_length": 64, "micro_batch_size": 1, "parallelism": "fsdp", "precision": "bfloat16"}
    together, alone = (
        only(config, checkpointing=every, reshard_after_forward=True, **options).memory.gathered for every in (0, 1)
    )
    kept = only(config, checkpointing=0, **options).memory.gathered
    with torch.device("meta"):
        model = LanguageModel(config)
    groups = gathered_together(model.blocks, GROUP_PARAMETERS)
    assert [block for group in groups for block in group] == list(model.blocks)
    sizes = [[sum(p.numel() for p in block.parameters()) for block in group] for group in groups]
    assert 1 < len(groups) < len(model.blocks)
    assert all(sum(group[:-1]) < GROUP_PARAMETERS <= sum(group) for group in sizes[:-1])
    # Two groups of weights in bf16, and gradients in bf16 and float32 where they outweigh those of the embeddings.
    outside = 4 * (model.num_parameters() - sum(map(sum, sizes)))
    for gathered, largest in ((together, max(map(sum, sizes))), (alone, max(map(max, sizes)))):
        assert gathered == outside + 4 * largest + max(outside, 6 * largest)
    largest = max(map(sum, sizes))
    assert kept == outside + 2 * sum(map(sum, sizes)) + max(outside, 6 * largest)
    assert gathered_together(model.blocks, 0) == [[block] for block in model.blocks]
    # More sequences than the two cards take at once: float32 gradients of the whole model, unless they are reduced.
    for batch_size, always, extra in ((2, False, False), (4, True, False), (4, False, True)):
        memory = only(
            config,
            checkpointing=0,
            world_sizes=(2,),
            batch_size=batch_size,
            reduce_every_micro_batch=always,
            **options,
        ).memory
        whole = 4 * model.num_parameters() + 2 * largest - max(outside, 6 * largest)
        assert memory.gathered == kept + whole * extra


MEASURED = json.loads((Path(__file__).parents[2] / "results" / "scaling" / "h100-x2.json").read_text())


@pytest.mark.parametrize(
    "row",
    MEASURED["sections"]["throughput"]["rows"],
    ids=lambda row: f"{row['preset']}, {row['processes']}, {row['parallelism']}",
)
def test_memory_is_what_was_measured_on_h100s(row):
    memory = only(
        preset(row["preset"], vocab_size=32_000),
        sequence_length=2048,
        micro_batch_size=row["micro_batch_size"],
        parallelism=row["parallelism"],
        precision="bfloat16",
        world_sizes=(row["processes"],),
    ).memory
    assert 1 < memory.tensors / (1e9 * row["peak_memory_gb"]) < 1.08


def test_the_largest_batch_is_the_last_that_fits():
    config = preset("mamba-340m", vocab_size=32_000)
    options = {"sequence_length": 2048, "precision": "bfloat16"}
    largest = only(config, micro_batch_size=8, **options).largest_micro_batch
    assert largest > 8
    assert only(config, micro_batch_size=largest, **options).fits
    assert not only(config, micro_batch_size=largest + 1, **options).fits
    tiny = only(config, micro_batch_size=1, cards=(replace(CARDS[2], memory=2 * GIB),), **options)
    assert (tiny.fits, tiny.largest_micro_batch) == (False, 0)


def test_the_largest_batch_keeps_whole_gradients_only_where_it_is_one_of_several():
    config = preset("deltanet-340m", vocab_size=32_000)
    options = {"sequence_length": 2048, "precision": "bfloat16", "micro_batch_size": 1, "world_sizes": (2,)}
    alone = only(config, **options).largest_micro_batch
    several = only(config, batch_size=200, **options).largest_micro_batch
    assert several < alone
    assert only(config, batch_size=2 * alone, **options).largest_micro_batch == alone
    assert only(config, batch_size=2 * alone + 2, **options).largest_micro_batch == several
    assert only(config, batch_size=200, reduce_every_micro_batch=True, **options).largest_micro_batch == alone


def test_speed_is_the_assumed_share_of_the_peak():
    config = preset("deltanet-340m", vocab_size=32_000)
    planned = plan(config, sequence_length=2048, micro_batch_size=8, mfu=0.5, cards=CARDS[2:3], world_sizes=(2,))
    plain, again = planned.placements
    assert plain.tokens_per_second * planned.flops_per_token == pytest.approx(2 * 0.5 * 989.4e12)
    assert again.tokens_per_second == pytest.approx(0.75 * plain.tokens_per_second)
    assert planned.step_seconds(plain) == pytest.approx(2 * 8 * 2048 / plain.tokens_per_second)
    assert plain.tokens_per_day == 86_400 * plain.tokens_per_second
    assert again.memory.total < plain.memory.total


def test_the_table():
    planned = plan(preset("deltaproduct-1.3b", vocab_size=32_000), sequence_length=2048, micro_batch_size=8)
    console = Console(width=200, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        console.print(planned)
    text = captured.get()
    assert "1,323.0M parameters" in text
    assert "assumed MFU of 35%" in text
    for card in CARDS:
        assert f"{card.name} {card.memory / GIB:.0f} GiB" in text
    assert len(planned.placements) == len(CARDS) * 4 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"world_sizes": (0,)}, "world_sizes must be at least 1"),
        ({"mfu": 1.5}, "mfu must lie in"),
        ({"parallelism": "tp"}, "parallelism must be auto, none, ddp or fsdp, got 'tp'"),
        ({"checkpointing": -1}, "checkpointing must be 0"),
        ({"precision": "fp8"}, "precision must be float32 or bfloat16, got 'fp8'"),
        ({"cards": (Card("Voodoo 2", GIB),)}, "the peak of Voodoo 2 is not known"),
    ],
)
def test_bad_plans_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(model_config("deltanet"), **{"sequence_length": 8, "micro_batch_size": 1, **options})
