"""Guest memory without a descriptor: what its VMM is asked, in what order, and what becomes of its answers."""

import asyncio
import struct

import pytest
from support.guest_port import TIMEOUT_S, GuestPort
from support.manual_clock import settle
from support.vmm import DMA_MAP, DMA_READ, DMA_WRITE, FAILED, HEADER, REPLY, VERSION, SharedMemory

from hostd.guest.dma_messages import MAX_UNANSWERED
from hostd.guest.vfio_user import Message
from hostd.memory import MemoryBusyError, NotAtHandError

PAGE = 4096
BEYOND = 1 << 32
"""A count that nobody can mean."""


class Guest(GuestPort):
    """A device with a page of memory at 0 that has to be asked for, and what its VMM says."""

    def __init__(self, transfer_bytes: int = 1 << 20) -> None:
        super().__init__("nvme")
        self.device.connected()
        capabilities = b'{"capabilities":{"max_data_xfer_size":%d}}\0' % transfer_bytes
        self.device.handle(Message(1, VERSION, 0, struct.pack("<HH", 0, 1) + capabilities), [])
        self.offer()
        self.rung: list[bytes] = []

    def offer(self) -> None:
        self.device.handle(Message(2, DMA_MAP, 0, struct.pack("<IIQQQ", 32, 3, 0, 0, PAGE)), [])

    def ring(self, key: bytes) -> None:
        self.rung.append(key)

    @property
    def asked(self) -> list[tuple[int, int, int]]:
        """What was asked so far: command, address, bytes."""
        found = []
        for message in self.said:
            _, command, _, _, _ = HEADER.unpack_from(message)
            address, count = struct.unpack_from("<QQ", message, HEADER.size)
            found.append((command, address, count))
        return found

    def answer(self, number: int, command: int, body: bytes = b"", *, flags: int = REPLY) -> None:
        self.device.handle(Message(number, command, flags, body), [])

    def learn(self, *, is_short: bool = False) -> None:
        """Let it find out what the VMM's messages look like."""
        with pytest.raises(MemoryBusyError):
            self.memory.write(0, b"12345678")
        assert self.asked == [(DMA_READ, 0, BEYOND)]
        self.answer(1, DMA_READ, bytes(16), flags=REPLY if is_short else REPLY | FAILED)

    def written(self) -> None:
        assert self.memory.write(8, b"12345678")


@pytest.fixture
def guest() -> Guest:
    found = Guest()
    found.learn()
    return found


@pytest.mark.parametrize("is_short", [False, True])
async def test_reads_and_writes_look_as_the_vmm_takes_them(*, is_short: bool):
    guest = Guest()
    guest.learn(is_short=is_short)
    start = HEADER.size + (12 if is_short else 16)
    assert guest.memory.write(100, b"hello")
    assert guest.said[1][start : start + 5] == b"hello"
    assert struct.unpack_from("<QI", guest.said[1], HEADER.size) == (100, 5)
    assert len(guest.said[1]) == HEADER.size + 16 + 5
    with pytest.raises(NotAtHandError):
        guest.memory.read(8, 4)
    reading = asyncio.create_task(guest.memory.fetch(8, 4))
    await settle()
    assert len(guest.said[2]) == HEADER.size + 16
    body = struct.pack("<QI", 8, 4) + b"data" + bytes(4) if is_short else struct.pack("<QQ", 8, 4) + b"data"
    guest.answer(3, DMA_READ, body)
    assert await reading == b"data"


def test_what_is_known_of_the_vmm_is_kept_and_ends_with_it(guest: Guest):
    assert b"dma" in guest.kept
    guest.device.gone()
    assert b"dma" not in guest.kept
    guest.offer()
    with pytest.raises(MemoryBusyError):
        guest.written()
    assert guest.asked[-1] == (DMA_READ, 8, BEYOND)


async def test_no_message_is_longer_than_the_vmm_takes():
    guest = Guest(1024)
    guest.learn()
    assert guest.memory.write(1, bytes(2500))
    assert guest.asked[1:] == [(DMA_WRITE, 1, 1024), (DMA_WRITE, 1025, 1024), (DMA_WRITE, 2049, 452)]
    reading = asyncio.create_task(guest.memory.fetch(0, 2048))
    await settle()
    assert guest.asked[4:] == [(DMA_READ, 0, 1024), (DMA_READ, 1024, 1024)]
    # Answers come in any order.
    guest.answer(6, DMA_READ, bytes(16) + b"b" * 1024)
    guest.answer(5, DMA_READ, bytes(16) + b"a" * 1024)
    assert await reading == b"a" * 1024 + b"b" * 1024


@pytest.mark.parametrize(
    ("body", "flags"),
    [(bytes(16), REPLY), (bytes(19), REPLY), (b"", REPLY), (bytes(20), REPLY | FAILED)],
    ids=["nothing", "too little", "empty", "refused"],
)
async def test_an_answer_without_what_was_asked_for_is_a_fault(guest: Guest, body: bytes, flags: int):
    reading = asyncio.create_task(guest.memory.fetch(0, 4))
    await settle()
    guest.answer(2, DMA_READ, body, flags=flags)
    assert await reading is None


async def test_a_vmm_that_does_not_answer_is_waited_for_so_long_and_no_longer(guest: Guest):
    guest.written()
    reading = asyncio.create_task(guest.memory.fetch(0, 4))
    await settle()
    guest.messages.ring(b"vector:0")
    guest.now = TIMEOUT_S - 0.001
    guest.messages.expire()
    assert (guest.failed_writes, guest.rung, reading.done()) == (0, [], False)
    guest.now = TIMEOUT_S
    guest.messages.expire()
    assert await reading is None
    assert (guest.failed_writes, guest.rung) == (1, [b"vector:0"])
    assert guest.messages.expires_s is None
    # What it says after that is an answer to nothing.
    guest.answer(3, DMA_READ, bytes(20))


def test_one_that_does_not_say_what_its_messages_look_like_has_them_as_specified():
    guest = Guest()
    with pytest.raises(MemoryBusyError):
        guest.written()
    guest.now = TIMEOUT_S
    guest.messages.expire()
    guest.written()
    assert guest.asked[-1] == (DMA_WRITE, 8, 8)


def test_only_so_much_waits_for_answers(guest: Guest):
    for _ in range(MAX_UNANSWERED):
        guest.written()
    with pytest.raises(MemoryBusyError):
        guest.written()
    guest.answer(2, DMA_WRITE)
    guest.written()


async def test_a_question_whose_identifier_comes_again_has_no_answer(guest: Guest):
    """A VMM answers all but one: identifiers have 16 bits."""
    guest.now = 1.0
    reading = asyncio.create_task(guest.memory.fetch(0, 4))
    await settle()
    guest.now = 2.0
    guest.written()
    guest.said += [b""] * 0xFFFE
    guest.now = 3.0
    guest.written()
    assert await reading is None
    # Those that are left are given up in the order in which they were asked.
    assert guest.messages.expires_s == 2.0 + TIMEOUT_S
    guest.answer(2, DMA_WRITE, flags=REPLY | FAILED)
    assert guest.failed_writes == 1


def test_a_write_that_the_vmm_refuses_is_counted(guest: Guest):
    guest.written()
    guest.answer(2, DMA_WRITE, flags=REPLY | FAILED)
    assert guest.failed_writes == 1


def test_an_interrupt_waits_for_the_writes_before_it_and_for_no_others(guest: Guest):
    guest.messages.ring(b"vector:0")
    assert guest.rung == [b"vector:0"]
    guest.written()
    guest.written()
    for _ in range(3):
        guest.messages.ring(b"vector:1")
    guest.written()
    guest.messages.ring(b"vector:1")
    guest.answer(3, DMA_WRITE)
    assert guest.rung == [b"vector:0"]
    guest.answer(2, DMA_WRITE)
    assert guest.rung == [b"vector:0", b"vector:1"]
    guest.answer(4, DMA_WRITE)
    assert guest.rung == [b"vector:0", b"vector:1", b"vector:1"]


def test_interrupts_of_one_vector_that_wait_become_two_at_most(guest: Guest):
    """A VMM answers all but the oldest: what waits for that does not grow."""
    guest.written()
    guest.messages.ring(b"vector:1")
    for number in range(3, 100):
        guest.written()
        guest.messages.ring(b"vector:1")
        guest.answer(number, DMA_WRITE)
    assert guest.rung == []
    guest.written()
    guest.messages.ring(b"vector:1")
    guest.answer(2, DMA_WRITE)
    assert guest.rung == [b"vector:1"]
    guest.answer(100, DMA_WRITE)
    assert guest.rung == [b"vector:1"] * 2


def test_an_answer_to_a_predecessors_write_tells_of_all_interrupts(guest: Guest):
    guest.device.interrupts.set(3)
    guest.answer(77, DMA_WRITE)
    assert guest.rung == [b"vector:3"]


def test_an_answer_to_another_question_is_none(guest: Guest):
    guest.written()
    guest.answer(2, DMA_READ, bytes(16))
    assert guest.failed_writes == 0
    guest.answer(2, DMA_WRITE, flags=REPLY | FAILED)
    assert guest.failed_writes == 1


async def test_what_is_asked_when_the_vmm_goes_has_no_answer(guest: Guest):
    reading = asyncio.create_task(guest.memory.fetch(0, 4))
    await settle()
    guest.device.gone()
    assert await reading is None


async def test_what_is_asked_when_the_connection_breaks_is_asked_again(guest: Guest):
    reading = asyncio.create_task(guest.memory.fetch(0, 4))
    await settle()
    guest.memory.messages = None
    guest.messages.end()
    with pytest.raises(MemoryBusyError):
        await reading


async def test_what_is_unmapped_while_the_rest_is_asked_for_was_read_before(guest: Guest):
    mapped = SharedMemory(PAGE)
    mapped.content[:4] = b"good"
    guest.device.handle(Message(2, DMA_MAP, 0, struct.pack("<IIQQQ", 32, 3, 0, PAGE, PAGE)), [mapped.descriptor])
    reading = asyncio.create_task(guest.memory.fetch(PAGE - 4, 8))
    await asyncio.sleep(0)
    guest.memory.remove(PAGE, PAGE)
    await settle()
    guest.answer(2, DMA_READ, bytes(16) + b"very")
    assert await reading == b"verygood"
    mapped.close()


@pytest.mark.parametrize(
    "capabilities",
    [
        b"{",
        b"[" * 8000,
        b"[]",
        b'{"capabilities":7}',
        b'{"capabilities":{"max_data_xfer_size":255}}',
        b'{"capabilities":{"max_data_xfer_size":"4096"}}',
        b'{"capabilities":{"max_data_xfer_size":true}}',
        b'{"capabilities":{"max_data_xfer_size":1e9}}',
    ],
)
def test_capabilities_that_can_not_be_are_refused(capabilities: bytes):
    guest = GuestPort("nvme")
    guest.device.handle(Message(1, VERSION, 0, struct.pack("<HH", 0, 1) + capabilities + b"\0"), [])
    _, _, _, flags, error = HEADER.unpack_from(guest.last_reply)
    assert (flags, error) == (REPLY | FAILED, 22)


@pytest.mark.parametrize("capabilities", [b"", b"\0", b"{}", b'{"capabilities":{"max_data_xfer_size":256}}\0more'])
def test_capabilities_may_be_few(capabilities: bytes):
    guest = GuestPort("nvme")
    guest.device.handle(Message(1, VERSION, 0, struct.pack("<HH", 0, 1) + capabilities), [])
    assert HEADER.unpack_from(guest.last_reply)[3] == REPLY
