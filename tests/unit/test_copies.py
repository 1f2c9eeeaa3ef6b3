"""How long a driver would be on hold, and what is said if that is too long."""

import pytest
from support.fleet_values import LIMITS, move, three_hosts

from coordinator.copies import Copies
from coordinator.planner import plan
from vfleet.errors import Reason, VfleetError
from vfleet.v1.transfer_service_pb2 import ImportStateResponse


@pytest.fixture
def copies() -> Copies:
    moves = [move("vf1", "h2/nic0"), move("vf2", "h3/nic0")]
    found = Copies(plan(three_hosts().snapshot(), moves, name="m1", coordinator="c1", limits=LIMITS).moves, 0.003)
    found.took_a_round_trip(0.001)
    found.took_a_round_trip(0.002)
    return found


def test_the_fixed_part_is_two_of_the_longest_round_trips_and_a_transaction(copies: Copies):
    assert copies.fixed_us == 7000
    assert copies.left_for_the_copy_us(10) == 3000
    assert copies.left_for_the_copy_us(7) == 0
    assert copies.left_for_the_copy_us(1) == 0


def test_the_estimate_is_known_once_a_round_has_ended(copies: Copies):
    copies.received("vf1", ImportStateResponse(received_bytes=1 << 20, total_bytes=4 << 20))
    first, other = copies.progress()
    assert (first.received_bytes, first.total_bytes, first.HasField("estimated_blackout")) == (1 << 20, 4 << 20, False)
    assert other.received_bytes == 0
    copies.received(
        "vf1",
        ImportStateResponse(rounds=1, dirty_bytes=8192, last_copy_us=500, dirty_bytes_per_s=9, throttle_percent=20),
    )
    (progress, _) = copies.progress()
    assert progress.estimated_blackout.ToMicroseconds() == 7500
    assert (progress.dirty_bytes, progress.dirty_bytes_per_s, progress.throttle_percent) == (8192, 9, 20)


def test_what_is_missing_after_the_lift_is_shown_beside_the_rest(copies: Copies):
    copies.received("vf2", ImportStateResponse(rounds=2, received_bytes=4096))
    before = copies.progress()[1]
    copies.is_missing("vf2", 1 << 20)
    after = copies.progress()[1]
    assert (after.rounds, after.received_bytes, after.missing_bytes) == (2, 4096, 1 << 20)
    assert before.missing_bytes == 0  # what was handed out before stays as it was


def test_a_limit_that_is_met_or_not_given_is_no_obstacle(copies: Copies):
    copies.received("vf1", ImportStateResponse(rounds=1, dirty_bytes=1 << 20, last_copy_us=3000))
    copies.check_limit(0)
    copies.check_limit(10)


def test_a_limit_that_can_not_be_met_is_named_with_all_that_counts(copies: Copies):
    copies.received("vf2", ImportStateResponse(rounds=8, dirty_bytes=65536, last_copy_us=3001, dirty_bytes_per_s=777))
    with pytest.raises(VfleetError) as caught:
        copies.check_limit(10)
    assert caught.value.reason is Reason.LIMIT_EXCEEDED
    assert caught.value.message == (
        "the driver of function 'vf2' would be on hold for 10.0 ms; expected at most 10 ms: 65536 bytes are dirty"
        " after 8 rounds, 777 become so a second, and 7.0 ms are fixed"
    )
    assert caught.value.metadata == {
        "function": "vf2",
        "limit_ms": "10",
        "estimate_us": "10001",
        "dirty_bytes_per_s": "777",
    }
