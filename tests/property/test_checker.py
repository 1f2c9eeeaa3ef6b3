"""The checker against a naive model: the set of all numbers that it was rung with."""

from hypothesis import given
from hypothesis import strategies as st

from hostd.models import create_model
from hostd.models.checker import CHANNELS, DOORBELL, LAST, channel_offset

# Numbers near those before, some far away, some long gone.
numbers = st.lists(st.integers(1, 12) | st.integers(1, 200) | st.integers((1 << 64) - 70, (1 << 64) - 1), max_size=60)


class Naive:
    """The data sheet's rules over sets: what has arrived, and the highest number."""

    def __init__(self) -> None:
        self.last = 0
        self.arrived: set[int] = set()
        self.repeated = 0
        self.reordered = 0

    def ring(self, number: int) -> None:
        if number > self.last:
            self.last = number
            self.arrived.add(number)
        elif number not in self.arrived and self.last - number < 64:
            self.reordered += 1
            self.arrived.add(number)
        else:
            self.repeated += 1

    def registers(self) -> tuple[int, ...]:
        accepted = len(self.arrived)
        window = sum(1 << age for age in range(64) if self.last - age in self.arrived)
        return self.last, accepted, self.last - accepted, self.repeated, self.reordered, window


@given(st.integers(0, CHANNELS - 1), numbers)
def test_the_checker_counts_as_sets_do(channel: int, rung: list[int]) -> None:
    device = create_model("checker", 1, {0: 4096})
    memory = bytearray(4096)
    naive = Naive()
    for number in rung:
        naive.ring(number)
        stores = device.write(memoryview(memory), channel_offset(channel) + DOORBELL, number.to_bytes(8, "little"))
        for offset, data in stores or ():
            memory[offset : offset + len(data)] = data
    found = []
    for register in range(LAST, LAST + 6 * 8, 8):
        answer = device.read(memoryview(memory), channel_offset(channel) + register, 8)
        assert answer is not None
        found.append(int.from_bytes(answer[0], "little"))
    assert tuple(found) == naive.registers()
