"""The verifying driver's script, against a device that behaves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.checker_script import STEPS_A_ROUND, WORD_BYTES, CheckerScript, Step
from hostd.models import checker, create_model
from vfleet.address import bar_span
from vfleet.errors import Reason, VfleetError
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_KIND_WRITE
from vfleet.v1.driver_service_pb2 import WorkloadOptions

IDENTITY = 0xBEEF
BARS = {0: 4096, 2: 1 << 16}
LOCAL = BARS[2]


class Device:
    """A checker that does what it is told, and whose answers are those that the script expects, or not."""

    def __init__(self, bars: dict[int, int] = BARS, identity: int = IDENTITY) -> None:
        self.model = create_model("checker", identity, bars)
        self.memory = bytearray(bar_span(bars))
        self.store(self.model.reset())

    def store(self, stores) -> None:
        assert stores is not None, "the script leaves the function's BARs"
        for offset, data in stores:
            self.memory[offset : offset + len(data)] = data

    def do(self, step: Step) -> bool:
        """Do a step and return whether the answer is the expected one."""
        if step.kind == ACCESS_KIND_WRITE:
            self.store(self.model.write(memoryview(self.memory), step.offset, step.data))
            return True
        answer = self.model.read(memoryview(self.memory), step.offset, WORD_BYTES)
        assert answer is not None
        assert answer[1] == (), "the script makes no bad access"
        return int.from_bytes(answer[0], "little") == step.value


def script(bars: dict[int, int] = BARS, **options: int) -> CheckerScript:
    return CheckerScript(IDENTITY, bar_span(bars), bars.get(2, 0), WorkloadOptions(**options))


options = st.builds(
    lambda channel, start, size, seed: {
        "channel": channel,
        "memory_offset_bytes": start * 8,
        "memory_bytes": min(size * 8, LOCAL - start * 8),
        "seed": seed,
    },
    st.integers(0, 7),
    st.integers(0, 16) | st.integers(0, LOCAL // 8 - 1),
    st.integers(0, 20) | st.integers(0, LOCAL // 8),
    st.integers(0, (1 << 64) - 1),
)


@settings(deadline=None)
@given(options, st.integers(1, 300))
def test_a_device_that_behaves_gives_the_expected_answers(options: dict[str, int], count: int):
    device, steps = Device(), script(**options)
    assert device.do(steps.first())
    assert all(device.do(steps.step(number)) for number in range(count))


def test_without_local_memory_the_scratch_register_is_the_memory():
    device, steps = Device({0: 4096}), script({0: 4096})
    device.do(steps.first())
    assert all(device.do(steps.step(number)) for number in range(400))


def test_first_clears_what_a_workload_before_left_and_nothing_else():
    device = Device()
    for channel in (3, 4):
        other = script(channel=channel)
        assert all(device.do(other.step(number)) for number in range(40))
    steps = script(channel=3)
    device.do(steps.first())
    assert all(device.do(steps.step(number)) for number in range(40))
    assert all(device.do(script(channel=4).step(number)) for number in range(40, 80))


def test_two_drivers_of_one_function_keep_out_of_each_others_way():
    device = Device()
    scripts = [script(channel=n, memory_offset_bytes=n * 1024, memory_bytes=1024, seed=n) for n in range(8)]
    for steps in scripts:
        device.do(steps.first())
    assert all(device.do(steps.step(number)) for number in range(1000) for steps in scripts)


def test_memory_is_used_where_the_options_say_and_nowhere_else():
    local_start = bar_span(BARS) - LOCAL
    steps = script(memory_offset_bytes=512, memory_bytes=256)
    written = {
        step.offset
        for step in map(steps.step, range(4000))
        if step.kind == ACCESS_KIND_WRITE and step.offset >= local_start
    }
    assert written == {local_start + 512 + word * 8 for word in range(32)}


def test_a_step_is_a_function_of_its_number():
    one, two = script(seed=5), script(seed=5)
    assert [one.step(n) for n in (7, 2, 900, 7)] == [two.step(n) for n in (7, 2, 900, 7)]
    assert one.step(0) == Step(ACCESS_KIND_WRITE, checker.channel_offset(0), 1)


def test_other_seeds_and_other_functions_write_other_values():
    values = set()
    for identity in (1, 2):
        for seed in (1, 5):
            steps = CheckerScript(identity, bar_span(BARS), LOCAL, WorkloadOptions(seed=seed))
            values |= {steps.step(number).value for number in range(1, 4000, STEPS_A_ROUND)}
    assert len(values) == 4 * 1000


# What goes wrong, and in which field it is counted. A doorbell is step 4i, a value step 4i + 1.


def unexpected(wrong) -> set[str]:
    """Do 80 steps with what `wrong` does in place of some, and return the counters of unexpected answers."""
    device, steps = Device(), script()
    device.do(steps.first())
    found = set()
    for number in range(80):
        step = steps.step(number)
        for done in wrong(number, step, steps):
            if not device.do(done):
                found.add(done.counter)
    return found


def test_a_doorbell_that_is_lost_shows():
    assert "lost" in unexpected(lambda n, step, steps: [] if n == 40 else [step])


def test_a_doorbell_that_comes_twice_shows():
    assert "repeated" in unexpected(lambda n, step, steps: [step, step] if n == 40 else [step])


def test_doorbells_out_of_order_show():
    swapped = {40: 44, 44: 40}
    assert "reordered" in unexpected(lambda n, step, steps: [steps.step(swapped.get(n, n))])


def test_a_write_that_is_lost_shows():
    assert unexpected(lambda n, step, steps: [] if n % 4 == 1 else [step]) == {""}


def test_another_function_shows():
    device, steps = Device(identity=7), script()
    device.do(steps.first())
    wrong = [step.counter for step in map(steps.step, range(80)) if not device.do(step)]
    assert set(wrong) == {"misrouted"}


@pytest.mark.parametrize(
    ("given_options", "field"),
    [
        ({"channel": 8}, "options.channel"),
        ({"memory_offset_bytes": 4}, "options.memory_offset_bytes"),
        ({"memory_offset_bytes": LOCAL + 8}, "options.memory_offset_bytes"),
        ({"memory_bytes": 12}, "options.memory_bytes"),
        ({"memory_bytes": LOCAL + 8}, "options.memory_bytes"),
        ({"memory_offset_bytes": 8, "memory_bytes": LOCAL}, "options.memory_bytes"),
    ],
)
def test_options_that_do_not_fit_are_refused(given_options, field):
    with pytest.raises(VfleetError) as caught:
        script(**given_options)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.metadata["field"] == field


def test_a_read_writes_nothing():
    assert Step(ACCESS_KIND_READ, 0, 5).data == b""
