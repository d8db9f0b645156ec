import errno
import os

import pytest

from sltt_ext.errors import SLTTError, WriteError
from sltt_ext.files import replaced, write_csv, write_text, writing


@pytest.fixture
def there(tmp_path):
    path = tmp_path / "there"
    path.write_bytes(b"old")
    return path


def test_a_file_is_replaced_when_it_is_whole(there):
    with replaced(there) as file:
        file.write(b"new")
        assert there.read_bytes() == b"old"
    assert there.read_bytes() == b"new"
    with replaced(there, before=there.with_name("before")) as file:
        file.write(b"newer")
    assert there.with_name("before").read_bytes() == b"new"
    assert sorted(path.name for path in there.parent.iterdir()) == ["before", "there"]


REFUSED = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES]


@pytest.mark.parametrize("number", REFUSED, ids=os.strerror)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_the_old_file_stays_where_the_new_one_cannot_be_written(there, monkeypatch, call, number):
    def refuses(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuses)
    with (
        pytest.raises(WriteError, match=rf"there cannot be written \({os.strerror(number)}\): (free|choose)"),
        replaced(there) as file,
    ):
        file.write(b"new")
    assert there.read_bytes() == b"old"
    assert list(there.parent.iterdir()) == [there]


def test_the_message_names_the_file_that_was_refused(tmp_path):
    with pytest.raises(WriteError, match="inner cannot be written") as raised, writing(tmp_path):
        raise OSError(errno.EACCES, "Permission denied", str(tmp_path / "inner"))
    assert isinstance(raised.value, SLTTError)


def test_other_errors_are_their_own(there):
    with pytest.raises(ConnectionResetError), writing(there):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    with pytest.raises(KeyboardInterrupt), replaced(there):
        raise KeyboardInterrupt
    assert list(there.parent.iterdir()) == [there]


def test_text_and_tables(there):
    write_text(there.parent / "new" / "page", "é\n")
    assert (there.parent / "new" / "page").read_bytes() == "é\n".encode()
    write_csv(there, [{"a": 1, "b": "x,y"}, {"a": 2, "b": None}])
    assert there.read_bytes() == b'a,b\n1,"x,y"\n2,\n'
    with pytest.raises(WriteError, match=r"there cannot be written \(File exists\): choose another name"):
        write_text(there / "page", "")
