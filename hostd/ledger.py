"""What survives a kill of the daemon: protobuf records in SQLite, and memory in mapped files, in one data directory.

Both are in the page cache once written, so they outlive the process at any instruction; neither is forced to disk,
since the loss of the machine is the loss of its devices anyway (a new incarnation).
"""

import contextlib
import mmap
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from google.protobuf.message import Message

from vfleet.errors import Reason, VfleetError, invalid_field

# Of all that is in the directory. It grows when what an older hostd would make of it is wrong.
FORMAT = 1

MessageT = TypeVar("MessageT", bound=Message)


class Ledger:
    """A data directory. Records are named by kind and key."""

    def __init__(self, data_dir: Path) -> None:
        """Open the directory, which is made if it is absent. Raise INVALID_FIELD if a newer hostd wrote it."""
        self._data_dir = data_dir
        self._files = data_dir / "memory"
        self._files.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(data_dir / "records.sqlite", isolation_level=None)
        (found,) = self._database.execute("PRAGMA user_version").fetchone()
        if found > FORMAT:
            self._database.close()
            expected = f"a directory that this hostd can read: of format 1 to {FORMAT}, not {found}, of a newer one"
            raise invalid_field("--data-dir", str(data_dir), expected)
        if found < FORMAT:
            self._write(f"PRAGMA user_version = {FORMAT}")
        # WAL without synchronizing: a commit is one append to a file, and safe against everything but a machine's end.
        self._write("PRAGMA journal_mode = WAL")
        self._write("PRAGMA synchronous = OFF")
        self._write(
            "CREATE TABLE IF NOT EXISTS records (kind TEXT, key TEXT, value BLOB NOT NULL, PRIMARY KEY (kind, key))"
            " WITHOUT ROWID"
        )

    @property
    def directory(self) -> Path:
        """The data directory, for what is neither a record nor a mapped file."""
        return self._data_dir

    def get(self, kind: str, key: str, message_type: type[MessageT]) -> MessageT | None:
        """Return a record, or None."""
        row = self._database.execute("SELECT value FROM records WHERE kind = ? AND key = ?", (kind, key)).fetchone()
        return None if row is None else message_type.FromString(row[0])

    def items(self, kind: str, message_type: type[MessageT]) -> list[tuple[str, MessageT]]:
        """Return all records of a kind with their keys, by key."""
        rows = self._database.execute("SELECT key, value FROM records WHERE kind = ? ORDER BY key", (kind,))
        return [(key, message_type.FromString(value)) for key, value in rows]

    def all(self, kind: str, message_type: type[MessageT]) -> list[MessageT]:
        """Return all records of a kind, by key."""
        return [record for _, record in self.items(kind, message_type)]

    def put(self, kind: str, key: str, record: Message) -> None:
        """Write a record. Raise LIMIT_EXCEEDED if the disk is full; then all is as it was."""
        self._write("REPLACE INTO records VALUES (?, ?, ?)", (kind, key, record.SerializeToString()))

    def delete(self, kind: str, key: str) -> None:
        """Delete a record; deleting one that is absent does nothing. Raise as `put`."""
        self._write("DELETE FROM records WHERE kind = ? AND key = ?", (kind, key))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make the writes within true all at once, or, if the block raises or the disk is full, none of them."""
        if self._database.in_transaction:
            yield
            return
        self._database.execute("BEGIN")
        try:
            yield
            self._write("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.OperationalError):  # a full disk may have ended it already
                self._database.execute("ROLLBACK")
            raise

    def map_file(self, name: str, size_bytes: int, *, exists: bool = False) -> mmap.mmap:
        """Map a file of exactly this size, a multiple of 4096; what is new in it is zero.

        What `exists` is not made: raise BAD_STATE unless it is there, in this size.
        """
        path = self._files / name
        if exists:
            found = f"{path.stat().st_size} bytes" if path.exists() else "nothing"
            if found != f"{size_bytes} bytes":
                expected = (
                    f"{size_bytes} bytes, a function's memory; --power-cycle starts the host without its functions"
                )
                raise VfleetError(Reason.BAD_STATE, f"{path} has {found}; expected {expected}")
        with path.open("a+b") as file:
            file.truncate(size_bytes)
            mapped = mmap.mmap(file.fileno(), size_bytes)
        # Else the first touch of a new file reads ahead: it fills megabytes of memory with zeros.
        mapped.madvise(mmap.MADV_RANDOM)
        return mapped

    def open_file(self, name: str) -> BinaryIO:
        """Open a mapped file beside its maps. They and it see the same bytes at once."""
        return (self._files / name).open("r+b", buffering=0)

    def delete_file(self, name: str) -> None:
        """Delete a mapped file; what still maps it keeps its bytes until it is closed."""
        (self._files / name).unlink(missing_ok=True)

    def files(self) -> list[str]:
        """Return the names of all mapped files."""
        return sorted(path.name for path in self._files.iterdir())

    def erase(self) -> None:
        """Forget all records, as a machine does that is switched off. Mapped files are deleted by their owners."""
        self._write("DELETE FROM records")

    def _write(self, statement: str, parameters: tuple[str | bytes, ...] = ()) -> None:
        try:
            self._database.execute(statement, parameters)
        except sqlite3.OperationalError as error:
            raise VfleetError(Reason.LIMIT_EXCEEDED, f"{self._data_dir} can't be written: {error}") from error

    def close(self) -> None:
        """Close the database; mapped files stay mapped until their maps are closed."""
        self._database.close()
