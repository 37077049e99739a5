"""Writes a model with its code, to be loaded by transformers where statetrack is not installed (`trust_remote_code`).

transformers copies the file that config.json names and those that it imports relatively, all of them flat. So a package
can't be shipped as one. Its sources go into a single file as text, and a loader turns them into a package again.
"""

from __future__ import annotations

import ast
import hashlib
import re
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from string import Template
from typing import Any

from transformers import PreTrainedTokenizerBase

import statetrack
from statetrack.files import atomic_write
from statetrack.hf.modeling import StatetrackForCausalLM
from statetrack.model import LanguageModel

_ENTRY = "statetrack.hf.modeling"
# A small package in pure Python that the config is read with, and that few environments have.
_VENDORED = "dacite"
_LOADER = "modeling_statetrack"


def export(
    model: StatetrackForCausalLM | LanguageModel,
    directory: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **save_options: Any,
) -> None:
    """Writes a directory that can be pushed to a hub: config, weights, code, a model card and a tokenizer.

    `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` then works with torch and transformers
    alone; with statetrack.hf imported it works without `trust_remote_code`.

    Args:
        model: the model; a `LanguageModel` is wrapped.
        directory: where to write; it is made if need be.
        tokenizer: written as well.
        save_options: of `save_pretrained`, such as max_shard_size.

    Raises:
        ValueError: if the model is no causal language model.
    """
    causal = StatetrackForCausalLM.of(model) if isinstance(model, LanguageModel) else model
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    classes = {"AutoConfig": "StatetrackConfig", "AutoModelForCausalLM": "StatetrackForCausalLM"}
    before = getattr(causal.config, "auto_map", None)
    causal.config.auto_map = {auto: f"{_LOADER}.{name}" for auto, name in classes.items()}
    try:
        causal.save_pretrained(place, **save_options)
    finally:
        causal.config.auto_map = before
    atomic_write(place / "statetrack_sources.py", _sources_file())
    atomic_write(place / f"{_LOADER}.py", _template(f"{_LOADER}.py.txt", version=statetrack.__version__))
    card = _template("model_card.md.txt", mixer=causal.config.to_model_config().mixer_name, name=place.name)
    atomic_write(place / "README.md", card)
    if tokenizer is not None:
        tokenizer.save_pretrained(place)


def _template(file: str, /, **values: str) -> str:
    text = resources.files("statetrack").joinpath("templates", file).read_text(encoding="utf-8")
    return Template(text).substitute(values)


def _sources_file() -> str:
    """The text of statetrack_sources.py: the name of the package, and its files by path."""
    own, vendored = _own_sources(), _vendored_sources()
    digest = hashlib.sha256(repr(sorted((own | vendored).items())).encode()).hexdigest()[:12]
    package = f"bundled_statetrack_{digest}"
    files = {f"{package}/{path}": _renamed(source, package) for path, source in own.items()} | vendored
    entries = "".join(f"    {path!r}: {_literal(source)},\n" for path, source in sorted(files.items()))
    return (
        f'"""Sources of statetrack {statetrack.__version__} (Apache-2.0) as text; {_LOADER}.py loads them.\n\n'
        f"{_VENDORED} is included under its own license, which is in {_VENDORED}/LICENSE.\n"
        f'"""\n\nPACKAGE = {package!r}\n\nSOURCES = {{\n{entries}}}\n'
    )


def _own_sources() -> dict[str, str]:
    """The modules that the model needs, by path within the package.

    Of a folder that is needed all files are, as registries load them; the roots register commands and models, and are
    left empty.
    """
    root = Path(statetrack.__file__).parent
    sources: dict[str, str] = {"__init__.py": "", "hf/__init__.py": ""}
    waiting = [_module_file(root, _ENTRY)]
    while waiting:
        file = waiting.pop()
        path = file.relative_to(root).as_posix()
        if path in sources:
            continue
        sources[path] = file.read_text(encoding="utf-8")
        if file.name == "__init__.py":
            waiting += sorted(file.parent.rglob("*.py"))
        for name in _imported(sources[path]):
            # A module is imported after all the packages that it lies in.
            parts = name.split(".")
            waiting += [_module_file(root, ".".join(parts[:length])) for length in range(2, len(parts) + 1)]
    return sources


@cache  # of hundreds of kilobytes of text, and parsing them is most of what an export of a small model takes
def _imported(source: str) -> tuple[str, ...]:
    """The modules of this package that a source imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return tuple(name for name in names if name.startswith("statetrack."))


def _module_file(root: Path, name: str) -> Path:
    place = root.joinpath(*name.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _renamed(source: str, package: str) -> str:
    """A source that belongs to another package: its imports, its operators and the names of its modules."""
    return re.sub(r"\bstatetrack\b(?=\.|::|\s+import\b)|(?<=torch\.ops\.)statetrack\b", package, source)


def _vendored_sources() -> dict[str, str]:
    root = Path(str(resources.files(_VENDORED)))
    sources = {}
    for file in sorted(root.glob("*.py")):
        # transformers takes lines that import relatively, in whatever string they are, for files of the model.
        text = re.sub(r"^(\s*from )\.(?=\w)", rf"\1{_VENDORED}.", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        sources[f"{_VENDORED}/{file.name}"] = text
    licenses = [path for path in metadata.files(_VENDORED) or [] if path.name.startswith("LICENSE")]
    return sources | {f"{_VENDORED}/LICENSE": licenses[0].read_text(encoding="utf-8")}


def _literal(source: str) -> str:
    """A string of Python that people can read, where that is possible."""
    readable = "'''" not in source and not source.startswith("'") and not source.endswith(("\\", "'"))
    return f"r'''{source}'''" if readable else repr(source)
