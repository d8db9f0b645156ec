import errno
import hashlib
import os
import re
import tarfile
from http.client import IncompleteRead
from urllib.error import URLError

import pytest

pytest.importorskip("torchvision")
from sltt_ext.data.archives import CIFAR10_DVS, DVS_GESTURE, Archive, ArchivedSet, extracted
from sltt_ext.errors import ConfigurationError, DataError, WriteError


@pytest.fixture
def archived(tmp_path):
    """A set of one archive that is in the folder ``download``."""
    (tmp_path / "Inside").mkdir()
    (tmp_path / "Inside" / "file").write_text("content")
    (tmp_path / "download").mkdir()
    path = tmp_path / "download" / "set.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "Inside", "Inside")
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    return ArchivedSet("The set", (Archive(path.name, "https://example.org/set", md5, "Inside"),), True)


def test_archives_are_those_that_spikingjelly_knows(spikingjelly_datasets):
    from spikingjelly.datasets import cifar10_dvs, dvs128_gesture

    known = [*dvs128_gesture.DVS128Gesture.resource_url_md5()[:1], *cifar10_dvs.CIFAR10DVS.resource_url_md5()]
    ours = [(file.name, file.url, file.md5) for file in (*DVS_GESTURE.archives, *CIFAR10_DVS.archives)]
    assert ours == known
    assert DVS_GESTURE.downloadable == dvs128_gesture.DVS128Gesture.downloadable()
    assert CIFAR10_DVS.downloadable == cifar10_dvs.CIFAR10DVS.downloadable()


def test_an_archive_is_extracted_once(tmp_path, archived):
    assert (extracted(archived, tmp_path, download=False) / "Inside" / "file").read_text() == "content"
    (tmp_path / "download" / "set.tar.gz").unlink()
    assert extracted(archived, tmp_path, download=False) == tmp_path / "extract"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (DVS_GESTURE, "download DvsGesture.tar.gz from https://ibm.ent.box.com/s/{any} into {root}/download"),
        (CIFAR10_DVS, "truck.zip from https://ndownloader.figshare.com/files/7712839 into {root}/download"),
    ],
    ids=["gesture", "cifar10_dvs"],
)
def test_an_absent_set(tmp_path, source, message):
    pattern = re.escape(message.format(any="@", root=tmp_path)).replace("@", ".*")
    with pytest.raises(DataError, match=pattern):
        extracted(source, tmp_path, download=False)


def test_a_set_that_no_program_may_download(tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"cannot be downloaded by a program: download DvsGesture.tar.gz"
    ):
        extracted(DVS_GESTURE, tmp_path, download=True)


def test_download(tmp_path, archived, monkeypatch):
    archive = tmp_path / "download" / "set.tar.gz"
    content = archive.read_bytes()
    archive.unlink()
    asked = []

    def download_url(url, root, filename, md5):
        asked.append((url, filename, md5))
        archive.write_bytes(content)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    extracted(archived, tmp_path, download=True)
    assert asked == [("https://example.org/set", "set.tar.gz", archived.archives[0].md5)]


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (
            URLError("no route to host"),
            DataError,
            r"set cannot be downloaded .*no route.*: try again, or .* by hand",
        ),
        (RuntimeError("File not found or corrupted."), DataError, "set cannot be downloaded"),
        (IncompleteRead(b""), DataError, "set cannot be downloaded"),
        (OSError(errno.ENOSPC, "No space left"), WriteError, "download cannot be written .*free some space"),
    ],
    ids=repr,
)
def test_a_download_that_fails(tmp_path, archived, monkeypatch, error, expected, message):
    archive = tmp_path / "download" / "set.tar.gz"
    archive.unlink()

    def download_url(url, root, filename, md5):
        archive.write_bytes(b"half")
        raise error

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    with pytest.raises(expected, match=message):
        extracted(archived, tmp_path, download=True)
    assert not archive.exists()


def test_no_room_for_what_is_in_an_archive(tmp_path, archived, monkeypatch):
    def extract_archive(path, folder):
        os.mkdir(folder)
        raise OSError(errno.ENOSPC, "No space left", f"{folder}/file")

    monkeypatch.setattr("torchvision.datasets.utils.extract_archive", extract_archive)
    with pytest.raises(WriteError, match=r"extract.unfinished/file cannot be written .*free some space"):
        extracted(archived, tmp_path, download=False)
    assert not list(tmp_path.glob("extract*"))


def test_a_damaged_archive(tmp_path, archived):
    path = tmp_path / "download" / "set.tar.gz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=r"set.tar.gz is damaged .* download it again from https://example.org/set"
    ):
        extracted(archived, tmp_path, download=False)


def test_an_incomplete_extract_folder(tmp_path, archived):
    (tmp_path / "extract").mkdir()
    with pytest.raises(DataError, match="extract has no Inside: delete it"):
        extracted(archived, tmp_path, download=False)
