"""Atomic writes: the old content or the new one, whole, and nothing left behind."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from statetrack.files import atomic_write

OLD, NEW = "old content", "new content ✓\n"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(OLD, encoding="utf-8")
    return path


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def assert_untouched(target: Path) -> None:
    assert target.read_text(encoding="utf-8") == OLD
    assert names(target.parent) == [target.name]


@pytest.mark.parametrize(("content", "expected"), [(NEW, NEW.encode()), (b"\x00\xff\r\n", b"\x00\xff\r\n"), ("", b"")])
def test_writes_text_and_bytes_unchanged(tmp_path: Path, content: str | bytes, expected: bytes) -> None:
    atomic_write(tmp_path / "file", content)
    atomic_write(str(tmp_path / "file"), content)
    assert (tmp_path / "file").read_bytes() == expected
    assert names(tmp_path) == ["file"]


def test_replaces_an_existing_file_and_keeps_its_permissions(target: Path) -> None:
    target.chmod(0o640)
    atomic_write(target, NEW)
    assert target.read_text(encoding="utf-8") == NEW
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_new_file_has_the_permissions_that_open_would_give(tmp_path: Path) -> None:
    (tmp_path / "opened").touch()
    atomic_write(tmp_path / "written", NEW)
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "opened").stat().st_mode


def test_follows_a_symbolic_link(target: Path) -> None:
    link = target.with_name("latest")
    link.symlink_to(target.name)
    atomic_write(link, NEW)
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == NEW


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_no_temporary_one(
    target: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(type(failure)) as caught:
        atomic_write(target, NEW)
    assert_untouched(target)
    if isinstance(failure, OSError):
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == errno.ENOSPC
        assert str(target) in str(caught.value)
        assert ".tmp" not in str(caught.value)


def test_the_file_size_limit_of_the_system_leaves_the_old_file(target: Path) -> None:
    """A failure in the middle of writing that nobody simulates: the limit hits after the first 4 KiB."""
    code = "import sys; from statetrack.files import atomic_write; atomic_write(sys.argv[1], b'x' * 100_000)"
    run = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert run.returncode == 1
    assert f"File too large: '{target}'" in run.stderr
    assert_untouched(target)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere/file'"):
        atomic_write(tmp_path / "nowhere" / "file", NEW)


def test_concurrent_writers_and_readers_never_see_a_mixture(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = {letter * 200_000 for letter in "abcd"}
    atomic_write(path, "a" * 200_000)
    writers = [
        threading.Thread(target=lambda c=content: [atomic_write(path, c) for _ in range(10)]) for content in contents
    ]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(path.read_text())
    for writer in writers:
        writer.join()
    assert seen <= contents
    assert path.read_text() in contents
    assert names(tmp_path) == ["file"]
