"""The verifier: what it proves, what it finds, and what it only samples."""

import pytest
import torch

from statetrack import LanguageModel, ModelConfig
from statetrack.automata import Automaton, group_automaton
from statetrack.theory.construct import compile
from statetrack.theory.verify import verify


def test_a_wrong_answer_in_one_state_is_found_with_a_word_that_leads_there():
    automaton = group_automaton("S3", "generators")
    changed = Automaton(automaton.transitions, 0, automaton.outputs.index_fill(0, torch.tensor([5]), 0))
    model = compile(automaton)
    proof = verify(model, changed, mode="exhaustive")
    assert proof.errors > 0
    assert not proof.exact
    assert automaton.run(torch.tensor([proof.first_error]))[0, -1] == 5
    assert "wrong after" in str(proof)


def test_a_model_with_too_many_states_is_judged_on_random_words_and_says_so():
    torch.manual_seed(0)
    automaton = group_automaton("Z2")
    model = LanguageModel(ModelConfig(vocab_size=2, d_model=8, num_layers=1)).eval()
    proof = verify(model, automaton, state_limit=50, words=2, length=30)
    assert proof.mode == "words"
    assert proof.checked == 60
    assert proof.errors > 0
    assert not proof.exact
    assert "no proof" in str(proof)
    assert "words lead the model to more than" in proof.reason
    with pytest.raises(ValueError, match="verify it on random words instead"):
        verify(model, automaton, mode="exhaustive", state_limit=50)


def test_random_words_are_no_proof_even_without_an_error():
    automaton = group_automaton("Z3")
    proof = verify(compile(automaton), automaton, mode="words", words=2, length=50)
    assert proof.errors == 0
    assert not proof.exact


@pytest.mark.parametrize(
    ("mode", "name", "message"), [("words", "Z5", "5 letters"), ("no", "Z3", "mode must be one of")]
)
def test_what_can_not_be_compared_is_refused(mode, name, message):
    with pytest.raises(ValueError, match=message):
        verify(compile(group_automaton("Z3")), group_automaton(name), mode=mode)


@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.parametrize("mode", ["exhaustive", "words"])
def test_a_model_that_prefers_no_answer_is_wrong(mode, value):
    automaton = group_automaton("Z2")
    model = compile(automaton)
    with torch.no_grad():
        model.output_weight.fill_(value)
    proof = verify(model, automaton, mode=mode, words=2, length=10)
    assert proof.errors == proof.checked
