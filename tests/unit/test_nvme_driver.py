"""The NVMe workload's driver against the model in the rig: what it counts, refuses, and how it goes on after a kill."""

import asyncio
import struct
import sys
from collections.abc import Callable, Coroutine
from random import Random
from types import FrameType

import pytest
from support.bus_master_rig import Rig
from support.nvme_host import IDENTITY, MAIN_ADDRESS
from support.rig_port import CountingTally, RigPort

from hostd.models import create_model
from hostd.models import nvme_layout as layout
from hostd.models.base import BusMaster
from hostd.models.nvme import Nvme
from hostd.workloads import nvme as workload
from hostd.workloads.nvme import NvmeDriver
from hostd.workloads.nvme_script import NvmeScript
from vfleet.address import PAGE_BYTES, bar_span
from vfleet.errors import Reason, VfleetError
from vfleet.v1.driver_service_pb2 import WorkloadOptions

NAMESPACE_BYTES = 1 << 20
BARS = {0: 16 << 10, 2: NAMESPACE_BYTES}
MAIN_BYTES = 2 << 20


def new_model() -> BusMaster:
    model = create_model("nvme", IDENTITY, BARS)
    assert isinstance(model, Nvme)
    return model


class Bench:
    """A driver with its device, and what it told of."""

    def __init__(self, random: Random | None = None, **options: int) -> None:
        self.rig = Rig(new_model, bar_span(BARS) + Nvme.private_bytes, MAIN_BYTES, MAIN_ADDRESS)
        self.options = WorkloadOptions(**options)
        self.random = random
        self.tally = CountingTally()
        self.new_driver()

    def new_driver(self) -> None:
        """Make the driver anew over its main memory."""
        self.port = RigPort(self.rig, bar_span(BARS), self.random)
        self.driver = NvmeDriver(self.port, self.tally, self.options)

    def start(self) -> None:
        asyncio.run(self.driver.start())

    def run_for(self, seconds: float) -> None:
        self.port.stop_at = self.port.clock_s + seconds
        asyncio.run(self.driver.run())

    def completion(self, number: int) -> int:
        """Where an entry of the I/O completion queue lies in main memory."""
        return workload._COMPLETION * PAGE_BYTES + number % workload._ENTRIES * 16


@pytest.mark.parametrize("window", [0, 1, 3, 64])
def test_it_reads_back_what_it_wrote(window: int) -> None:
    bench = Bench(Random(window), window=window, seed=5)
    bench.start()
    bench.run_for(0.4)
    assert bench.tally.wrong == []
    assert bench.tally.done >= 200
    pages = {bytes(bench.rig.image[start : start + 32]) for start in range(1 << 20, 2 << 20, PAGE_BYTES)}
    assert len(pages) > 80, "no two pages are alike"


def test_it_uses_the_part_of_the_namespace_that_it_is_told() -> None:
    bench = Bench(window=2, memory_offset_bytes=64 << 10, memory_bytes=8 << 10)
    bench.start()
    bench.run_for(0.2)
    start = 1 << 20
    used = {page for page in range(256) if any(bench.rig.image[start + page * PAGE_BYTES :][:PAGE_BYTES])}
    assert used == {16, 17}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"window": 65}, "options.window is 65; expected at most 64"),
        ({"memory_offset_bytes": 8}, "options.memory_offset_bytes is 8; expected a multiple of 4096"),
        ({"memory_offset_bytes": 2 << 20}, "options.memory_offset_bytes is 2097152; expected .*at most 1048576"),
        ({"memory_bytes": 512}, "options.memory_bytes is 512; expected a multiple of 4096"),
        ({"memory_bytes": 1 << 20, "memory_offset_bytes": 4096}, "options.memory_bytes is .*at most 1044480"),
        ({"memory_bytes": 8192, "window": 3}, "options.window is 3; expected at most the pages .*, 2"),
        ({"memory_offset_bytes": 1 << 20, "window": 3}, "options.window is 3; expected at most the pages .*, 0"),
    ],
)
def test_options_are_refused_that_cannot_be(options: dict[str, int], field: str) -> None:
    with pytest.raises(VfleetError, match=field) as error:
        Bench(**options).start()
    assert error.value.reason is Reason.INVALID_FIELD


def test_main_memory_must_be_large_enough() -> None:
    rig = Rig(new_model, bar_span(BARS) + Nvme.private_bytes, 64 << 10, MAIN_ADDRESS)
    with pytest.raises(VfleetError, match=r"main_memory_bytes is 65536; expected at least .* for this window"):
        NvmeDriver(RigPort(rig, bar_span(BARS)), CountingTally(), WorkloadOptions())


def test_another_device_is_refused() -> None:
    bench = Bench()
    bench.rig.image[layout.VS : layout.VS + 4] = b"\xff" * 4
    with pytest.raises(VfleetError, match="has version 0xffffffff; expected an NVMe controller"):
        bench.start()


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (layout.CAP, struct.pack("<Q", 1 << 37 | 31), "has queues of 32 entries; expected at least 128"),
        (layout.CAP, struct.pack("<Q", 1023), "expected an NVMe controller"),
    ],
)
def test_a_controller_that_cannot_do_is_refused(offset: int, data: bytes, message: str) -> None:
    bench = Bench()
    bench.rig.image[offset : offset + len(data)] = data
    with pytest.raises(VfleetError, match=message):
        bench.start()


def test_a_controller_that_never_gets_ready_is_told() -> None:
    bench = Bench()
    real, bench.rig.write = bench.rig.write, lambda offset, data: None  # type: ignore[method-assign]
    with pytest.raises(VfleetError, match="does not become ready"):
        bench.start()
    bench.rig.write = real  # type: ignore[method-assign]


def test_a_controller_that_fails_is_told() -> None:
    bench = Bench()
    bench.rig.faults.add(MAIN_ADDRESS + workload._ADMIN_SUBMISSION * PAGE_BYTES)
    with pytest.raises(VfleetError, match="does not complete admin command 0x6"):
        bench.start()
    bench = Bench(window=2)
    bench.start()
    bench.rig.faults.add(MAIN_ADDRESS + workload._SUBMISSION * PAGE_BYTES)
    with pytest.raises(VfleetError, match="has failed: its status is 0x3"):
        bench.run_for(1)


def test_an_admin_command_that_ends_with_an_error_is_told() -> None:
    bench = Bench()
    real = bench.rig.model.work

    def spoiled(memory: memoryview):
        """Every command is one that there isn't."""
        start = workload._ADMIN_SUBMISSION * PAGE_BYTES
        bench.rig.main[start] = 0x7F
        return real(memory)

    bench.rig.model.work = spoiled  # type: ignore[method-assign]
    with pytest.raises(VfleetError, match="ended admin command 0x6 with status 0x4001"):
        bench.start()


def test_it_needs_main_memory_that_is_set_up() -> None:
    bench = Bench()
    with pytest.raises(VfleetError, match="main memory is not that of an NVMe driver with this window"):
        bench.run_for(1)
    bench.start()
    bench.options.window = 3
    bench.new_driver()
    with pytest.raises(VfleetError, match="main memory is not that of an NVMe driver with this window"):
        bench.run_for(1)


def test_a_rate_is_kept() -> None:
    bench = Bench(window=4, accesses_per_second=100)
    bench.start()
    bench.run_for(3.0)
    assert bench.tally.wrong == []
    assert 280 <= bench.tally.done <= 305


def spoil(bench: Bench, spoiler: Callable[[], None], after: int) -> None:
    """Let something go wrong in main memory once, after so many interrupts."""
    real = bench.rig.step

    def step() -> bool:
        is_more = real()
        if bench.rig.interrupts[1] >= after:
            bench.rig.step = real  # type: ignore[method-assign]
            spoiler()
        return is_more

    bench.rig.step = step  # type: ignore[method-assign]


def test_content_that_is_wrong_is_a_mismatch() -> None:
    bench = Bench(window=1)
    bench.start()
    start = 1 << 20

    def flip() -> None:
        for page in range(256):
            bench.rig.image[start + page * PAGE_BYTES + 4095] ^= 1

    spoil(bench, flip, 9)
    bench.run_for(0.1)
    assert len(bench.tally.wrong) >= 1
    assert all(found.startswith("mismatch read of ") for found in bench.tally.wrong)


def test_a_read_that_brings_nothing_is_a_mismatch() -> None:
    """The content is the same as last time in the buffer only if the device has put it there."""
    bench = Bench(window=1)
    bench.start()
    real = bench.rig._dma_write
    buffers = range(MAIN_ADDRESS + workload._LANES * PAGE_BYTES, MAIN_ADDRESS + MAIN_BYTES)
    bench.rig._dma_write = lambda write: None if write.address in buffers else real(write)  # type: ignore[method-assign]
    bench.run_for(0.05)
    assert bench.tally.wrong
    assert all(found.startswith("mismatch read of ") for found in bench.tally.wrong)


def test_a_completion_that_comes_twice_is_repeated() -> None:
    bench = Bench(window=1)
    bench.start()

    def twice() -> None:
        """The last completion again, in the next entry, as a controller would that did a command twice."""
        number = bench.driver._taken()
        memory = bench.rig.main
        memory[bench.completion(number + 1) : bench.completion(number + 1) + 16] = memory[
            bench.completion(number) : bench.completion(number) + 16
        ]
        state = bench.rig.model.layout  # type: ignore[attr-defined]
        queue = layout.CompletionQueue(*state.completion.get(memoryview(bench.rig.image), 1))
        offset, data = state.completion.put(1, *queue._replace(tail=queue.tail + 1))
        bench.rig.image[offset : offset + len(data)] = data

    spoil(bench, twice, 5)
    bench.run_for(0.1)
    assert bench.tally.wrong == ["repeated completion of command 0x0 of queue 1, which is not under way"]
    assert bench.tally.done > 50, "it goes on"


def test_a_status_that_is_not_success_is_an_error() -> None:
    bench = Bench(window=1)
    bench.start()

    def fail() -> None:
        bench.rig.main[bench.completion(bench.driver._taken()) + 14] |= 4

    spoil(bench, fail, 6)
    bench.run_for(0.1)
    (wrong,) = bench.tally.wrong
    assert wrong.startswith(("error read of ", "error write of "))
    assert wrong.endswith("status 0x2")


def test_commands_that_never_complete_are_lost() -> None:
    bench = Bench(window=3)
    bench.start()

    def stall() -> None:
        """The controller forgets what it has fetched."""
        bench.rig.step = lambda: False  # type: ignore[method-assign]

    spoil(bench, stall, 6)
    with pytest.raises(VfleetError, match="does not complete its commands"):
        bench.run_for(1)
    assert 1 <= len(bench.tally.wrong) <= 3
    assert all(found.startswith("lost command ") for found in bench.tally.wrong)


def test_an_interrupt_that_never_comes_is_lost() -> None:
    bench = Bench(window=1)
    bench.start()
    real = bench.rig._dma_write
    dropped: list[int] = []

    def drop(write) -> None:
        if write.address == bench.port.interrupt_address and not dropped and bench.rig.interrupts[1] > 5:
            dropped.append(1)
            return
        real(write)

    bench.rig._dma_write = drop  # type: ignore[method-assign]
    bench.run_for(60.3)
    assert bench.tally.wrong == ["lost an interrupt"]
    assert bench.tally.done > 100, "it goes on"


class KilledError(BaseException):
    """The daemon is no more."""


def until_line(most: int, work: Callable[[], Coroutine[object, object, None]]) -> bool:
    """Run until it ends or has executed so many lines of the driver; then it is killed. Return whether it was."""
    lines = 0

    def trace(frame: FrameType, event: str, _: object):
        nonlocal lines
        if frame.f_code.co_filename != workload.__file__:
            return None
        if event == "line":
            lines += 1
            if lines > most:
                raise KilledError
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        asyncio.run(work())
    except KilledError:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("seed", range(8))
def test_it_goes_on_after_being_killed_at_any_line(seed: int) -> None:
    random = Random(seed)
    bench = Bench(random, window=random.choice((1, 4, 16)))
    bench.start()
    for _ in range(25):
        killed = until_line(random.randrange(1, 1500), bench.driver.run)
        assert killed
        bench.port.die()
        bench.rig.run_with_moves(random) if random.random() < 0.5 else bench.rig.step()
        bench.new_driver()
    before = bench.driver._completed()
    bench.run_for(0.1)
    assert bench.tally.wrong == []
    assert bench.tally.resumed_at == before
    assert bench.driver._issued() == bench.driver._completed() > before


def test_a_start_after_a_run_begins_anew() -> None:
    bench = Bench(window=4)
    for _ in range(2):
        bench.start()
        bench.run_for(0.1)
        bench.new_driver()
    assert bench.tally.wrong == []
    assert bench.tally.resumed_at == 0


@pytest.mark.parametrize(("size", "lanes"), [(256 << 10, 16), (1 << 20, 16), (12 << 20, 64), (4096, 1), (5 * 4096, 2)])
def test_the_script_reads_what_was_written_last_there(size: int, lanes: int) -> None:
    script = NvmeScript(WorkloadOptions(), size, lanes, 7)
    for lane in {0, lanes - 1}:
        written: dict[int, bytes] = {}
        for number in range(600):
            operation = script.operation(lane, number)
            assert 0 <= operation.page < operation.page + operation.pages <= size // PAGE_BYTES
            content = script.content(operation)
            pages = range(operation.page, operation.page + operation.pages)
            parts = [content[index * PAGE_BYTES : (index + 1) * PAGE_BYTES] for index in range(operation.pages)]
            if operation.is_write:
                assert not set(parts) & set(written.values()), "no content is written twice"
                written |= dict(zip(pages, parts, strict=True))
            else:
                assert [written[page] for page in pages] == parts


def test_lanes_do_not_meet() -> None:
    script = NvmeScript(WorkloadOptions(), 1 << 20, 16, 7)
    owners: dict[int, int] = {}
    for lane in range(16):
        for number in range(200):
            operation = script.operation(lane, number)
            for page in range(operation.page, operation.page + operation.pages):
                assert owners.setdefault(page, lane) == lane
