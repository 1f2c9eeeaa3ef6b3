"""A host's disk: what `hostd.ledger.Ledger` keeps, in memory, so that it outlives the daemon and not the simulation.

What was written before a kill is there after it, at any instruction; what a transaction had not committed is not.
"""

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Self

from google.protobuf.message import Message
from simulation.vopr.loop import Life


class MappedMemory(mmap.mmap):
    """A mapped file. Its bytes belong to the disk, so closing it does nothing. `fd` is the file's descriptor."""

    fd: int

    @classmethod
    def new(cls, size_bytes: int) -> Self:
        """Make one."""
        fd = os.memfd_create("memory")
        os.ftruncate(fd, size_bytes)
        made = cls(fd, size_bytes)
        made.fd = fd
        return made

    def __del__(self) -> None:
        os.close(self.fd)

    def close(self) -> None:
        """Unmap it."""


class Disk:
    """Records by kind and key, and mapped files by name."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], bytes] = {}
        self.files: dict[str, MappedMemory] = {}


class SimulatedLedger:
    """The ledger of one life of a daemon, on its host's disk. `before_write` may kill it right there."""

    directory = Path("/nonexistent")  # guests' sockets would be there, and no guest is simulated

    def __init__(self, disk: Disk, life: Life, before_write: Callable[[], None]) -> None:
        self._disk = disk
        self._life = life
        self._before_write = before_write
        self._in_transaction = False

    def get(self, kind, key, message_type):
        self._life.check()
        value = self._disk.records.get((kind, key))
        return None if value is None else message_type.FromString(value)

    def items(self, kind, message_type):
        self._life.check()
        keys = sorted(key for of, key in self._disk.records if of == kind)
        return [(key, message_type.FromString(self._disk.records[kind, key])) for key in keys]

    def all(self, kind, message_type):
        return [record for _, record in self.items(kind, message_type)]

    def put(self, kind: str, key: str, record: Message) -> None:
        self._writes()
        self._disk.records[kind, key] = record.SerializeToString(deterministic=True)

    def delete(self, kind: str, key: str) -> None:
        self._writes()
        self._disk.records.pop((kind, key), None)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        self._life.check()
        if self._in_transaction:
            yield
            return
        before = dict(self._disk.records)
        self._in_transaction = True
        try:
            yield
            self._writes()
        except BaseException:
            self._disk.records = before
            raise
        finally:
            self._in_transaction = False

    def map_file(self, name: str, size_bytes: int, *, exists: bool = False) -> MappedMemory:
        self._writes()
        file = self._disk.files.get(name)
        if file is None:
            if exists:
                raise AssertionError(f"{name} is not there")
            file = self._disk.files[name] = MappedMemory.new(size_bytes)
        if len(file) != size_bytes:
            raise AssertionError(f"{name} has {len(file)} bytes; expected {size_bytes}")
        return file

    def open_file(self, name: str) -> BinaryIO:
        self._life.check()
        return os.fdopen(os.dup(self._disk.files[name].fd), "r+b", buffering=0)

    def delete_file(self, name: str) -> None:
        self._writes()
        self._disk.files.pop(name, None)

    def files(self) -> list[str]:
        self._life.check()
        return sorted(self._disk.files)

    def erase(self) -> None:
        self._writes()
        self._disk.records.clear()

    def close(self) -> None:
        """Close it."""

    def _writes(self) -> None:
        self._life.check()
        self._before_write()
