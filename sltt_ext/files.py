"""Files that are written whole or not at all, and what to do where one cannot be written."""

from __future__ import annotations

import csv
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any, BinaryIO

from sltt_ext.errors import WriteError

__all__ = ["replaced", "write_csv", "write_text", "writing"]

ADVICE = {
    errno.ENOSPC: "free some space, or choose another folder",
    errno.EDQUOT: "free some space, or choose another folder",
    errno.EFBIG: "choose a folder on another file system",
    errno.EIO: "look at the disk, and choose another folder",
    errno.EROFS: "choose another folder",
    errno.EACCES: "choose another folder, or change its permissions",
    errno.EPERM: "choose another folder, or change its permissions",
    errno.EEXIST: "choose another name, or move away what has this one",
    errno.EISDIR: "choose another name, or move away what has this one",
    errno.ENOTDIR: "choose another name, or move away what has this one",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes ``path``, a file or a folder.

    Raises:
        WriteError: If the system refuses to write: a full disk, a quota, a read-only file system, permissions.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        place = error.filename or path
        raise WriteError(f"{place} cannot be written ({error.strerror}): {ADVICE[error.errno]}") from error


@contextmanager
def replaced(path: Path, *, before: Path | None = None) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` when it is whole and on the disk; until then the old one stays.

    Args:
        path: The file.
        before: Where the file that has this name goes; None overwrites it.

    Raises:
        WriteError: If the system refuses to write. ``path`` is then what it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if before is not None and path.exists():
                os.replace(path, before)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file, and make its folder if missing.

    Raises:
        WriteError: If the system refuses to write. ``path`` is then what it was.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        file.write(text.encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write or replace a table with a heading, and make its folder if missing. Raises: as `write_text`."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _sync_folder(folder: Path) -> None:
    """Make the new names last, where the system can open folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
