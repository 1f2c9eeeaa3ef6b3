"""Every field of virtio-net's state must move: falsified at a move, it makes the drivers' verification fail.

Those that don't are listed as harmless, each with the reason.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import cache
from random import Random
from struct import Struct

import pytest
from support.virtio_wire import Pair

from hostd.models.virtio import REGISTERS, Registers
from hostd.models.virtio_net import MSIX_TABLE, RECEIVE, STATE, TRANSMIT, State
from hostd.models.virtqueue import QUEUE, Queue

PRIVATE = 0x8000
RECORDS: dict[str, tuple[int, Struct, type]] = {
    "registers": (PRIVATE, REGISTERS, Registers),
    "state": (PRIVATE + 0x40, STATE, State),
    "receive": (PRIVATE + 0x80, QUEUE, Queue),
    "transmit": (PRIVATE + 0xC0, QUEUE, Queue),
}
HARMLESS = {
    "registers.epoch": "only tells what was read before a queue's reset from what is read after it; no reading moves",
    "state.turn": "which queue is served first when both could be",
    "receive.kicks": "only compared with kicks_seen, across one reading of the ring; no reading moves",
    "receive.kicks_seen": "as kicks",
    "transmit.kicks": "as kicks",
    "transmit.kicks_seen": "as kicks",
}
ACTS = 160
WORDS = Struct("<HH")
SEGMENT = Struct("<QI")
SLOT = Struct("<H")

Falsify = Callable[[bytearray], None]


def falsified(value: int, width: int) -> Iterator[int]:
    """Yield other values that a field of so many bits may have had instead."""
    for other in (value ^ 1, 0, value + 1, value - 1, (1 << width) - 1):
        if other != value and 0 <= other < 1 << width:
            yield other


@cache
def moments() -> list[Pair]:
    """Return two functions with frames under way both ways, at many moments, the last of which are the end of it."""
    random, found = Random(1), []
    pair = Pair(random, size=8, kind=True)
    for number in range(ACTS):
        act(pair, random)
        if number % 3 == 0:
            found.append(deepcopy(pair))
    for station in pair.stations:
        station.refills = True
        station.give_buffers(8)
    while True:
        busy = [station.rig.step() for station in pair.stations]
        found.append(deepcopy(pair))
        if not any(busy) and not any(station.look() for station in pair.stations):
            return found
        for to in (0, 1):
            pair.carry(to, 2)


def act(pair: Pair, random: Random) -> None:
    station = pair.stations[random.randrange(2)]
    match random.choices(range(5), (8, 3, 3, 30, 12))[0]:
        case 0:
            station.send(random.randrange(1, 9))
        case 1:
            station.give_buffers(random.randrange(1, 9))
        case 2:
            station.look()
        case 3:
            for _ in range(random.randrange(1, 4)):
                station.rig.step()
        case 4:
            pair.carry(random.randrange(2), random.randrange(1, 8))


def faults(moment: Pair, falsify: Falsify) -> list[str]:
    """Let one function move with a false state; return what is wrong when all is settled, and after more frames."""
    pair = deepcopy(moment)
    found = []
    try:
        pair.stations[0].rig.move(falsify)
        pair.settle(50)
        found += pair.faults()
        for to, station in enumerate(pair.stations):
            station.send(8)
            station.rig.run()
            # All buffers are used up before the other driver looks.
            pair.carry(1 - to, 8)
            pair.stations[1 - to].rig.run()
        pair.settle(50)
    except AssertionError as error:
        # The rig itself saw a step that no device may do.
        return [*found, str(error)]
    return found + pair.faults()


def is_found(falsifications: Callable[[bytearray], Sequence[Falsify]], every: int = 1) -> bool:
    """Return whether one of the falsifications of what is there at some moment makes the verification fail."""
    return any(
        faults(moment, falsify)
        for moment in moments()[::every]
        for falsify in falsifications(moment.stations[0].rig.image)
    )


def put(structure: Struct, offset: int, position: int, value: int) -> Falsify:
    def falsify(image: bytearray) -> None:
        fields = list(structure.unpack_from(image, offset))
        fields[position] = value
        structure.pack_into(image, offset, *fields)

    return falsify


def of_field(structure: Struct, offset: int, position: int) -> Callable[[bytearray], list[Falsify]]:
    letters = [letter for letter in _letters(structure.format) if letter != "x"]
    width = {"B": 8, "H": 16, "I": 32, "Q": 64}[letters[position]]

    def falsifications(image: bytearray) -> list[Falsify]:
        value = structure.unpack_from(image, offset)[position]
        return [put(structure, offset, position, other) for other in falsified(value, width)]

    return falsifications


def _letters(form: str) -> Iterator[str]:
    count = ""
    for letter in form.lstrip("<"):
        if letter.isdigit():
            count += letter
        else:
            yield from letter * int(count or "1")
            count = ""


def queue_of(image: bytearray, name: str) -> Queue:
    return Queue._make(QUEUE.unpack_from(image, RECORDS[name][0]))


def test_state_that_moves_whole_is_no_fault() -> None:
    for moment in moments():
        assert faults(moment, lambda image: None) == []


FIELDS = [
    pytest.param(structure, offset, position, id=f"{record}.{field}")
    for record, (offset, structure, names) in RECORDS.items()
    for position, field in enumerate(names._fields)
]


@pytest.mark.parametrize(("structure", "offset", "position"), FIELDS)
def test_a_false_field_is_found(structure: Struct, offset: int, position: int, request: pytest.FixtureRequest) -> None:
    falsifications = of_field(structure, offset, position)
    if request.node.callspec.id in HARMLESS:
        assert not is_found(falsifications, every=4)
    else:
        assert is_found(falsifications)


@pytest.mark.parametrize("index", [RECEIVE, TRANSMIT])
@pytest.mark.parametrize("part", ["head", "segments", "address", "length"])
def test_a_false_chain_is_found(part: str, index: int) -> None:
    taken = PRIVATE + 0x1000 + index * 0x1000

    def falsifications(image: bytearray) -> list[Falsify]:
        queue = queue_of(image, ("receive", "transmit")[index])
        if not queue.taken:
            return []
        if part in ("head", "segments"):
            return of_field(WORDS, taken + 4 * queue.first, part == "segments")(image)
        return of_field(SEGMENT, taken + 64 + 12 * queue.first_segment, part == "length")(image)

    assert is_found(falsifications)


@pytest.mark.parametrize("part", ["length", "content"])
def test_a_false_backlog_is_found(part: str) -> None:
    def falsifications(image: bytearray) -> list[Falsify]:
        state = State._make(STATE.unpack_from(image, RECORDS["state"][0]))
        slot = PRIVATE + 0x3000 + 1536 * state.first
        if not state.waiting:
            return []
        return of_field(SLOT, slot + (20 if part == "content" else 0), 0)(image)

    assert is_found(falsifications)


@pytest.mark.parametrize(("offset", "length"), [(0, 8), (8, 4), (12, 4)])
@pytest.mark.parametrize("vector", [0, 1, 2])
def test_a_false_vector_is_found(vector: int, offset: int, length: int) -> None:
    structure = Struct("<Q" if length == 8 else "<I")
    assert is_found(of_field(structure, MSIX_TABLE + 16 * vector + offset, 0))
