"""A store that holds a fleet of values, and answers transactions as a test says."""

from collections.abc import Callable

from support.fleet_values import FleetValues

from vfleet.errors import Reason, VfleetError
from vfleet.etcd.store import Committed, KeyValue, Transaction


class FleetStore:
    """A store that holds a fleet. `answers` says what becomes of the next transactions; of all others, what should.

    "lost" is one that never came, "unanswered" one that is done all the same, "late" one that is done when the next
    comes, and "refused" one that etcd doesn't take. `changed` is called after each that reaches the fleet.
    """

    def __init__(self, fleet: FleetValues, changed: Callable[[], None] = lambda: None) -> None:
        self.fleet = fleet
        self.changed = changed
        self.answers: list[str] = []
        self.commits = 0
        self.unreadable: list[Reason] = []
        self._late: list[Transaction] = []

    async def get(self, key: str) -> KeyValue | None:
        if self.unreadable:
            raise VfleetError(self.unreadable.pop(), "no read")
        return self.fleet.items.get(key)

    async def commit(self, change: Transaction) -> Committed:
        self.commits += 1
        while self._late:
            self.fleet.commit(self._late.pop())
        answer = self.answers.pop(0) if self.answers else "done"
        if answer == "lost":
            raise VfleetError(Reason.STORE_UNAVAILABLE, "no answer")
        if answer == "late":
            self._late.append(change)
            raise VfleetError(Reason.OUTCOME_UNKNOWN, "no answer")
        if answer == "refused":
            raise VfleetError(Reason.LIMIT_EXCEEDED, "too large")
        succeeded = self.fleet.commit(change)
        self.changed()
        if answer == "unanswered":
            raise VfleetError(Reason.OUTCOME_UNKNOWN, "no answer")
        return Committed(succeeded, self.fleet.revision)
