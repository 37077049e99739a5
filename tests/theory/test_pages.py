"""The pages about theory: one file that needs nothing else, with what they are about in it."""

import re

import pytest
import torch
from automaton_examples import full

from statetrack import LanguageModel, ModelConfig, mixer_config
from statetrack.automata import Automaton, group_automaton
from statetrack.report import canvas, theory
from statetrack.report.theory import eggboxes, write_analysis, write_certificate
from statetrack.theory.certify import certify
from statetrack.theory.construct import compile
from statetrack.theory.requirements import analyze


def test_the_page_of_an_analysis_draws_the_automaton_and_the_eggbox(tmp_path):
    page = tmp_path / "page.html"
    write_analysis("(ab)* <script>", analyze(Automaton.from_regex("(ab)*")), page)
    text = page.read_text()
    assert "<svg" in text
    assert "Eggbox" in text
    assert "<script" not in text
    assert not re.search(r'(?:src|href)="(?!#)', text)


def test_an_eggbox_has_a_cell_for_each_class_and_marks_the_groups():
    eggs = eggboxes(full(3))
    cells = [[(cell["size"], cell["group"]) for row in egg["cells"] for cell in row] for egg in eggs]
    assert cells[0] == [(6, True)]
    assert sorted(size for size, _ in cells[1]) == [2] * 9
    assert sum(group for _, group in cells[1]) == 6
    assert cells[2] == [(1, True)] * 3


def test_the_page_of_a_certificate_has_a_disc_for_each_spectrum(tmp_path):
    page = tmp_path / "page.html"
    certificate = certify(compile(group_automaton("S3")))
    write_certificate("S3", certificate, page)
    text = page.read_text()
    assert "<h1>S3</h1>" in text
    # One token, where all tokens are known, and products of two and three.
    assert text.count("<figure>") == 3
    assert "vocabulary, exact: lowest -1, flips or turns last for ever, beta 0 from 2" in text
    assert "No theorem" not in text


def test_a_page_draws_the_region_that_a_sound_bound_leaves(tmp_path):
    page = tmp_path / "page.html"
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=2, d_model=8, num_layers=2, mixer=mixer_config("deltaproduct")(num_heads=2))
    certificate = certify(LanguageModel(config).eval())
    write_certificate("run", certificate, page)
    text = page.read_text()
    assert text.count("<figure>") == 2 * 2 * 3
    assert text.count("sound bound: lowest") == 4
    assert not re.search(r'(?:src|href)="(?!#)', text)


def test_large_models_are_drawn_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(theory, "MOST_HEADS", 2)
    config = ModelConfig(vocab_size=2, d_model=8, num_layers=1, mixer=mixer_config("deltanet")(num_heads=4))
    write_certificate("run", certify(LanguageModel(config).eval()), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<figure>") == 6
    assert "The first 2 of 4 heads are drawn" in text


@pytest.mark.parametrize("states", [1, 2, 7])
def test_the_drawing_names_every_letter_and_state(states):
    table = [[(state + 1) % states, state] for state in range(states)]
    automaton = Automaton(torch.tensor(table), 0, torch.zeros(states, dtype=torch.int64), ("next", "stay"))
    svg = canvas.inline_svg(
        lambda axes: theory.draw_automaton(axes, automaton), 400, 400, margins=(0,) * 4, prefix="a", label="drawing"
    )
    words = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert sorted(word for word in words if word.isdigit()) == sorted(map(str, range(states)))
    assert sum("stay" in word for word in words) == sum("next" in word for word in words) == states
