"""The NVMe controller's admin commands: what they do, and how they are refused."""

import struct

import pytest
from support.nvme_host import IDENTITY, NAMESPACE_BYTES, PAGE, NvmeHost

from hostd.models import nvme_admin as admin
from hostd.models import nvme_commands as io
from hostd.models import nvme_completion as status
from hostd.models import nvme_layout as layout

ALL = 0xFFFFFFFF


@pytest.fixture
def host() -> NvmeHost:
    found = NvmeHost()
    found.enable()
    return found


def identify(host: NvmeHost, structure: int, namespace: int = 0) -> bytes:
    buffer = host.take_pages()
    assert host.command(admin.IDENTIFY, namespace=namespace, prp1=buffer, words=(structure,)).status == 0
    return host.get(buffer, PAGE)


def create_completion_queue(
    host: NvmeHost, queue: int = 1, last: int = 15, prp1: int = 0, flags: int = 1, vector: int = 1
):
    return host.command(
        admin.CREATE_COMPLETION_QUEUE, prp1=prp1, words=(last << 16 | queue, vector << 16 | flags)
    ).status


def create_submission_queue(
    host: NvmeHost, queue: int = 1, last: int = 15, prp1: int = 0, flags: int = 1, completion: int = 1
):
    words = (last << 16 | queue, completion << 16 | flags)
    return host.command(admin.CREATE_SUBMISSION_QUEUE, prp1=prp1, words=words).status


def test_identify_controller(host: NvmeHost) -> None:
    data = identify(host, 1)
    assert data[4:24] == b"1122334455667788    "
    assert data[24:35] == b"vfleet NVMe"
    assert data[77] == 5  # transfers of 2**5 pages
    assert struct.unpack_from("<I", data, 80)[0] == 0x10400
    assert data[111] == 1  # an I/O controller
    assert (data[512], data[513]) == (0x66, 0x44)
    assert struct.unpack_from("<I", data, 516)[0] == 1  # one namespace
    assert struct.unpack_from("<H", data, 520)[0] == 0b1100  # dataset management, write zeroes
    assert data[768:].startswith(b"nqn.2014.08.org.nvmexpress:1af41af41122334455667788\0")


def test_identify_namespace(host: NvmeHost) -> None:
    data = identify(host, 0, 1)
    assert struct.unpack_from("<QQQ", data) == (NAMESPACE_BYTES // 512,) * 3
    assert struct.unpack_from(">Q", data, 120)[0] == IDENTITY
    assert struct.unpack_from("<HBB", data, 128) == (0, 9, 0)  # blocks of 2**9 bytes, without metadata


def test_identify_lists(host: NvmeHost) -> None:
    assert identify(host, 2, 0) == (1).to_bytes(4, "little") + bytes(PAGE - 4)
    assert identify(host, 2, 1) == bytes(PAGE)
    assert identify(host, 3, 1) == b"\x01\x08\0\0" + IDENTITY.to_bytes(8, "big") + bytes(PAGE - 12)


@pytest.mark.parametrize(
    ("structure", "namespace", "expected"),
    [
        (0, 0, status.INVALID_NAMESPACE),
        (0, 2, status.INVALID_NAMESPACE),
        (0, ALL, status.INVALID_NAMESPACE),
        (2, ALL - 1, status.INVALID_NAMESPACE),
        (2, ALL, status.INVALID_NAMESPACE),
        (3, 0, status.INVALID_NAMESPACE),
        (3, 2, status.INVALID_NAMESPACE),
        (4, 1, status.INVALID_FIELD),
        (6, 0, status.INVALID_FIELD),
        (0xFF, 0, status.INVALID_FIELD),
    ],
)
def test_identify_refuses(host: NvmeHost, structure: int, namespace: int, expected: int) -> None:
    buffer = host.take_pages()
    answer = host.command(admin.IDENTIFY, namespace=namespace, prp1=buffer, words=(structure,))
    assert answer.status == expected
    assert host.get(buffer, PAGE) == bytes(PAGE)


def test_data_crosses_into_the_second_page(host: NvmeHost) -> None:
    whole = identify(host, 1)
    first, second = host.take_pages(), host.take_pages(2) + PAGE
    assert host.command(admin.IDENTIFY, prp1=first + 512, prp2=second, words=(1,)).status == 0
    assert host.get(first + 512, PAGE - 512) + host.get(second, 512) == whole


@pytest.mark.parametrize(("prp1", "prp2"), [(1, 0), (0x202, 0), (512, 4)])
def test_data_pointers_that_cannot_be(host: NvmeHost, prp1: int, prp2: int) -> None:
    buffer = host.take_pages(2)
    answer = host.command(admin.IDENTIFY, prp1=buffer + prp1, prp2=buffer + PAGE + prp2, words=(1,))
    assert answer.status == status.PRP_OFFSET_INVALID
    assert host.get(buffer, 2 * PAGE) == bytes(2 * PAGE)


@pytest.mark.parametrize("opcode", [0x03, 0x0D, 0x10, 0x11, 0x14, 0x18, 0x19, 0x80, 0x81, 0xC0, 0xFF])
def test_what_there_is_not_is_an_invalid_opcode(host: NvmeHost, opcode: int) -> None:
    assert host.command(opcode).status == status.INVALID_OPCODE


@pytest.mark.parametrize("flags", [1, 2, 0x40, 0x80])
@pytest.mark.parametrize("opcode", [admin.IDENTIFY, admin.EVENT_REQUEST, 0x99])
def test_fused_operations_and_scatter_gather_lists_are_refused(host: NvmeHost, opcode: int, flags: int) -> None:
    assert host.command(opcode, flags=flags, words=(1,)).status == status.INVALID_FIELD


def test_queues_are_refused_that_cannot_be(host: NvmeHost) -> None:
    assert create_completion_queue(host, queue=0) == status.INVALID_QUEUE_IDENTIFIER
    assert create_completion_queue(host, queue=9) == status.INVALID_QUEUE_IDENTIFIER
    assert create_completion_queue(host, queue=0xFFFF) == status.INVALID_QUEUE_IDENTIFIER
    assert create_completion_queue(host, last=0) == status.INVALID_QUEUE_SIZE
    assert create_completion_queue(host, last=1024) == status.INVALID_QUEUE_SIZE
    assert create_completion_queue(host, flags=0) == status.INVALID_FIELD
    assert create_completion_queue(host, prp1=512) == status.PRP_OFFSET_INVALID
    assert create_completion_queue(host, flags=3, vector=9) == status.INVALID_INTERRUPT_VECTOR
    assert create_completion_queue(host, last=1023, flags=1, vector=9) == 0, "without interrupts"
    assert create_completion_queue(host) == status.INVALID_QUEUE_IDENTIFIER, "it exists"

    assert create_submission_queue(host, queue=0) == status.INVALID_QUEUE_IDENTIFIER
    assert create_submission_queue(host, queue=9) == status.INVALID_QUEUE_IDENTIFIER
    assert create_submission_queue(host, last=0) == status.INVALID_QUEUE_SIZE
    assert create_submission_queue(host, last=1024) == status.INVALID_QUEUE_SIZE
    assert create_submission_queue(host, flags=0) == status.INVALID_FIELD
    assert create_submission_queue(host, prp1=8) == status.PRP_OFFSET_INVALID
    assert create_submission_queue(host, completion=0) == status.COMPLETION_QUEUE_INVALID
    assert create_submission_queue(host, completion=2) == status.COMPLETION_QUEUE_INVALID
    assert create_submission_queue(host, completion=0xFFFF) == status.COMPLETION_QUEUE_INVALID
    assert create_submission_queue(host) == 0
    assert create_submission_queue(host) == status.INVALID_QUEUE_IDENTIFIER, "it exists"


def test_queues_need_their_entry_sizes(host: NvmeHost) -> None:
    host.set_register(layout.CC, 1)
    assert create_completion_queue(host) == status.INVALID_FIELD


def test_queues_are_deleted(host: NvmeHost) -> None:
    def delete(opcode: int, queue: int) -> int:
        return host.command(opcode, words=(queue,)).status

    host.create_queues()
    for opcode in (admin.DELETE_SUBMISSION_QUEUE, admin.DELETE_COMPLETION_QUEUE):
        for queue in (0, 2, 9, 0xFFFF):
            assert delete(opcode, queue) == status.INVALID_QUEUE_IDENTIFIER
    assert delete(admin.DELETE_COMPLETION_QUEUE, 1) == status.INVALID_QUEUE_DELETION
    assert delete(admin.DELETE_SUBMISSION_QUEUE, 1) == 0
    assert delete(admin.DELETE_SUBMISSION_QUEUE, 1) == status.INVALID_QUEUE_IDENTIFIER
    assert delete(admin.DELETE_COMPLETION_QUEUE, 1) == 0
    assert delete(admin.DELETE_COMPLETION_QUEUE, 1) == status.INVALID_QUEUE_IDENTIFIER
    host.completion.pop(1)
    host.create_queues()
    assert host.io(io.FLUSH, 0, 1).status == 0


def test_commands_in_flight_end_with_their_queue(host: NvmeHost) -> None:
    host.create_queues()
    host.create_queues(2, completion=1)
    begun = [host.submit(1, io.READ, prp1=host.take_pages(), words=(0, 0, 7)) for _ in range(3)]
    other = host.submit(2, io.FLUSH)
    host.rig.step()
    waiting = host.submit(1, io.READ, prp1=host.take_pages(), words=(0, 0, 7))
    deletion = host.submit(0, admin.DELETE_SUBMISSION_QUEUE, words=(1,))
    host.rig.run()
    assert [(found.identifier, found.status) for found in host.poll()] == [(deletion, 0)]
    found = {completion.identifier: completion.status for completion in host.poll(1)}
    assert found == {other: 0} | dict.fromkeys(begun, status.ABORTED_SUBMISSION_QUEUE_DELETED)
    assert waiting not in found, "it was never fetched, and its queue is gone"


def test_abort_ends_a_command_in_flight_once(host: NvmeHost) -> None:
    host.create_queues()
    first, second = (host.submit(1, io.READ, prp1=host.take_pages(), words=(0, 0, 7)) for _ in range(2))
    host.rig.step()
    aborts = [host.submit(0, admin.ABORT, words=(number << 16 | 1,)) for number in (second, second, 0x7777)]
    host.rig.run()
    assert [(found.identifier, found.result, found.status) for found in host.poll()] == [
        (aborts[0], 0, 0),
        (aborts[1], 1, 0),
        (aborts[2], 1, 0),
    ]
    assert [(found.identifier, found.status) for found in host.poll(1)] == [
        (second, status.ABORT_REQUESTED),
        (first, 0),
    ]


def test_admin_commands_go_ahead_of_long_ones(host: NvmeHost) -> None:
    host.create_queues()
    long = host.submit(1, io.WRITE_ZEROES, words=(0, 0, NAMESPACE_BYTES // 512 - 1))
    for _ in range(3):
        host.rig.step()
    host.submit(0, admin.GET_FEATURES, words=(1,))
    host.rig.step()
    assert len(host.poll()) == 1
    assert not host.poll(1)
    host.rig.run()
    assert [found.identifier for found in host.poll(1)] == [long]


@pytest.mark.parametrize(
    ("feature", "value"),
    [(0x01, 0x01020304), (0x02, 0), (0x05, 0x1FFFF), (0x06, 0), (0x08, 0x1234), (0x0A, 1), (0x0B, 0x1FF)],
)
def test_features_are_kept_until_a_reset(host: NvmeHost, feature: int, value: int) -> None:
    before = host.command(admin.GET_FEATURES, words=(feature,))
    assert (before.status, before.result) == (0, 1 if feature == 6 else 0)
    assert host.command(admin.SET_FEATURES, words=(feature, value)).status == 0
    host.rig.move()
    assert host.command(admin.GET_FEATURES, words=(feature,)).result == value
    host.disable()
    host.enable()
    assert host.command(admin.GET_FEATURES, words=(feature,)).result == before.result


def test_features_of_a_part(host: NvmeHost) -> None:
    def get(feature: int, part: int) -> int:
        return host.command(admin.GET_FEATURES, words=(feature, part)).result

    under = 1 << 20
    assert (get(4, 0), get(4, under)) == (0xFFFF, 0)
    assert host.command(admin.SET_FEATURES, words=(4, under | 290)).status == 0
    assert host.command(admin.SET_FEATURES, words=(4, 350)).status == 0
    assert (get(4, 0), get(4, under)) == (350, 290)
    assert (get(9, 3), get(9, 4)) == (3, 4)
    assert host.command(admin.SET_FEATURES, words=(9, 1 << 16 | 3)).status == 0
    assert (get(9, 3), get(9, 4)) == (1 << 16 | 3, 4)
    assert host.command(admin.SET_FEATURES, words=(9, 3)).status == 0
    assert get(9, 3) == 3


def test_the_number_of_queues(host: NvmeHost) -> None:
    assert host.command(admin.SET_FEATURES, words=(7, 63 << 16 | 63)).result == 7 << 16 | 7
    assert host.command(admin.GET_FEATURES, words=(7,)).result == 7 << 16 | 7
    for value in (0xFFFF, 0xFFFF0000):
        assert host.command(admin.SET_FEATURES, words=(7, value)).status == status.INVALID_FIELD
    host.create_queues()
    assert host.command(admin.SET_FEATURES, words=(7, 0)).status == status.COMMAND_SEQUENCE_ERROR


@pytest.mark.parametrize(
    ("feature", "value", "expected"),
    [
        (0x00, 0, status.INVALID_FIELD),
        (0x03, 0, status.INVALID_FIELD),
        (0x0C, 0, status.INVALID_FIELD),
        (0x80, 0, status.INVALID_FIELD),
        (0x02, 1, status.INVALID_FIELD),
        (0x06, 2, status.INVALID_FIELD),
        (0x0B, 1 << 9, status.INVALID_FIELD),
        (0x04, 1 << 16, status.INVALID_FIELD),
        (0x04, 2 << 20, status.INVALID_FIELD),
        (0x09, 9, status.INVALID_FIELD),
        (0x80000006, 0, status.FEATURE_NOT_SAVEABLE),
    ],
)
def test_features_are_refused_that_cannot_be(host: NvmeHost, feature: int, value: int, expected: int) -> None:
    assert host.command(admin.SET_FEATURES, words=(feature, value)).status == expected
    assert host.command(admin.GET_FEATURES, words=(6,)).result == 1


@pytest.mark.parametrize(("feature", "part"), [(0x0C, 0), (0x106, 0), (0x306, 0), (4, 1 << 16), (4, 3 << 20), (9, 9)])
def test_features_that_cannot_be_asked_for(host: NvmeHost, feature: int, part: int) -> None:
    assert host.command(admin.GET_FEATURES, words=(feature, part)).status == status.INVALID_FIELD


def log_page(host: NvmeHost, page: int, length: int, offset: int = 0) -> bytes:
    buffer = host.take_pages()
    host.put(buffer, b"\xee" * PAGE)
    words = ((length // 4 - 1) << 16 | page, 0, offset & ALL, offset >> 32)
    assert host.command(admin.GET_LOG_PAGE, namespace=ALL, prp1=buffer, words=words).status == 0
    assert host.get(buffer + length, PAGE - length) == b"\xee" * (PAGE - length), "no more than was asked for"
    return host.get(buffer, length)


def test_log_pages(host: NvmeHost) -> None:
    assert log_page(host, 1, 64) == bytes(64)
    health = log_page(host, 2, 512)
    assert struct.unpack_from("<xHBB", health) == (300, 100, 10)
    assert log_page(host, 2, 16, 1 << 2) == health[4:20]
    assert log_page(host, 3, 512)[:16] == b"\x01" + bytes(7) + b"1".ljust(8)
    assert log_page(host, 3, 4, 512) == bytes(4), "there is nothing after its end"
    assert log_page(host, 4, PAGE) == bytes(PAGE)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((0x00,), status.INVALID_LOG_PAGE),
        ((0x05,), status.INVALID_LOG_PAGE),
        ((0xC0,), status.INVALID_LOG_PAGE),
        ((0x02, 0, 2), status.INVALID_FIELD),
        ((0x02, 0, 516), status.INVALID_FIELD),
        ((0x02, 0, 0, 1), status.INVALID_FIELD),
        ((1024 << 16 | 0x02,), status.INVALID_FIELD),
        ((0x02, 1), status.INVALID_FIELD),
    ],
)
def test_log_pages_are_refused_that_cannot_be(host: NvmeHost, words: tuple[int, ...], expected: int) -> None:
    assert host.command(admin.GET_LOG_PAGE, prp1=host.take_pages(), words=words).status == expected


def test_events_wait_for_a_request_and_for_the_log_to_be_read(host: NvmeHost) -> None:
    def bad_doorbell(offset: int, value: int = 0) -> None:
        host.set_register(layout.DOORBELLS + offset, value)
        host.rig.run()

    def read_log(*, retain: bool) -> None:
        words = (15 << 16 | retain << 15 | 1,)
        host.submit(0, admin.GET_LOG_PAGE, identifier=0x100, prp1=host.take_pages(), words=words)
        host.rig.run()

    bad_doorbell(0x800)  # nobody asks yet
    assert not host.poll()
    requests = [host.submit(0, admin.EVENT_REQUEST) for _ in range(3)]
    host.rig.run()
    assert [(found.identifier, found.result) for found in host.poll()] == [(requests[0], 1 << 16)]
    bad_doorbell(0, 999)  # the log has not been read
    assert not host.poll()
    read_log(retain=True)
    assert [found.identifier for found in host.poll()] == [0x100]
    host.rig.move()
    read_log(retain=False)
    assert [(found.identifier, found.result) for found in host.poll()] == [(0x100, 0), (requests[1], 1 << 16 | 1 << 8)]
    bad_doorbell(0x800)
    read_log(retain=False)
    assert [(found.identifier, found.result) for found in host.poll()] == [(0x100, 0), (requests[2], 1 << 16)]


def test_four_event_requests_are_kept(host: NvmeHost) -> None:
    for _ in range(4):
        host.submit(0, admin.EVENT_REQUEST)
    host.rig.run()
    assert not host.poll()
    assert host.command(admin.EVENT_REQUEST).status == status.EVENT_REQUEST_LIMIT_EXCEEDED


def test_admin_commands_wait_for_room_in_their_completion_queue() -> None:
    host = NvmeHost()
    host.enable(entries=2)
    for _ in range(5):
        host.submit(0, admin.GET_FEATURES, words=(1,))
        host.rig.run()
        assert len(host.poll(ring=False)) == 1
        host.submission[0].used = 0
        waiting = host.submit(0, admin.GET_FEATURES, words=(6,))
        assert not host.rig.run(), "its completion would overwrite one that was not taken"
        host.set_register(layout.DOORBELLS + 4, host.completion[0].head)
        host.rig.run()
        assert [found.identifier for found in host.poll()] == [waiting]
