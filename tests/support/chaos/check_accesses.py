"""The checker of accesses: from what drivers logged, what the devices hold must follow, and every answer on the way.

Each place has one writer, so its contents have an order, the writer's. An access without an answer took effect if, and
only if, the sequences of those around it leave room for it. A read by the writer itself must return exactly what it
wrote last. A read by another driver may return anything that it can have met in time: nothing older than what was
written for good before it was sent, nothing that was begun after its answer; and never older than what that driver read
before. That last pair finds a second home, or an old one that still answers.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from support.chaos.findings import Findings
from support.chaos.history import Access

from vfleet.v1.driver_service_pb2 import WorkloadReport

# By the data sheet, docs/device-model.md.
IDENTITY = 0x08
CHANNELS = range(0x100, 0x300, 0x40)
LAST, ACCEPTED = 0x08, 0x10
COUNTERS = {"lost": 0x18, "repeated": 0x20, "reordered": 0x28}
WORKLOAD_CHANNEL = CHANNELS[0]
ACCESSES_A_RING = 4  # a workload rings its doorbell with every fourth access

Place = tuple[str, int]


@dataclass(slots=True)
class _Writes:
    """What took effect at one place, in its writer's order. Index 0 is what was there at the start."""

    writer: str = ""
    values: list[int] = field(default_factory=lambda: [0])
    starts_s: list[float] = field(default_factory=lambda: [-math.inf])
    ends_s: list[float] = field(default_factory=lambda: [-math.inf])
    seen: dict[str, int] = field(default_factory=dict)

    def add(self, access: Access) -> None:
        self.writer = access.driver
        self.values.append(access.value)
        self.starts_s.append(access.start_s)
        self.ends_s.append(access.end_s)


def check_accesses(accesses: Iterable[Access], findings: Findings) -> dict[Place, int]:
    """Check all answers, and return what each place holds in the end (a doorbell: the number rung last)."""
    programs: dict[tuple[str, str], list[Access]] = defaultdict(list)
    for access in accesses:
        programs[access.driver, access.function].append(access)
    done = {who: _settled(who, program, findings) for who, program in programs.items()}
    writes: dict[Place, _Writes] = defaultdict(_Writes)
    for program in done.values():
        for access in program:
            if not access.is_read:
                writes[access.function, access.offset].add(access)
    origin = {v: place for place, written in writes.items() if not _is_doorbell(place[1]) for v in written.values[1:]}
    for program in done.values():
        _check_reads(program, writes, origin, findings)
    return {place: written.values[-1] for place, written in writes.items()}


def check_devices(
    contents: Mapping[Place, int],
    words: Mapping[str, Mapping[int, int]],
    workloads: Sequence[WorkloadReport],
    findings: Findings,
) -> None:
    """Check what the devices hold against what `check_accesses` says that they must, and their own counters.

    A function that can't be read, of which there are no `words`, has failed already.
    """
    for (function, offset), expected in contents.items():
        if function not in words:
            continue
        at = offset + LAST if _is_doorbell(offset) else offset
        found = words[function][at]
        kind = "lost" if found < expected else "repeated"
        findings.expect(
            kind, found == expected, f"{function} holds {found:#x} at {at:#x} in the end, not {expected:#x}"
        )
    for function, registers in words.items():
        for channel in CHANNELS:
            for kind, counter in COUNTERS.items():
                findings.add(kind, f"by the count of {function}, channel at {channel:#x}", registers[channel + counter])
            last, accepted = registers[channel + LAST], registers[channel + ACCEPTED]
            findings.expect(
                "lost", last == accepted, f"{function}, channel at {channel:#x}: {accepted} of {last} rings"
            )
    for report in workloads:
        who = f"workload of {report.driver} on {report.function}"
        for kind in ("lost", "repeated", "reordered", "misrouted", "mismatches"):
            findings.add(kind, f"by the {who}", getattr(report, kind))
        findings.add("mismatches", f"errors of the {who}", report.errors)
        findings.expect("unfinished", not report.failure, f"the {who} ended by itself: {report.failure}")
        if report.function not in words:
            continue
        rung = -(-report.operations // ACCESSES_A_RING)
        last = words[report.function][WORKLOAD_CHANNEL + LAST]
        findings.expect("lost" if last < rung else "repeated", last == rung, f"{who} rang {rung} times, device: {last}")


def check_sequences(
    accesses: Iterable[Access], last_sequences: Mapping[tuple[str, str], int], findings: Findings
) -> None:
    """Check how far each function says that it got with each driver (by driver and function)."""
    last = {(access.driver, access.function): access for access in accesses}
    for (driver, function), access in last.items():
        who = f"driver {driver} on {function}"
        findings.expect("unfinished", access.is_answered, f"{who} got no answer in the end")
        got = last_sequences.get((driver, function), 0)
        if access.is_answered and got != access.sequence:
            kind = "lost" if got < access.sequence else "repeated"
            findings.add(kind, f"{who}: the home says {got} accesses, the driver {access.sequence}")


def check_identities(accesses: Iterable[Access], identities: Mapping[str, int], findings: Findings) -> None:
    """Check that each function answered as itself."""
    for access in accesses:
        if access.is_read and access.is_answered and access.offset == IDENTITY:
            right = access.value == identities.get(access.function)
            findings.expect("misrouted", right, f"{_name(access)} was answered by identity {access.value:#x}")


def _settled(who: tuple[str, str], program: Sequence[Access], findings: Findings) -> list[Access]:
    """Return the accesses that took effect, each with an end by which it had."""
    done: list[Access] = []
    open_accesses: list[Access] = []
    last = 0
    for access in program:
        if not access.is_answered:
            open_accesses.append(access)
            continue
        missing = access.sequence - last - 1
        if missing < 0:
            findings.add("reordered", f"{_name(access)} came after sequence {last}")
        elif missing > len(open_accesses):
            what = f"{who}: sequences {last + 1} to {access.sequence - 1} belong to {len(open_accesses)} accesses"
            findings.add("repeated", what, missing - len(open_accesses))
        done += [replace(open_access, end_s=access.end_s) for open_access in open_accesses[: max(missing, 0)]]
        open_accesses.clear()
        done.append(access)
        last = max(last, access.sequence)
    return done


def _check_reads(
    program: Sequence[Access], writes: Mapping[Place, _Writes], origin: Mapping[int, Place], findings: Findings
) -> None:
    own: dict[Place, int] = defaultdict(int)
    for access in program:
        place = access.function, access.offset
        if access.is_answered and not access.is_ok:
            findings.add("mismatches", f"{_name(access)} was claimed by nobody")
        elif not access.is_read:
            own[place] += 1
        elif not access.is_answered or access.offset == IDENTITY:
            continue
        elif _is_doorbell(access.offset - LAST):
            expected = writes[access.function, access.offset - LAST].values[own[access.function, access.offset - LAST]]
            kind = "lost" if access.value < expected else "repeated"
            findings.expect(kind, access.value == expected, f"{_name(access)} is not {expected}, rung last")
        else:
            _check_read(access, writes.get(place, _Writes()), own[place], origin, findings)


def _check_read(access: Access, written: _Writes, own: int, origin: Mapping[int, Place], findings: Findings) -> None:
    found = bisect_left(written.values, access.value)
    if found == len(written.values) or written.values[found] != access.value:
        elsewhere = origin.get(access.value)
        kind = "misrouted" if elsewhere is not None else "mismatches"
        findings.add(kind, f"{_name(access)} was never written there ({elsewhere or 'nor anywhere'})")
        return
    oldest = newest = own
    if access.driver != written.writer:
        oldest = bisect_left(written.ends_s, access.start_s) - 1
        newest = bisect_left(written.starts_s, access.end_s) - 1
    seen = written.seen.get(access.driver, 0)
    if found < max(oldest, seen):
        newer = written.values[max(oldest, seen)]
        findings.add("repeated" if found < seen else "lost", f"{_name(access)} is older than {newer:#x}")
    elif found > newest:
        findings.add("reordered", f"{_name(access)} was written later")
    written.seen[access.driver] = max(seen, found)


def _is_doorbell(offset: int) -> bool:
    return offset in CHANNELS


def _name(access: Access) -> str:
    what = "read" if access.is_read else "write"
    return (
        f"{what} of {access.value:#x} at {access.offset:#x} of {access.function} by {access.driver}, sequence"
        f" {access.sequence}, {access.start_s:.6f} to {access.end_s:.6f} s"
    )
