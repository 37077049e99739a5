"""Corpora of code, formal mathematics and technical English, built from pinned packages of PyPI and Debian.

    python -m benchmarks.corpora                  # runs/corpora: text, licences, tokens
    python -m benchmarks.corpora --all            # also what is free under conditions, such as the GPL

It takes a machine with pip, and for mathematics and English apt-get and dpkg (Debian 12), some 200 MB of downloads
and ten minutes. It writes

packages/             the downloads; what is there is not fetched again
text/DOMAIN.jsonl     a document a line: its text, its package and its path
licences/             the licence files of each package, and a table of all
tokens/               as `statetrack data prepare` writes them, a byte-level BPE of 16,384 tokens over all domains

There is no narrative prose among it. Texts that occur twice are taken once, long ones are cut at blank lines.
"""

from __future__ import annotations

import argparse
import fnmatch
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from benchmarks.common import ROOT
from statetrack.data import PrepareConfig, TextSource, prepare
from statetrack.data.preparation import Progress
from statetrack.files import atomic_write

# Larger source files are tables of data; larger documents of other kinds are cut.
LARGEST_CODE = 400_000
LARGEST_DOCUMENT = 2**16


@dataclass(frozen=True, kw_only=True)
class Package:
    """Where some of the text comes from.

    Attributes:
        domain: which corpus it is part of.
        origin: "pypi" or "debian".
        name: of the package.
        version: of the package; may end in *.
        licence: its licence, as SPDX spells it where it does.
        files: patterns of the names of its files that are text.
        permissive: whether its licence asks for no more than to be named.
    """

    domain: str
    origin: Literal["pypi", "debian"]
    name: str
    version: str
    licence: str
    files: tuple[str, ...]
    permissive: bool = True


def read_packages(file: Path) -> list[Package]:
    """The packages of a list such as corpora.toml."""
    entries = tomllib.loads(file.read_text(encoding="utf-8"))["package"]
    return [Package(origin=entry.pop("from"), files=tuple(entry.pop("files")), **entry) for entry in entries]


def fetch(package: Package, directory: Path) -> Path:
    """The file of a package, downloaded unless it is there already.

    Raises:
        RuntimeError: if it can't be had.
    """
    place = directory / package.name
    if not place.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            if package.origin == "pypi":
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
                command += ["--dest", ".", f"{package.name}=={package.version}"]
            else:
                command = ["apt-get", "download", "-q", f"{package.name}={package.version}"]
            result = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
            if result.returncode or not any(Path(temporary).iterdir()):
                raise RuntimeError(
                    f"{package.name} {package.version} can't be fetched from {package.origin}: {result.stderr.strip()}"
                )
            made = directory / f".{package.name}"
            shutil.rmtree(made, ignore_errors=True)
            shutil.copytree(temporary, made)
            made.rename(place)
    (file,) = place.iterdir()
    return file


def unpack(file: Path, directory: Path) -> None:
    """Unpacks a wheel or a Debian package."""
    if file.suffix == ".deb":
        subprocess.run(["dpkg", "-x", str(file), str(directory)], check=True)
    else:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(directory)


def documents(package: Package, directory: Path) -> Iterator[tuple[str, str]]:
    """The paths and texts of an unpacked package, in the order of the paths; those that are no UTF-8 are left out."""
    for path in sorted(directory.rglob("*")):
        if not path.is_file() or path.is_symlink() or not any(fnmatch.fnmatch(path.name, p) for p in package.files):
            continue
        data = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
        if package.domain == "code" and len(data) >= LARGEST_CODE:
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        name = path.relative_to(directory).as_posix()
        if path.suffix == ".html":
            text = text_of_html(text)
        for piece in [text] if package.domain == "code" else pieces(text):
            yield name, piece


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of bounded size, cut at blank lines, or else at the ends of lines."""
    start = 0
    while len(text) - start > LARGEST_DOCUMENT:
        limit = start + LARGEST_DOCUMENT
        stop = text.rfind("\n\n", start, limit) + 2
        if stop < start + 2:
            stop = text.rfind("\n", start, limit) + 1 or limit
        yield text[start:stop]
        start = stop
    yield text[start:]


class _Text(HTMLParser):
    """Collects the text of a page, its blocks on lines of their own."""

    blocks = frozenset(("p", "div", "pre", "li", "tr", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "h6", "table", "br"))
    silent = frozenset(("script", "style", "nav", "head"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.depth = self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.depth += tag in self.silent
        self.preformatted += tag == "pre"
        if tag in self.blocks:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.depth = max(0, self.depth - (tag in self.silent))
        self.preformatted = max(0, self.preformatted - (tag == "pre"))
        if tag in self.blocks:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.depth:
            return
        if self.preformatted:
            self.parts.append(data)
        elif words := " ".join(data.split()):
            left, right = (" " if side.isspace() else "" for side in (data[0], data[-1]))
            self.parts.append(left + words + right)
        elif self.parts and not self.parts[-1].endswith(("\n", " ")):
            self.parts.append(" ")


def text_of_html(page: str) -> str:
    """The text of an HTML page, without markup, scripts and navigation; at most one blank line in a row."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    lines: list[str] = []
    for line in "".join(parser.parts).splitlines():
        if line.strip() or (lines and lines[-1]):
            lines.append(line.rstrip())
    return "\n".join(lines).strip() + "\n"


def build_text(packages: list[Package], out: Path, console: Console) -> list[dict[str, object]]:
    """Writes text/ and licences/; returns a row for each package.

    Raises:
        RuntimeError: for a package that can't be fetched, or has no text.
    """
    rows: list[dict[str, object]] = []
    seen: set[bytes] = set()
    (out / "text").mkdir(parents=True, exist_ok=True)
    for domain in dict.fromkeys(package.domain for package in packages):
        target = out / "text" / f"{domain}.jsonl"
        unfinished = target.with_suffix(".part")
        with unfinished.open("w", encoding="utf-8") as lines:
            for package in packages:
                if package.domain != domain:
                    continue
                file = fetch(package, out / "packages")
                count = size = 0
                with tempfile.TemporaryDirectory() as temporary:
                    unpack(file, Path(temporary))
                    _keep_licences(Path(temporary), out / "licences" / package.name)
                    for path, text in documents(package, Path(temporary)):
                        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                        if not text.strip() or digest in seen:
                            continue
                        seen.add(digest)
                        row = {"text": text, "package": package.name, "path": path}
                        lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                        count, size = count + 1, size + len(text.encode())
                if not count:
                    raise RuntimeError(f"{file.name} has no text in {', '.join(package.files)}")
                rows.append(
                    {
                        "domain": domain,
                        "package": file.name,
                        "licence": package.licence,
                        "documents": count,
                        "bytes": size,
                    }
                )
                console.print(f"{domain}: {file.name}, {count:,} documents, {size / 1e6:.1f} MB", highlight=False)
        unfinished.replace(target)
    header = "| corpus | package | licence | documents | bytes |\n|---|---|---|---|---|\n"
    table = "".join(
        f"| {row['domain']} | {row['package']} | {row['licence']} | {row['documents']:,} | {row['bytes']:,} |\n"
        for row in rows
    )
    atomic_write(out / "licences" / "README.md", f"# Where the text comes from\n\n{header}{table}")
    return rows


def _keep_licences(unpacked: Path, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(unpacked.rglob("*")):
        name = path.name.lower()
        beside = "dist-info" in path.as_posix() and name.startswith(("licen", "copying", "notice"))
        if path.is_file() and not path.is_symlink() and (beside or name == "copyright"):
            shutil.copyfile(path, directory / path.relative_to(unpacked).as_posix().replace("/", "-"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "corpora", help="directory of the corpora")
    parser.add_argument("--packages", type=Path, default=Path(__file__).with_suffix(".toml"), help="list of packages")
    parser.add_argument("--domain", action="append", help="only this corpus; may be repeated")
    parser.add_argument("--all", action="store_true", help="also what is free under conditions, such as the GPL")
    parser.add_argument("--vocab-size", type=int, default=16384, help="of the tokenizer")
    options = parser.parse_args()
    packages = [
        package
        for package in read_packages(options.packages)
        if (options.all or package.permissive) and (not options.domain or package.domain in options.domain)
    ]
    if not packages:
        parser.error(f"no package of {options.packages} is of the domain {', '.join(options.domain)}")
    console = Console()
    rows = build_text(packages, options.out, console)
    domains = dict.fromkeys(str(row["domain"]) for row in rows)
    sources = [TextSource(domain, str(options.out / "text" / f"{domain}.jsonl")) for domain in domains]
    config = PrepareConfig(vocab_size=options.vocab_size)

    def show(progress: Progress) -> None:
        console.print(f"tokens of {progress.domain}: {progress.tokens:,} in all", highlight=False)

    manifest = prepare(sources, options.out / "tokens", config, on_progress=show)
    table = Table("corpus", "documents", "MB", "training tokens", "held-out tokens")
    for domain in domains:
        of_domain = [row for row in rows if row["domain"] == domain]
        table.add_row(
            domain,
            f"{sum(int(str(row['documents'])) for row in of_domain):,}",
            f"{sum(int(str(row['bytes'])) for row in of_domain) / 1e6:.1f}",
            *(f"{manifest['tokens'][split][domain]:,}" for split in ("train", "held_out")),
        )
    console.print(table)
    console.print(f"licences of all of them: {options.out / 'licences'}")


if __name__ == "__main__":
    main()
