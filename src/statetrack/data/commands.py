"""The commands about data: `statetrack data prepare | check`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from statetrack.data.preparation import SPLITS, PrepareConfig, Progress, check, prepare, read_manifest
from statetrack.data.sources import TextSource


@dataclass(kw_only=True)
class Prepare:
    """Turn text into memory-mapped token files, with a tokenizer, a held-out part and a manifest with hashes.

    The same command again goes on after an interruption.

    Attributes:
        sources: DOMAIN=LOCATION each, such as code=src/: a file or a directory of text, .jsonl or .parquet files, or
            hf:NAME:SPLIT for a dataset of Hugging Face; without DOMAIN= the domain is called text.
        out: the directory to make, or to go on with.
        config: how.
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    out: Path
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")] = field(default_factory=PrepareConfig)

    def __call__(self) -> int:
        console = Console(stderr=True)
        with console.status("reading") as status:

            def show(progress: Progress) -> None:
                line = f"{progress.domain}: {progress.documents:,} documents, {progress.tokens:,} tokens"
                status.update(line)
                if not console.is_terminal:
                    console.print(line, highlight=False)

            manifest = prepare([TextSource.of(text) for text in self.sources], self.out, self.config, on_progress=show)
        Console().print(_table(manifest, self.out))
        if manifest["skipped_files"]:
            print(f"{manifest['skipped_files']} files were no UTF-8 text and were skipped")
        for domain, count in manifest["tokens"]["held_out"].items():
            if self.config.held_out and not count:
                print(
                    f"nothing of {domain} is held out: it has too few documents for held_out = {self.config.held_out}"
                )
        return 0


@dataclass
class Check:
    """Compare the files of prepared data with the hashes in its manifest.

    Attributes:
        directory: what `statetrack data prepare` has written.
    """

    directory: tyro.conf.Positional[Path]

    def __call__(self) -> int:
        count = check(self.directory)
        Console().print(_table(read_manifest(self.directory), self.directory))
        print(f"{count} files are as they were written")
        return 0


@dataclass
class Data:
    """Prepare text for language models, or check what was prepared.

    Attributes:
        command: what to do.
    """

    command: Annotated[Prepare, tyro.conf.subcommand("prepare")] | Annotated[Check, tyro.conf.subcommand("check")]

    def __call__(self) -> int:
        return self.command()


def _table(manifest: dict, directory: Path) -> Table:
    title = f"{directory}, tokens:"
    table = Table("domain", *SPLITS, title=title, title_justify="left", min_width=len(title))
    for domain in manifest["sources"]:
        table.add_row(domain, *(f"{manifest['tokens'][split][domain]:,}" for split in SPLITS))
    return table
