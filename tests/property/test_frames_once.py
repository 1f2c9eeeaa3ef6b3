"""Frames between functions that move, on hosts that are killed, over a bad network: each arrives once and in order."""

import asyncio
import tempfile
from pathlib import Path
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from support.manual_clock import settle
from support.switch_world import World, recorders

FUNCTIONS = {"a": "h1", "b": "h2", "c": "h2", "d": "h3"}


async def act(world: World, random: Random) -> None:
    """Let one thing happen."""
    function = random.choice(sorted(FUNCTIONS))
    host = random.choice(sorted(world.nodes))
    match random.choices(range(9), (40, 8, 5, 3, 3, 10, 10, 10, 6))[0]:
        case 0:
            other = random.choice([name for name in sorted(FUNCTIONS) if name != function])
            world.send(function, random.choice((other, other, other, None)), random.randrange(1, 6))
        case 1:
            await world.move(function, random.choice([h for h in sorted(world.nodes) if h != world.homes[function]]),
                             commits=random.random() < 0.8, tells=random.random() < 0.5)  # fmt: skip
        case 2:
            world.restart(host)
        case 3:
            world.cut ^= {host}
        case 4:
            world.fill(function, full=random.random() < 0.5)
        case 5:
            world.tell(host)
        case 6:
            world.arrive_late()
        case 7:
            await asyncio.sleep(0.002)
        case 8:
            await settle(random.randrange(40))


async def run(seed: int) -> None:
    random = Random(seed)
    with tempfile.TemporaryDirectory() as directory, recorders():
        world = World(Path(directory), random, FUNCTIONS)
        try:
            world.kindness = random.choice((1.0, 0.9, 0.6))
            await settle()
            for _ in range(80):
                await act(world, random)
            world.kindness = 1.0
            world.cut.clear()
            for function in FUNCTIONS:
                world.fill(function, full=False)
            world.tell()
            await world.until_quiet()
            while world.late:
                world.arrive_late()
            check(world)
        finally:
            await world.close()


def check(world: World) -> None:
    """Each receiver has got of each sender what that has sent it, in order, and nothing else."""
    for receiver in FUNCTIONS:
        got = world.received(receiver)
        for sender, numbers in ((s, n) for (s, r), n in world.sent.items() if r == receiver):
            origin = world.identities[sender]
            assert [number & 0xFFFF_FFFF for number in got if number >> 32 == origin] == numbers
    assert sum(world.instance(function).frames_dropped for function in FUNCTIONS) == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, (1 << 32) - 1))
def test_every_frame_arrives_once_and_in_order(seed: int) -> None:
    asyncio.run(run(seed))
