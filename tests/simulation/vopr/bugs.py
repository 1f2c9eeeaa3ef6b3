"""Bugs, each a small patch of the real code at run time: what the simulation is known to find.

A rule of which a second layer takes the place is taken away together with it (design.md, "Why it is safe").
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from simulation.vopr import restoration, world
from simulation.vopr.bugs_post_copy import POST_COPY_BUGS, Patch
from simulation.vopr.faults import draw_profile

from coordinator import migration, transaction
from coordinator import service as coordinator_service
from coordinator.migration import Run
from coordinator.tasks import together
from hostd import device_state, drivers, entry_order, instance, resolution, transfer
from hostd.access_queue import AccessQueue
from hostd.drivers import Drivers
from hostd.fence import Fences
from hostd.functions import Functions
from hostd.instance import Instance
from hostd.resolution import Resolver
from hostd.sequencer import Sequencer
from hostd.slots import Slots
from hostd.transfer import Export
from hostd.translation import TranslationTable
from vfleet import decision
from vfleet.etcd.session import Session
from vfleet.etcd.store import Compare, Delete, Transaction
from vfleet.v1.host_records_pb2 import Fence
from vfleet.v1.records_pb2 import Phase
from vfleet.v1.types_pb2 import DECISION_ABORTED, DEVICE_STATE_STOP_COPY

BUGS: dict[str, Callable[[], list[Patch]]] = {}
FOUND_AT: dict[str, int] = {}


def _bug(*, found_at: int):
    """Register a bug, and a seed that finds it."""

    def register(make: Callable[[], list[Patch]]) -> Callable[[], list[Patch]]:
        name = make.__name__.replace("_", "-")
        BUGS[name], FOUND_AT[name] = make, found_at
        return make

    return register


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Have a bug while the block runs."""
    with ExitStack() as patches:
        for target, attribute, replacement in BUGS[name]():
            patches.enter_context(mock.patch.object(target, attribute, replacement))
        yield


def _without(make: Callable[..., Transaction], is_dropped: Callable[[Compare], bool]) -> Callable[..., Transaction]:
    def made(*args: Any, **options: Any) -> Transaction:
        whole = make(*args, **options)
        return replace(whole, compares=tuple(compare for compare in whole.compares if not is_dropped(compare)))

    return made


def _no_fence() -> list[Patch]:
    def admit(self, function, attempt):
        fence = self._fences.get(function)
        if fence is None or fence.attempt.revision < attempt.revision:
            self._fences[function] = Fence(attempt=attempt)
            self._ledger.put("fence", function, self._fences[function])

    return [(Fences, "prepare", admit), (Fences, "conclude", admit)]


@_bug(found_at=5)
def no_fence_and_no_naming() -> list[Patch]:
    def destroy(self, request, fleet_generation=0):
        found = self.find(request.function, request.generation)
        if found is not None:
            self.remove(found)

    def resume(self, request, fleet_generation=0):
        found = self.find(request.function, request.generation)
        if found is not None and found.state == DEVICE_STATE_STOP_COPY:
            self.run(found)
        return found

    return [*_no_fence(), (Functions, "destroy", destroy), (Functions, "resume", resume)]


@_bug(found_at=2)
def no_fence_and_resume_by_any_attempt() -> list[Patch]:
    return [*_no_fence(), no_fence_and_no_naming()[3]]


@_bug(found_at=2)
def no_fence_and_lift_of_any_hold() -> list[Patch]:
    def lift(self, request):
        names = [(name.driver, name.function) for name in request.entries]
        self._forget_and_replace([name for name in names if self._holds.find(name)])

    return [*_no_fence(), (Drivers, "lift", lift)]


@_bug(found_at=3)
def destroy_by_function() -> list[Patch]:
    def destroy(self, request, fleet_generation=0):
        self._fences.conclude(request.function, request.attempt)
        found = self.find(request.function, 0)
        if found is not None:
            self.remove(found)

    return [(Functions, "destroy", destroy)]


@_bug(found_at=2)
def lift_before_commit() -> list[Patch]:
    prepare = Run._prepare

    async def early(self, options):
        await prepare(self, options)
        await together(self._lift_unchanged(move, entry) for move in self.record.moves for entry in move.entries)

    return [(Run, "_prepare", early)]


@_bug(found_at=1)
def apply_before_commit() -> list[Patch]:
    prepare = Run._prepare

    async def early(self, options):
        await prepare(self, options)
        await together(self._lift(host) for host in self._entries_by_host())

    return [(Run, "_prepare", early)]


@_bug(found_at=1)
def target_slot_forgotten() -> list[Patch]:
    begin = transaction.begin

    def forgetful(record, *args):
        whole = begin(record, *args)
        return replace(whole, writes=tuple(write for write in whole.writes if "/slots/" not in write.key))

    return [(transaction, "begin", forgetful)]


@_bug(found_at=1)
def source_slot_not_freed() -> list[Patch]:
    finish = transaction.finish

    def forgetful(*args, **options):
        whole = finish(*args, **options)
        slots = [w for w in whole.writes if isinstance(w, Delete) and "/slots/" in w.key]
        return replace(whole, writes=tuple(write for write in whole.writes if write not in slots[:1]))

    return [(transaction, "finish", forgetful)]


@_bug(found_at=8)
def old_table_applied() -> list[Patch]:
    def with_entries(self, entries):
        by_function = dict(self.by_function)
        by_function.update({entry.function: entry for entry in entries})
        return TranslationTable(by_function.values())

    return [(entry_order, "_is_as_new", lambda *_: False), (TranslationTable, "with_entries", with_entries)]


@_bug(found_at=1)
def sequences_stay_behind() -> list[Patch]:
    return [(Sequencer, "load", lambda self, exported: self.take(exported.driver))]


@_bug(found_at=1)
def answers_stay_behind() -> list[Patch]:
    export = Sequencer.export

    def bare(self):
        exported = export(self)
        exported.ClearField("answers")
        return exported

    return [(Sequencer, "export", bare)]


@_bug(found_at=1)
def answers_forgotten_when_given() -> list[Patch]:
    finish_head = AccessQueue._finish_head

    def finish(self, result):
        self._accesses[0].may_ask_again = False
        finish_head(self, result)

    return [(AccessQueue, "_finish_head", finish)]


@_bug(found_at=1)
def lease_trusted() -> list[Patch]:
    def nothing(_: Compare) -> bool:
        return True

    return [
        (Session, "check", lambda self: None),
        (transaction, "commit", _without(transaction.commit, nothing)),
        (migration, "abort_transaction", _without(decision.abort_transaction, nothing)),
        (transaction, "finish", _without(transaction.finish, nothing)),
    ]


@_bug(found_at=4)
def abort_not_compared() -> list[Patch]:
    without = _without(decision.abort_transaction, lambda compare: "/migrations/" in compare.key)
    return [(resolution, "abort_transaction", without), (coordinator_service, "abort_transaction", without)]


@_bug(found_at=19)
def commit_not_compared() -> list[Patch]:
    return [
        (
            transaction,
            "commit",
            _without(transaction.commit, lambda c: "/migrations/" in c.key),
        )
    ]


@_bug(found_at=88)
def incarnation_ignored() -> list[Patch]:
    return [(transaction, "commit", _without(transaction.commit, lambda c: "/registrations/" in c.key))]


@_bug(found_at=2)
def lock_not_compared() -> list[Patch]:
    return [
        (transaction, "begin", _without(transaction.begin, lambda c: "/locks/" in c.key)),
        (__import__("coordinator.planner").planner, "check_unlocked", lambda *_: None),
    ]


@_bug(found_at=9)
def resolved_by_phase() -> list[Patch]:
    async def resolve(self, found):
        stored = await self._store.get(f"/vfleet/migrations/{found.about.migration}")
        record = resolution.decode(resolution.Migration, stored)
        committed = record.phase in (Phase.PHASE_COMMITTED, Phase.PHASE_DONE)
        if found.is_closed or record.phase == Phase.PHASE_PREPARING:
            return
        if committed != found.about.HasField("stopped_by"):
            self._functions.run(found)
        else:
            self._functions.remove(found)

    return [(Resolver, "_resolve_instance", resolve)]


@_bug(found_at=45)
def source_runs_on() -> list[Patch]:
    return [(instance, "serves", lambda state: device_state.serves(state) or state == DEVICE_STATE_STOP_COPY)]


@_bug(found_at=7)
def nothing_zeroed() -> list[Patch]:
    open_instance = Slots._open

    def by_slot(self, record, model=None):
        file, record.file = record.file, f"{record.instance.device}-{record.instance.vf_index}".replace("/", "-")
        try:
            return open_instance(self, record, model)
        finally:
            record.file = file

    return [(Slots, "_open", by_slot)]


@_bug(found_at=8)
def dirty_pages_forgotten() -> list[Patch]:
    rest = Export.rest
    return [(Export, "rest", lambda self, dirty: rest(self, set()))]


@_bug(found_at=1)
def half_an_import_taken() -> list[Patch]:
    async def hasty(functions, channels, request):
        async for progress in import_state(functions, channels, request):
            if progress.ready_to_stop and not progress.complete:
                functions.complete_import(functions.find(request.function, request.generation))
                progress.complete = True
                yield progress
                return
            yield progress

    import_state = transfer.import_state
    return [(transfer, "import_state", hasty)]


@_bug(found_at=13)
def holds_forgotten_at_restart() -> list[Patch]:
    init = Drivers.__init__

    def forgetful(self, host, place, ledger, *args):
        for hold in ledger.all("hold", drivers.Hold):
            ledger.delete("hold", f"{hold.driver}/{hold.function}")
        init(self, host, place, ledger, *args)

    return [(Drivers, "__init__", forgetful)]


@_bug(found_at=97)
def holds_never_resolved() -> list[Patch]:
    async def never(self, migration):
        return

    return [(Resolver, "_resolve_holds", never)]


@_bug(found_at=196)
def abort_that_looks_at_no_source() -> list[Patch]:
    """Only a loss of etcd just between a COMMIT and its FINISH makes a difference."""

    async def undo(self, move):
        target = move.target
        await together(
            (
                self._destroy(move.function, target.host, target.incarnation, target.generation),
                self._resume(move),
                *(self._lift_unchanged(move, entry) for entry in move.entries),
            )
        )

    def is_over(found, record, function):
        return is_over_now(found, record, function) or (
            not found.about.HasField("stopped_by")
            and record is not None
            and decision.outcome(record) == DECISION_ABORTED
        )

    is_over_now = resolution._is_over
    weather: list[Patch] = [(world, "LOSS_OF_ETCD", 1.0), (restoration, "AIMED", 1.0)]
    return [(Run, "_undo_move", undo), (resolution, "_is_over", is_over), *weather]


@_bug(found_at=3)
def source_not_scrubbed() -> list[Patch]:
    async def never(self, move):
        return

    return [(Run, "_scrub", never), (Resolver, "_resolve_instance", never)]


@_bug(found_at=1)
def repeated_access_applied_again() -> list[Patch]:
    access = Instance.access

    def again(self, sequencer, sequence, *rest):
        if sequence <= sequencer.last:
            sequencer.last = sequence - 1
        return access(self, sequencer, sequence, *rest)

    return [(Instance, "access", again)]


@_bug(found_at=35)
def sessions_not_counted() -> list[Patch]:
    """In 1 run of 200 a message of before a host's restart arrives after it; in such weather as this, in 1 of 20."""

    def admit(self, driver, function, generation, session, address, admit=Functions.admit):
        return admit(self, driver, function, generation, (1 << 40, 0, 0), address)

    def stormy(random):
        worst = {"faults": ("cut off and kill",), "fault_every_s": 2.0, "slowness": 0.05, "duplication": 0.4}
        return replace(draw_profile(random), **worst)

    return [(Functions, "admit", admit), (world, "draw_profile", stormy)]


@_bug(found_at=3)
def group_commits_in_parts() -> list[Patch]:
    commit = transaction.commit

    def part(record, *args):
        whole = commit(record, *args)
        last = record.moves[-1].function
        writes = tuple(w for w in whole.writes if len(record.moves) == 1 or not w.key.endswith(f"/{last}"))
        return replace(whole, writes=writes)

    return [(transaction, "commit", part)]


@_bug(found_at=2)
def table_changes_in_parts() -> list[Patch]:
    put = Drivers._put_entries

    def first_only(self, entries, *, keep_held=False, goes_back=False):
        entries = list(entries)
        put(self, entries[:1], keep_held=keep_held, goes_back=goes_back)
        for entry in entries[1:]:
            hold = self._holds.find((entry.driver, entry.function))
            if hold is not None and not keep_held:
                self._forget_and_replace([(entry.driver, entry.function)])

    return [(Drivers, "_put_entries", first_only)]


for make, seed in POST_COPY_BUGS.items():
    _bug(found_at=seed)(make)
