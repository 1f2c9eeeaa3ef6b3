"""The NVMe controller's registers, doorbells and interrupts, and how it is enabled, reset and shut down."""

import struct

import pytest
from support.nvme_host import BARS, ENABLE, IDENTITY, MAIN_ADDRESS, PAGE, NvmeHost

from hostd.models import create_model
from hostd.models import nvme_admin as admin
from hostd.models import nvme_commands as io
from hostd.models import nvme_layout as layout
from hostd.models.nvme_completion import DATA_TRANSFER_ERROR
from vfleet.errors import VfleetError

READY, FATAL = 1, 2
EVENT_INVALID_DOORBELL = 0x0001_0000
EVENT_INVALID_VALUE = 0x0001_0100


@pytest.fixture
def host() -> NvmeHost:
    return NvmeHost()


@pytest.fixture
def enabled(host: NvmeHost) -> NvmeHost:
    host.enable()
    return host


def test_the_bars_must_be_registers_and_a_namespace() -> None:
    for bars in ({0: 16 << 10}, {0: 8 << 10, 2: PAGE}, {0: 16 << 10, 2: PAGE, 4: PAGE}, {2: PAGE}):
        with pytest.raises(VfleetError, match=r"bars is .*; expected BAR 0 of at least 16384 bytes"):
            create_model("nvme", IDENTITY, bars)


def test_capabilities_after_a_reset(host: NvmeHost) -> None:
    capabilities = host.register(layout.CAP, 8)
    assert capabilities == host.register(layout.CAP) | host.register(layout.CAP + 4) << 32
    assert capabilities & 0xFFFF == 1023  # entries of a queue, less one
    assert capabilities >> 16 & 1  # queues are contiguous
    assert capabilities >> 24 & 0xFF == 40  # half seconds until ready, at most
    assert capabilities >> 32 & 0xF == 0  # doorbells lie side by side
    assert capabilities >> 37 & 1  # the NVM command set
    assert capabilities >> 48 == 0  # pages of 4 KiB only
    assert host.register(layout.VS) == 0x10400
    for register in (layout.CC, layout.CSTS, layout.NSSR, layout.AQA, 0x38, 0x3C):
        assert host.register(register) == 0
    assert host.rig.read(layout.MSIX_TABLE, 8) == bytes(8)
    assert host.register(layout.MSIX_TABLE + 12) == 1, "vectors are masked after a reset"


def test_queue_addresses_are_written_in_halves_or_whole(host: NvmeHost) -> None:
    for register in (layout.ASQ, layout.ACQ):
        host.set_register(register, 0xFFFFF123)
        host.set_register(register + 4, 0x12345678)
        assert host.register(register, 8) == 0x12345678_FFFFF000
        host.set_register(register, 0xABCDEF01_23456789, 8)
        assert host.register(register, 8) == 0xABCDEF01_23456000
    host.set_register(layout.AQA, 0xFFFFFFFF)
    assert host.register(layout.AQA) == 0x0FFF0FFF


@pytest.mark.parametrize("register", [layout.CAP, layout.VS, layout.CSTS, layout.NSSR, 0x38, 0x50, 0xFFC, 0x3FF8])
def test_what_can_only_be_read_stays(host: NvmeHost, register: int) -> None:
    before = bytes(host.rig.image)
    host.set_register(register, 0xFFFFFFFF)
    assert host.rig.image == before


@pytest.mark.parametrize("length", [1, 2, 8, 16, 4096])
def test_a_write_of_another_size_changes_nothing(enabled: NvmeHost, length: int) -> None:
    before = bytes(enabled.rig.image)
    for offset in (layout.CAP, layout.DOORBELLS, layout.MSIX_TABLE if length not in (4, 8) else 0x40):
        enabled.rig.write(offset, b"\xff" * length)
    assert enabled.rig.image == before


def test_reads_of_any_size_have_an_answer(enabled: NvmeHost) -> None:
    for length in (1, 2, 4, 8, 4096):
        for offset in (0, layout.DOORBELLS, layout.MSIX_TABLE, layout.MSIX_PENDING):
            assert len(enabled.rig.read(offset, length)) == length
    assert enabled.rig.read(0, 64)[layout.CSTS] == READY
    assert enabled.rig.read(layout.MSIX_TABLE, 1) == b"\xff"
    model, memory = enabled.model, memoryview(enabled.rig.image)
    hole = BARS[0] + PAGE
    assert model.read(memory, hole, 4) is None
    assert model.write(memory, hole, bytes(4)) is None


def test_the_namespace_is_bar_2(enabled: NvmeHost) -> None:
    start = enabled.model.local_memory.start
    enabled.rig.write(start + PAGE, b"directly".ljust(PAGE, b"."))
    enabled.create_queues()
    buffer = enabled.take_pages()
    assert enabled.io(io.READ, 8, 8, buffer).status == 0
    assert enabled.get(buffer, 8) == b"directly"
    assert enabled.rig.read(start + PAGE, 8) == b"directly"


def test_the_interrupt_mask_can_be_set_cleared_and_read(host: NvmeHost) -> None:
    host.set_register(layout.INTMS, 0b1100)
    host.set_register(layout.INTMC, 0b0100)
    assert host.register(layout.INTMS) == host.register(layout.INTMC) == 0b1000
    host.enable()
    host.disable()
    assert host.register(layout.INTMS) == 0


@pytest.mark.parametrize(
    ("sizes", "configuration"),
    [
        (0x000F0000, ENABLE),
        (0x0000000F, ENABLE),
        (0x000F000F, ENABLE | 1 << 7),
        (0x000F000F, ENABLE | 1 << 4),
        (0x000F000F, ENABLE | 1 << 11),
    ],
    ids=["one submission entry", "one completion entry", "page size", "command set", "arbitration"],
)
def test_a_configuration_that_cannot_be_is_fatal(host: NvmeHost, sizes: int, configuration: int) -> None:
    host.set_register(layout.AQA, sizes)
    host.set_register(layout.CC, configuration)
    assert host.register(layout.CSTS) == FATAL
    host.set_register(layout.CC, 0)
    assert host.register(layout.CSTS) == 0
    host.enable()
    assert host.command(admin.IDENTIFY, prp1=host.take_pages(), words=(1,)).status == 0


def test_the_admin_queue_stands_while_enabled(enabled: NvmeHost) -> None:
    before = bytes(enabled.rig.image)
    enabled.set_register(layout.AQA, 0)
    enabled.set_register(layout.ASQ, 0, 8)
    enabled.set_register(layout.ACQ + 4, 7)
    assert enabled.rig.image == before


def test_a_reset_ends_queues_commands_and_features(enabled: NvmeHost) -> None:
    enabled.create_queues()
    enabled.command(admin.SET_FEATURES, words=(admin.VOLATILE_WRITE_CACHE, 0))
    enabled.submit(0, admin.EVENT_REQUEST)
    enabled.rig.run()
    for _ in range(4):
        enabled.submit(1, io.READ, prp1=enabled.take_pages(), words=(0, 0, 7))
    enabled.rig.step()  # fetched
    enabled.disable()
    assert enabled.register(layout.CSTS) == 0
    assert not enabled.rig.run()
    state = enabled.model.layout
    assert state.core.get(memoryview(enabled.rig.image)) == (1, 0, 0, 0, 0, 0, 0, 0, 0)
    assert enabled.register(layout.MSIX_TABLE) != 0, "the vectors are the function's, not the controller's"
    enabled.enable()
    assert enabled.command(admin.GET_FEATURES, words=(admin.VOLATILE_WRITE_CACHE,)).result == 1
    enabled.create_queues()
    assert enabled.io(io.FLUSH, 0, 1).status == 0


def test_what_was_fetched_before_a_reset_is_not_taken_for_its_successor(host: NvmeHost) -> None:
    """The queue is set up again at the same place, with another command in it."""

    def set_up(feature: int) -> None:
        host._free = MAIN_ADDRESS
        host.enable()
        host.put(host.completion[0].base, bytes(PAGE))
        host.submit(0, admin.GET_FEATURES, identifier=feature, words=(feature,))

    set_up(1)
    begun = host.rig.begin()
    assert begun is not None
    host.disable()
    set_up(2)
    assert not host.rig.end(begun)
    host.rig.run()
    assert [completion.identifier for completion in host.poll()] == [2]


def test_shutdown_waits_for_commands_in_flight(enabled: NvmeHost) -> None:
    enabled.create_queues()
    enabled.submit(1, io.READ, prp1=enabled.take_pages(), words=(0, 0, 7))
    enabled.rig.step()
    enabled.submit(1, io.READ, prp1=enabled.take_pages(), words=(0, 0, 7))
    enabled.set_register(layout.CC, ENABLE | 1 << 14)
    assert enabled.register(layout.CSTS) == READY | 1 << 2
    enabled.rig.run()
    assert enabled.register(layout.CSTS) == READY | 2 << 2
    assert len(enabled.poll(1)) == 1, "what is not fetched when it shuts down stays in its queue"
    enabled.disable()
    assert enabled.register(layout.CSTS) == 0
    enabled.enable()


def test_shutdown_without_being_enabled(host: NvmeHost) -> None:
    host.set_register(layout.CC, 2 << 14)
    assert host.register(layout.CSTS) == 2 << 2


def test_a_queue_outside_main_memory_is_fatal(enabled: NvmeHost) -> None:
    enabled.create_queues()
    enabled.rig.faults.add(enabled.submission[1].base)
    enabled.submit(1, io.FLUSH)
    enabled.rig.run()
    assert enabled.register(layout.CSTS) == READY | FATAL
    enabled.submit(0, admin.GET_FEATURES, words=(1,))
    assert not enabled.rig.run(), "nothing goes on until the controller is reset"
    enabled.rig.faults.clear()
    enabled.disable()
    enabled.enable()
    enabled.create_queues()
    assert enabled.io(io.FLUSH, 0, 1).status == 0


def test_completions_outside_main_memory_harm_nobody(enabled: NvmeHost) -> None:
    base = 1 << 60
    created = enabled.command(admin.CREATE_COMPLETION_QUEUE, prp1=base, words=(15 << 16 | 1, 1))
    assert created.status == 0
    created = enabled.command(
        admin.CREATE_SUBMISSION_QUEUE, prp1=enabled.take_pages(), words=(15 << 16 | 1, 1 << 16 | 1)
    )
    assert created.status == 0
    enabled.set_register(layout.DOORBELLS + 8, 1)
    enabled.rig.run()
    assert enabled.rig.stray_writes == 1
    assert enabled.command(admin.GET_FEATURES, words=(1,)).status == 0


@pytest.mark.parametrize(
    ("offset", "value", "event"),
    [
        (8 * 9, 0, EVENT_INVALID_DOORBELL),
        (0xFFC, 0, EVENT_INVALID_DOORBELL),
        (8 * 2, 0, EVENT_INVALID_DOORBELL),
        (8 * 2 + 4, 0, EVENT_INVALID_DOORBELL),
        (8, 16, EVENT_INVALID_VALUE),
        (8, 0xFFFFFFFF, EVENT_INVALID_VALUE),
        (8 + 4, 1, EVENT_INVALID_VALUE),
        (8 + 4, 16, EVENT_INVALID_VALUE),
    ],
)
def test_a_bad_doorbell_is_told_by_an_event_and_does_nothing_else(
    enabled: NvmeHost, offset: int, value: int, event: int
) -> None:
    enabled.create_queues()
    identifier = enabled.submit(0, admin.EVENT_REQUEST)
    enabled.rig.run()
    enabled.set_register(layout.DOORBELLS + offset, value)
    enabled.rig.run()
    (completion,) = enabled.poll()
    assert (completion.identifier, completion.result) == (identifier, event)
    assert enabled.io(io.FLUSH, 0, 1).status == 0


def test_a_tail_may_not_pass_the_head_nor_go_back(enabled: NvmeHost) -> None:
    enabled.create_queues(entries=8)
    for _ in range(3):
        enabled.submit(1, io.FLUSH, ring=False)
    enabled.ring(1)
    for tail in (0, 1, 2):
        enabled.set_register(layout.DOORBELLS + 8, tail)
    enabled.rig.run()
    assert len(enabled.poll(1)) == 3
    assert enabled.model.layout.core.get(memoryview(enabled.rig.image))[6] == 2


def test_ringing_again_with_the_same_value_changes_nothing(enabled: NvmeHost) -> None:
    enabled.create_queues()
    enabled.io(io.FLUSH, 0, 1)
    before = bytes(enabled.rig.image)
    enabled.ring(1)
    enabled.set_register(layout.DOORBELLS + 12, enabled.completion[1].head)
    assert enabled.rig.image == before


def test_doorbells_of_a_controller_that_is_not_ready_do_nothing(host: NvmeHost) -> None:
    before = bytes(host.rig.image)
    host.set_register(layout.DOORBELLS, 1)
    assert host.rig.image == before


def test_a_masked_interrupt_comes_when_it_is_unmasked(enabled: NvmeHost) -> None:
    enabled.create_queues()
    enabled.set_register(layout.MSIX_TABLE + 16 + 12, 1)
    for _ in range(2):
        enabled.io(io.FLUSH, 0, 1)
    assert enabled.rig.interrupts[1] == 0
    assert enabled.register(layout.MSIX_PENDING, 8) == 1 << 1
    enabled.rig.move()
    enabled.set_register(layout.MSIX_TABLE + 16 + 12, 0)
    enabled.rig.run()
    assert enabled.rig.interrupts[1] == 1
    assert enabled.register(layout.MSIX_PENDING, 8) == 0


def test_a_queue_without_interrupts_makes_none(enabled: NvmeHost) -> None:
    base, queue = enabled.take_pages(), enabled.take_pages()
    assert enabled.command(admin.CREATE_COMPLETION_QUEUE, prp1=base, words=(15 << 16 | 1, 1 << 16 | 1)).status == 0
    assert enabled.command(admin.CREATE_SUBMISSION_QUEUE, prp1=queue, words=(15 << 16 | 1, 1 << 16 | 1)).status == 0
    enabled.set_register(layout.DOORBELLS + 8, 1)
    enabled.rig.run()
    assert struct.unpack("<H", enabled.get(base + 14, 2))[0] & 1, "completed"
    assert enabled.rig.interrupts[1] == 0


def test_an_interrupt_comes_after_its_completion_and_the_data_before(enabled: NvmeHost) -> None:
    enabled.create_queues()
    buffer = enabled.take_pages()
    enabled.submit(1, io.READ, prp1=buffer, words=(0, 0, 7))
    enabled.rig.step()
    work = enabled.model.work(memoryview(enabled.rig.image))
    assert work is not None
    sends = enabled.model.finish(memoryview(enabled.rig.image), work, []).sends
    assert [send.address for send in sends] == [buffer, enabled.completion[1].base, 0xFEE00000]  # type: ignore[union-attr]


def test_a_fault_of_data_is_an_error_of_its_command_alone(enabled: NvmeHost) -> None:
    enabled.create_queues()
    good, bad = enabled.take_pages(), enabled.take_pages()
    enabled.rig.faults.add(bad)
    enabled.put(good, b"good".ljust(PAGE, b"!"))
    identifiers = [
        enabled.submit(1, io.WRITE, prp1=good if index % 2 else bad, words=(8 * index, 0, 7)) for index in range(6)
    ]
    enabled.rig.run()
    codes = {completion.identifier: completion.status for completion in enabled.poll(1)}
    assert codes == {
        identifier: 0 if index % 2 else DATA_TRANSFER_ERROR for index, identifier in enumerate(identifiers)
    }
    for index in range(6):
        expected = b"good".ljust(PAGE, b"!") if index % 2 else bytes(PAGE)
        assert enabled.medium[index * PAGE : (index + 1) * PAGE] == expected


def test_frames_are_dropped(enabled: NvmeHost) -> None:
    step = enabled.model.receive(memoryview(enabled.rig.image), bytes(60))
    assert step is not None
    assert (*step.stores, *step.sends) == ()
