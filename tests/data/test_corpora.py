"""The corpora: packages to text, with their licences, from packages that are made here."""

import gzip
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import corpora
from benchmarks.corpora import Package, build_text, pieces, read_packages, text_of_html

CODE = Package(domain="code", origin="pypi", name="made", version="1", licence="MIT", files=("*.py",))
PROSE = replace(CODE, domain="english", origin="debian", name="words", licence="CC0-1.0", files=("*.dz", "*.html"))


@pytest.fixture
def packages(tmp_path):
    """A wheel and a Debian package, where the downloads would be."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg")
    for package in (CODE, PROSE):
        (tmp_path / "packages" / package.name).mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "packages" / "made" / "made-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made/b.py", "b = 2\n")
        wheel.writestr("made/a.py", "a = 1\n")
        wheel.writestr("made/again.py", "a = 1\n")
        wheel.writestr("made/empty.py", " \n")
        wheel.writestr("made/latin.py", b"# \xe9\n")
        wheel.writestr("made/table.py", "0," * 300_000)
        wheel.writestr("made/data.json", "{}")
        wheel.writestr("made-1.dist-info/licenses/LICENSE", "MIT, in full")
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: words\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: words\n"
    )
    doc = root / "usr" / "share" / "doc" / "words"
    doc.mkdir(parents=True)
    (doc / "copyright").write_text("CC0, in full")
    (doc / "index.html").write_text("<head><title>x</title></head><p>One <b>bold</b> word.</p><pre>a  b\n c</pre>")
    (root / "usr" / "share" / "words.dict.dz").write_bytes(gzip.compress(b"word: a word\n"))
    file = tmp_path / "packages" / "words" / "words_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", str(root), str(file)], check=True, capture_output=True)
    return tmp_path


def test_packages_become_text_with_licences(packages):
    rows = build_text([PROSE, CODE], packages, Console(quiet=True))
    read = [json.loads(line) for line in (packages / "text" / "code.jsonl").read_text().splitlines()]
    assert [(row["path"], row["text"]) for row in read] == [("made/a.py", "a = 1\n"), ("made/b.py", "b = 2\n")]
    read = [json.loads(line)["text"] for line in (packages / "text" / "english.jsonl").read_text().splitlines()]
    assert read == ["One bold word.\n\na  b\n c\n", "word: a word\n"]
    assert [(row["domain"], row["documents"], row["bytes"]) for row in rows] == [("english", 2, 37), ("code", 2, 12)]
    kept = {path.name: path.read_text() for path in (packages / "licences").rglob("*") if path.is_file()}
    assert kept["made-1.dist-info-licenses-LICENSE"] == "MIT, in full"
    assert kept["usr-share-doc-words-copyright"] == "CC0, in full"
    assert "| code | made-1-py3-none-any.whl | MIT | 2 | 12 |" in kept["README.md"]
    with pytest.raises(RuntimeError, match=r"made-1-py3-none-any.whl has no text in \*.rs"):
        build_text([replace(CODE, files=("*.rs",))], packages, Console(quiet=True))


def test_the_command_ends_with_tokens(packages, monkeypatch, capsys):
    listed = packages / "list.toml"
    listed.write_text(
        '[[package]]\ndomain = "code"\nfrom = "pypi"\nname = "made"\nversion = "1"\nlicence = "MIT"\nfiles = ["*.py"]\n'
        '[[package]]\ndomain = "more"\nfrom = "pypi"\nname = "absent"\nversion = "1"\nlicence = "GPL-3.0-only"\n'
        'permissive = false\nfiles = ["*.py"]\n'
    )
    words = ["corpora", "--out", str(packages), "--packages", str(listed), "--vocab-size", "300"]
    monkeypatch.setattr(sys, "argv", words)
    corpora.main()
    manifest = json.loads((packages / "tokens" / "manifest.json").read_text())
    assert manifest["complete"]
    assert list(manifest["sources"]) == ["code"]
    assert sum(manifest["tokens"][split]["code"] for split in ("train", "held_out")) > 2
    assert "training tokens" in capsys.readouterr().out


def test_a_package_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    def failing(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "no such version")

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(RuntimeError, match="made 1 can't be fetched from pypi: no such version"):
        corpora.fetch(CODE, tmp_path)
    assert not any(tmp_path.iterdir())


def test_long_texts_are_cut_at_blank_lines(monkeypatch):
    monkeypatch.setattr(corpora, "LARGEST_DOCUMENT", 40)
    paragraphs = "".join(f"paragraph {i}\nof two lines\n\n" for i in range(9))
    lines = "".join(f"line {i}\n" for i in range(20))
    unbroken = "x" * 100
    for text, ends in ((paragraphs, "\n\n"), (lines, "\n"), (unbroken, "x")):
        cut = list(pieces(text))
        assert "".join(cut) == text
        assert max(map(len, cut)) <= 40
        assert all(piece.endswith(ends) for piece in cut[:-1])
    assert list(pieces("short")) == ["short"]


def test_markup_scripts_and_navigation_are_no_text():
    page = "<nav>menu</nav><script>x()</script><h1>Title</h1><p>a&lt;b\n c <i>d</i>, e</p><ul><li>f<li>g</ul>"
    assert text_of_html(page) == "Title\n\na<b c d, e\n\nf\ng\n"


def test_the_list_is_whole():
    packages = read_packages(Path(corpora.__file__).with_suffix(".toml"))
    assert {package.domain for package in packages} == {"code", "mathematics", "english"}
    assert len({package.name for package in packages}) == len(packages)
    for package in packages:
        assert package.origin in ("pypi", "debian")
        assert package.version
        assert package.files
        assert "GPL" not in package.licence or not package.permissive or "Artistic" in package.licence
