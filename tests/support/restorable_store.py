"""A store in memory that a test can restore from a backup, and whose answers it can lose."""

from copy import deepcopy

from simulation.vopr.etcd import Etcd

from vfleet.errors import Reason, VfleetError
from vfleet.etcd.store import Committed, KeyValue, Listing, Put, Transaction


class RestorableStore:
    """As much of a `Store` as reads and writes keys. `fate` is what becomes of the next transaction.

    "" is nothing special; "before" it is lost; its answer is lost "after" it was done; or it is done only "late", by
    `arrive`.
    """

    def __init__(self) -> None:
        self.state = Etcd()
        self.fate = ""
        self._late: list[Transaction] = []

    async def get(self, key: str) -> KeyValue | None:
        return self.state.get(key)

    async def list(self, prefix: str) -> Listing:
        return self.state.list(prefix)

    async def commit(self, transaction: Transaction) -> Committed:
        fate, self.fate = self.fate, ""
        if fate == "after":
            self.state.commit(transaction)
        elif fate == "late":
            self._late.append(transaction)
        if fate:
            raise VfleetError(Reason.OUTCOME_UNKNOWN, "the answer is lost")
        return self.state.commit(transaction)

    def arrive(self) -> None:
        """Carry out what was on its way."""
        while self._late:
            self.state.commit(self._late.pop(0))

    def put(self, key: str, value: str) -> None:
        self.state.commit(Transaction((), (Put(key, value.encode()),)))

    def pass_revision(self, revision: int) -> None:
        """Let others write until etcd is at a revision."""
        while self.state.revision < revision:
            self.put("/elsewhere", "")

    def back_up(self) -> Etcd:
        return deepcopy(self.state)

    def restore(self, backup: Etcd) -> None:
        self.state = deepcopy(backup)
