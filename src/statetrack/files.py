"""Files that are replaced whole or not at all, hashes that tell whether they still are what was written, and TOML."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import tomllib
from pathlib import Path
from typing import Any


def atomic_write(path: Path | str, content: str | bytes) -> None:
    """Writes a file so that, whatever happens, readers find the old content or the new one, whole.

    The content goes to a temporary file in the same directory, which then takes the path's place. When this returns,
    the file survives a power cut. A failure or an interrupt removes the temporary file; only a process killed on the
    spot leaves it behind, as `.<name>.<random>.tmp`.

    Args:
        path: the file; its directory must exist. A symbolic link is followed. An existing file keeps its permissions.
        content: bytes, or text that is written as UTF-8.

    Raises:
        OSError: if it can't be written (disk full, no permission, no such directory); the message names `path`.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        if target.exists() and not target.is_file():  # a device or a pipe has no place that a file could take
            target.write_bytes(data)
            return
        try:
            with temporary.open("xb") as file:
                if target.exists():
                    temporary.chmod(stat.S_IMODE(target.stat().st_mode))
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(target.parent)
    except OSError as error:
        # The error itself names the temporary file or no file at all; whoever reads it knows only the path.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def sync_directory(directory: Path) -> None:
    """Makes the renaming of a file last: the entry of a file lives in its directory, which is synced on its own."""
    if os.name == "nt":  # Windows has no handles of directories to sync
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: if it can't be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_toml(path: Path) -> dict[str, Any]:
    """The contents of a TOML file.

    Raises:
        ValueError: if there is no such file, or it is not valid TOML; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
