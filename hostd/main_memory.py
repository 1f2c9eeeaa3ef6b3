"""Drivers' main memory: parts of the window of the host's root complex, each a mapped file that survives a kill.

A driver sees its part at one virtual address, the same for all drivers, through an entry of its own table.
"""

import mmap
from collections.abc import Iterable

from hostd.ledger import Ledger
from hostd.translation import Entry
from vfleet.address import PAGE_BYTES, WINDOW_BYTES, Location, table_offset
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.limits import INTERRUPT_PAGE_ADDRESS, MAIN_MEMORY_VIRTUAL_ADDRESS, MAX_MAIN_MEMORY_BYTES
from vfleet.v1.host_records_pb2 import DriverRecord
from vfleet.v1.types_pb2 import Guest

# Interrupts are writes to this page of the window: no memory lies there.
_INTERRUPT_PAGE = DriverRecord(main_memory_offset=INTERRUPT_PAGE_ADDRESS, main_memory_bytes=PAGE_BYTES)


class MainMemory:
    """The window of a host's root complex, at `place`."""

    def __init__(self, host: str, place: Location, ledger: Ledger) -> None:
        self._host = host
        self._place = place
        self._ledger = ledger

    def base(self, record: DriverRecord) -> int:
        """Return the fabric address of a driver's part."""
        return self._place.base + record.main_memory_offset

    def allot(
        self, driver: str, size_bytes: int, others: Iterable[DriverRecord], guest: Guest | None = None
    ) -> DriverRecord:
        """Return the record of a driver with a part of this size (0 for none), first fit among the `others`.

        A guest's part is the virtual machine's own memory, and has no file.

        Raise INVALID_FIELD for a size that can't be, LIMIT_EXCEEDED if no place is left.
        """
        if not 0 <= size_bytes <= MAX_MAIN_MEMORY_BYTES or size_bytes % PAGE_BYTES:
            expected = f"a multiple of {PAGE_BYTES}, at most {MAX_MAIN_MEMORY_BYTES}"
            raise invalid_field("main_memory_bytes", size_bytes, expected)
        record = DriverRecord(driver=driver, main_memory_bytes=size_bytes, guest=guest)
        if size_bytes:
            record.main_memory_offset = self._first_fit(size_bytes, others)
        if size_bytes and guest is None:
            record.file = f"{driver}.memory"
            # What a killed daemon left there without a record is no memory of this driver.
            self._ledger.delete_file(record.file)
        return record

    def open(self, record: DriverRecord) -> tuple[mmap.mmap, Entry] | None:
        """Map a driver's part, and return it with the entry that leads there; None if it has no file."""
        if not record.file:
            return None
        entry = Entry(
            driver=record.driver,
            function="",
            virtual_address=MAIN_MEMORY_VIRTUAL_ADDRESS,
            length_bytes=record.main_memory_bytes,
            offset=table_offset(self.base(record), MAIN_MEMORY_VIRTUAL_ADDRESS),
            generation=0,
            host=self._host,
        )
        return self._ledger.map_file(record.file, record.main_memory_bytes), entry

    def _first_fit(self, size_bytes: int, others: Iterable[DriverRecord]) -> int:
        end = 0
        for taken in sorted((*others, _INTERRUPT_PAGE), key=lambda record: record.main_memory_offset):
            if taken.main_memory_bytes and end + size_bytes <= taken.main_memory_offset:
                break
            end = max(end, taken.main_memory_offset + taken.main_memory_bytes)
        if end + size_bytes > WINDOW_BYTES:
            message = f"{size_bytes} bytes of main memory do not fit in what is left of host {self._host!r}"
            raise VfleetError(Reason.LIMIT_EXCEEDED, message)
        return end
