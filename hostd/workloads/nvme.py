"""A small NVMe driver that verifies what it reads, and that each of its commands completes exactly once.

It follows NVMe 1.4 and PCI Express: reset, an admin queue, Identify, one pair of I/O queues with an interrupt of their
own, commands with PRP entries. All that it must remember are two numbers a lane, in its main memory: commands given to
the device, and commands completed. Everything else is a function of these.

    main memory   | numbers | admin queues | data | submission queue | completion queue | a lane: list, buffer | ...

A command is written into its queue's entry before its number is stored, and then its doorbell is rung; a completion is
verified before its number is stored, and then its doorbell is rung. So a daemon that is killed anywhere in between goes
on: the queues' indices are the sums of the numbers, and ringing again with the same index changes nothing.
"""

import struct
from typing import Final

from hostd.models import nvme_admin as admin
from hostd.models import nvme_commands as io
from hostd.models import nvme_layout as registers
from hostd.models.nvme_layout import BLOCK_BYTES, COMPLETION_BYTES, ENTRY_BYTES
from hostd.workloads.nvme_script import EXTENT_PAGES_MAX, NvmeScript, Operation
from hostd.workloads.port import Port, Tally
from vfleet.address import PAGE_BYTES
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.limits import WINDOW
from vfleet.v1.driver_service_pb2 import WorkloadOptions

DEFAULT_WINDOW: Final = 16
READY_WAIT_S: Final = 0.01
READY_WAITS_MAX: Final = 2000
PATIENCE_S: Final = 30.0
"""How long a command may take before it counts as lost: as long as in Linux."""
RATE_WAIT_MIN_S: Final = 0.001
RATE_WAIT_MAX_S: Final = 0.1

_ADMIN_ENTRIES: Final = 16
_IO_QUEUE: Final = 1
_ENTRIES: Final = 2 * WINDOW
_INTERRUPT_ADMIN: Final = 0
_INTERRUPT_IO: Final = 1

# Pages of main memory.
_NUMBERS: Final = 0
_ADMIN_SUBMISSION: Final = 1
_ADMIN_COMPLETION: Final = 2
_DATA: Final = 3
_SUBMISSION: Final = 4
_COMPLETION: Final = _SUBMISSION + _ENTRIES * ENTRY_BYTES // PAGE_BYTES
_LANES: Final = _COMPLETION + 1
_LANE_PAGES: Final = 1 + EXTENT_PAGES_MAX

# Words of the page of numbers.
_IS_SET_UP: Final = 0
_RUN: Final = 1
_NAMESPACE_BYTES: Final = 2
_LANE_COUNT: Final = 3
_REPEATED: Final = 4
_FIRST_LANE: Final = 8

_COMPLETION_ENTRY: Final = struct.Struct("<IIHHHH")
_NVM_COMMAND_SET: Final = 1 << 37
_POISON: Final = b"\xa5" * PAGE_BYTES


class NvmeDriver:
    """The driver of one controller. `options.window` is its queue depth, 1 to 64; 0 for 16."""

    def __init__(self, port: Port, tally: Tally, options: WorkloadOptions) -> None:
        self._port = port
        self._tally = tally
        self._options = options
        self._lanes = options.window or DEFAULT_WINDOW
        if self._lanes > WINDOW:
            raise invalid_field("options.window", options.window, f"at most {WINDOW}")
        needed = (_LANES + self._lanes * _LANE_PAGES) * PAGE_BYTES
        if len(port.memory) < needed:
            raise invalid_field("main_memory_bytes", len(port.memory), f"at least {needed} for this window")
        self._words = port.memory.cast("Q")
        self._submitted: dict[int, float] = {}
        self._admin_commands = 0

    async def start(self) -> None:
        """Reset the controller and set it up. Raise ILLEGAL_STATE if it is none, or doesn't do what it must."""
        self._words[_IS_SET_UP] = 0
        await self._check_device()
        await self._enable()
        namespace_bytes = await self._identify()
        await self._create_queues()
        words = self._words
        words[_RUN] = int(self._port.now() * 1e9) & (1 << 64) - 1
        words[_NAMESPACE_BYTES] = namespace_bytes
        words[_LANE_COUNT] = self._lanes
        words[_REPEATED] = 0
        for word in range(_FIRST_LANE, _FIRST_LANE + 2 * self._lanes):
            words[word] = 0
        self._script()
        words[_IS_SET_UP] = 1

    async def run(self) -> None:
        """Read, write and verify until the port is stopping and everything has its completion.

        Raise ILLEGAL_STATE if main memory is not that of a driver with these options, or the controller gave up.
        """
        if self._words[_IS_SET_UP] != 1 or self._words[_LANE_COUNT] != self._lanes:
            raise VfleetError(Reason.ILLEGAL_STATE, "main memory is not that of an NVMe driver with this window")
        script, began, done = self._script(), self._port.now(), self._completed()
        self._tally.resumed(done)
        self._ring()
        given = 0
        while True:
            taken = self._take_completions(script)
            now = self._port.now()
            idle = [] if self._port.is_stopping else self._idle_lanes()
            allowed = len(idle)
            if self._options.accesses_per_second:
                allowed = min(allowed, int((now - began) * self._options.accesses_per_second) + 1 - given)
            for lane in idle[: max(allowed, 0)]:
                self._give(script, lane, now)
                given += 1
            if taken or allowed > 0:
                self._ring()
                await self._port.pause(0)
            elif self._issued() > self._completed():
                await self._await_completions()
            elif self._port.is_stopping:
                return
            else:
                ahead_s = began + given / self._options.accesses_per_second - now
                await self._port.pause(min(max(ahead_s, RATE_WAIT_MIN_S), RATE_WAIT_MAX_S))

    # What is remembered.

    def _script(self) -> NvmeScript:
        return NvmeScript(self._options, self._words[_NAMESPACE_BYTES], self._lanes, self._words[_RUN])

    def _issued(self) -> int:
        return sum(self._words[_FIRST_LANE : _FIRST_LANE + 2 * self._lanes : 2])

    def _completed(self) -> int:
        return sum(self._words[_FIRST_LANE + 1 : _FIRST_LANE + 2 * self._lanes : 2])

    def _numbers(self, lane: int) -> tuple[int, int]:
        word = _FIRST_LANE + 2 * lane
        return self._words[word], self._words[word + 1]

    def _idle_lanes(self) -> list[int]:
        words = self._words[_FIRST_LANE : _FIRST_LANE + 2 * self._lanes].tolist()
        return [lane for lane in range(self._lanes) if words[2 * lane] == words[2 * lane + 1]]

    # Commands and completions.

    def _give(self, script: NvmeScript, lane: int, now: float) -> None:
        """Put a lane's next command into the queue."""
        number = self._words[_FIRST_LANE + 2 * lane]
        operation = script.operation(lane, number)
        first = _LANES + lane * _LANE_PAGES
        start = (first + 1) * PAGE_BYTES
        length = operation.pages * PAGE_BYTES
        self._port.memory[start : start + length] = (
            script.content(operation) if operation.is_write else _POISON * operation.pages
        )
        prp2 = self._second_pointer(first, operation)
        blocks = PAGE_BYTES // BLOCK_BYTES
        entry = registers.ENTRY.pack(
            io.WRITE if operation.is_write else io.READ,
            0,
            lane,
            io.NAMESPACE,
            self._address(first + 1),
            prp2,
            operation.page * blocks & 0xFFFFFFFF,
            operation.page * blocks >> 32,
            operation.pages * blocks - 1,
            0,
        )
        place = _SUBMISSION * PAGE_BYTES + self._issued() % _ENTRIES * ENTRY_BYTES
        self._port.memory[place : place + ENTRY_BYTES] = entry
        self._submitted[lane] = now
        self._words[_FIRST_LANE + 2 * lane] = number + 1

    def _second_pointer(self, first: int, operation: Operation) -> int:
        if operation.pages < 3:
            return self._address(first + 2) if operation.pages == 2 else 0
        pages = [self._address(first + 2 + index) for index in range(operation.pages - 1)]
        start = first * PAGE_BYTES
        self._port.memory[start : start + 8 * len(pages)] = struct.pack(f"<{len(pages)}Q", *pages)
        return self._address(first)

    def _ring(self) -> None:
        doorbell = registers.DOORBELLS + 8 * _IO_QUEUE
        self._port.write(doorbell, (self._issued() % _ENTRIES).to_bytes(4, "little"))
        self._port.write(doorbell + 4, (self._taken() % _ENTRIES).to_bytes(4, "little"))

    def _taken(self) -> int:
        """Return how many entries of the completion queue were taken."""
        repeated: int = self._words[_REPEATED]
        return self._completed() + repeated

    def _take_completions(self, script: NvmeScript) -> int:
        """Verify all completions that are new, and count them. Return how many there were."""
        count, taken = 0, self._taken()
        while self._is_new(_COMPLETION, taken + count, _ENTRIES):
            start = _COMPLETION * PAGE_BYTES + (taken + count) % _ENTRIES * COMPLETION_BYTES
            _, _, _, queue, lane, status = _COMPLETION_ENTRY.unpack_from(self._port.memory, start)
            issued, completed = self._numbers(lane) if lane < self._lanes else (0, 0)
            if queue != _IO_QUEUE or issued == completed:
                self._tally.repeated(f"completion of command {lane:#x} of queue {queue}, which is not under way")
                self._words[_REPEATED] += 1
            else:
                self._verify(script, lane, completed, status >> 1)
                self._words[_FIRST_LANE + 2 * lane + 1] = completed + 1
            count += 1
        return count

    def _is_new(self, page: int, number: int, entries: int) -> bool:
        """Return whether a completion queue's entry, by its number from the start, has been written."""
        phase = self._port.memory[page * PAGE_BYTES + number % entries * COMPLETION_BYTES + 14] & 1
        return phase != number // entries % 2

    def _verify(self, script: NvmeScript, lane: int, number: int, status: int) -> None:
        operation = script.operation(lane, number)
        what = f"{'write' if operation.is_write else 'read'} of {operation.pages} pages at {operation.page}"
        if status:
            self._tally.error(f"{what}: status {status:#x}")
            return
        if not operation.is_write:
            start = (_LANES + lane * _LANE_PAGES + 1) * PAGE_BYTES
            found = bytes(self._port.memory[start : start + operation.pages * PAGE_BYTES])
            if found != script.content(operation):
                self._tally.mismatch(f"{what}: found {found[:32].hex()}, expected version {operation.version}")
                return
        self._tally.completed(self._submitted.pop(lane, self._port.now()))

    async def _await_completions(self) -> None:
        """Wait for an interrupt. If none comes, and the function answers, then something was lost."""
        if await self._port.interrupt(_INTERRUPT_IO, PATIENCE_S):
            return
        await self._status()
        if await self._port.interrupt(_INTERRUPT_IO, PATIENCE_S):
            return
        if self._is_new(_COMPLETION, self._taken(), _ENTRIES):
            self._tally.lost("an interrupt")
            return
        for lane in range(self._lanes):
            issued, completed = self._numbers(lane)
            if issued > completed:
                self._tally.lost(f"command {completed} of lane {lane}")
        raise _broken("does not complete its commands")

    # Setting up.

    async def _check_device(self) -> None:
        version = await self._read(registers.VS)
        capabilities = await self._read(registers.CAP) | await self._read(registers.CAP + 4) << 32
        if version >> 16 not in (1, 2) or not capabilities & _NVM_COMMAND_SET:
            message = f"the function has version {version:#x}; expected an NVMe controller, for which this workload is"
            raise VfleetError(Reason.ILLEGAL_STATE, message)
        entries = (capabilities & 0xFFFF) + 1
        if entries < _ENTRIES:
            raise _broken(f"has queues of {entries} entries; expected at least {_ENTRIES}")

    async def _enable(self) -> None:
        self._write(registers.CC, 0)
        await self._until_ready(0)
        memory = self._port.memory
        memory[_ADMIN_SUBMISSION * PAGE_BYTES : _LANES * PAGE_BYTES] = bytes((_LANES - _ADMIN_SUBMISSION) * PAGE_BYTES)
        self._admin_commands = 0
        for vector in (_INTERRUPT_ADMIN, _INTERRUPT_IO):
            entry = struct.pack("<QII", self._port.interrupt_address, vector, 0)
            for offset in range(0, len(entry), 4):
                self._port.write(registers.MSIX_TABLE + 16 * vector + offset, entry[offset : offset + 4])
        self._write(registers.AQA, (_ADMIN_ENTRIES - 1) << 16 | (_ADMIN_ENTRIES - 1))
        for register, page in ((registers.ASQ, _ADMIN_SUBMISSION), (registers.ACQ, _ADMIN_COMPLETION)):
            self._write(register, self._address(page) & 0xFFFFFFFF)
            self._write(register + 4, self._address(page) >> 32)
        self._write(registers.CC, 4 << 20 | 6 << 16 | registers.CC_ENABLE)
        await self._until_ready(registers.CSTS_READY)

    async def _until_ready(self, ready: int) -> None:
        for _ in range(READY_WAITS_MAX):
            if await self._status() & registers.CSTS_READY == ready:
                return
            await self._port.pause(READY_WAIT_S)
        raise _broken("does not become ready" if ready else "does not reset")

    async def _status(self) -> int:
        status = await self._read(registers.CSTS)
        if status & registers.CSTS_FATAL:
            raise _broken(f"has failed: its status is {status:#x}")
        return status

    async def _identify(self) -> int:
        """Return the bytes of the namespace."""
        await self._admin(admin.IDENTIFY, 0, 1)
        start = _DATA * PAGE_BYTES
        limit = self._port.memory[start + 77]
        if limit and 1 << limit < EXTENT_PAGES_MAX:
            raise _broken(f"transfers at most {1 << limit} pages; expected at least {EXTENT_PAGES_MAX}")
        await self._admin(admin.IDENTIFY, io.NAMESPACE, 0)
        (blocks,) = struct.unpack_from("<Q", self._port.memory, start)
        formatted = self._port.memory[start + 26] & 0xF
        shift = self._port.memory[start + 128 + 4 * formatted + 2]
        if 1 << shift != BLOCK_BYTES:
            raise _broken(f"has blocks of 2**{shift} bytes; expected {BLOCK_BYTES}")
        return int(blocks) << shift

    async def _create_queues(self) -> None:
        await self._admin(admin.SET_FEATURES, 0, admin.NUMBER_OF_QUEUES, 0, has_data=False)
        size = (_ENTRIES - 1) << 16 | _IO_QUEUE
        await self._admin(
            admin.CREATE_COMPLETION_QUEUE, 0, size, _INTERRUPT_IO << 16 | 3, address=self._address(_COMPLETION)
        )
        await self._admin(
            admin.CREATE_SUBMISSION_QUEUE, 0, size, _IO_QUEUE << 16 | 1, address=self._address(_SUBMISSION)
        )

    async def _admin(
        self,
        opcode: int,
        namespace: int,
        word10: int,
        word11: int = 0,
        *,
        address: int | None = None,
        has_data: bool = True,
    ) -> None:
        """Do an admin command, alone. Raise ILLEGAL_STATE if it fails."""
        number, memory = self._admin_commands, self._port.memory
        self._admin_commands += 1
        prp1 = (self._address(_DATA) if has_data else 0) if address is None else address
        place = _ADMIN_SUBMISSION * PAGE_BYTES + number % _ADMIN_ENTRIES * ENTRY_BYTES
        memory[place : place + ENTRY_BYTES] = registers.ENTRY.pack(
            opcode, 0, number, namespace, prp1, 0, word10, word11, 0, 0
        )
        self._write(registers.DOORBELLS, (number + 1) % _ADMIN_ENTRIES)
        while not self._is_new(_ADMIN_COMPLETION, number, _ADMIN_ENTRIES):
            if not await self._port.interrupt(_INTERRUPT_ADMIN, PATIENCE_S):
                raise _broken(f"does not complete admin command {opcode:#x}")
        place = _ADMIN_COMPLETION * PAGE_BYTES + number % _ADMIN_ENTRIES * COMPLETION_BYTES
        *_, identifier, status = _COMPLETION_ENTRY.unpack_from(memory, place)
        self._write(registers.DOORBELLS + 4, (number + 1) % _ADMIN_ENTRIES)
        if identifier != number or status >> 1:
            raise _broken(f"ended admin command {opcode:#x} with status {status >> 1:#x}")

    def _address(self, page: int) -> int:
        return self._port.memory_address + page * PAGE_BYTES

    async def _read(self, register: int) -> int:
        return int.from_bytes(await self._port.read(register, 4), "little")

    def _write(self, register: int, value: int) -> None:
        self._port.write(register, value.to_bytes(4, "little"))


def _broken(what: str) -> VfleetError:
    return VfleetError(Reason.ILLEGAL_STATE, f"the NVMe controller {what}")
