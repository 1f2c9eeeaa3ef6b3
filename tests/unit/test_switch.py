"""The switch: who gets a frame, who waits, who gives up; and what a host says to frames that are offered to it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest
from support.manual_clock import settle
from support.switch_world import BROADCAST, World, recorders

from hostd.models.base import Frame, Step
from hostd.models.ethernet import mac_address
from hostd.switch import GIVE_UP_S, LEARN_S
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import function_key
from vfleet.v1.fabric_service_pb2 import (
    FRAME_REFUSAL_NO_ROOM,
    FRAME_REFUSAL_NOT_SERVING,
    FRAME_REFUSAL_UNSPECIFIED,
    DeliverFramesRequest,
    NetworkFrame,
)

FRAME = bytes(14) + (7).to_bytes(8, "little") + bytes(40)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    with recorders():
        found = World(tmp_path, Random(1), {"a": "h1", "b": "h2", "c": "h2", "d": "h1"})
        await settle()
        yield found
        await found.close()


def numbers(world: World, function: str) -> list[int]:
    return [number & 0xFFFF_FFFF for number in world.received(function)]


def received(world: World) -> dict[str, list[int]]:
    return {function: numbers(world, function) for function in world.homes}


def dropped(world: World, function: str = "a") -> int:
    return world.instance(function).frames_dropped


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def test_a_frame_goes_to_whom_it_names(world: World) -> None:
    world.send("a", "b", 3)
    world.send("a", "d")
    await world.until_quiet()
    assert received(world) == {"a": [], "b": [0, 1, 2], "c": [], "d": [3]}


async def test_a_frame_to_all_goes_to_all_others_on_the_network(world: World) -> None:
    world.send("b", None, 2)
    await world.until_quiet()
    assert received(world) == {"a": [0, 1], "b": [], "c": [0, 1], "d": [0, 1]}


async def test_those_who_share_no_attachment_are_on_no_network(world: World) -> None:
    world.record_host("h2", ("storage", "other"))
    world.tell()
    await settle()
    world.send("a", None)
    world.send("b", None)
    await world.until_quiet()
    assert received(world) == {"a": [], "b": [], "c": [0], "d": [0]}
    world.record_host("h1", ("lan", "other"))
    world.tell()
    await settle()
    world.send("a", "b")
    await world.until_quiet()
    assert numbers(world, "b") == [1]


async def test_a_moved_function_keeps_its_peers_and_what_it_had_not_sent_yet(world: World) -> None:
    world.cut |= {"h1", "h2", "h3"}
    world.send("a", "b", 5)
    world.send("b", "a", 5)
    await settle()
    await world.move("a", "h3")
    world.cut.clear()
    world.send("a", "b", 2)
    await world.until_quiet()
    await world.move("b", "h1")
    world.send("a", "b")
    await world.until_quiet()
    assert numbers(world, "b") == list(range(8))
    assert numbers(world, "a") == list(range(5))
    assert dropped(world, "b") == 0


async def test_a_sender_that_does_not_know_of_a_move_yet_asks_again(world: World) -> None:
    await world.move("b", "h3", tells=False)
    world.send("a", "b", 3)
    await asyncio.sleep(0.02)
    assert numbers(world, "b") == []
    world.tell("h1")
    await world.until_quiet()
    assert numbers(world, "b") == [0, 1, 2]
    assert dropped(world) == 0


async def test_a_receiver_without_room_holds_the_sender_back(world: World) -> None:
    world.fill("b", full=True)
    world.send("a", "b", 2)
    world.send("a", "d", 2)
    await asyncio.sleep(0.02)
    assert numbers(world, "b") == []
    world.fill("b", full=False)
    await world.until_quiet()
    assert (numbers(world, "b"), numbers(world, "d")) == ([0, 1], [2, 3])


async def test_a_receiver_that_takes_nothing_for_too_long_loses_frames_and_delays_once(world: World) -> None:
    world.cut.add("h2")
    world.send("a", "b", 2)
    await asyncio.sleep(0.01)
    await world.clock.advance(GIVE_UP_S - 1)
    await asyncio.sleep(0.15)
    assert dropped(world) == 0
    await world.clock.advance(1)
    await until(lambda: dropped(world) == 2)
    world.send("a", "b")
    await until(lambda: dropped(world) == 3)
    await world.until_quiet()
    world.cut.clear()
    world.send("a", "b", 2)
    await world.until_quiet()
    assert numbers(world, "b") == [3, 4]
    world.cut.add("h2")
    world.send("a", "b")
    await asyncio.sleep(0.15)
    assert dropped(world) == 3, "it has its time again"


async def test_a_receiver_that_is_lost_or_deleted_has_its_frames_dropped(world: World) -> None:
    world.cut.add("h2")
    world.send("a", "b")
    world.send("a", "c")
    await asyncio.sleep(0.01)
    world.lose("b")
    del world.records[function_key("c")]
    world.tell()
    await world.until_quiet()
    assert dropped(world) == 2


async def test_an_address_that_nobody_has_delays_once(world: World) -> None:
    record = world.records.pop(function_key("b"))
    world.tell()
    await settle()
    world.send("a", "b")
    await asyncio.sleep(0.15)
    assert dropped(world) == 0, "its record may come still"
    await world.clock.advance(LEARN_S)
    await until(lambda: dropped(world) == 1)
    world.send("a", "b")
    await until(lambda: dropped(world) == 2)
    world.records[function_key("b")] = record
    world.tell()
    await settle()
    world.send("a", "b")
    await world.until_quiet()
    assert numbers(world, "b") == [2]


async def test_a_record_that_comes_late_is_waited_for(world: World) -> None:
    record = world.records.pop(function_key("b"))
    world.tell()
    await settle()
    world.send("a", "b")
    await asyncio.sleep(0.01)
    world.records[function_key("b")] = record
    world.tell()
    await world.until_quiet()
    assert numbers(world, "b") == [0]
    assert dropped(world) == 0


async def test_a_sender_that_was_stopped_and_runs_on_sends_what_it_has(world: World) -> None:
    world.cut.add("h2")
    world.send("a", "b", 3)
    await asyncio.sleep(0.01)
    await world.move("a", "h3", commits=False)
    world.cut.clear()
    await world.until_quiet()
    assert numbers(world, "b") == [0, 1, 2]


async def test_a_frame_that_nobody_has_the_address_of_is_not_dropped_while_its_sender_is_stopped(world: World) -> None:
    record = world.records.pop(function_key("b"))
    world.tell()
    await settle()
    world.send("a", "b")
    await settle()
    node, about = world.nodes["h1"], world.instance("a").about
    node.stop(about.generation, 50, function="a")
    await world.clock.advance(LEARN_S)
    world.lose("c")
    await settle()
    node.resume(about.generation, 50, function="a")
    await settle()
    assert dropped(world) == 0, "it has its time again"
    world.records[function_key("b")] = record
    world.tell()
    await world.until_quiet()
    assert numbers(world, "b") == [0]
    assert dropped(world) == 0


async def test_a_receiver_is_not_waited_for_while_the_sender_is_stopped(world: World) -> None:
    world.cut.add("h2")
    world.send("a", "b")
    await asyncio.sleep(0.01)
    node, about = world.nodes["h1"], world.instance("a").about
    node.stop(about.generation, 50, function="a")
    await asyncio.sleep(0.15)
    await world.clock.advance(GIVE_UP_S)
    node.resume(about.generation, 50, function="a")
    await asyncio.sleep(0.01)
    world.cut.clear()
    await world.until_quiet()
    assert numbers(world, "b") == [0]
    assert dropped(world) == 0


@pytest.mark.parametrize("length", [1, 6, 13])
async def test_a_frame_without_a_whole_header_is_dropped_and_others_go_on(world: World, length: int) -> None:
    header = mac_address(world.identities["b"]) + bytes(8)
    for frame in (header, BROADCAST + bytes(8)):
        world.engine("a")._apply(Step((), [Frame(frame[:length])]))
    world.send("a", "d")
    world.send("a", "b")
    await world.until_quiet()
    assert received(world) == {"a": [], "b": [1], "c": [], "d": [0]}
    assert dropped(world) == 2


async def test_a_killed_daemon_goes_on(world: World) -> None:
    world.cut.add("h2")
    world.send("a", "b", 3)
    await asyncio.sleep(0.01)
    world.restart("h1")
    world.restart("h2")
    world.cut.clear()
    await settle()
    await world.until_quiet()
    assert numbers(world, "b") == [0, 1, 2]


async def test_a_cancelled_frame_goes_nowhere(world: World) -> None:
    world.cut.add("h2")
    world.send("a", "b", 2)
    world.instance("a").master.frames.cancel()
    world.send("a", "b")
    world.cut.clear()
    await world.until_quiet()
    # What was under way when it was cancelled may have been offered still.
    assert numbers(world, "b")[-1] == 2


def request(world: World, function: str = "b", **other) -> DeliverFramesRequest:
    about = world.instance(function).about
    fields = {
        "function": function,
        "generation": about.generation,
        "base": about.base,
        "sender": 0xABC,
        "frames": [NetworkFrame(sequence=5, data=FRAME)],
    }
    return DeliverFramesRequest(**{**fields, **other})


async def test_a_frame_that_is_offered_again_is_taken_once(world: World) -> None:
    switch = world.nodes["h2"].switch
    for _ in range(3):
        response = switch.take(request(world))
        assert (response.taken, response.refusal) == (1, FRAME_REFUSAL_UNSPECIFIED)
    assert numbers(world, "b") == [7]
    await world.move("b", "h3")
    assert world.nodes["h3"].switch.take(request(world)).taken == 1
    assert numbers(world, "b") == [7]


@pytest.mark.parametrize("other", [{"generation": 2}, {"function": "c"}, {"function": "zz"}, {"base": 2 << 48}])
async def test_frames_for_somebody_else_are_refused(world: World, other: dict[str, object]) -> None:
    asked = request(world)
    for field, value in other.items():
        setattr(asked, field, value)
    response = world.nodes["h2"].switch.take(asked)
    assert (response.taken, response.refusal) == (0, FRAME_REFUSAL_NOT_SERVING)
    assert received(world) == {"a": [], "b": [], "c": [], "d": []}


async def test_a_stopped_function_takes_no_frames(world: World) -> None:
    world.nodes["h2"].stop(1, 50, function="b")
    assert world.nodes["h2"].switch.take(request(world)).refusal == FRAME_REFUSAL_NOT_SERVING


async def test_what_is_taken_of_a_batch_is_told(world: World) -> None:
    switch = world.nodes["h2"].switch
    switch.take(request(world))
    world.fill("b", full=True)
    frames = [NetworkFrame(sequence=sequence, data=FRAME) for sequence in (4, 5, 6, 9)]
    response = switch.take(request(world, frames=frames))
    assert (response.taken, response.refusal) == (2, FRAME_REFUSAL_NO_ROOM)


async def test_senders_that_are_no_more_make_room(world: World) -> None:
    switch = world.nodes["h2"].switch
    known = [world.identities[name] for name in ("a", "c", "d")]
    for sender in [*known, *range(1, 254)]:
        assert switch.take(request(world, sender=sender)).taken == 1
    assert world.instance("b").master.is_full
    assert switch.take(request(world, sender=900)).taken == 1
    assert set(world.instance("b").master.senders()) == {*known, 900}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"sender": 0}, "sender is 0; expected an identity other than 0"),
        ({"function": ""}, "function is ''"),
        ({"frames": [NetworkFrame(sequence=0, data=FRAME)]}, r"frames\[0\].sequence is 0; expected more than 0"),
        ({"frames": [NetworkFrame(sequence=3, data=FRAME)] * 2}, r"frames\[1\].sequence is 3; expected more than 3"),
        (
            {"frames": [NetworkFrame(sequence=1, data=bytes(13))]},
            r"frames\[0\].data is '13 bytes'; expected 14 to 1518",
        ),
        ({"frames": [NetworkFrame(sequence=1, data=bytes(1519))]}, "expected 14 to 1518"),
    ],
)
async def test_what_no_host_sends_is_refused_by_name(world: World, other: dict[str, object], message: str) -> None:
    asked = request(world)
    asked.MergeFrom(DeliverFramesRequest())
    for field, value in other.items():
        if field == "frames":
            del asked.frames[:]
            asked.frames.extend(value)
        else:
            setattr(asked, field, value)
    with pytest.raises(VfleetError, match=message) as caught:
        world.nodes["h2"].switch.take(asked)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert numbers(world, "b") == []
