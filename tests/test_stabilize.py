"""Stabilized models: right where the same model without it drifts, and untouched where nothing drifts."""

import json

import pytest
import torch
from automaton_examples import full

from statetrack import AttentionConfig, DeltaNetConfig, LanguageModel, ModelConfig
from statetrack.automata import Automaton, group_automaton
from statetrack.cli import main
from statetrack.config import TrainingConfig, run_config
from statetrack.evaluation import evaluate
from statetrack.stabilize import StabilizationError, StabilizedModel, learn_states, steady_length
from statetrack.tasks import get_task
from statetrack.theory.construct import compile
from statetrack.theory.verify import count_errors, verify
from statetrack.training import train

NOISE = {"S3": 0.02, "S4": 0.005}


def disturbed(name, noise=None, dtype=torch.float32):
    """A compiled model with keys a little off their angles: right at first, and drifting."""
    model = compile(group_automaton(name), dtype=dtype)
    weight, noise = model.blocks[0].mixer.k_proj.weight, NOISE[name] if noise is None else noise
    with torch.no_grad():
        weight *= 1 + noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["S3", "S4"])
def test_a_model_that_drifts_stays_right(name, dtype):
    model, automaton = disturbed(name, dtype=dtype), group_automaton(name)
    assert count_errors(model, automaton, words=4, length=8) == (0, None)
    assert count_errors(model, automaton, words=4, length=3000)[0] > 1000
    assert count_errors(StabilizedModel(model), automaton, words=4, length=3000) == (0, None)


def test_a_trained_model_stays_right():
    task = get_task("parity")
    mixer = DeltaNetConfig(conv_size=0, activation="identity", output_norm=False)
    options = TrainingConfig(steps=300, min_length=1, learning_rate=1e-2)
    model = train(run_config("parity", mixer, {"d_model": 16, "num_layers": 1, "final_norm": False}, options)).model
    (plain,) = evaluate(model, task, [4096], sequences=32)
    (stabilized,) = evaluate(StabilizedModel(model), task, [4096], sequences=32)
    assert plain.accuracy < 0.8
    assert stabilized.accuracy == 1


def test_with_an_interval_of_one_token_a_drifting_model_is_proved_right():
    model, automaton = disturbed("S3"), group_automaton("S3")
    assert not verify(model, automaton, state_limit=2000, words=1, length=500).exact
    proof = verify(StabilizedModel(model, 1), automaton, mode="exhaustive")
    assert proof.exact
    assert proof.states == 6


def test_the_states_found_are_those_of_the_automaton():
    automaton = group_automaton("S4")
    known = learn_states(disturbed("S4"))
    assert (len(known), known.depth, known.agreement) == (24, 1, 1.0)
    # Both machines start in 0: walk them side by side.
    same, frontier = {0: 0}, [0]
    for state in frontier:
        for ours, theirs in zip(known.transitions[state], automaton.transitions[same[state]], strict=True):
            if int(ours) not in same:
                same[int(ours)] = int(theirs)
                frontier.append(int(ours))
            assert same[int(ours)] == theirs
    assert len(same) == 24


def test_states_with_the_same_answer_are_told_apart_by_longer_questions():
    known = learn_states(compile(Automaton.from_regex("(a|b)*a(a|b)(a|b)")))
    assert (len(known), known.depth) == (4, 2)  # the letter before the last decides, and the one before it
    assert known.agreement == 1


def test_the_many_states_of_a_cascade_are_those_of_its_automaton():
    automaton = full(4)
    model = compile(automaton)
    assert verify(model, automaton).states == 24
    assert len(learn_states(model)) == 4
    assert verify(StabilizedModel(model, 1), automaton).exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_happens_to_an_exact_model(dtype):
    model = compile(group_automaton("A5"), dtype=dtype)
    stabilized = StabilizedModel(model, 16)
    ids = torch.randint(60, (2, 100), generator=torch.Generator().manual_seed(0))
    logits, after = model.scan(ids)
    kept, (kept_after, _) = stabilized.scan(ids)
    assert torch.equal(kept, logits)
    assert torch.equal(kept_after["recurrence"], after[0]["recurrence"])


def test_a_state_is_judged_by_what_the_answers_see_of_it():
    """A head that no answer depends on may hold anything."""
    model = disturbed("S3", noise=0)
    known = learn_states(model)
    state = known.select(torch.arange(6))
    spare = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(known.nearest(model, [{**state[0], "unread": 1e3 * spare}]), torch.arange(6))
    state[0]["recurrence"] = state[0]["recurrence"] + 0.05 * torch.randn(state[0]["recurrence"].shape)
    assert torch.equal(known.nearest(model, state), torch.arange(6))


def test_segments_positions_and_steps_compute_the_same():
    model = StabilizedModel(disturbed("S3"), 5)
    ids = torch.randint(6, (3, 23), generator=torch.Generator().manual_seed(1))
    whole, after = model.scan(ids)
    for cut in (1, 4, 5, 6, 15, 22):
        first, state = model.scan(ids[:, :cut])
        second, state = model.scan(ids[:, cut:], state)
        assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-5)
        assert torch.equal(state[-1]["since"], after[-1]["since"])
    positions = torch.tensor([22, 0, 4, 5])
    assert torch.allclose(model.scan(ids, positions=positions)[0], whole[:, positions], atol=1e-5)
    state, steps = model.init_state(3), []
    for letter in ids.unbind(1):
        logits, state = model.step(letter, state)
        steps.append(logits)
    assert torch.allclose(torch.stack(steps, 1), whole, atol=1e-5)


def test_rows_that_were_corrected_at_different_times():
    model = StabilizedModel(disturbed("S3"), 5)
    ids = torch.randint(6, (2, 12), generator=torch.Generator().manual_seed(1))
    states = [model.scan(ids[row : row + 1, :start])[1] for row, start in enumerate((3, 5))]
    both = [
        {name: torch.cat([layer[name] for layer in layers]) for name in layers[0]}
        for layers in zip(*states, strict=True)
    ]
    logits, after = model.scan(ids[:, 5:], both)
    for row, state in enumerate(states):
        alone, end = model.scan(ids[row : row + 1, 5:], state)
        assert torch.allclose(logits[row], alone[0], atol=1e-5)
        assert after[-1]["since"][row] == end[-1]["since"]


def test_the_interval_is_a_quarter_of_what_the_model_holds_and_at_most_256():
    exact, drifting, worse = (disturbed("S3", noise) for noise in (0, 0.01, 0.02))
    assert StabilizedModel(exact).interval == 256
    known = learn_states(drifting)
    assert StabilizedModel(drifting).interval == steady_length(drifting, known) / 4 < 256
    assert StabilizedModel(worse).interval < StabilizedModel(drifting).interval


def test_models_that_are_no_finite_machine_are_refused(monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 3, "output_size": 6, "d_model": 8, "num_layers": 1}
    with pytest.raises(StabilizationError, match="grows with every token"):
        learn_states(LanguageModel(ModelConfig(**sizes, mixer=AttentionConfig(num_heads=2))).eval())
    monkeypatch.setattr("statetrack.stabilize.MAX_ANSWERS", 2000)
    with pytest.raises(StabilizationError, match="no finite machine"):
        learn_states(LanguageModel(ModelConfig(**sizes, mixer=DeltaNetConfig(num_heads=2))).eval())
    with pytest.raises(ValueError, match="at least 1 token"):
        StabilizedModel(disturbed("S3"), 0)


def test_the_commands(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["compile", "group:S3", "--out", str(run)]) == 0
    assert main(["evaluate", str(run), "--lengths", "8", "--sequences", "4"]) == 0
    before = (run / "evaluation.json").read_bytes()
    command = ["evaluate", str(run), "--lengths", "9,70", "--sequences", "4", "--dtype", "bfloat16"]
    assert main([*command, "--stabilize", "16", "--json", str(tmp_path / "data.json")]) == 0
    data = json.loads((tmp_path / "data.json").read_text())
    assert data["stabilized"] == {"interval": 16, "states": 6}
    assert data["accuracy"] == {"9": 1.0, "70": 1.0}
    assert (run / "evaluation.json").read_bytes() == before
    assert main([*command, "--stabilize", "auto"]) == 0
    assert "corrected every 256 tokens" in capsys.readouterr().out
    assert main([*command, "--stabilize", "0"]) == 2
    assert main(["verify", str(run), "--stabilize", "1", "--tokens", "10", "--json", str(tmp_path / "proof.json")]) == 0
    assert json.loads((tmp_path / "proof.json").read_text())["exact"]
