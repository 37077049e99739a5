"""The commands about theory as a person uses them."""

import json
import shlex

import pytest
import torch

from statetrack import from_pretrained
from statetrack.automata import Automaton
from statetrack.cli import main
from statetrack.runs import RunDirectory
from statetrack.theory.commands import Language, bare_json
from statetrack.theory.verify import verify


def run(text):
    try:
        return main(shlex.split(text))
    except SystemExit as end:
        return end.code


def test_analyze_says_what_a_language_needs_and_how_to_go_on(capsys):
    assert run("analyze --group S5 --generators two") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "S5 (120)" in text
    assert "T3" in text
    assert "statetrack train group:S5:two" in text
    assert "statetrack compile group:S5:two" in text


def test_analyze_writes_json_to_standard_output_or_a_file(tmp_path, capsys):
    assert run("analyze --regex '(ab)*' --alphabet abc --json") == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["states"], data["aperiodic"], data["one_layer_obstruction"]) == (3, True, None)
    assert run(f"analyze parity --json {tmp_path}/parity.json") == 0
    assert json.loads((tmp_path / "parity.json").read_text())["primes"] == [2]
    assert bare_json(["verify", "run", "--json", "--seed", "1"]) == ["verify", "run", "--json", "-", "--seed", "1"]


@pytest.mark.parametrize(
    "language",
    [
        "--group S3",
        "--group A5 --generators 3-cycles",
        "--generators '(1 2),(1 2 3)'",
        "--regex '(a|b)*abb'",
        "--regex '(ab)*' --alphabet abc",
        "--automaton OWN",
        "--automaton DFA",
        "parity",
        "modular_addition:5",
        "group:Q8",
        "'regex:a*b* over abc'",
        "automaton:OWN",
    ],
)
def test_json_has_the_same_keys_however_a_language_is_named(language, tmp_path, capsys):
    own = {"transitions": [[1, 0], [2, 0], [2, 1]], "accepting": [1], "letters": ["x", "y"], "states": ["p", "q", "r"]}
    dfa = {
        "states": ["p", "q"],
        "input_symbols": ["x", "y"],
        "transitions": {"p": {"x": "q"}, "q": {"x": "p", "y": "q"}},
        "initial_state": "p",
        "final_states": ["q"],
        "allow_partial": True,
    }
    for name, data in (("OWN", own), ("DFA", dfa)):
        (tmp_path / name).write_text(json.dumps(data))
        language = language.replace(name, str(tmp_path / name))
    assert run(f"analyze {language} --json") == 0
    data = json.loads(capsys.readouterr().out)
    kinds = {"states": int, "monoid_size": int, "aperiodic": bool, "group": bool, "solvable": bool, "primes": list}
    assert {key: type(data[key]) for key in kinds} == kinds
    assert data["one_layer_obstruction"] is None or {"e", "f", "state"} == set(data["one_layer_obstruction"])
    assert data["requirements"]
    for row in data["requirements"]:
        assert all(row[key] for key in ("quantity", "value", "kind", "theorem", "assumption", "sentence"))


@pytest.mark.parametrize(
    "language",
    [
        "--group S3 --generators '(1 2),(1 2 3)'",
        "--generators '(1 2),(1 2 3)'",
        "--regex 'a*b*'",
        "--automaton FILE",
        "parity",
    ],
)
def test_compile_verify_evaluate_certify(language, tmp_path, capsys):
    file, out = tmp_path / "automaton.json", tmp_path / "run"
    file.write_text('{"transitions": [[1, 0], [2, 0], [2, 1]], "outputs": [0, 1, 1]}')
    language = language.replace("FILE", str(file))
    assert run(f"compile {language} --out {out}") == 0
    file.unlink()  # a run directory holds all that it needs
    assert run(f"verify {out} --tokens 100 --json {tmp_path}/proof.json") == 0
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert (proof["exact"], proof["mode"], proof["token_errors"]) == (True, "exhaustive", 0)
    assert run(f"evaluate {out} --lengths 20 --sequences 4") == 0
    assert run(f"certify {out} --json {tmp_path}/certificate.json") == 0
    claims = json.loads((tmp_path / "certificate.json").read_text())["claims"]
    assert all(claim["capability"] != "parity" for claim in claims)
    assert "exact at every length" in capsys.readouterr().out


def test_from_pretrained_reads_a_compiled_run_directory_like_a_trained_one(tmp_path):
    assert run(f"compile --regex 'a*b*' --strategy holonomy --out {tmp_path}/compiled") == 0
    small = "--d-model 8 --num-layers 1 --batch-size 4 --steps 1 --max-length 8 --num-heads 2"
    assert run(f"train --regex 'a*b*' --out {tmp_path}/trained {small}") == 0
    ids = torch.randint(2, (2, 30), generator=torch.Generator().manual_seed(0))
    for name in ("compiled", "trained"):
        same = RunDirectory(tmp_path / name).load_model()
        assert torch.equal(from_pretrained(tmp_path / name)(ids), same(ids))
    assert verify(from_pretrained(tmp_path / "compiled"), Automaton.from_regex("a*b*")).exact
    widened = from_pretrained(tmp_path / "trained", widening="preserve")
    assert torch.allclose(widened(ids), RunDirectory(tmp_path / "trained").load_model()(ids), atol=1e-6)
    assert "lower_end" in "".join(widened.state_dict())
    config = tmp_path / "trained" / "config.json"
    config.write_text(config.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="format = 99"):
        from_pretrained(tmp_path / "trained")


def test_verify_finds_that_a_model_is_of_another_language(tmp_path, capsys):
    assert run(f"compile --regex '(ab)*' --out {tmp_path}/run") == 0
    assert run(f"verify {tmp_path}/run --regex '(ab)*' --dtype bfloat16") == 0
    assert run(f"verify {tmp_path}/run --regex 'a*b*'") == 1
    assert "first wrong answer after" in capsys.readouterr().out


def test_train_takes_the_same_names_of_languages(tmp_path):
    small = "--d-model 8 --num-layers 1 --batch-size 4 --steps 1 --max-length 8 --num-heads 2"
    assert run(f"train --regex '(ab)*' --out {tmp_path}/run {small}") == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["task"] == "regex:(ab)*"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("analyze", "name one language"),
        ("analyze parity --group S3", "got 2 of them"),
        ("analyze parity --alphabet ab", "--alphabet goes with --regex"),
        ("analyze --regex '(ab'", "can't be read"),
        ("analyze --group S99", "more than 5,040"),
        ("analyze --automaton /no/where.json", "no such file"),
        ("compile --regex 'a*b*' --strategy one_layer --out OUT", "the exclusion cascade has 2 layers"),
        ("compile --regex 'a*b*' --keys pair --out OUT", "use raw keys"),
        ("verify OUT", "there is no run directory"),
        ("certify OUT", "there is no run directory"),
    ],
)
def test_bad_input_is_refused_with_status_2(command, message, tmp_path, capsys):
    assert run(command.replace("OUT", str(tmp_path / "out"))) == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in error
    assert not (tmp_path / "out").exists()


def test_names_of_languages():
    assert Language(regex="a", alphabet="ab").task_name() == "regex:a over ab"
    assert Language(group="S5", generators="(1 2),(1 2 3 4 5)").task_name() == "group:S5:(1 2),(1 2 3 4 5)"
