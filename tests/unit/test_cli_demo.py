"""The demo checks what it prints: each figure that is wrong is named."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from vfleet.address import Location, table_offset
from vfleet.cli.demo import FIGURES, Leg, _problems
from vfleet.v1.driver_service_pb2 import WorkloadReport
from vfleet.v1.records_pb2 import Migration, Move, Place
from vfleet.v1.types_pb2 import TableEntry

VIRTUAL_ADDRESS = 0x1000_0000_0000
HOMES = (Location(1, 0x0180), Location(2, 0x1110), Location(3, 0x4100))


def entry(generation: int) -> TableEntry:
    return TableEntry(
        virtual_address=VIRTUAL_ADDRESS,
        offset=table_offset(HOMES[generation - 1].base, VIRTUAL_ADDRESS),
        generation=generation,
    )


def place(generation: int) -> Place:
    home = HOMES[generation - 1]
    return Place(device=f"h{generation}/nic0", base=home.base, segment=home.segment, routing_id=home.routing_id)


def good() -> tuple[list[Leg], WorkloadReport]:
    legs = [
        Leg(
            migration=Migration(moves=[Move(source=place(generation), target=place(generation + 1))]),
            before=entry(generation),
            after=entry(generation + 1),
            operations=100,
            report=WorkloadReport(),
        )
        for generation in (1, 2)
    ]
    return legs, WorkloadReport(operations=1000)


def test_a_good_demo_has_no_problems() -> None:
    assert list(_problems(*good())) == []


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_must_be_zero(figure: str) -> None:
    legs, final = good()
    setattr(final, figure, 1)
    assert list(_problems(legs, final)) == [f"{figure}: 1; expected 0"]


def test_a_workload_that_ended_by_itself_is_a_problem() -> None:
    legs, final = good()
    final.failure = "TRANSLATION_FAULT"
    assert list(_problems(legs, final)) == ["the workload ended by itself: TRANSLATION_FAULT"]


def moved_address(leg: Leg) -> None:
    leg.after.virtual_address += 4096
    leg.after.offset = (leg.after.offset - 4096) % 2**64


def same_generation(leg: Leg) -> None:
    leg.after.generation = leg.before.generation


def same_offset(leg: Leg) -> None:
    leg.after.offset = leg.before.offset


def wrong_base(leg: Leg) -> None:
    leg.migration.moves[0].target.base += 1 << 32


def test_a_driver_that_did_nothing_meanwhile_is_a_problem() -> None:
    legs, final = good()
    idle = [replace(leg, operations=0) for leg in legs]
    assert list(_problems(idle, final)) == ["the driver did nothing during the migrations"]
    assert list(_problems([legs[0], idle[1]], final)) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (moved_address, "the virtual address changed in migration 1"),
        (same_generation, "the generation went from 1 to 1 in migration 1"),
        (same_offset, "the offset did not change in migration 1"),
        (wrong_base, "does not lead to h2/nic0"),
    ],
)
def test_what_is_wrong_in_a_move_is_named(spoil: Callable[[Leg], None], words: str) -> None:
    legs, final = good()
    spoil(legs[0])
    assert any(words in problem for problem in _problems(legs, final))
