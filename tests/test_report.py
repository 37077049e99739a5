"""The report: the table, summary.json, the page and the figure, from made-up records."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from report_records import history, parity_records, record, s3_records
from rich.console import Console

from statetrack.report import (
    Record,
    ReportTable,
    provenance,
    read_summary,
    table,
    write_figure,
    write_report,
    write_summary,
)
from statetrack.report.figures import spread, thin
from statetrack.report.record import group, percent, short_length, true_minus
from statetrack.report.spectrum import describe

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page taken apart; refuses tags that are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[tuple[str, list[str]]] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append((dict(attrs).get("class") or "", []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self._open or "th" in self._open:
            self.rows[-1][1][-1] += data

    def cells(self, row_class: str) -> list[list[str]]:
        return [[" ".join(cell.split()) for cell in cells] for name, cells in self.rows if name == row_class]

    @property
    def text(self) -> str:
        return " ".join(re.sub(r"<[^>]*>", "", re.sub(r"<style>.*?</style>", "", self.source, flags=re.DOTALL)).split())


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return parity_records() + s3_records()


@pytest.fixture(scope="module")
def page(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(
        records,
        path,
        title="Linear RNNs & state",
        criterion="99.9% right at length 256",
        descriptions={"parity": "Is the number of ones <odd>?"},
        provenance={"Command": "statetrack demo", "Seeds": "0, 1, 2"},
    )
    return Page(path)


def render(tmp_path: Path, records: list[Record], **options: Any) -> Page:
    write_report(records, tmp_path / "page.html", title="A title", **options)
    return Page(tmp_path / "page.html")


# The page


def test_the_page_is_one_well_formed_document(page: Page) -> None:
    assert page.source.lstrip().startswith("<!DOCTYPE html>")
    assert [page.tags[tag] for tag in ("html", "head", "title", "body", "main", "h1")] == [1] * 6
    assert "<title>Linear RNNs &amp; state</title>" in page.source
    assert "Is the number of ones &lt;odd&gt;?" in page.source
    assert len(page.source.encode()) < 2_000_000


def test_tables_of_the_page_name_a_task_once_and_keep_numbers_on_a_line(tmp_path: Path) -> None:
    rows = [("parity", "A", "0.5 / -0.5"), ("parity", "B", "`=` < 1"), ("S3", "B", "–")]
    source = render(tmp_path, [record()], tables=[ReportTable("T", "", ("task", "model", "ours"), rows)]).source
    cells = re.findall(r"<td( class=\"short\")?>(.*?)</td>", source)[:9]
    assert [text for _, text in cells] == [
        "parity",
        "A",
        "0.5 / −0.5",
        "",
        "B",
        "<code>=</code> &lt; 1",
        "S3",
        "B",
        "–",
    ]
    assert [bool(short) for short, _ in cells] == [False, False, True, False, False, True, False, False, True]


def test_the_page_needs_nothing_but_itself(page: Page) -> None:
    references = [
        (tag, value) for tag, name, value in page.attributes if name in ("src", "href", "xlink:href", "action")
    ]
    assert references
    assert [reference for reference in references if not reference[1].startswith("#")] == []
    assert not re.search(r"https?:|//\w|@import|@font-face|<script|<link|<iframe|<img", page.source)
    assert {name for name in re.findall(r"url\(([^)]*)\)", page.source) if not name.startswith("#")} == set()


def test_ids_are_unique_and_every_reference_has_its_target(page: Page) -> None:
    ids = Counter(value for _, name, value in page.attributes if name == "id")
    targets = {value[1:] for _, name, value in page.attributes if name == "href"}
    targets |= set(re.findall(r"url\(#([^)]*)\)", page.source))
    assert ids
    assert {name for name, count in ids.items() if count > 1} == set()
    assert targets == set(ids)


def test_every_colour_of_a_figure_is_defined_for_light_and_for_dark(page: Page) -> None:
    used = set(re.findall(r"var\(--([\w-]+)\)", page.source))
    light, dark = (re.findall(r"--([\w-]+):", rules) for rules in page.source.split("prefers-color-scheme: dark", 1))
    assert used <= set(light)
    assert set(light) == set(dark)
    figures = "".join(re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", figures)


def test_every_run_has_its_row_failed_ones_too(page: Page, records: list[Record]) -> None:
    rows = page.cells("run")
    assert len(rows) == len(records)
    outcomes = Counter(row[-4] for row in rows)
    (failed,) = [r for r in records if r.failed is not None]
    assert outcomes == {
        "solved": sum(r.solved for r in records),
        "not solved": sum(not r.solved for r in records) - 1,
        f"failed: {failed.failed}": 1,
    }
    (row,) = [row for row in rows if row[-4].startswith("failed")]
    assert row[:3] == ["Mamba [−1, 1]", "2", "–"]
    assert row[-3] == "–"


def test_rows_of_models_have_medians_seeds_solved_and_reasons(page: Page) -> None:
    rows = {row[0]: row for row in page.cells("model")}
    assert list(rows) == [
        "DeltaNet [0, 1]", "DeltaNet [−1, 1]", "Mamba [0, 1]", "Mamba [−1, 1]",
        "DeltaProduct [0, 1] n=2", "DeltaProduct [−1, 1] n=1", "DeltaProduct [−1, 1] n=2",
    ]  # fmt: skip
    assert rows["DeltaNet [−1, 1]"][1:7] == ["100%", "100%", "100%", "100%", "93.8%", "3/3"]
    assert rows["Mamba [−1, 1]"][6] == "2/3"
    assert rows["Mamba [−1, 1]"][8].startswith(
        "can: a token may flip the state (Theorem 3) seed 2 failed: the loss became"
    )
    assert rows["DeltaProduct [0, 1] n=2"][5] == "0/3"


def test_the_headline_is_counted(page: Page, tmp_path: Path) -> None:
    assert "With eigenvalues allowed below zero, 8 of 12 runs solved their task;" in page.text
    assert "with eigenvalues kept to [0, 1], 0 of 9 did." in page.text
    assert "DeltaNet [−1, 1] solved parity." in render(tmp_path, [record()]).text
    assert "DeltaNet [−1, 1] did not solve parity." in render(tmp_path, [record(solved=False)]).text
    assert "1 of 2 runs solved parity." in render(tmp_path, [record(), record(seed=1, solved=False)]).text
    unjudged = record(seed=2, solved=False, accuracy={}, accuracy_sequences={})
    assert "1 of 1 runs" not in render(tmp_path, [record(), unjudged]).text
    assert "DeltaNet [−1, 1] solved parity." in render(tmp_path, [record(), unjudged]).text
    assert "No run was judged yet." in render(tmp_path, [unjudged]).text
    assert "Our own words." in render(tmp_path, [record()], headline="Our own words.").text


def test_the_page_has_all_sections_that_there_are_data_for(page: Page) -> None:
    for heading in (
        "What you see",
        "Accuracy beyond",
        "Eigenvalues of the",
        "Results",
        "Learning curves",
        "How it was",
    ):
        assert heading in page.text
    assert "statetrack demo" in page.text
    assert "99.9% right at length 256" in page.text


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({}, ["Eigenvalues of the", "Learning curves", "How it was made", "seeds", "Householder"]),
        ({"accuracy": {}, "accuracy_sequences": {}}, ["Accuracy beyond"]),
        ({"accuracy": {256: math.nan}, "solved": False}, ["Accuracy beyond", "nan"]),
        ({"history": [{"step": 1, "loss": math.nan, "accuracy": math.nan}]}, ["Learning curves", "nan"]),
        ({"history": [{"step": 1, "loss": 0.5}]}, ["accuracy on the training batch", "nan"]),
        ({"explanation": ""}, ["why"]),
        ({"eigenvalue_range": None, "num_householder": None, "mixer": "attention"}, ["["]),
        ({"solved": False, "failed": "boom", "accuracy": {}, "train_seconds": None}, ["Accuracy beyond"]),
    ],
)
def test_sections_without_data_are_left_out(tmp_path: Path, changes: dict[str, Any], absent: list[str]) -> None:
    text = render(tmp_path, [record(**changes)]).text
    assert "Results" in text
    assert [word for word in absent if word in text] == []


def test_eigenvalues_are_drawn_with_and_without_tokens_and_with_too_many(tmp_path: Path) -> None:
    pairs = [[-0.5, 0.0], [0.5, 0.0]]
    plain = render(tmp_path, [record(eigenvalues=pairs)])
    assert "Eigenvalues of the" in plain.text
    assert "Colours are input tokens" not in plain.text
    few = render(tmp_path, [record(token_eigenvalues={"a": pairs, "b": pairs})])
    assert "Colours are input tokens" in few.text
    many = render(tmp_path, [record(token_eigenvalues={f"t{i}": pairs for i in range(30)})])
    assert "Colours are input tokens" not in many.text


def test_a_page_of_large_spectra_and_long_histories_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    angle, radius = 2 * np.pi * rng.uniform(size=4000), np.sqrt(rng.uniform(size=4000))
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).tolist()
    curve = history(rng, True, 100_000)
    models = [
        record(variant=f"{i} layers", seed=s, eigenvalues=pairs, history=curve) for i in range(12) for s in range(3)
    ]
    assert len(render(tmp_path, models).source.encode()) < 2_000_000


@pytest.mark.parametrize(
    ("lengths", "words"), [((3, 40), "3–40"), ((40, 40), "40"), ((30, 40), "30–40"), ((64, 1_024), "64–1,024")]
)
def test_the_training_lengths_are_marked(tmp_path: Path, lengths: tuple[int, int], words: str) -> None:
    source = render(tmp_path, [record(train_lengths=lengths)]).source
    assert source.count(f">{words}</text>") >= 2  # in the wide and in the narrow figure
    assert "chance 50%" in source


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"report\.html"):
        write_report([record()], path, title="new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_report_needs_records(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one record"):
        write_report([], tmp_path / "report.html", title="nothing")


def test_the_same_records_give_the_same_page(tmp_path: Path, records: list[Record]) -> None:
    assert render(tmp_path, records).source == render(tmp_path, records).source


# Captions


def spectrum(**tokens: list[complex]) -> Record:
    return record(token_eigenvalues={name: [[z.real, z.imag] for z in values] for name, values in tokens.items()})


TURN = complex(0.999 * np.exp(2j * np.pi / 3))
TURNS = [TURN, TURN.conjugate()]
REAL = "All are real: no rotation."
NEVER = "the state can be kept or forgotten, never flipped."
ROTATE = "Non-real eigenvalues of size 0.999 rotate the state:"
THIRD = "by about 120° (3 make a full turn)"


@pytest.mark.parametrize(
    ("measured", "caption"),
    [
        (spectrum(a=[1, 0.25], b=[0.013]), f"Never below 0 (lowest 0.01): {NEVER}"),
        (spectrum(a=[1, 0.002], b=[1]), f"Never below 0 (lowest 0.002): {NEVER}"),
        (spectrum(a=[1, 0.0]), f"Never below 0 (lowest 0): {NEVER}"),
        (spectrum(a=[1, -0.012]), f"Hardly below 0 (lowest −0.01): {NEVER}"),
        (
            spectrum(a=[1, 0.97], b=[1, -0.998]),
            f"The eigenvalue −1 (measured −0.998): token b flips the state, token a does not (lowest 0.97). {REAL}",
        ),
        (spectrum(a=[-1], b=[1, -0.99999]), f"The eigenvalue −1: tokens a and b flip the state. {REAL}"),
        (spectrum(a=[1, -0.5], b=[-1]), f"The eigenvalue −1: token b flips the state. {REAL}"),
        (
            spectrum(**{letter: [-1 + 0j] for letter in "abcdef"}),
            f"The eigenvalue −1: tokens a, b, c and 3 more flip the state. {REAL}",
        ),
        (
            spectrum(a=[1, -0.96]),
            "Almost −1 (measured −0.96): token a flips the state, but it fades to a hundredth after 113 flips. " + REAL,
        ),
        (
            spectrum(a=[1, -0.62]),
            "Negative, but no lower than −0.62: every flip shrinks the state, to a hundredth after 10 of them.",
        ),
        (spectrum(e=[1], r=[1, *TURNS]), f"{ROTATE} token r {THIRD}. No real one is below 0 (lowest 1)."),
        (
            spectrum(r=TURNS, s=[1, -1]),
            f"{ROTATE} token r {THIRD}. The eigenvalue −1: token s flips the state.",
        ),
        (
            spectrum(r=[0.999j, -0.999j], s=[0.98j, -0.98j], t=TURNS),
            f"{ROTATE} tokens r and s by about 90° (4 make a full turn) and token t {THIRD}.",
        ),
        (spectrum(r=[0.6j, -0.6j]), "Non-real eigenvalues, but of size at most 0.60: what rotates fades."),
        (record(eigenvalues=[[-1.0, 0.0]]), f"The eigenvalue −1: a token can flip the state. {REAL}"),
        (
            record(eigenvalues=[[0.156, 0.98], [0.156, -0.98]]),
            "Non-real eigenvalues of size 0.99 rotate the state, by 81°.",
        ),
    ],
)
def test_captions_follow_from_the_eigenvalues(measured: Record, caption: str) -> None:
    assert describe(measured) == caption


def test_captions_reach_the_page(page: Page) -> None:
    assert "Never below 0 (lowest 0.002)" in page.text
    assert "token 1 flips the state, token 0 does not" in page.text
    assert "tokens r and r² by about 120° (3 make a full turn)" in page.text


# The terminal


def test_the_table_has_the_right_medians(records: list[Record]) -> None:
    console = Console(width=80, no_color=True, record=True, file=sys.stderr)
    with console.capture() as capture:
        console.print(table(records))
    lines = capture.get().splitlines()
    assert max(len(line) for line in lines) <= 80
    cells = {" ".join(line.split()[:-8]): line.split()[-8:] for line in lines if re.search(r"\d/\d", line)}
    assert cells["DeltaNet [-1, 1]"][:6] == ["100%", "100%", "100%", "100%", "93.8%", "3/3"]
    for g in group(records):
        model = next(words for name, words in cells.items() if name.startswith(g.model))
        expected = [np.median([r.accuracy[n] for r in g.records if n in r.accuracy]) for n in (40, 256, 1_000, 10_000)]
        assert model[:4] == [percent(float(value)) for value in expected]
        assert model[5] == f"{sum(r.solved for r in g.records)}/3"
    text = " ".join(" ".join(line.split()) for line in lines)
    assert "no eigenvalue below 0" in text
    assert "seed 2 failed" in text


def test_the_table_says_how_many_seeds_a_median_is_over() -> None:
    runs = [record(), record(seed=1, accuracy={40: 1.0}), record(seed=2, failed="boom", solved=False, accuracy={})]
    columns = {str(column.header): [str(cell) for cell in column.cells] for column in table(runs).columns}
    assert columns["40"][-1] == "100%"
    assert columns["256"][-1] == "100% (1)"
    assert columns["solved"][-1] == "2/3"


def test_a_run_that_was_not_evaluated_is_neither_solved_nor_missed(tmp_path: Path) -> None:
    unjudged = record(seed=1, solved=False, accuracy={256: math.nan})
    assert [str(cell) for cell in table([unjudged]).columns[-2].cells][-1] == "–"
    runs = [record(), unjudged, record(seed=2, failed="boom", solved=False, accuracy={})]
    assert group(runs)[0].solved_text == "1/2"
    assert [row[-4] for row in render(tmp_path, runs).cells("run")] == ["solved", "not judged", "failed: boom"]


def test_medians_leave_out_nan_and_failed_seeds() -> None:
    runs = [
        record(accuracy={256: 0.5}, train_seconds=1.0),
        record(seed=1, accuracy={256: math.nan}, train_seconds=3.0),
        record(seed=2, accuracy={256: 0.7}, train_seconds=5.0),
        record(seed=3, failed="boom", solved=False, accuracy={}, train_seconds=100.0),
    ]
    (model,) = group(runs)
    assert model.median_accuracy(256) == pytest.approx(0.6)
    assert model.train_seconds == 3.0
    assert model.solved == 3
    assert model.median_accuracy(40) is None


def test_groups_are_apart_in_everything_but_the_seed() -> None:
    same = [record(seed=1), record(seed=0, num_householder=None)]
    others = [
        record(task="group:S3"),
        record(mixer="mamba"),
        record(eigenvalue_range=(0, 1)),
        record(num_householder=2),
        record(variant="2 layers"),
    ]
    groups = group(same + others)
    assert [len(g.records) for g in groups] == [2, 1, 1, 1, 1, 1]
    assert [r.seed for r in groups[0].records] == [0, 1]
    assert len({(g.task, g.model) for g in groups}) == len(groups)


def test_the_picture_is_of_the_seed_in_the_middle() -> None:
    runs = [record(seed=s, accuracy={256: a}, eigenvalues=[[1, 0]]) for s, a in enumerate((1.0, 0.4, 0.8))]
    without = [record(seed=3, accuracy={256: 0.9})]
    (model,) = group(runs + without)
    chosen = model.representative()
    assert chosen is not None
    assert chosen.seed == 2
    assert group(without)[0].representative() is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "100%"), (0.99999, "99.9%"), (0.9995, "99.9%"), (0.5, "50.0%"), (0.0, "0.0%"), (math.nan, "–"), (None, "–")],
)
def test_only_an_accuracy_of_1_is_100_percent(value: float | None, text: str) -> None:
    assert percent(value) == text


@pytest.mark.parametrize(
    ("length", "text"), [(40, "40"), (1_000, "1k"), (1_500, "1,500"), (10_000, "10k"), (1_000_000, "1M")]
)
def test_lengths_are_short(length: int, text: str) -> None:
    assert short_length(length) == text


def test_minus_signs_are_typographic_and_hyphens_are_not() -> None:
    assert true_minus("[-1, 1] at -0.5, RWKV-7, 2026-01-02") == "[−1, 1] at −0.5, RWKV-7, 2026-01-02"


# summary.json


def test_the_summary_comes_back(tmp_path: Path, records: list[Record]) -> None:
    write_summary(records, tmp_path / "summary.json")
    light = [dataclasses.replace(r, history=(), eigenvalues=(), token_eigenvalues={}) for r in records]
    assert read_summary(tmp_path / "summary.json") == light
    data = json.loads((tmp_path / "summary.json").read_text())
    expected = {"task", "mixer", "eigenvalue_range", "num_householder", "seed", "train_seconds", "solved", "accuracy"}
    assert all(expected <= set(entry) for entry in data)
    assert data[3]["eigenvalue_range"] == [-1.0, 1.0]
    assert set(data[0]["accuracy"]) == {"40", "256", "1000", "10000"}


def test_a_record_comes_back_from_strict_json(records: list[Record]) -> None:
    def forbid(constant: str) -> None:
        raise AssertionError(constant)

    for original in [*records, record(history=[(1, math.nan, 0.5)], accuracy={256: math.nan}, solved=False)]:
        text = json.dumps(original.to_data())
        back = Record.from_data(json.loads(text, parse_constant=forbid))
        assert repr(back) == repr(original)  # NaN is not equal to itself, but looks the same


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a summary"),
        ('{"task": "parity"}', "a list of records"),
        ('[{"task": "parity"}]', "needs the key chance, mixer"),
        ('[{"taks": "parity"}]', "unknown key taks"),
    ],
)
def test_a_damaged_summary_is_refused_in_a_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_summary(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": {256: 1.5}}, "accuracy must lie in"),
        ({"failed": "boom"}, "can't have solved"),
        ({"eigenvalue_range": (1, 0)}, "eigenvalue range"),
        ({"eigenvalues": [[math.nan, 0]]}, "must be finite"),
    ],
)
def test_impossible_records_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(**changes)


# The figure


def test_the_figure_is_written_as_svg_and_png(tmp_path: Path, records: list[Record]) -> None:
    write_figure(records, tmp_path / "figure.svg")
    write_figure(records, tmp_path / "figure.png", task="parity")
    root = ElementTree.parse(tmp_path / "figure.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert sum(element.tag.endswith("}use") for element in root.iter()) > 100
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    write_figure([record()], tmp_path / "one.svg")
    assert (tmp_path / "one.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [("figure.pdf", None, r"\.svg or \.png"), ("figure.svg", "chess", "the tasks are parity")],
)
def test_a_figure_that_cannot_be_is_refused(tmp_path: Path, name: str, task: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_figure([record()], tmp_path / name, task=task)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wanted", [[1.0, 1.0, 1.0], [0.9, 0.02, 0.01, 0.0], [0.5], [], [0.5] * 6, [1.0, 0.55, 0.5, 0.0]]
)
def test_labels_are_spread_without_overlap(wanted: list[float]) -> None:
    positions = spread(wanted, 0.1, 0.0, 1.0)
    assert len(positions) == len(wanted)
    assert all(a - b >= 0.1 - 1e-9 for a, b in itertools.pairwise(positions))
    assert all(-1e-9 <= position <= 1 + 1e-9 for position in positions)


def test_thinning_keeps_the_outermost_points() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-0.5, 0.5, 5000) + 1j * rng.uniform(-0.5, 0.5, 5000)
    points = np.append(points, [-1, 1, 1j, -1j])
    kept = thin(points, 50)
    assert len(kept) == 50
    assert {-1, 1, 1j, -1j} <= set(kept)
    assert set(kept) <= set(points)
    assert len(thin(np.ones(1000, dtype=complex), 50)) == 1


# Where it comes from


def test_provenance_names_machine_versions_and_command() -> None:
    entries = provenance("statetrack demo")
    assert entries["Command"] == "statetrack demo"
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in entries["Versions"]
    assert re.search(r"\d cores?$", entries["Machine"])
    assert all(entries.values())


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("/usr/bin/statetrack", "statetrack reproduce parity --out 'a b'"),
        ("/lib/statetrack/__main__.py", "python -m statetrack reproduce parity --out 'a b'"),
    ],
)
def test_the_command_is_one_that_can_be_given_again(program: str, expected: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, "reproduce", "parity", "--out", "a b"])
    assert provenance()["Command"] == expected


def test_records_and_tables_need_no_matplotlib() -> None:
    code = "import sys, statetrack.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
