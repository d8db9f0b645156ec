"""The archives of the event recordings: what they are, where they are from, and what is in them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from sltt_ext.errors import ConfigurationError, DataError, WriteError
from sltt_ext.files import writing
from sltt_ext.optional import require

__all__ = ["CIFAR10_DVS", "DVS_GESTURE", "Archive", "ArchivedSet", "downloading", "extracted"]


@dataclass(frozen=True)
class Archive:
    """A published file, and a folder in it."""

    name: str
    url: str
    md5: str
    inside: str


@dataclass(frozen=True)
class ArchivedSet:
    """A set of archives.

    Args:
        title: The set's name in messages.
        archives: All of them.
        downloadable: Whether a program may download them.
    """

    title: str
    archives: tuple[Archive, ...]
    downloadable: bool


def extracted(source: ArchivedSet, root: Path, download: bool) -> Path:
    """The folder ``ROOT/extract``, made from the archives in ``ROOT/download`` if it is not there.

    Raises:
        DataError: If an archive is absent or damaged; says what to download, from where, into which folder.
        WriteError: If there is no room for what is in them.
        ConfigurationError: If ``download`` is asked for, and no program may do it.
    """
    extract = root / "extract"
    absent = [archive.inside for archive in source.archives if not (extract / archive.inside).is_dir()]
    if not absent:
        return extract
    if extract.exists():
        raise DataError(
            f"{extract} has no {', '.join(absent)}: delete it, and it will be made again from the archives in "
            f"{root / 'download'}"
        )
    _fetch(source, root, download)
    extract_archive = require("torchvision.datasets.utils", extra="train").extract_archive
    unfinished = root / "extract.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with writing(extract):
            for archive in source.archives:
                extract_archive(str(root / "download" / archive.name), str(unfinished))
                if not (unfinished / archive.inside).is_dir():
                    raise DataError(f"{root / 'download' / archive.name} has no folder {archive.inside}")
            unfinished.rename(extract)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return extract


@contextmanager
def downloading(url: str, folder: Path) -> Iterator[None]:
    """Around what downloads with torchvision.

    Raises:
        WriteError: If there is no room for it.
        DataError: If the server does not give it, or gives something else.
    """
    try:
        with writing(folder):
            yield
    except WriteError:
        raise
    except (OSError, HTTPException, RuntimeError) as error:  # the last for an archive of another MD5
        raise DataError(
            f"{url} cannot be downloaded ({error}): try again, or download it by hand into {folder}"
        ) from error


def _fetch(source: ArchivedSet, root: Path, download: bool) -> None:
    """See to it that all archives are there and intact."""
    files = require("torchvision.datasets.utils", extra="train")
    folder = root / "download"
    missing = [archive for archive in source.archives if not (folder / archive.name).is_file()]
    what = f"download {', '.join(f'{file.name} from {file.url}' for file in missing)} into {folder}"
    if missing and download and not source.downloadable:
        raise ConfigurationError(f"{source.title} cannot be downloaded by a program: {what}")
    if missing and not download:
        hint = ", or pass download=True" if source.downloadable else ""
        raise DataError(
            f"{source.title} is not in {root}: {what}{hint}. If you have it extracted already, "
            f"its folder has to be {root / 'extract' / source.archives[0].inside}"
        )
    for file in missing:
        with downloading(file.url, folder):
            try:
                files.download_url(file.url, str(folder), file.name, file.md5)
            except BaseException:
                (folder / file.name).unlink(missing_ok=True)
                raise
    for file in source.archives:
        if not files.check_integrity(str(folder / file.name), file.md5):
            raise DataError(
                f"{folder / file.name} is damaged (its MD5 is not {file.md5}): download it again from {file.url}"
            )


DVS_GESTURE = ArchivedSet(
    "DVS128 Gesture",
    (
        Archive(
            "DvsGesture.tar.gz",
            "https://ibm.ent.box.com/s/3hiq58ww1pbbjrinh367ykfdf60xsfm8/folder/50167556794",
            "8a5c71fb11e24e5ca5b11866ca6c00a1",
            "DvsGesture",
        ),
    ),
    downloadable=False,
)

CIFAR10_DVS = ArchivedSet(
    "CIFAR10-DVS",
    tuple(
        Archive(f"{name}.zip", f"https://ndownloader.figshare.com/files/{number}", md5, name)
        for name, number, md5 in (
            ("airplane", 7712788, "0afd5c4bf9ae06af762a77b180354fdd"),
            ("automobile", 7712791, "8438dfeba3bc970c94962d995b1b9bdd"),
            ("bird", 7712794, "a9c207c91c55b9dc2002dc21c684d785"),
            ("cat", 7712812, "52c63c677c2b15fa5146a8daf4d56687"),
            ("deer", 7712815, "b6bf21f6c04d21ba4e23fc3e36c8a4a3"),
            ("dog", 7712818, "f379ebdf6703d16e0a690782e62639c3"),
            ("frog", 7712842, "cad6ed91214b1c7388a5f6ee56d08803"),
            ("horse", 7712851, "e7cbbf77bec584ffbf913f00e682782a"),
            ("ship", 7712836, "41c7bd7d6b251be82557c6cce9a7d5c9"),
            ("truck", 7712839, "89f3922fd147d9aeff89e76a2b0b70a7"),
        )
    ),
    downloadable=True,
)
