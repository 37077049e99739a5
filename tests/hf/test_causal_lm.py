"""The causal language model of transformers around `LanguageModel`: generation, files, training, refusals."""

import copy
import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from statetrack import LanguageModel, ModelConfig, from_pretrained, mixer_config, mixer_configs
from statetrack.hf import StateCache, StatetrackConfig, StatetrackForCausalLM
from statetrack.pretrained import CheckpointError

V = 11
HYBRIDS = {
    "deltanet+attention": ("deltanet", "attention"),
    "mamba+lstm": ("mamba", "lstm"),
    "gated_deltaproduct+slstm": ("gated_deltaproduct", "slstm"),
}
MIXERS = [*mixer_configs(), *HYBRIDS]
# transformers has renamed it.
NAME = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
GREEDY = {"do_sample": False, "max_new_tokens": 6}

logging.disable_progress_bar()


def make_config(name="deltanet", **options):
    mixer = tuple(mixer_config(part)() for part in HYBRIDS.get(name, (name,)))
    return ModelConfig(vocab_size=V, **{"d_model": 16, "num_layers": 2, "mlp_ratio": 2.0, "mixer": mixer, **options})


def make(name="deltanet", **options):
    torch.manual_seed(0)
    model = StatetrackForCausalLM(StatetrackConfig.of(make_config(name, **options), eos_token_id=None, pad_token_id=0))
    return model.double().eval()


def load(path, **options) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


def prompts(rows=3, length=7):
    torch.manual_seed(1)
    return torch.randint(1, V, (rows, length))


def left_padded(ids, lengths):
    """Rows of which only the last so many tokens are real, and their mask."""
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]
    return torch.where(mask, ids, 0), mask.long()


@pytest.mark.parametrize("name", MIXERS)
def test_logits_are_those_of_the_language_model(name):
    model, ids = make(name), prompts()
    assert torch.equal(model(ids).logits, model.model(ids))
    assert torch.equal(model(ids, logits_to_keep=2).logits, model.model.scan(ids, positions=torch.tensor([5, 6]))[0])
    at = torch.tensor([1, 4])
    assert torch.equal(model(ids, logits_to_keep=at).logits, model.model.scan(ids, positions=at)[0])


@pytest.mark.parametrize("name", MIXERS)
def test_generation_with_the_cache_equals_generation_without(name):
    model, (ids, mask) = make(name), left_padded(prompts(), [7, 3, 5])
    for options in (GREEDY, {**GREEDY, "num_beams": 3}, {**GREEDY, "do_sample": True, "num_return_sequences": 2}):
        results = []
        for use_cache in (True, False):
            set_seed(3)
            results.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **options))
        assert torch.equal(*results)
        assert results[0].shape == (3 * options.get("num_return_sequences", 1), 13)


@pytest.mark.parametrize("name", MIXERS)
def test_left_padding_changes_nothing(name):
    model, lengths = make(name), [7, 3, 5]
    ids, mask = left_padded(prompts(), lengths)
    for options in (GREEDY, {**GREEDY, "num_beams": 2}):
        together = model.generate(ids, attention_mask=mask, **options)
        for row, length in enumerate(lengths):
            alone = model.generate(ids[row : row + 1, -length:], **options)
            assert torch.equal(together[row, -6 - length :], alone[0])


def test_generated_tokens_are_the_most_likely_ones():
    model, ids = make("gated_deltanet"), prompts()
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model.model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(ids, **GREEDY), expected)


@pytest.mark.parametrize("name", [name for name in mixer_configs() if name != "attention"])
def test_the_cache_has_a_constant_size(name):
    model, ids = make(name), prompts()
    short = model(ids[:, :2], use_cache=True).past_key_values
    out = model.generate(ids, return_dict_in_generate=True, do_sample=False, max_new_tokens=20)
    assert out.past_key_values.num_bytes() == short.num_bytes() > 0
    assert out.past_key_values.get_seq_length() == 7 + 20 - 1


@pytest.mark.parametrize("num_beams", [1, 3])
def test_only_caches_that_generate_made_are_overwritten(num_beams):
    model, ids = make("gated_deltaproduct+slstm"), prompts()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        kept = copy.deepcopy(cache)
        before = cache.state
        model(ids[:, :1], past_key_values=cache)
        assert all(
            torch.equal(layer[name], tensor)
            for layer, was in zip(before, kept.state, strict=True)
            for name, tensor in was.items()
        )
        out = model.generate(ids, return_dict_in_generate=True, num_beams=num_beams, **GREEDY)
        tensors = [tensor for layer in out.past_key_values.state for tensor in layer.values()]
        model(ids[:, :1].expand(3, 1).repeat_interleave(num_beams, 0), past_key_values=out.past_key_values)
        after = [tensor for layer in out.past_key_values.state for tensor in layer.values()]
        assert all(a is b for a, b in zip(tensors, after, strict=True))
    assert torch.equal(out.sequences, model.generate(ids, use_cache=False, num_beams=num_beams, **GREEDY))


def test_the_cache_of_attention_grows():
    model, ids = make("deltanet+attention"), prompts()
    short, long = (model(x, use_cache=True).past_key_values for x in (ids[:, :2], ids))
    assert long.num_bytes() > short.num_bytes()


@torch.no_grad()
@pytest.mark.parametrize("name", ["deltanet", "lstm", "deltanet+attention"])
def test_a_cache_goes_on_where_it_stopped(name):
    model, ids = make(name), prompts()
    whole = model(ids).logits
    first = model(ids[:, :4], use_cache=True)
    kept = copy.deepcopy(first.past_key_values)
    second = model(ids[:, 4:], past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat([first.logits, second.logits], 1), whole)
    assert second.past_key_values is first.past_key_values
    # Rows chosen, repeated and given a mask of all tokens, from a copy that has not moved.
    assert kept.get_seq_length() == 4
    kept.batch_select_indices(torch.tensor([2, 0]))
    kept.batch_repeat_interleave(2)
    assert kept.batch_size == 4
    again = model(ids[[2, 2, 0, 0], 4:], attention_mask=torch.ones(4, 7), past_key_values=kept)
    assert torch.allclose(again.logits, whole[[2, 2, 0, 0], 4:])
    generated = model.generate(ids, past_key_values=model(ids[:, :4], use_cache=True).past_key_values, **GREEDY)
    assert torch.equal(generated, model.generate(ids, **GREEDY))
    kept.reset()
    assert torch.allclose(model(ids, past_key_values=kept).logits, whole)
    assert "seen_tokens=7" in repr(kept)
    with pytest.raises(ValueError, match="can't forget"):
        kept.crop(-1)


def test_prompts_may_be_read_in_chunks_of_padding_only():
    model, (ids, mask) = make(), left_padded(prompts(), [2, 3, 1])
    chunked = model.generate(ids, attention_mask=mask, prefill_chunk_size=3, **GREEDY)
    assert torch.equal(chunked, model.generate(ids, attention_mask=mask, **GREEDY))


def test_embeddings_may_take_the_place_of_tokens():
    model, (ids, mask) = make(), left_padded(prompts(), [7, 3, 5])
    embedded = model.get_input_embeddings()(ids)
    logits = model(inputs_embeds=embedded, attention_mask=mask).logits
    assert torch.equal(logits, model(ids, attention_mask=mask).logits)
    generated = model.generate(inputs_embeds=embedded, attention_mask=mask, **GREEDY)
    assert torch.equal(generated, model.generate(ids, attention_mask=mask, **GREEDY)[:, 7:])


@pytest.mark.parametrize("name", MIXERS)
def test_models_are_saved_in_shards_and_read_again(name, tmp_path):
    model, ids = make(name), prompts()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    read = load(tmp_path)
    assert type(read) is StatetrackForCausalLM
    assert not read.training
    assert read.config.to_model_config() == model.model.config
    assert {n: t.dtype for n, t in read.state_dict().items()} == dict.fromkeys(model.state_dict(), torch.float64)
    assert torch.allclose(read(ids).logits, model(ids).logits, rtol=1e-12, atol=1e-12)


def test_the_config_goes_there_and_back(tmp_path):
    config = make_config("deltanet+attention", norm_placement=("before", "after"), tie_embeddings=True)
    ours = StatetrackConfig.of(config, bos_token_id=1, eos_token_id=2)
    ours.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.to_model_config() == config
    assert (read.hidden_size, read.num_hidden_layers, read.tie_word_embeddings) == (16, 2, True)
    assert (read.bos_token_id, read.eos_token_id) == (1, 2)
    made = StatetrackConfig(vocab_size=V, hidden_size=16, tie_word_embeddings=True, mixer={"name": "mamba"})
    assert made.to_model_config() == ModelConfig(
        vocab_size=V, d_model=16, tie_embeddings=True, mixer=mixer_config("mamba")()
    )
    assert AutoConfig.for_model("statetrack").to_model_config().vocab_size == 256
    changed = AutoConfig.from_pretrained(tmp_path, num_layers=4)
    assert AutoModelForCausalLM.from_config(changed).model.config.num_layers == 4


def test_new_models_begin_as_language_models_do():
    torch.manual_seed(5)
    expected = LanguageModel(make_config("mamba")).state_dict()
    torch.manual_seed(5)
    got = AutoModelForCausalLM.from_config(StatetrackConfig.of(make_config("mamba"))).model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_loss_of_a_new_model_is_near_that_of_a_uniform_guess(tied):
    config = ModelConfig(vocab_size=1000, d_model=256, num_layers=2, tie_embeddings=tied)
    ids = torch.randint(1000, (4, 65))
    loss = AutoModelForCausalLM.from_config(StatetrackConfig.of(config))(ids, labels=ids).loss.item()
    assert loss == pytest.approx(math.log(1000), rel=0.07)


def test_weights_that_a_checkpoint_lacks_begin_as_in_a_new_model(tmp_path):
    name, native = "gated_deltanet", mixer_config("gated_deltanet")(eigenvalue_range=(0, 1))
    model, ids = make(name, mixer=native), prompts()
    model.save_pretrained(tmp_path)
    mixer = mixer_config(name)(eigenvalue_range=(0, 1), learn_lower_end=True)
    opening, info = load(tmp_path, config=StatetrackConfig.of(make_config(name, mixer=mixer)), output_loading_info=True)
    assert sorted(info["missing_keys"]) == [f"model.blocks.{i}.mixer.widening.lower_end" for i in range(2)]
    assert torch.allclose(opening(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_what_was_saved_is_read_without_transformers_too(tied, tmp_path):
    learned = mixer_config("gated_deltanet")(eigenvalue_range=(-0.5, 1), learn_lower_end=True)
    model, ids = make(mixer=(learned, mixer_config("attention")()), tie_embeddings=tied), prompts()
    with torch.no_grad():
        model.model.blocks[0].mixer.widening.lower_end.fill_(-0.25)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    read = from_pretrained(tmp_path)
    assert read.config == model.model.config
    assert torch.allclose(read(ids), model(ids).logits, rtol=1e-12)
    make("gated_deltanet", mixer=mixer_config("gated_deltanet")(eigenvalue_range=(0, 1))).save_pretrained(
        tmp_path / "0"
    )
    native, opening = (from_pretrained(tmp_path / "0", widening=w) for w in ("reinterpret", "preserve"))
    assert torch.allclose(native(ids), opening(ids))
    assert opening.config.layer_mixers()[0].learn_lower_end
    config = json.loads((tmp_path / "0" / "config.json").read_text())
    (tmp_path / "0" / "config.json").write_text(json.dumps({**config, "d_model": 0}))
    with pytest.raises(CheckpointError, match=r"config.json: d_model must be a positive integer, got 0"):
        from_pretrained(tmp_path / "0")


def test_tied_embeddings_are_saved_once_and_stay_tied(tmp_path):
    model, ids = make(tie_embeddings=True), prompts()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    read, info = load(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not [name for name in read.state_dict() if "head" in name]
    assert read.get_output_embeddings().weight is read.get_input_embeddings().weight
    assert torch.allclose(read(ids).logits, model(ids).logits, rtol=1e-12)
    hidden = torch.randn(2, 16, dtype=torch.double)
    assert torch.equal(read.get_output_embeddings()(hidden), hidden @ read.get_input_embeddings().weight.T)


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_can_grow(tied, tmp_path):
    model, ids = make(tie_embeddings=tied), prompts()
    before = model(ids).logits
    model.resize_token_embeddings(V + 3)
    ids[0, -1] = V + 2
    logits = model(ids).logits
    assert logits.shape == (3, 7, V + 3)
    assert torch.allclose(logits[1:, :, :V], before[1:])
    model.save_pretrained(tmp_path)
    read = load(tmp_path)
    assert read.model.config.vocab_size == V + 3
    assert torch.allclose(read(ids).logits, logits, rtol=1e-12)


def test_the_dtype_can_be_chosen(tmp_path):
    make("mamba").save_pretrained(tmp_path)
    model = load(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.generate(prompts(), **GREEDY).shape == (3, 13)


@pytest.mark.parametrize("name", MIXERS)
def test_the_loss_is_the_cross_entropy_of_the_next_token(name):
    model, (ids, mask) = make(name), left_padded(prompts(), [7, 3, 5])
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    assert torch.allclose(out.loss.float(), expected)
    assert model.train()(ids, labels=labels).past_key_values is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_computes_again_and_changes_no_gradient(reentrant, monkeypatch):
    model, ids = make("deltanet+attention").train(), prompts()
    calls = []
    for index, block in enumerate(model.model.blocks):
        scan = block.mixer.scan
        monkeypatch.setattr(block.mixer, "scan", lambda *a, scan=scan, index=index: calls.append(index) or scan(*a))

    def gradients():
        calls.clear()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    def partial(function, *args):
        return checkpoint.checkpoint(function, *args, use_reentrant=reentrant)

    expected = gradients()
    assert sorted(calls) == [0, 1]
    model.model.checkpoint_blocks(partial, every=2)
    model.enable_input_require_grads()
    got = gradients()
    assert sorted(calls) == [0, 0, 1]
    assert all(torch.allclose(got[name], gradient) for name, gradient in expected.items())
    getattr(model, f"{NAME}_enable")({"use_reentrant": reentrant})
    assert getattr(model, f"is_{NAME}")
    got = gradients()
    assert sorted(calls) == [0, 0, 1, 1]
    assert all(torch.allclose(got[name], gradient) for name, gradient in expected.items())
    getattr(model, f"{NAME}_disable")()
    gradients()
    assert sorted(calls) == [0, 1]
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        model.model.checkpoint_blocks(partial, every=0)


@pytest.mark.parametrize("name", ["deltanet", "mamba", "deltanet+attention"])
def test_sequences_that_share_a_row_do_not_see_each_other(name):
    model, ids = make(name), prompts()
    rows = [{"input_ids": ids[0].tolist()}, {"input_ids": ids[1, :4].tolist()}, {"input_ids": ids[2, :6].tolist()}]
    alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in rows], 1)
    flat = DataCollatorWithFlattening()(rows)
    assert torch.allclose(model(flat["input_ids"], position_ids=flat["position_ids"]).logits, alone)
    boundaries = torch.tensor([0, 7, 11, 17])
    assert torch.allclose(model(flat["input_ids"], cu_seq_lens_q=boundaries).logits, alone)
    # Several rows, each with a boundary somewhere else.
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 5, 6]])
    got = model(ids, position_ids=positions).logits
    for row, cut in enumerate((3, 5, 7)):
        pieces = [piece for piece in (ids[row, :cut], ids[row, cut:]) if len(piece)]
        assert torch.allclose(got[row], torch.cat([model(piece[None]).logits[0] for piece in pieces]))


def test_the_trainer_trains_and_goes_on_from_its_checkpoint(tmp_path):
    torch.manual_seed(2)
    pattern = torch.tensor([1, 5, 3, 8]).repeat(4)
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones(16)} for row in pattern.expand(16, -1)]

    def train(steps, **options):
        model = make("gated_deltanet").float()
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            learning_rate=2e-2, lr_scheduler_type="constant", save_steps=4, report_to=[], use_cpu=True,
            disable_tqdm=True, logging_steps=100, **{NAME: True},
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:2])
        before = trainer.evaluate()["eval_loss"]
        trainer.train(**options)
        return model, before, trainer.evaluate()["eval_loss"]

    whole, before, after = train(8)
    assert after < before / 2
    resumed, _, _ = train(8, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    generated = whole.eval().generate(pattern[None, :8], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated[0], pattern[:12])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give input_ids or inputs_embeds"),
        ({"input_ids": prompts(), "inputs_embeds": torch.zeros(3, 7, 16)}, "give input_ids or inputs_embeds"),
        ({"input_ids": prompts(), "past_key_values": DynamicCache()}, "is a StateCache.* got a DynamicCache"),
        ({"input_ids": prompts(), "attention_mask": torch.ones(3, 6)}, r"must be \[B, 7\], 0 at padding, got \(3, 6\)"),
        ({"input_ids": prompts(), "attention_mask": torch.ones(3, 1, 7, 7)}, r"must be \[B, 7\]"),
        ({"input_ids": prompts(), "output_hidden_states": True}, "output_hidden_states is not supported"),
        ({"input_ids": prompts(), "labels": prompts(), "logits_to_keep": 1}, "labels need the logits of all tokens"),
        (
            {"input_ids": prompts(1), "cu_seq_lens_q": torch.tensor([0, 7]), "past_key_values": StateCache()},
            "packed sequences can't go on from a cache",
        ),
        ({"inputs_embeds": torch.zeros(3, 7, 5)}, r"embeddings must be \[B, T, D\] .* D = 16, got \(3, 7, 5\)"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make()(**options)


def test_a_model_that_answers_with_labels_is_no_causal_language_model():
    with pytest.raises(ValueError, match="output_size must be vocab_size = 11 or None, got 3"):
        StatetrackForCausalLM.of(LanguageModel(make_config(output_size=3)))
    with pytest.raises(ValueError, match="unknown mixer 'deltanets'"):
        StatetrackConfig(mixer={"name": "deltanets"})
    with pytest.raises(ValueError, match="'static' is for attention"):
        make().generate(prompts(), cache_implementation="static", **GREEDY)


def test_a_language_model_is_wrapped_and_not_copied():
    torch.manual_seed(0)
    model = LanguageModel(make_config(output_size=V)).double()
    wrapped = StatetrackForCausalLM.of(model, eos_token_id=4)
    assert wrapped.model is model
    assert wrapped.config.eos_token_id == wrapped.generation_config.eos_token_id == 4
    assert torch.equal(wrapped(prompts()).logits, model(prompts()))


def test_transformers_is_needed_by_nothing_else():
    code = """
import statetrack, sys
print("transformers" in sys.modules)
sys.modules["transformers"] = None
try:
    import statetrack.hf
except ModuleNotFoundError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message = "statetrack.hf needs transformers, which comes with: pip install 'statetrack[hf]'"
    assert result.stdout.splitlines() == ["False", message]
