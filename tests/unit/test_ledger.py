"""The ledger: records by kind and key, writes that are true together or not at all, and mapped files."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.full_disk import full_disk

from hostd.ledger import FORMAT, Ledger
from vfleet.errors import Reason, VfleetError
from vfleet.v1.host_records_pb2 import Fence
from vfleet.v1.types_pb2 import Attempt


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path)
    yield opened
    opened.close()


def fence(revision: int) -> Fence:
    return Fence(attempt=Attempt(fleet_generation=1, revision=revision))


def reopened(path: Path) -> dict[str, list[Fence]]:
    again = Ledger(path)
    found = {kind: again.all(kind, Fence) for kind in ("one", "two")}
    again.close()
    return found


def test_a_record_is_there_until_it_is_deleted(ledger: Ledger, tmp_path: Path):
    ledger.put("one", "b", fence(1))
    ledger.put("one", "b", fence(2))
    ledger.put("one", "a", fence(3))
    ledger.put("two", "a", fence(4))
    assert ledger.get("one", "b", Fence) == fence(2)
    assert ledger.get("two", "b", Fence) is None
    assert reopened(tmp_path) == {"one": [fence(3), fence(2)], "two": [fence(4)]}
    ledger.delete("one", "b")
    ledger.delete("one", "b")
    assert reopened(tmp_path) == {"one": [fence(3)], "two": [fence(4)]}


def test_an_empty_record_is_a_record(ledger: Ledger):
    ledger.put("one", "a", Fence())
    assert ledger.get("one", "a", Fence) == Fence()


def test_writes_together_are_true_together_or_not_at_all(ledger: Ledger, tmp_path: Path):
    ledger.put("one", "a", fence(1))
    with pytest.raises(ZeroDivisionError), ledger.together():  # noqa: PT012  # the writes before it are the point
        ledger.delete("one", "a")
        with ledger.together():
            ledger.put("two", "a", fence(2))
        assert ledger.get("two", "a", Fence) == fence(2)
        raise ZeroDivisionError
    assert ledger.get("one", "a", Fence) == fence(1)
    assert reopened(tmp_path) == {"one": [fence(1)], "two": []}
    with ledger.together():
        ledger.delete("one", "a")
        ledger.put("two", "a", fence(2))
        assert reopened(tmp_path)["one"] == [fence(1)]
    assert reopened(tmp_path) == {"one": [], "two": [fence(2)]}


def test_a_full_disk_is_named_and_leaves_everything_as_it_was(ledger: Ledger, tmp_path: Path):
    def both() -> None:
        with ledger.together():
            ledger.put("one", "b", fence(2))
            ledger.put("two", "a", fence(3))

    ledger.put("one", "a", fence(1))
    for write in (lambda: ledger.put("one", "a", fence(9)), lambda: ledger.delete("one", "a"), both):
        with full_disk(), pytest.raises(VfleetError, match=f"{tmp_path} can't be written") as caught:
            write()
        assert caught.value.reason is Reason.LIMIT_EXCEEDED
        assert reopened(tmp_path) == {"one": [fence(1)], "two": []}
    both()
    assert reopened(tmp_path) == {"one": [fence(1), fence(2)], "two": [fence(3)]}


def test_erase_forgets_all_records(ledger: Ledger, tmp_path: Path):
    ledger.put("one", "a", fence(1))
    ledger.map_file("memory", 4096).close()
    ledger.erase()
    assert reopened(tmp_path) == {"one": [], "two": []}
    assert ledger.files() == ["memory"]


def test_a_mapped_file_has_exactly_its_size_and_begins_with_zeros(ledger: Ledger):
    with ledger.map_file("memory", 8192) as mapped:
        assert bytes(mapped) == bytes(8192)
        mapped[4090:4100] = b"0123456789"
    with ledger.map_file("memory", 4096) as mapped:
        assert len(mapped) == 4096
        assert mapped[4090:] == b"012345"
    with ledger.map_file("memory", 8192) as mapped:
        assert mapped[4090:4100] == b"012345" + bytes(4)


def test_a_deleted_file_stays_mapped_where_it_is(ledger: Ledger):
    with ledger.map_file("memory", 4096) as mapped:
        mapped[:1] = b"x"
        ledger.delete_file("memory")
        ledger.delete_file("memory")
        assert ledger.files() == []
        with ledger.map_file("memory", 4096) as new:
            assert new[:1] == b"\0"
        assert mapped[:1] == b"x"


KILLED = """
import os, signal, sys
from pathlib import Path
from hostd.ledger import FORMAT, Ledger
from vfleet.errors import Reason, VfleetError
from vfleet.v1.host_records_pb2 import Fence
ledger = Ledger(Path(sys.argv[1]))
mapped = ledger.map_file("memory", 4096)
mapped[0:1] = b"x"
ledger.put("one", "a", Fence(ended=True))
with ledger.together():
    ledger.delete("one", "a")
    ledger.put("two", "a", Fence())
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_written_outlives_a_kill_and_what_was_half_written_does_not(tmp_path: Path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert reopened(tmp_path) == {"one": [Fence(ended=True)], "two": []}
    ledger = Ledger(tmp_path)
    with ledger.map_file("memory", 4096) as mapped:
        assert mapped[:1] == b"x"
    ledger.close()


def written_by(path: Path, number: int) -> None:
    database = sqlite3.connect(path / "records.sqlite")
    database.execute(f"PRAGMA user_version = {number}")
    database.close()


def test_what_a_newer_hostd_wrote_is_refused_and_left_as_it_is(tmp_path: Path):
    Ledger(tmp_path).close()
    written_by(tmp_path, FORMAT + 1)
    before = (tmp_path / "records.sqlite").read_bytes()
    with pytest.raises(VfleetError, match=f"--data-dir .*of format 1 to {FORMAT}, not {FORMAT + 1}") as refused:
        Ledger(tmp_path)
    assert refused.value.reason is Reason.INVALID_FIELD
    assert (tmp_path / "records.sqlite").read_bytes() == before


def test_what_was_written_before_there_were_formats_is_read(ledger: Ledger, tmp_path: Path):
    ledger.put("one", "a", fence(1))
    written_by(tmp_path, 0)
    assert reopened(tmp_path) == {"one": [fence(1)], "two": []}
