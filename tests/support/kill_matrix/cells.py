"""The cells of the kill matrix: every step of a migration, by every participant, by every fault. Pure.

A cell runs one migration in which one fault happens exactly at a failpoint. The failpoint is the coordinator's or a
host's own; at one of the coordinator's the fault may also be another participant's, while the coordinator stands still.
"""

import enum
from dataclasses import dataclass

from vfleet import failpoint

LEASE_TTL_S = 2
# What is promised, beyond the lease's TTL and beyond a hold's deadline.
RESOLUTION_MARGIN_S = 2.0


class Participant(enum.StrEnum):
    COORDINATOR = "coordinator"
    SOURCE = "source"
    TARGET = "target"
    DRIVER_HOST = "driver host"
    ETCD = "etcd"


class Fault(enum.StrEnum):
    """SIGSTOP lasts longer than a lease. RESTART is SIGTERM and a new start: for an etcd that must not be killed.

    The others, as long as SIGSTOP, are for machines with networks of their own: tests/containers.
    """

    KILL = "SIGKILL"
    STOP = "SIGSTOP"
    RESTART = "restart"
    PAUSE = "pause"
    CUT = "cut off"
    CUT_FABRIC = "cut off from the fabric"


class Course(enum.StrEnum):
    """How the migration goes without the cell's fault."""

    COMMIT = "commits"
    POST_COPY = "commits, post-copy"
    ABORT = "aborts: its COMMIT fails"
    ADOPT_UNDECIDED = "loses its coordinator before COMMIT"
    ADOPT_COMMITTED = "loses its coordinator after COMMIT"
    RESOLVE = "loses its only coordinator before COMMIT"


@dataclass(frozen=True, slots=True)
class Cell:
    """`has_second` says whether another coordinator runs."""

    course: Course
    point: str
    participant: Participant
    fault: Fault
    has_second: bool = True

    @property
    def is_own(self) -> bool:
        """Whether the participant itself reaches the failpoint, rather than the coordinator for it."""
        return self.participant is Participant.COORDINATOR or self.point.startswith("hostd.")

    @property
    def column(self) -> str:
        if self.participant is not Participant.COORDINATOR:
            return self.participant
        return "coordinator and second" if self.has_second else "coordinator alone"

    @property
    def expected(self) -> frozenset[str]:
        """The phases in which the migration may end."""
        done, aborted = frozenset({"DONE"}), frozenset({"ABORTED"})
        if self.course in (Course.ABORT, Course.ADOPT_UNDECIDED, Course.RESOLVE):
            return aborted
        if self.course is Course.ADOPT_COMMITTED or self.point in AFTER_COMMIT:
            return done
        if self.point == "coordinator.begin.before":
            return done | aborted  # nothing has begun, and whoever asks for it asks again
        is_gone = self.participant is Participant.COORDINATOR and self.fault in (Fault.KILL, Fault.STOP)
        return aborted if is_gone else done | aborted

    @property
    def resolution_max_s(self) -> float | None:
        """How long after the coordinator's death the migration may take to be over, where another takes over."""
        is_a_death = self.participant is Participant.COORDINATOR and self.has_second and self.fault is Fault.KILL
        has_begun = self.point != "coordinator.begin.before"
        bounded = is_a_death and has_begun and self.course in (Course.COMMIT, Course.ABORT)
        return LEASE_TTL_S + RESOLUTION_MARGIN_S if bounded else None


def _sides(*steps: str) -> tuple[str, ...]:
    return tuple(f"{step}.{side}" for step in steps for side in ("before", "after"))


# In the order in which they are reached.
_COMMIT_STEPS = ("begin", "create", "import", "hold", "stop", "commit", "lift", "scrub", "finish")
_COMMIT_POINTS = _sides(*(f"coordinator.{step}" for step in _COMMIT_STEPS))
_ABORT_POINTS = _sides(*(f"coordinator.{step}" for step in ("abort", "discard", "resume", "restore", "finish")))
# What is another step, or does another thing, if local memory follows after COMMIT.
_POST_COPY_POINTS = _sides(*(f"coordinator.{step}" for step in ("commit", "lift", "arrive", "scrub")))
_HOST_POINTS = {
    Course.COMMIT: {
        Participant.TARGET: (
            *_sides("hostd.create"),
            "hostd.import.round",
            *_sides("hostd.complete", "hostd.prove"),
        ),
        Participant.SOURCE: (
            *(f"hostd.export.{part}" for part in ("header", "round")),
            *_sides("hostd.stop"),
            *(f"hostd.export.{part}" for part in ("last", "end")),
            "hostd.destroy.before",
            "hostd.remove.halfway",
            "hostd.destroy.after",
        ),
        Participant.DRIVER_HOST: _sides("hostd.hold", "hostd.update"),
    },
    Course.POST_COPY: {
        Participant.TARGET: (*_sides("hostd.complete", "hostd.prove"), "hostd.arrive", *_sides("hostd.arrived")),
        Participant.SOURCE: (*_sides("hostd.stop"), "hostd.export.end", "hostd.destroy.before"),
    },
    Course.ABORT: {
        Participant.TARGET: ("hostd.destroy.before", "hostd.remove.halfway", "hostd.destroy.after"),
        Participant.SOURCE: _sides("hostd.resume"),
        Participant.DRIVER_HOST: _sides("hostd.lift"),
    },
    # A target that has all of its state waits for a coordinator, here for the one that is started in the end.
    Course.RESOLVE: {
        Participant.SOURCE: _sides("hostd.resolve_instance"),
        Participant.DRIVER_HOST: _sides("hostd.resolve_hold", "hostd.resolve_abort"),
    },
}
AFTER_COMMIT = frozenset(
    (
        *_COMMIT_POINTS[_COMMIT_POINTS.index("coordinator.commit.after") :],
        *_sides("coordinator.arrive"),
        *_sides("hostd.prove", "hostd.update", "hostd.arrived", "hostd.destroy"),
        "hostd.arrive",
        "hostd.remove.halfway",
    )
)
# Reached only where a machine has lost its memory: tests/integration/test_post_copy.py.
NOT_HERE = frozenset(_sides("hostd.lose"))


def all_cells(*, may_kill_etcd: bool) -> list[Cell]:
    """Return the whole matrix."""
    cells = [
        Cell(course, point, participant, fault, has_second)
        for course, points in (
            (Course.COMMIT, _COMMIT_POINTS),
            (Course.POST_COPY, _POST_COPY_POINTS),
            (Course.ABORT, _ABORT_POINTS),
        )
        for point in points
        for participant in Participant
        for fault in _faults(participant, may_kill_etcd=may_kill_etcd)
        for has_second in ((True, False) if participant is Participant.COORDINATOR else (True,))
    ]
    cells += [
        Cell(course, point, Participant.COORDINATOR, fault)
        for course in (Course.ADOPT_UNDECIDED, Course.ADOPT_COMMITTED)
        for point in _sides("coordinator.adopt")
        for fault in (Fault.KILL, Fault.STOP)
    ]
    cells += [
        Cell(course, point, participant, fault, has_second=course is not Course.RESOLVE)
        for course, by_participant in _HOST_POINTS.items()
        for participant, points in by_participant.items()
        for point in points
        for fault in (Fault.KILL, Fault.STOP)
    ]
    assert {cell.point for cell in cells} | NOT_HERE == failpoint.NAMES
    return cells


def _faults(participant: Participant, *, may_kill_etcd: bool) -> tuple[Fault, ...]:
    if participant is not Participant.ETCD or may_kill_etcd:
        return Fault.KILL, Fault.STOP
    return Fault.RESTART, Fault.STOP
