"""What one frame of `vfleet top` shows of a fleet."""

import io
import re

from rich.console import Console

from vfleet.cli.top import MAX_FUNCTIONS, MAX_HOSTS, MAX_MIGRATIONS, Fleet, frame
from vfleet.parts import part_of
from vfleet.v1.fleet_service_pb2 import DeviceUse
from vfleet.v1.records_pb2 import Cordon, Device, Function, FunctionStatus, Host, Migration, Move, Phase, Place

ACTIVE, LOST = FunctionStatus.FUNCTION_STATUS_ACTIVE, FunctionStatus.FUNCTION_STATUS_LOST


def shown(fleet: Fleet, now: float = 0) -> list[str]:
    out = Console(file=io.StringIO(), width=200)
    with out.capture() as captured:
        out.print(frame(fleet, now))
    return [line.rstrip() for line in captured.get().splitlines()]


def section(lines: list[str], title: str) -> list[str]:
    """Return the first words of a table's lines."""
    start = next(index for index, line in enumerate(lines) if line.startswith(title)) + 1
    rows = lines[start : lines.index("", start) if "" in lines[start:] else None]
    return [row if row.startswith("and ") else row.split()[0] for row in rows]


def hosts(*names: str, registered: bool = True) -> list[Host]:
    return [Host(name=name, registered=registered) for name in names]


def functions(count: int) -> list[Function]:
    return [Function(name=f"vf{n:03}", status=ACTIVE, device="h1/nic0", vf_index=n) for n in range(1, count + 1)]


def test_an_empty_fleet_can_be_shown() -> None:
    assert shown(Fleet([], [], [], []))[0] == "0 of 0 hosts registered, 0 functions, 0 in a migration"


def test_hosts_that_need_a_look_come_first() -> None:
    cordoned = Host(name="h3", registered=True, cordons=[Cordon(part=part_of("host", "h3"), reason="firmware")])
    lines = shown(Fleet([*hosts("h1", "h2"), cordoned, *hosts("h4", registered=False)], [], [], []))
    assert section(lines, "HOST") == ["h3", "h4", "h1", "h2"]
    assert lines[0].startswith("3 of 4 hosts registered")


def test_slots_and_functions_of_a_host_are_summed() -> None:
    uses = [
        DeviceUse(device=Device(host="h1", total_vfs=8), used_slots=2, reserved_slots=1),
        DeviceUse(device=Device(host="h1", total_vfs=8), used_slots=1),
        DeviceUse(device=Device(host="h2", total_vfs=8)),
    ]
    lines = shown(Fleet(hosts("h1", "h2"), uses, functions(3), []))
    assert any(re.fullmatch(r"h1 +yes +no +3 +4 of 16", line) for line in lines)
    assert any(re.fullmatch(r"h2 +yes +no +0 +0 of 8", line) for line in lines)


def test_functions_that_are_lost_or_move_come_first() -> None:
    found = functions(3)
    found[1].migration = "m-1"
    found[2].status = LOST
    lines = shown(Fleet([], [], found, []))
    assert section(lines, "FUNCTION") == ["vf003", "vf002", "vf001"]
    assert lines[0] == "0 of 0 hosts registered, 3 functions, 2 active, 1 lost, 1 in a migration"


def test_what_is_too_much_for_a_screen_is_counted() -> None:
    fleet = Fleet(
        hosts(*(f"h{n}" for n in range(MAX_HOSTS + 2))),
        [],
        functions(MAX_FUNCTIONS + 5),
        [Migration(name=f"m{n}") for n in range(MAX_MIGRATIONS + 1)],
    )
    lines = shown(fleet)
    assert section(lines, "HOST")[-1] == "and 2 more"
    assert section(lines, "FUNCTION")[-1] == "and 5 more"
    assert section(lines, "MIGRATION")[-1] == "and 1 more"
    assert len(lines) < MAX_HOSTS + MAX_FUNCTIONS + MAX_MIGRATIONS + 12


def test_a_migration_under_way_takes_as_long_as_it_has_until_now() -> None:
    running = Migration(name="m2", phase=Phase.PHASE_PREPARING)
    running.begin_time.FromSeconds(100)
    over = Migration(name="m1", phase=Phase.PHASE_DONE)
    over.begin_time.FromSeconds(90)
    over.finish_time.FromMilliseconds(90_500)
    running.moves.extend(Move(function=f"vf{n}", target=Place(device="h2/nic0")) for n in range(5))
    lines = shown(Fleet([], [], [], [running, over]), now=103)
    assert any(re.fullmatch(r"m2 +preparing +vf0 to h2/nic0, .*, vf2 to h2/nic0 and 2 more +3\.0 s", x) for x in lines)
    assert any(re.fullmatch(r"m1 +done +0\.5 s", line) for line in lines)
