"""Probes in words: the truth by other means, the likelihoods by the plain computation, and the same from lm-eval."""

import contextlib
import io
import json
import re
import sys

import pytest
import torch

from statetrack import LanguageModel, ModelConfig, mixer_config
from statetrack.cli import main
from statetrack.data.tokenizer import byte_tokenizer, train_tokenizer
from statetrack.language_models.causal import RecurrentModel, load_causal_model
from statetrack.language_models.probes import (
    evaluate_probes,
    get_probe,
    list_probes,
    log_likelihoods,
    write_lm_eval_tasks,
)


def make(vocab_size=257):
    torch.manual_seed(0)
    pattern = (mixer_config("deltanet")(), mixer_config("attention")())
    return LanguageModel(ModelConfig(vocab_size=vocab_size, d_model=16, num_layers=2, mixer=pattern)).eval()


def solve(probe, text):
    """The right answer, from the text alone."""
    last = text.split("\n\n")[-1]
    if probe == "parity":
        return " odd" if last.partition("\n")[0].count("1") % 2 else " even"
    if probe == "s3":
        boxes = ["red", "green", "blue"]
        for i, j in re.findall(r"swap (\d) (\d)", last):
            boxes[int(i) - 1], boxes[int(j) - 1] = boxes[int(j) - 1], boxes[int(i) - 1]
        return f" {boxes[int(re.search(r'Box (.) holds$', last)[1]) - 1]}"
    with contextlib.redirect_stdout(printed := io.StringIO()):
        exec(last, {})
    return f" {printed.getvalue().strip()}"


@pytest.mark.parametrize("probe", [probe.name for probe in list_probes()])
@pytest.mark.parametrize("length", [5, 40])
def test_the_answer_is_what_the_text_says(probe, length):
    questions = get_probe(probe).questions(length, 60)
    answers = [question.choices[question.answer] for question in questions]
    assert answers == [solve(probe, question.prompt) for question in questions]
    assert set(answers) == set(questions[0].choices)
    first, second, _ = questions[0].prompt.split("\n\n")
    for example, choice in ((first, questions[0].choices[0]), (second, questions[0].choices[1])):
        assert example.endswith(choice)
        assert solve(probe, example.removesuffix(choice)) == choice
    assert questions == get_probe(probe).questions(length, 60)
    assert questions != get_probe(probe).questions(length, 60, seed=1)


@pytest.mark.parametrize("logits", [2**12, 2**26])
def test_likelihoods_are_those_of_the_plain_computation(logits, monkeypatch):
    monkeypatch.setattr("statetrack.language_models.probes._LOGITS", logits)
    tokenizer, model = byte_tokenizer(), make().double().requires_grad_(False)
    questions = get_probe("s3").questions(5, 4)
    got = log_likelihoods(RecurrentModel(model), tokenizer, questions)
    for question, scores in zip(questions, got, strict=True):
        for choice, score in zip(question.choices, scores, strict=True):
            prompt, answer = list(question.prompt.encode()), list(choice.encode())
            logits_ = model(torch.tensor([[256, *prompt, *answer[:-1]]]))[0, -len(answer) :].log_softmax(-1)
            expected = logits_[torch.arange(len(answer)), torch.tensor(answer)].sum()
            assert score == pytest.approx(expected.item(), abs=1e-4)


def test_an_oracle_is_right_and_a_liar_is_wrong(monkeypatch):
    def scores(right):
        def fake(model, tokenizer, questions):
            return [[float((i == q.answer) == right) for i in range(len(q.choices))] for q in questions]

        return fake

    for right, expected in ((True, 1.0), (False, 0.0)):
        monkeypatch.setattr("statetrack.language_models.probes.log_likelihoods", scores(right))
        results = evaluate_probes(None, None, [4, 9], questions=8)
        assert [result.accuracy for result in results] == [expected] * 6
        assert {result.chance for result in results} == {1 / 2, 1 / 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"probes": ["chess"]}, "unknown probe 'chess'"), ({"questions": 0}, "at least 1"), ({"lengths": [1]}, "code")],
)
def test_bad_input_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_lm_eval_tasks(tmp_path / "out", **{"lengths": [4], **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.filterwarnings("default")  # of lm-eval and what it imports
def test_lm_eval_finds_the_same(kind, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    harness, managers = (pytest.importorskip(f"lm_eval.{name}") for name in ("models.huggingface", "tasks"))
    from statetrack.hf import export

    texts = [q.prompt + c for p in list_probes() for q in p.questions(9, 20) for c in q.choices]
    tokenizer = byte_tokenizer() if kind == "bytes" else train_tokenizer(texts, 320)
    export(make(tokenizer.vocab_size), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    lengths = [4, 12]
    names = write_lm_eval_tasks(tmp_path / "tasks", lengths, questions=12)
    lm = harness.HFLM(
        pretrained=str(tmp_path / "model"), add_bos_token=True, max_length=4096, device="cpu", batch_size=4
    )
    tasks = managers.TaskManager(include_path=str(tmp_path / "tasks"))
    theirs = lm_eval.simple_evaluate(lm, tasks=names, task_manager=tasks, log_samples=True, bootstrap_iters=0)
    model = load_causal_model(tmp_path / "model")
    for result in evaluate_probes(model, tokenizer, lengths, questions=12):
        name = f"statetrack_{result.probe}_{result.length}"
        assert theirs["results"][name]["acc,none"] == pytest.approx(result.accuracy)
        ours = log_likelihoods(model, tokenizer, get_probe(result.probe).questions(result.length, 12))
        for sample in theirs["samples"][name]:
            likely = [response[0][0] for response in sample["resps"]]
            assert likely == pytest.approx(ours[sample["doc_id"]], abs=1e-3)


def test_lm_eval_without_transformers_says_what_is_missing(monkeypatch, capsys):
    from statetrack.lm_eval import main as lm_eval_main

    for name in [name for name in sys.modules if name.startswith("statetrack.hf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert lm_eval_main() == 2
    assert "needs transformers, which comes with: pip install 'statetrack[hf]'" in capsys.readouterr().err


def test_the_command_writes_tasks(tmp_path, capsys):
    assert main(["probes", "--out", str(tmp_path), "--probes", "parity,s3", "--lengths", "4", "--questions", "3"]) == 0
    assert "python -m statetrack.lm_eval" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "statetrack_s3_4.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [q.answer for q in get_probe("s3").questions(4, 3)]
    assert "statetrack_parity_4" in (tmp_path / "statetrack_probes.yaml").read_text()
    assert main(["probes", "--out", str(tmp_path), "--probes", "chess"]) == 2
