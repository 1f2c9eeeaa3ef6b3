"""A function's image: sequences, answers, and what is left of them after a kill at any instruction."""

import mmap
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.killed_image import MEMORY_BYTES, content_of, new_image, snapshots_during, torn

from hostd.image import FunctionImage
from hostd.models.base import Store
from hostd.sequencer import Sequencer
from vfleet.errors import Reason, VfleetError
from vfleet.limits import MAX_DRIVERS, WINDOW
from vfleet.v1.access_pb2 import ACCESS_STATUS_OK as OK
from vfleet.v1.access_pb2 import ACCESS_STATUS_UNSUPPORTED_REQUEST as UNSUPPORTED

# An access as the engine hands it to the image: its answer, and what it stores.
Effect = tuple[bytes, Sequence[Store]]


@pytest.fixture
def image() -> Iterator[FunctionImage]:
    opened = new_image()
    yield opened
    opened.close()


def apply(image: FunctionImage, driver: str, effect: Effect) -> int:
    """Carry out the driver's next access and return its sequence."""
    sequencer = image.sequencer(driver)
    sequence = sequencer.last + 1
    image.apply(sequencer, sequence, OK, *effect)
    return sequence


def write(offset: int, data: bytes) -> Effect:
    return b"", [(offset, data)]


# Answers


def test_an_answer_is_the_first_one_whatever_the_memory_says_since(image: FunctionImage):
    sequencer = image.sequencer("d1")
    image.apply(sequencer, 1, OK, b"first", ())
    apply(image, "d1", write(0, b"second"))
    image.apply(sequencer, 3, UNSUPPORTED, b"\xff" * 8, ())
    assert [sequencer.answer(n) for n in (1, 2, 3)] == [(OK, b"first"), (OK, b""), (UNSUPPORTED, b"\xff" * 8)]


def test_the_answers_of_the_last_64_accesses_are_kept(image: FunctionImage):
    sequencer = image.sequencer("d1")
    for sequence in range(1, 201):
        image.apply(sequencer, sequence, OK, b"%d" % sequence, ())
        kept = range(max(1, sequence - WINDOW + 1), sequence + 1)
        assert [sequencer.answer(n) for n in kept] == [(OK, b"%d" % n) for n in kept]
        assert kept.start == 1 or sequencer.answer(kept.start - 1) is None
        assert sequencer.answer(sequence + 1) is None
        assert sequencer.answer(sequence + WINDOW) is None


def test_each_driver_has_sequences_of_its_own(image: FunctionImage):
    assert [apply(image, driver, (driver.encode(), ())) for driver in ("d2", "d1", "d2")] == [1, 1, 2]
    assert [(s.driver, s.last) for s in image.sequencers()] == [("d1", 1), ("d2", 2)]
    assert image.sequencer("d1").answer(1) == (OK, b"d1")
    assert image.sequencer("d2").answer(2) == (OK, b"d2")


def test_the_longest_names_and_answers_fit(image: FunctionImage):
    names = [f"{number:02}".rjust(63, "d") for number in range(MAX_DRIVERS)]
    for name in names:
        for _ in range(WINDOW):
            apply(image, name, (b"\xff" * 4096, [(4096, b"\xee" * 4096)]))
    again = new_image(content_of(image))
    for name in names:
        assert again.sequencer(name).last == WINDOW
        assert all(again.sequencer(name).answer(n) == (OK, b"\xff" * 4096) for n in range(1, WINDOW + 1))
    assert bytes(again.memory) == bytes(4096) + b"\xee" * 4096
    again.close()


def test_a_function_has_16_drivers_and_no_more_until_one_is_forgotten(image: FunctionImage):
    for number in range(MAX_DRIVERS):
        apply(image, f"d{number}", (b"", ()))
    for _ in range(2):
        with pytest.raises(VfleetError) as caught:
            image.sequencer("more")
        assert caught.value.reason is Reason.LIMIT_EXCEEDED
    image.forget("d3")
    image.forget("d3")
    assert image.sequencer("more").last == 0
    assert image.sequencer("d4").last == 1


def test_a_forgotten_driver_begins_anew(image: FunctionImage):
    apply(image, "d1", (b"old", ()))
    image.sequencer("d1").set_session((1, 2, 9))
    image.forget("d1")
    assert image.sequencers() == []
    sequencer = image.sequencer("d1")
    assert (sequencer.last, sequencer.session, sequencer.answer(1)) == (0, (0, 0, 0), None)


def test_clear_leaves_nothing(image: FunctionImage):
    apply(image, "d1", write(100, b"x"))
    image.clear()
    assert bytes(image.memory) == bytes(MEMORY_BYTES)
    assert image.sequencers() == []
    again = new_image(content_of(image))
    assert (again.sequencers(), again.sequencer("d1").last) == ([], 0)
    again.close()


# Export and load

accesses = st.tuples(
    st.sampled_from(["d1", "d2", "d3"]),
    st.binary(max_size=24),
    st.lists(st.tuples(st.integers(0, MEMORY_BYTES - 32), st.binary(min_size=1, max_size=32)), max_size=3),
)
histories = st.lists(
    accesses
    | st.tuples(st.just("session"), st.sampled_from(["d1", "d2"]), st.integers(1, 1 << 63))
    | st.tuples(st.just("forget"), st.sampled_from(["d1", "d2"]), st.none()),
    max_size=150,
)


def played(history: Sequence[tuple]) -> FunctionImage:
    image = new_image()
    for kind, second, third in history:
        if kind == "session":
            image.sequencer(second).set_session((1, third >> 1, third))
        elif kind == "forget":
            image.forget(second)
        else:
            apply(image, kind, (second, third))
    return image


def seen(sequencer: Sequencer) -> tuple:
    """Return all that can be seen of a sequencer."""
    near = range(max(1, sequencer.last - WINDOW - 1), sequencer.last + 3)
    return sequencer.driver, sequencer.last, sequencer.session, [sequencer.answer(n) for n in near]


@settings(deadline=None)
@given(histories)
def test_whatever_is_exported_is_the_same_once_loaded_and_after_a_restart(history):
    image, target = played(history), new_image()
    for exported in [sequencer.export() for sequencer in image.sequencers()]:
        target.sequencer(exported.driver).load(exported)
    assert [seen(s) for s in target.sequencers()] == [seen(s) for s in image.sequencers()]
    assert [s.export() for s in target.sequencers()] == [s.export() for s in image.sequencers()]
    for before in (image, target):
        again = new_image(content_of(before))
        assert [seen(s) for s in again.sequencers()] == [seen(s) for s in before.sequencers()]
        assert again.memory == before.memory
        again.close()
        before.close()


def test_answers_that_the_driver_has_are_not_exported(image: FunctionImage):
    for number in range(1, 11):
        apply(image, "d1", (b"%d" % number, ()))
    sequencer = image.sequencer("d1")
    sequencer.acknowledged = 7
    exported = sequencer.export()
    assert [answer.sequence for answer in exported.answers] == [8, 9, 10]
    target = new_image()
    target.sequencer("d1").load(exported)
    assert [target.sequencer("d1").answer(n) for n in (7, 8)] == [None, (OK, b"8")]
    target.close()


# A kill


EFFECTS: list[Effect] = [
    write(0, b"\x11" * 8),
    (b"answer", [(4096, b"\x22" * 64), (8, b"\x33" * 24), (16, b"\x44" * 8)]),
    (b"\x55" * 4096, ()),
    write(0, b"\x66" * 4096),
    (b"\x77" * 4096, [(2048, b"\x77" * 4096)]),
]


def write_plain(image: FunctionImage, driver: str, effect: Effect) -> None:
    """Do an access as a write to plain memory, which it is."""
    (_, ((offset, data),)) = effect
    sequencer = image.sequencer(driver)
    image.write_plain(sequencer, sequencer.last + 1, offset, data)


@pytest.mark.parametrize(
    ("access", "effect"),
    [*((apply, effect) for effect in EFFECTS), (write_plain, EFFECTS[0]), (write_plain, EFFECTS[3])],
)
def test_a_kill_at_any_instruction_leaves_an_access_done_or_not_begun(image: FunctionImage, access, effect: Effect):
    random = Random(1)
    for number in range(WINDOW + 3):
        apply(image, "d1", (b"%d" % number, [(number * 8, b"%08d" % number)]))
    apply(image, "d2", (b"other", [(0, b"other")]))
    done_before = image.sequencer("d1").last
    memory_before = bytes(image.memory)
    steps = snapshots_during(image, lambda: access(image, "d1", effect))
    assert len(steps) > 3
    memory_after = bytes(image.memory)
    torn_steps = [content for a, b in pairwise(steps) for content in torn(a, b, random)]
    done = set()
    for content in [*steps, *torn_steps]:
        again = new_image(content)
        sequencer = again.sequencer("d1")
        done.add(sequencer.last - done_before)
        assert again.memory == (memory_before if sequencer.last == done_before else memory_after)
        assert again.sequencer("d2").answer(1) == (OK, b"other")
        assert [sequencer.answer(n) for n in range(5, done_before)] == [
            (OK, b"%d" % (n - 1)) for n in range(5, done_before)
        ]
        if sequencer.last == done_before:
            access(again, "d1", effect)
        assert again.memory == memory_after
        assert seen(sequencer) == seen(image.sequencer("d1"))
        again.close()
    assert done == {0, 1}


@pytest.mark.parametrize("later", [(1, 20, 3), (2, 1, 1), (1, 10, 10), (2, 10, 1)])
def test_a_kill_while_a_session_is_noted_leaves_none_that_refuses_it(image: FunctionImage, later):
    sequencer = image.sequencer("d1")
    sequencer.set_session((1, 10, 9))
    for content in snapshots_during(image, lambda: sequencer.set_session(later)):
        again = new_image(content)
        assert again.sequencer("d1").session <= later
        again.close()
    assert sequencer.session == later


def test_a_kill_while_a_driver_is_taken_in_leaves_it_known_or_not(image: FunctionImage):
    apply(image, "d1", write(0, b"x" * 8))
    image.sequencer("d1").set_session((1, 2, 3))
    image.forget("d1")
    for content in snapshots_during(image, lambda: image.sequencer("d2")):
        again = new_image(content)
        assert [(s.driver, s.last, s.session) for s in again.sequencers()] in ([], [("d2", 0, (0, 0, 0))])
        again.close()


@pytest.mark.parametrize("reads", [0, 1, 2, 3])
def test_the_last_store_of_a_forgotten_driver_is_never_anothers(image: FunctionImage, reads: int):
    """Its redo record names a sequencer and a sequence that another driver reaches by accesses without stores."""
    apply(image, "d0", write(0, b"d0 is known"))
    for data in (b"first", b"secnd", b"third"):
        apply(image, "d1", write(64, data))
    image.forget("d1")
    for _ in range(reads):
        apply(image, "d2", (b"", ()))
    image.sequencer("d2")
    image.store([(64, b"newer")])
    again = new_image(content_of(image))
    assert again.sequencer("d2").last == reads
    assert bytes(again.memory[64:69]) == b"newer"
    again.close()


# Steps of an engine

ENGINE = 4096


def with_engine(content: bytes = b"") -> FunctionImage:
    return new_image(content, engine_start=ENGINE)


STEPS: list[Sequence[Store]] = [
    [(0, b"\x11" * 8)],
    [(100, b"\x22" * 3000), (5000, b"\x33" * 24), (104, b"\x44" * 8)],
    [],
]


@pytest.mark.parametrize("stores", STEPS)
def test_a_kill_at_any_instruction_leaves_a_step_done_or_not_begun(stores: Sequence[Store]):
    image, random = with_engine(), Random(2)
    apply(image, "d1", write(0, b"access"))
    image.step([(4200, b"before"), (0, b"\xaa" * 16)])
    before = bytes(image.memory)
    steps = snapshots_during(image, lambda: image.step(stores))
    after = bytes(image.memory)
    torn_steps = [content for a, b in pairwise(steps) for content in torn(a, b, random)]
    done = set()
    for content in [*steps, *torn_steps]:
        again = with_engine(content)
        done.add(again.word(ENGINE))
        assert again.memory == (before if again.word(ENGINE) == 1 else after)
        assert again.sequencer("d1").last == 1
        if again.word(ENGINE) == 1:
            again.step(stores)
        assert again.memory == after
        again.close()
    assert done == {1, 2}
    image.close()


def test_a_step_that_is_done_is_not_done_again_over_what_came_since():
    image = with_engine()
    image.step([(0, b"step")])
    image.store([(0, b"later")])
    again = with_engine(content_of(image))
    assert bytes(again.memory[:5]) == b"later"
    for each in (image, again):
        each.close()


def test_a_step_is_tracked_with_its_number():
    image = with_engine()
    dirty = image.track()
    image.step([(8, b"x")])
    assert dirty == {0, 1}
    image.put_word(ENGINE + 8, 5)
    assert (dirty, image.word(ENGINE + 8)) == ({0, 1}, 5)
    image.close()


def test_a_step_that_is_too_long_changes_nothing():
    image = with_engine()
    before = content_of(image)
    with pytest.raises(VfleetError) as caught:
        image.step([(0, bytes(MEMORY_BYTES)), (0, bytes(MEMORY_BYTES))])
    assert caught.value.reason is Reason.LIMIT_EXCEEDED
    assert content_of(image) == before
    image.close()


KILLED = """
import sys
from pathlib import Path
from hostd.image import FunctionImage, image_bytes
from hostd.ledger import Ledger
from vfleet.v1.access_pb2 import ACCESS_STATUS_OK
image = FunctionImage(Ledger(Path(sys.argv[1])).map_file("image", image_bytes(8192)))
sequencer = image.sequencer("d1")
print(flush=True)
while True:
    number = sequencer.last + 1
    data = number.to_bytes(8, "little")
    stores = [(number % 512 * 8, data), (4096 + number % 16 * 256, data * 32)] if number % 3 else ()
    image.apply(sequencer, number, ACCESS_STATUS_OK, data, stores)
"""


def memory_after(accesses: int) -> bytes:
    """Return what the accesses of KILLED leave: in each place, the last that went there."""
    memory = bytearray(8192)
    for number in range(max(1, accesses - 2048), accesses + 1):
        if number % 3:
            data = number.to_bytes(8, "little")
            memory[number % 512 * 8 : number % 512 * 8 + 8] = data
            start = 4096 + number % 16 * 256
            memory[start : start + 256] = data * 32
    return bytes(memory)


def test_a_process_that_is_killed_again_and_again_loses_and_repeats_nothing(tmp_path: Path):
    random, reached, end = Random(), 0, time.monotonic() + 3
    while time.monotonic() < end:
        with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(random.uniform(0.01, 0.1))
            process.send_signal(signal.SIGKILL)
        with (tmp_path / "memory" / "image").open("r+b") as file:
            image = FunctionImage(mmap.mmap(file.fileno(), 0))
        last = image.sequencer("d1").last
        assert last >= reached
        assert image.memory == memory_after(last)
        kept = range(max(1, last - WINDOW + 2), last + 1)
        assert [image.sequencer("d1").answer(n) for n in kept] == [(OK, n.to_bytes(8, "little")) for n in kept]
        image.close()
        reached = last
    assert reached
