"""The accelerator's registers and commands, by its data sheet."""

import zlib

import pytest

from hostd.models import accelerator
from hostd.models.accelerator import COMMAND, COMPLETION, Accelerator, Command
from hostd.models.base import DmaWrite
from vfleet.errors import Reason, VfleetError

BARS = {0: 8192, 2: 1 << 16}
LOCAL = 1 << 16
SUBMISSIONS, COMPLETIONS, ENTRIES = 0x10000, 0x20000, 8
ADDRESS = 0xFEE00000


class Device:
    """An accelerator with its driver's main memory, done by hand as the engine does it."""

    def __init__(self) -> None:
        self.model = Accelerator(7, BARS)
        self.memory = memoryview(bytearray(2 * LOCAL + self.model.private_bytes))
        self.main = bytearray(1 << 18)
        self.interrupts = 0
        self.put(self.model.reset())

    def put(self, stores) -> None:
        for offset, data in stores:
            self.memory[offset : offset + len(data)] = data

    def write(self, register: int, value: int, length: int = 8) -> None:
        self.put(self.model.write(self.memory, register, value.to_bytes(length, "little")) or ())

    def read(self, register: int, length: int = 8) -> int:
        data, stores = self.model.read(self.memory, register, length) or (b"", ())
        self.put(stores)
        return int.from_bytes(data, "little")

    def set_up(self, vector: int = 2) -> None:
        self.write(accelerator.SUBMISSION_RING, SUBMISSIONS)
        self.write(accelerator.COMPLETION_RING, COMPLETIONS)
        self.write(accelerator.ENTRIES, ENTRIES)
        self.write(accelerator.VECTOR, vector)
        entry = accelerator.MSIX_TABLE + 16 * vector
        if vector < accelerator.VECTORS:
            self.write(entry, ADDRESS)
            self.write(entry + 8, vector)
        self.write(accelerator.CONTROL, 1)

    def submit(self, *commands: Command) -> None:
        number = self.read(accelerator.SUBMITTED)
        for command in commands:
            slot = SUBMISSIONS + number % ENTRIES * COMMAND.size
            self.main[slot : slot + COMMAND.size] = command.pack()
            number += 1
        self.write(accelerator.SUBMITTED, number)

    def run(self, steps: int = 1000, *, is_faulty: bool = False) -> int:
        """Do so many steps, and return how many there were."""
        for done in range(steps):
            work = self.model.work(self.memory)
            if work is None:
                return done
            data = [bytes(self.main[read.address : read.address + read.length]) for read in work.reads]
            before = bytes(self.memory)
            step = self.model.finish(self.memory, work, None if work.reads and is_faulty else data)
            assert bytes(self.memory) == before, "a model returns what it changes"
            self.put(step.stores)
            for send in step.sends:
                assert isinstance(send, DmaWrite)
                if send.address == ADDRESS:
                    self.interrupts += 1
                else:
                    self.main[send.address : send.address + len(send.data)] = send.data
        return steps

    def completion(self, number: int) -> tuple[int, ...]:
        """Return identifier, checksum, status and number of completion `number`, from 0."""
        found = COMPLETION.unpack_from(self.main, COMPLETIONS + number % ENTRIES * COMPLETION.size)
        return (*found[:3], found[4])

    def local(self, offset: int, length: int) -> bytes:
        return bytes(self.memory[LOCAL + offset : LOCAL + offset + length])


@pytest.fixture
def device() -> Device:
    found = Device()
    found.set_up()
    return found


def command(opcode: int, identifier: int, **fields: int) -> Command:
    return Command(
        **{"main": 0, "local": 0, "source": 0, "length": 0, "value": 0, **fields}, opcode=opcode, identifier=identifier
    )


def test_each_command_does_what_it_says_and_completes_once(device: Device):
    data = bytes(range(256)) * 40
    device.main[: len(data)] = data
    size = len(data)
    device.submit(
        command(accelerator.READ, 11, main=0, local=64, length=size),
        command(accelerator.COPY, 12, local=20480, source=64, length=size),
        command(accelerator.FILL, 13, local=64, length=12, value=0x0807060504030201),
        command(accelerator.CHECKSUM, 14, main=0x18000, local=20480, length=size),
        command(accelerator.WRITE, 15, main=0x19001, local=20480, length=size),
    )
    device.run()
    crc = zlib.crc32(data)
    assert [device.completion(n) for n in range(5)] == [
        (11, 0, 0, 1),
        (12, 0, 0, 2),
        (13, 0, 0, 3),
        (14, crc, 0, 4),
        (15, 0, 0, 5),
    ]
    assert device.local(20480, size) == data == bytes(device.main[0x19001 : 0x19001 + size])
    assert device.local(64, 16) == bytes([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4]) + data[12:16]
    assert int.from_bytes(device.main[0x18000:0x18008], "little") == crc
    assert (device.interrupts, device.read(accelerator.COMPLETED), device.read(accelerator.ERRORS)) == (5, 5, 0)
    assert device.run() == 0


def test_a_long_command_is_done_in_pieces_and_goes_on_in_another_object(device: Device):
    device.submit(command(accelerator.FILL, 1, length=5 * 4096, value=3))
    device.run(3)
    assert device.local(0, 5 * 4096) == (bytes([3]) + bytes(7)) * 1024 + bytes(3 * 4096)
    device.model = Accelerator(7, BARS)
    assert device.run() == 3
    assert device.local(0, 5 * 4096) == (bytes([3]) + bytes(7)) * 2560
    assert device.completion(0) == (1, 0, 0, 1)


@pytest.mark.parametrize(
    ("refused", "status"),
    [
        (command(0, 1), accelerator.BAD_OPCODE),
        (command(6, 1), accelerator.BAD_OPCODE),
        (command(accelerator.FILL, 1, local=LOCAL - 8, length=9), accelerator.BAD_RANGE),
        (command(accelerator.FILL, 1, local=1 << 63, length=1 << 63), accelerator.BAD_RANGE),
        (command(accelerator.COPY, 1, source=LOCAL, length=1), accelerator.BAD_RANGE),
        (command(accelerator.COPY, 1, source=100, local=107, length=8), accelerator.BAD_RANGE),
    ],
)
def test_a_command_that_cannot_be_done_says_so_and_does_nothing(device: Device, refused: Command, status: int):
    device.submit(refused, command(accelerator.FILL, 2))
    device.run()
    assert [device.completion(0), device.completion(1)] == [(1, 0, status, 1), (2, 0, 0, 2)]
    assert device.local(0, LOCAL) == bytes(LOCAL)


def test_a_dma_fault_ends_a_command_and_one_on_the_ring_turns_it_off(device: Device):
    device.submit(command(accelerator.READ, 1, length=8))
    device.run(1)
    device.run(is_faulty=True)
    assert device.completion(0) == (1, 0, accelerator.DMA_FAULT, 1)
    device.submit(command(accelerator.READ, 2, length=8))
    device.run(is_faulty=True)
    assert (device.read(accelerator.STATUS), device.read(accelerator.CONTROL)) == (3, 0)
    device.write(accelerator.CONTROL, 1)
    assert (device.read(accelerator.STATUS), device.read(accelerator.SUBMITTED)) == (1, 0)


def test_completions_wait_for_room(device: Device):
    for _ in range(2):
        device.submit(*(command(accelerator.FILL, n) for n in range(ENTRIES)))
        device.run()
    assert device.read(accelerator.COMPLETED) == ENTRIES
    device.write(accelerator.CONSUMED, 3)
    device.run()
    assert (device.read(accelerator.COMPLETED), device.interrupts) == (ENTRIES + 3, ENTRIES + 3)
    assert device.completion(2)[3] == ENTRIES + 3


def test_work_of_before_the_rings_were_turned_off_is_other_work(device: Device):
    device.submit(command(accelerator.FILL, 1))
    before = device.model.work(device.memory)
    device.write(accelerator.CONTROL, 0)
    assert device.model.work(device.memory) is None
    device.write(accelerator.CONTROL, 1)
    device.submit(command(accelerator.FILL, 1))
    again = device.model.work(device.memory)
    assert before is not None
    assert again is not None
    assert (before.reads, before == again) == (again.reads, False)


def test_a_masked_interrupt_goes_out_when_it_is_unmasked(device: Device):
    control = accelerator.MSIX_TABLE + 16 * 2 + 12
    device.write(control, 1, 4)
    device.submit(command(accelerator.FILL, 1), command(accelerator.FILL, 2))
    device.run()
    assert (device.interrupts, device.completion(1)) == (0, (2, 0, 0, 2))
    device.write(control, 0, 4)
    device.run()
    assert device.interrupts == 1


@pytest.mark.parametrize(
    ("register", "value", "length"),
    [
        (accelerator.IDENTITY, 1, 8),
        (accelerator.CONTROL, 2, 8),
        (accelerator.CONTROL, 1, 4),
        (accelerator.ENTRIES, 16, 8),  # the rings are on
        (accelerator.SUBMITTED, ENTRIES + 1, 8),
        (accelerator.CONSUMED, 1, 8),
        (accelerator.FETCHED, 1, 8),
        (accelerator.MSIX_TABLE, 1, 2),
        (0x70, 1, 8),
    ],
)
def test_a_bad_write_is_counted_and_changes_nothing_else(device: Device, register: int, value: int, length: int):
    before = bytes(device.memory)
    device.write(register, value, length)
    assert device.read(accelerator.ERRORS) == 1
    device.put([(accelerator.ERRORS, bytes(8))])
    assert bytes(device.memory) == before


@pytest.mark.parametrize(("entries", "submissions"), [(0, 0), (1, 0), (3, 0), (2048, 0), (8, 32)])
def test_rings_that_cannot_be_are_not_turned_on(entries: int, submissions: int):
    device = Device()
    device.write(accelerator.ENTRIES, entries)
    device.write(accelerator.SUBMISSION_RING, submissions)
    device.write(accelerator.CONTROL, 1)
    assert (device.read(accelerator.CONTROL), device.read(accelerator.ERRORS)) == (0, 1)


def test_reads_of_what_is_not_there_are_all_ones(device: Device):
    assert [device.read(0x70), device.read(accelerator.STATUS, 4)] == [(1 << 64) - 1, (1 << 32) - 1]
    assert device.read(accelerator.ERRORS) == 2
    assert device.model.read(device.memory, 8192, 8) is None
    assert device.model.write(device.memory, 8192, bytes(8)) is None
    device.write(LOCAL + 8, 5)
    assert device.read(LOCAL + 8) == 5


@pytest.mark.parametrize("bars", [{0: 4096, 2: 4096}, {0: 8192}, {0: 8192, 2: 4096, 4: 4096}])
def test_it_needs_registers_and_local_memory(bars: dict[int, int]):
    with pytest.raises(VfleetError) as caught:
        Accelerator(1, bars)
    assert caught.value.reason is Reason.INVALID_FIELD
