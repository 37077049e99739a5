"""The pages about theory: one file that needs nothing else, with what they are about in it."""

import re

from automaton_examples import full

from statetrack.automata import Automaton, group_automaton
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
    assert page.read_text().count("<figure>") == len(certificate.spectra) == 4
