"""The registers of virtio-net, as its data sheet (docs/device-model.md) and virtio 1.2, 4.1.4, say."""

from collections.abc import Mapping

import pytest
from support.model_rig import MEMORY_ADDRESS, Rig
from support.virtio_bench import BARS, FEATURES, NO_VECTOR, Bench, at

from hostd.models import create_model, virtio
from hostd.models.ethernet import is_group, mac_address
from hostd.models.virtio_net import (
    COMMON,
    CONFIGURATION,
    COUNTERS,
    ISR,
    MSIX_PENDING,
    MSIX_TABLE,
    NOTIFY,
    RECEIVE,
    TRANSMIT,
)
from vfleet.errors import Reason, VfleetError

MAC = bytes.fromhex("324455667788")  # the identity's last 48 bits, locally administered


@pytest.fixture
def bench() -> Bench:
    return Bench(Rig("virtio-net", BARS))


def test_after_a_reset(bench: Bench) -> None:
    assert bench.status == 0
    assert bench.common(virtio.NUMBER_OF_QUEUES, 2) == 2
    assert bench.common(virtio.CONFIGURATION_VECTOR, 2) == NO_VECTOR
    assert bench.common(virtio.CONFIGURATION_GENERATION, 1) == 0
    for index in (RECEIVE, TRANSMIT):
        bench.set_common(virtio.QUEUE_SELECT, index, 2)
        assert bench.common(virtio.QUEUE_SIZE, 2) == 256
        assert bench.common(virtio.QUEUE_VECTOR, 2) == NO_VECTOR
        assert bench.common(virtio.QUEUE_ENABLE, 2) == 0
        assert bench.common(virtio.QUEUE_NOTIFY_OFFSET, 2) == index
    assert [bench.rig.read(MSIX_TABLE + 16 * vector + 12, 4) for vector in range(3)] == [1, 1, 1]
    assert not bench.rig.step()


def test_features_are_two_halves(bench: Bench) -> None:
    halves = []
    for select in (0, 1, 2, 0xFFFF_FFFF):
        bench.set_common(virtio.DEVICE_FEATURE_SELECT, select, 4)
        halves.append(bench.common(virtio.DEVICE_FEATURE, 4))
    assert halves == [FEATURES & 0xFFFF_FFFF, FEATURES >> 32, 0, 0]


@pytest.mark.parametrize(
    ("features", "accepted"),
    [
        (FEATURES, True),
        (virtio.VERSION_1, True),
        (FEATURES & ~virtio.VERSION_1, False),
        (0, False),
        (FEATURES | 1 << 15, False),
        (FEATURES | 1 << 28, False),
        (FEATURES | 1 << 63, False),
    ],
)
def test_features_are_accepted_if_all_were_offered(bench: Bench, features: int, accepted: bool) -> None:
    status = bench.negotiate(features)
    assert bool(status & virtio.FEATURES_OK) == accepted
    assert bool(bench.set_status(0x0F) & virtio.DRIVER_OK) == accepted


def test_features_are_fixed_once_accepted(bench: Bench) -> None:
    bench.negotiate()
    bench.set_common(virtio.DRIVER_FEATURE, 0, 4)
    assert bench.common(virtio.DRIVER_FEATURE, 4) == FEATURES >> 32
    bench.set_status(0)
    assert bench.common(virtio.DRIVER_FEATURE, 4) == 0


def test_status_bits_are_added_and_only_a_reset_clears_them(bench: Bench) -> None:
    bench.negotiate()
    assert bench.set_status(virtio.ACKNOWLEDGE) == 0x0B
    assert bench.set_status(0x8F | virtio.DEVICE_NEEDS_RESET) == 0x8F
    assert bench.set_status(0) == 0


def test_a_queue_is_set_up_before_it_is_enabled(bench: Bench) -> None:
    bench.bind()
    bench.set_common(virtio.QUEUE_SELECT, TRANSMIT, 2)
    shown = {register: bench.common(register, 8) for register in (0x20, 0x28, 0x30)}
    assert shown == {0x20: at(0x4000), 0x28: at(0x5000), 0x30: at(0x6000)}
    for register, length in ((0x18, 2), (0x20, 4), (0x24, 4), (0x28, 8), (0x30, 4), (0x1C, 2)):
        bench.set_common(register, 4 if register == 0x18 else 0, length)
    assert {register: bench.common(register, 8) for register in shown} == shown
    assert bench.common(virtio.QUEUE_SIZE, 2) == 8
    assert bench.common(virtio.QUEUE_ENABLE, 2) == 1


@pytest.mark.parametrize(("size", "taken"), [(1, 1), (2, 2), (256, 256), (0, 256), (3, 256), (512, 256), (0xFFFF, 256)])
def test_a_queue_has_a_power_of_two_of_entries(bench: Bench, size: int, taken: int) -> None:
    bench.set_common(virtio.QUEUE_SIZE, size, 2)
    assert bench.common(virtio.QUEUE_SIZE, 2) == taken


def test_an_address_can_be_written_whole(bench: Bench) -> None:
    bench.set_common(virtio.QUEUE_DEVICE, 0x1122_3344_5566_7788, 8)
    assert bench.common(virtio.QUEUE_DEVICE + 4, 4) == 0x1122_3344


def test_a_queue_is_not_enabled_before_features_are_ok(bench: Bench) -> None:
    bench.set_common(virtio.QUEUE_ENABLE, 1, 2)
    assert bench.common(virtio.QUEUE_ENABLE, 2) == 0


@pytest.mark.parametrize("select", [2, 0xFFFF])
def test_a_queue_that_there_is_not_has_no_size(bench: Bench, select: int) -> None:
    bench.negotiate()
    before = bench.rig.read(COMMON, 4)
    bench.set_common(virtio.QUEUE_SELECT, select, 2)
    assert [bench.common(register, 2) for register in range(0x18, 0x3C, 2)] == [0] * 18
    for register in range(0x18, 0x3C, 2):
        bench.set_common(register, 1, 2)
    assert bench.common(virtio.QUEUE_SIZE, 2) == 0
    assert bench.rig.read(COMMON, 4) == before


@pytest.mark.parametrize("register", [virtio.CONFIGURATION_VECTOR, virtio.QUEUE_VECTOR])
def test_a_vector_reads_back_if_there_is_one(bench: Bench, register: int) -> None:
    for vector, taken in ((0, 0), (2, 2), (3, NO_VECTOR), (1, 1), (NO_VECTOR, NO_VECTOR)):
        bench.set_common(register, vector, 2)
        assert bench.common(register, 2) == taken


def test_one_queue_can_be_reset_and_enabled_anew(bench: Bench) -> None:
    bench.bind()
    bench.send(b"a" * 60)
    bench.rig.run()
    bench.set_common(virtio.QUEUE_SELECT, TRANSMIT, 2)
    bench.set_common(virtio.QUEUE_RESET, 1, 2)
    assert bench.common(virtio.QUEUE_RESET, 2) == 0
    assert bench.common(virtio.QUEUE_ENABLE, 2) == 0
    assert bench.common(virtio.QUEUE_SIZE, 2) == 256
    bench.rig.memory[0x4000:0x8000] = bytes(0x4000)
    again = Bench(bench.rig)
    again.set_queue(again.transmit, 2)
    again.send(b"b" * 60, kick=False)
    bench.rig.run()
    assert list(bench.rig.frames) == [b"a" * 60, b"b" * 60], "a queue that is enabled anew is looked at"
    assert again.status == 0x0F


def test_a_queue_is_not_reset_unless_that_was_negotiated(bench: Bench) -> None:
    bench.negotiate(FEATURES & ~virtio.RING_RESET)
    bench.set_queue(bench.transmit, 2)
    bench.set_common(virtio.QUEUE_RESET, 1, 2)
    assert bench.common(virtio.QUEUE_ENABLE, 2) == 1


def test_the_configuration_has_mac_address_and_link(bench: Bench) -> None:
    found = bytes(bench.rig.read(CONFIGURATION + index, 1) for index in range(10))
    assert found == MAC + b"\x01\x00" + bytes(2)
    assert bench.rig.read(CONFIGURATION, 8) == int.from_bytes(found[:8], "little")
    assert bench.rig.write(CONFIGURATION, 0, 4)
    assert bench.rig.read(CONFIGURATION, 4) == int.from_bytes(MAC[:4], "little")


@pytest.mark.parametrize("identity", [1, 0x1122_3344_5566_7788, (1 << 64) - 1])
def test_a_mac_address_is_locally_administered_and_of_one_station(identity: int) -> None:
    mac = mac_address(identity)
    assert len(mac) == 6
    assert mac[0] & 2
    assert not is_group(mac)
    assert mac[1:] == identity.to_bytes(8, "big")[3:]


def test_group_addresses() -> None:
    assert is_group(b"\xff" * 6)
    assert is_group(bytes.fromhex("01005e000001"))


def test_msix_is_in_bar_0(bench: Bench) -> None:
    bench.unmask(1)
    assert [bench.rig.read(MSIX_TABLE + 16 + offset, 4) for offset in (0, 4, 8, 12)] == [0xFEE0_0000, 0, 1, 0]
    assert bench.rig.read(MSIX_TABLE + 16, 2) == 0, "of 4 or 8 bytes"
    assert bench.rig.read(MSIX_PENDING, 8) == 0


@pytest.mark.parametrize("offset", [0x8000, 0x10_0000, 0xFFFF_FFF8])
def test_outside_the_bars_nobody_claims_an_access(bench: Bench, offset: int) -> None:
    assert bench.rig.read(offset, 8) is None
    assert not bench.rig.write(offset, 0, 8)


@pytest.mark.parametrize(
    "offset", [0x3C, 0x800, ISR + 4, CONFIGURATION + 8, COUNTERS + 16, NOTIFY, NOTIFY + 8, 0x4030, 0x4808, 0x7FFC]
)
def test_where_no_register_is_bar_0_reads_as_zero_and_takes_nothing(bench: Bench, offset: int) -> None:
    bench.bind()
    before = bytes(bench.rig.image)
    assert bench.rig.read(offset, 4) == 0
    if not NOTIFY <= offset < NOTIFY + 8:
        assert bench.rig.write(offset, 0xFFFF_FFFF, 4)
    assert bench.rig.image == before


def test_a_larger_bar_0_has_nothing_behind_the_registers() -> None:
    rig = Rig("virtio-net", {0: 65536})
    assert rig.read(0x8000, 8) == 0
    assert rig.read(0x10000, 8) is None


@pytest.mark.parametrize("length", [1, 2, 4, 8, 16, 64, 4096])
def test_every_legal_access_to_every_register_is_answered(bench: Bench, length: int) -> None:
    bench.bind()
    for offset in range(0, 0x8000, length):
        assert bench.rig.read(offset, length) is not None
        assert bench.rig.write(offset, (1 << 8 * length) - 1, length)
    bench.rig.run()


def test_a_notification_before_the_driver_is_ok_counts_later(bench: Bench) -> None:
    bench.negotiate()
    bench.set_queue(bench.transmit, NO_VECTOR)
    bench.send(b"early".ljust(60))
    bench.rig.run()
    assert not bench.rig.frames
    bench.set_status(0x0F)
    bench.rig.run()
    assert len(bench.rig.frames) == 1


def test_a_reset_by_the_driver_stops_the_queues(bench: Bench) -> None:
    bench.bind()
    assert bench.rig.receive(bytes(60))
    bench.send(bytes(60))
    bench.set_status(0)
    assert not bench.rig.step()
    bench.bind()
    bench.give_buffer(0)
    bench.rig.run()
    assert bench.receive.take() == [], "what came before the reset is gone"


@pytest.mark.parametrize(
    "bars",
    [{}, {2: 0x8000}, {0: 0x4000}, {0: 0x8000, 2: 4096}],
)
def test_bars_that_do_not_do_are_refused(bars: Mapping[int, int]) -> None:
    with pytest.raises(
        VfleetError, match=r"bars is .*; expected BAR 0, of 32768 bytes at least, and no other"
    ) as caught:
        create_model("virtio-net", 1, bars)
    assert caught.value.reason is Reason.INVALID_FIELD


def test_its_sections_cover_all_that_it_has() -> None:
    model = create_model("virtio-net", 1, BARS)
    ends = 0
    for section in model.sections:
        assert section.start >= ends
        assert section.start % 4096 == section.length % 4096 == 0
        ends = section.start + section.length
    assert ends == 0x8000 + model.private_bytes
    assert model.local_memory == range(0)
    assert MEMORY_ADDRESS % 4096 == 0
