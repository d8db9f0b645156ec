import errno
import pickle
import tokenize
import warnings

import pytest
import torch
from PIL.Image import DecompressionBombError
from torch.utils.data import Dataset

from sltt_ext.data import corrupt
from sltt_ext.data.corrupt import CheckedDataset, CheckedLoader, NamedReader, collate
from sltt_ext.errors import DataError, SLTTWarning, WriteError


class Numbers(Dataset):
    """The numbers from 0 to 9, some of them in files that cannot be read."""

    def __init__(self, *damaged):
        self.damaged = damaged

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index in self.damaged:
            raise DataError(f"number_{index}.npz cannot be read")
        return torch.tensor(index), index % 2


def loader(damaged=(), on_corrupt="skip", workers=0, batch_size=4):
    return CheckedLoader(
        CheckedDataset(Numbers(*damaged), on_corrupt),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_file_is_left_out_and_named_once(workers):
    batches = loader((3, 5), workers=workers)
    with pytest.warns(SLTTWarning) as warned:
        numbers = [x.tolist() for x, _ in batches]
    assert numbers == [[0, 1, 2], [4, 6, 7], [8, 9]]
    assert [str(w.message) for w in warned] == [f"skipped: number_{i}.npz cannot be read" for i in (3, 5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(len(x) for x, _ in batches) == 8  # the second epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_raised_by_name(workers):
    with pytest.raises(
        DataError, match=r"number_3.npz cannot be read: restore it, or pass on_corrupt='skip'"
    ):
        list(loader((3,), "raise", workers))


@pytest.mark.filterwarnings("ignore::sltt_ext.errors.SLTTWarning")
def test_a_batch_with_nothing_left():
    with pytest.raises(DataError, match=r"nothing of this batch can be read:\n  number_2.*\n  number_3"):
        list(loader((2, 3), batch_size=2))


@pytest.mark.parametrize(
    "error",
    [
        EOFError("end"),
        KeyError("t"),
        OSError("image file is truncated"),
        FileNotFoundError(errno.ENOENT, "gone"),
        pickle.UnpicklingError("no pickle"),
        ValueError("bad"),
        DecompressionBombError("900000000 pixels"),
        tokenize.TokenError("EOF in multi-line statement", (2, 0)),
        MemoryError("Unable to allocate 3.64 TiB"),
        OverflowError("too large to convert to C long"),
        RuntimeError("broken stream"),
        NotImplementedError("compression type 9"),
        AttributeError("no such class"),
        TypeError("not a string"),
    ],
    ids=repr,
)
def test_what_counts_as_damaged(error):
    def read(path):
        raise error

    with pytest.raises(DataError, match=r"some/file\.npz cannot be read \(" + type(error).__name__):
        NamedReader(read)("some/file.npz")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, "too many open files"), WriteError("full"), KeyboardInterrupt(), SystemExit()],
    ids=repr,
)
def test_what_is_not_the_files_fault(error):
    def read(path):
        raise error

    with pytest.raises(type(error)) as raised:
        NamedReader(read)("some/file.npz")
    assert raised.value is error


def test_a_machine_without_memory_is_not_the_files_fault(monkeypatch):
    def read(path):
        raise MemoryError

    monkeypatch.setattr(corrupt, "ENOUGH_BYTES", 1 << 62)
    with pytest.raises(MemoryError):
        NamedReader(read)("some/file.npz")
