"""The home's side of the fabric: batches that come in order, twice, too early, too late, or make no sense."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bench import IDENTITY, Bench, reason_of

from hostd.home import exchange, forget_driver, last_sequence
from hostd.models import checker
from vfleet.errors import Reason, VfleetError
from vfleet.limits import MAX_DRIVERS
from vfleet.v1.access_pb2 import (
    ACCESS_KIND_READ,
    ACCESS_KIND_UNSPECIFIED,
    ACCESS_KIND_WRITE,
    ACCESS_STATUS_OK,
    Access,
    Session,
)
from vfleet.v1.fabric_service_pb2 import (
    REFUSAL_NOT_SERVING,
    REFUSAL_SEQUENCE_GAP,
    REFUSAL_STALE_SESSION,
    REFUSAL_UNSPECIFIED,
    ExchangeRequest,
    ExchangeResponse,
    ForgetDriverRequest,
    GetSequenceRequest,
)


class Home:
    """vf1 at home on a host, and what others send it."""

    def __init__(self, path: Path) -> None:
        self.bench = Bench(path)
        self.instance = self.bench.create()
        self.last()

    def write(self, sequence: int, value: int) -> Access:
        address = self.instance.about.base + checker.SCRATCH
        data = value.to_bytes(8, "little")
        return Access(sequence=sequence, kind=ACCESS_KIND_WRITE, address=address, length_bytes=8, data=data)

    def read(self, sequence: int, offset: int = checker.SCRATCH) -> Access:
        address = self.instance.about.base + offset
        return Access(sequence=sequence, kind=ACCESS_KIND_READ, address=address, length_bytes=8)

    def send(self, *accesses: Access, generation: int = 1, session: int = 1, acknowledged: int = 0) -> ExchangeResponse:
        request = ExchangeRequest(
            driver="d1",
            function="vf1",
            generation=generation,
            session=Session(start=session),
            acknowledged_sequence=acknowledged,
            accesses=accesses,
        )
        return exchange(self.bench.functions, request)

    def last(self, session: int = 1, generation: int = 1, driver: str = "d1") -> int:
        request = GetSequenceRequest(
            driver=driver, function="vf1", generation=generation, session=Session(start=session)
        )
        return last_sequence(self.bench.functions, request)

    def forget(self, session: int = 1, generation: int = 1, driver: str = "d1") -> None:
        request = ForgetDriverRequest(
            driver=driver, function="vf1", generation=generation, session=Session(start=session)
        )
        forget_driver(self.bench.functions, request)

    @property
    def scratch(self) -> int:
        return int.from_bytes(self.instance.image.memory[checker.SCRATCH : checker.SCRATCH + 8], "little")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    found = Home(tmp_path)
    yield found
    found.bench.close()


def sequences(response: ExchangeResponse) -> list[int]:
    return [answer.sequence for answer in response.answers]


def values(response: ExchangeResponse) -> list[int]:
    assert all(answer.status == ACCESS_STATUS_OK for answer in response.answers)
    return [int.from_bytes(answer.data, "little") for answer in response.answers]


def test_a_batch_is_carried_out_in_its_order(home: Home):
    response = home.send(home.write(1, 5), home.read(2), home.write(3, 6), home.read(4), home.read(5, checker.IDENTITY))
    assert (response.driver, response.function, response.generation) == ("d1", "vf1", 1)
    assert (sequences(response), values(response)) == ([1, 2, 3, 4, 5], [0, 5, 0, 6, IDENTITY])
    assert response.refusal == REFUSAL_UNSPECIFIED


def test_a_batch_that_comes_twice_gets_its_first_answers(home: Home):
    batch = [home.write(1, 5), home.read(2)]
    first = home.send(*batch)
    home.send(home.write(3, 6))
    assert home.send(*batch).answers == first.answers
    assert home.scratch == 6


def test_batches_that_overlap_go_on_where_the_first_ended(home: Home):
    home.send(home.write(1, 1), home.write(2, 2))
    response = home.send(home.write(2, 2), home.write(3, 3))
    assert (sequences(response), home.scratch) == ([2, 3], 3)


@pytest.mark.parametrize("start", [2, 5])
def test_a_gap_is_refused_with_what_is_expected_and_changes_nothing(home: Home, start: int):
    response = home.send(home.write(start, 9))
    assert (response.refusal, response.expected_sequence, sequences(response)) == (REFUSAL_SEQUENCE_GAP, 1, [])
    assert home.scratch == 0


def test_what_comes_before_a_gap_is_answered_and_nothing_after_it(home: Home):
    response = home.send(home.write(1, 1), home.write(3, 3), home.write(2, 2))
    assert (sequences(response), response.refusal, response.expected_sequence) == ([1], REFUSAL_SEQUENCE_GAP, 2)
    assert home.scratch == 1


@pytest.mark.parametrize("generation", [0, 2, 1 << 60])
def test_another_generation_is_not_served(home: Home, generation: int):
    response = home.send(home.write(1, 1), generation=generation)
    assert (response.refusal, sequences(response), home.scratch) == (REFUSAL_NOT_SERVING, [], 0)
    assert response.generation == generation


def test_a_stopped_function_is_not_served_and_has_its_sequences_still(home: Home):
    home.send(home.write(1, 1))
    home.bench.stop(1, 10)
    assert home.send(home.write(1, 1), home.write(2, 2)).refusal == REFUSAL_NOT_SERVING
    home.bench.resume(1, 10)
    assert sequences(home.send(home.write(1, 1), home.write(2, 2))) == [1, 2]


def test_an_address_in_anothers_window_is_not_served(home: Home):
    home.bench.create("vf2", vf_index=2)
    access = home.write(1, 1)
    access.address += 1 << 32
    assert home.send(access).refusal == REFUSAL_NOT_SERVING


def test_an_earlier_session_is_refused_after_a_later_one_asked_or_sent(home: Home):
    home.send(home.write(1, 1), session=3)
    assert home.send(home.write(2, 2), session=2).refusal == REFUSAL_STALE_SESSION
    assert home.last(session=4) == 1
    assert home.send(home.write(2, 2), session=3).refusal == REFUSAL_STALE_SESSION
    assert reason_of(home.last, session=3) is Reason.ILLEGAL_STATE
    assert sequences(home.send(home.write(2, 2), session=4)) == [2]


def test_how_far_it_got_is_told_by_the_home_alone(home: Home):
    assert home.last() == 0
    home.send(home.write(1, 1), home.write(2, 2))
    assert home.last() == 2
    assert home.last(driver="d2") == 0
    for generation in (0, 2):
        assert reason_of(home.last, generation=generation) is Reason.ILLEGAL_STATE
    home.bench.stop(1, 10)
    assert reason_of(home.last) is Reason.ILLEGAL_STATE


def test_acknowledged_answers_are_not_moved(home: Home):
    home.send(*(home.write(n, n) for n in range(1, 6)))
    home.send(acknowledged=4)
    home.send(home.write(6, 6), acknowledged=3)
    assert [a.sequence for a in home.instance.image.sequencer("d1").export().answers] == [1, 2, 3, 4, 5, 6][3:]
    home.send(home.write(7, 7), acknowledged=6)
    assert [a.sequence for a in home.instance.image.sequencer("d1").export().answers] == [7]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kind": ACCESS_KIND_UNSPECIFIED}, "accesses[1].kind"),
        ({"kind": ACCESS_KIND_READ}, "accesses[1].data"),
        ({"data": b"1234567"}, "accesses[1].data"),
        ({"length_bytes": 3}, "accesses[1]"),
        ({"length_bytes": 8192}, "accesses[1]"),
        ({"length_bytes": 4}, "accesses[1].data"),
        ({"address": 4}, "accesses[1]"),
        ({"sequence": 0}, "accesses[1].sequence"),
    ],
)
def test_a_batch_with_one_thing_wrong_is_not_carried_out_at_all(home: Home, change, field):
    wrong = home.write(2, 2)
    for name, value in change.items():
        setattr(wrong, name, value)
    with pytest.raises(VfleetError) as caught:
        home.send(home.write(1, 1), wrong)
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_FIELD, field)
    assert home.scratch == 0


def test_a_forgotten_driver_begins_anew_and_others_are_kept(home: Home):
    home.send(home.write(1, 1))
    home.last(driver="d2")
    home.forget(generation=7)
    home.forget(driver="d3")
    assert home.last() == 1
    home.forget()
    home.forget()
    assert (home.last(), home.scratch) == (0, 1)
    assert [s.driver for s in home.instance.image.sequencers()] == ["d1", "d2"]


def test_a_late_forgetting_leaves_a_later_session(home: Home):
    home.last(session=5)
    home.send(home.write(1, 1), session=5)
    home.forget(session=4)
    assert home.last(session=5) == 1


def test_a_function_that_has_all_its_drivers_refuses_more_of_them_and_serves_on(home: Home):
    for number in range(MAX_DRIVERS - 1):
        home.last(driver=f"other{number}")
    home.send(home.write(1, 1))
    assert reason_of(home.last, driver="more") is Reason.LIMIT_EXCEEDED
    assert sequences(home.send(home.write(2, 2))) == [2]
    home.forget(driver="other3")
    assert home.last(driver="more") == 0
