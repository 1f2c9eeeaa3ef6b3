"""What happened in a run, as far as the invariants ask, and whether they held. Violations are noted, never raised.

The observer stands outside: it sees every change of etcd, every access that an instance carries out, every swap of a
table and every request that a host accepted, and believes no record of the code under test but etcd's.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.protobuf.message import Message
from simulation.vopr.etcd import Etcd
from simulation.vopr.loop import LIFE
from simulation.vopr.network import SimulatedServer

from hostd.driver import Driver
from hostd.instance import Instance
from hostd.sequencer import Sequencer
from vfleet.etcd import keys
from vfleet.etcd.store import Changes
from vfleet.names import host_of
from vfleet.v1.records_pb2 import (
    FUNCTION_STATUS_ACTIVE,
    FUNCTION_STATUS_DELETING,
    FUNCTION_STATUS_LOST,
    Function,
    Migration,
    Phase,
    Slot,
)
from vfleet.v1.types_pb2 import TRANSFER_MODE_POST_COPY

if TYPE_CHECKING:
    from simulation.vopr.world import World

_NEXT = {
    Phase.PHASE_PREPARING: (Phase.PHASE_COMMITTED, Phase.PHASE_ABORTING),
    Phase.PHASE_COMMITTED: (Phase.PHASE_DONE,),
    Phase.PHASE_ABORTING: (Phase.PHASE_ABORTED,),
    Phase.PHASE_DONE: (),
    Phase.PHASE_ABORTED: (),
}
OVER = (Phase.PHASE_DONE, Phase.PHASE_ABORTED)
HIT = (
    "crash before COMMIT",
    "crash after COMMIT",
    "adoption",
    "hold resolved by a host",
    "lease lost in the middle",
    "duplicated request after FINISH",
)

RecordT = TypeVar("RecordT", bound=Message)


class History:
    """The observer of one run. `violations` is empty as long as all invariants held; `hits` counts what was met."""

    def __init__(self, world: "World") -> None:
        self.violations: list[str] = []
        self.hits: dict[str, int] = defaultdict(int)
        self.functions: dict[str, Function] = {}
        self.migrations: dict[str, tuple[Migration, int]] = {}
        self.slots: dict[str, Slot] = {}
        self.begun_s: dict[str, float] = {}
        # What etcd forgot is to be kept by the hosts: the functions as they were, until all is repaired.
        self.forgotten: dict[str, Function] | None = None
        # The identities of functions that were deleted. What a backup or a host has of them still, doctor may take for
        # something that was forgotten.
        self._deleted: set[int] = set()
        self._world = world
        self._served: dict[tuple[int, int], set[tuple[str, str, str, int]]] = defaultdict(set)
        self._applied: dict[tuple[int, str], int] = {}
        self._attempts: dict[tuple[str, str, str], tuple[int, int]] = {}

    def violate(self, invariant: int, text: str) -> None:
        """Note that an invariant does not hold."""
        self.violations.append(f"invariant {invariant}, at {self._world.loop.time():.3f} s: {text}")
        self._world.trace("violation", self.violations[-1])

    def undecided(self) -> bool:
        """Whether a migration waits for its decision."""
        return any(record.phase == Phase.PHASE_PREPARING for record, _ in self.migrations.values())

    def decided(self) -> bool:
        """Whether a migration is decided and not over."""
        return any(record.phase == Phase.PHASE_COMMITTED for record, _ in self.migrations.values())

    # --- etcd ---

    def forget(self, backup: Etcd) -> None:
        """See etcd lose all that came after a backup."""
        self.hits["etcd restored"] += 1
        self.forgotten = dict(self.functions)
        self.functions = _records(backup, keys.FUNCTIONS, Function)
        self.slots = _records(backup, keys.SLOTS, Slot)
        self.migrations = {
            name: (record, backup.keys[keys.migration_key(name)].create_revision)
            for name, record in _records(backup, keys.MIGRATIONS, Migration).items()
        }

    def repaired(self) -> None:
        """See the operator find nothing wrong any more."""
        self.forgotten = None
        self._world.trace("repaired")
        self._check_slots()
        self._check_tables()

    def removed(self, instance: Instance) -> None:
        """See a host remove an instance."""
        about, known = instance.about, (self.forgotten or {}).get(instance.about.function)
        if known is None or known.status != FUNCTION_STATUS_ACTIVE or not _is_home(known, instance):
            return
        recorded = self.functions.get(about.function)
        if recorded is not None and recorded.status == FUNCTION_STATUS_DELETING:
            return
        # A commit that had no effect yet may be taken back where the source has everything still.
        others = self._others(instance)
        if instance.has_run or not others:
            self.violate(1, f"{host_of(about.device)} gives up {about.function}, whose home it was")
        elif recorded is not None and self.forgotten and any(_is_home(recorded, other) for other in others):
            self.forgotten[about.function] = recorded

    def _others(self, instance: Instance) -> list[Instance]:
        """Return the function's other instances that have all of its state."""
        hosts = (process.host for process in self._world.hosts.values() if process.host is not None)
        instances = (other for host in hosts for other in host.functions.instances() if other is not instance)
        return [each for each in instances if each.about.complete and each.about.identity == instance.about.identity]

    def etcd_changed(self, changes: Changes) -> None:
        """See what one revision changed."""
        moved = False
        for event in changes.events:
            if event.key.startswith(keys.MIGRATIONS):
                self._migration_changed(event.key.removeprefix(keys.MIGRATIONS), event.value, event.create_revision)
            elif event.key.startswith(keys.FUNCTIONS):
                name = event.key.removeprefix(keys.FUNCTIONS)
                if event.value is None:
                    gone = self.functions.pop(name, None)
                    if gone is not None:
                        self._deleted.add(gone.identity)
                    if self.forgotten is not None:
                        self.forgotten.pop(name, None)
                else:
                    self._check_lost(Function.FromString(event.value))
                    self.functions[name] = Function.FromString(event.value)
                    self._remember(self.functions[name])
                moved = True
            elif event.key.startswith(keys.SLOTS):
                name = event.key.removeprefix(keys.SLOTS)
                if event.value is None:
                    self.slots.pop(name, None)
                else:
                    self.slots[name] = Slot.FromString(event.value)
            elif event.key.startswith(keys.OWNERS):
                self._owner_changed(event.key.removeprefix(keys.OWNERS), event.value, changes)
        if self.forgotten is None:
            self._check_slots()
            if moved:
                self._check_tables()

    def _remember(self, function: Function) -> None:
        """Take a function's record for what it was before etcd was lost, if it is ahead of that."""
        is_ahead = function.generation > self._generation(function.name)
        if self.forgotten is not None and is_ahead and function.identity not in self._deleted:
            self.forgotten[function.name] = function

    def _check_lost(self, function: Function) -> None:
        """See to it that nothing but a machine's end loses a function: its home's, or in post-copy its source's."""
        before = self.functions.get(function.name)
        if function.status != FUNCTION_STATUS_LOST or before is None or before.status == FUNCTION_STATUS_LOST:
            return
        known = (self.forgotten or {}).get(function.name)
        is_being_deleted = known is not None and known.status == FUNCTION_STATUS_DELETING
        if function.identity in self._deleted or is_being_deleted:
            return
        sources = {
            move.source.host: record
            for record, _ in self.migrations.values()
            for move in record.moves
            if move.function == function.name and move.target.generation == function.generation
        }
        for source, record in sources.items():
            is_waited_for = record.phase == Phase.PHASE_COMMITTED and record.mode == TRANSFER_MODE_POST_COPY
            if is_waited_for and self._world.was_power_cycled(source, function.name):
                self.hits["lost with its source"] += 1
                return
        if not self._world.has_lost(host_of(function.device), function.incarnation):
            self.violate(8, f"{function.name} is LOST at {function.device}, and no machine died that had its state")

    def _generation(self, name: str) -> int:
        """Return the generation that a function had before etcd was lost."""
        known = (self.forgotten or {}).get(name)
        return known.generation if known is not None else 0

    def _check_tables(self) -> None:
        for process in self._world.hosts.values():
            if process.is_up and process.host is not None:
                for driver in process.host.drivers.all():
                    self.table_swapped(driver, process.name)

    def _migration_changed(self, name: str, value: bytes | None, create_revision: int) -> None:
        before = self.migrations.get(name)
        if value is None:
            self.violate(5, f"the record of {name} was deleted")
            return
        record = Migration.FromString(value)
        if before is not None and record.phase not in _NEXT[before[0].phase]:
            self.violate(5, f"{name} went from {Phase.Name(before[0].phase)} to {Phase.Name(record.phase)}")
        self.migrations[name] = (record, create_revision)
        self._check_begun_or_committed(record, before is None)
        self.hits[Phase.Name(record.phase).removeprefix("PHASE_")] += 1
        self._world.trace("phase", name, Phase.Name(record.phase), record.abort_reason)

    def _check_begun_or_committed(self, record: Migration, is_new: bool) -> None:
        for move in record.moves:
            if is_new:
                self.begun_s[move.function] = self._world.loop.time()
            for other, _ in self.migrations.values() if is_new else ():
                shared = any(theirs.function == move.function for theirs in other.moves)
                if shared and other.name != record.name and other.phase not in OVER:
                    self.violate(5, f"{record.name} and {other.name} move {move.function} at once")
            registered = self._world.etcd.state.get(keys.registration_key(move.target.host))
            if record.phase == Phase.PHASE_COMMITTED and (
                registered is None or registered.value.decode() != move.target.incarnation
            ):
                self.violate(11, f"{record.name} commits {move.function} to a machine that is no more")

    def _owner_changed(self, name: str, value: bytes | None, changes: Changes) -> None:
        record = self.migrations[name][0]
        if self.forgotten is not None:
            return
        if value is None and record.phase not in OVER:
            self.hits["lease lost in the middle"] += 1
        if value is not None and all(event.key != keys.migration_key(name) for event in changes.events):
            self.hits["adoption"] += 1

    def _check_slots(self) -> None:
        for function in self.functions.values():
            slot = self.slots.get(f"{function.device}/{function.vf_index}")
            if slot is None or slot.function != function.name:
                self.violate(12, f"{function.name} has no slot at its home {function.device} VF {function.vf_index}")
        for record, _ in self.migrations.values():
            for move in record.moves if record.phase not in OVER else ():
                for place in (move.source, move.target):
                    slot = self.slots.get(f"{place.device}/{place.vf_index}")
                    if slot is None or slot.function != move.function:
                        self.violate(12, f"{record.name} has no slot {place.device} VF {place.vf_index}")

    # --- hosts ---

    def accessed(self, instance: Instance, sequencer: Sequencer, sequence: int, generation: int | None = None) -> None:
        """See an access that an instance is about to carry out."""
        about, life = instance.about, LIFE.get()
        assert life is not None
        name, home = about.function, self.functions.get(about.function)
        what = f"{life.name} serves {name} at generation {about.generation} (attempt {about.attempt.revision})"
        if self.forgotten is not None:
            home = self.forgotten.get(about.function)
        if home is None or home.identity != about.identity:
            self.violate(1, f"{what}, which etcd does not have")
        elif not _is_home(home, instance):
            place = f"{home.device} VF {home.vf_index} at generation {home.generation}"
            self.violate(1, f"{what} while etcd's home is {place}")
        served = self._served[about.identity, about.generation]
        served.add((life.name, about.device, str(about.vf_index), about.attempt.revision))
        if len(served) > 1:
            self.violate(1, f"{name} at generation {about.generation} was served by {sorted(served)}")
        if sequence <= sequencer.last:
            return
        key = (about.identity, sequencer.driver)
        expected = self._applied.get(key, 0) + 1
        if sequence == sequencer.last + 1:
            if sequence != expected:
                self.violate(4, f"{sequencer.driver}'s access {sequence} to {name} takes effect; expected {expected}")
            self._applied[key] = sequence

    def admitted(self, instance: Instance, generation: int) -> None:
        """See which instance is to serve an access that names a generation."""
        if instance.about.generation != generation:
            self.violate(
                3, f"{instance.about.function} at {instance.about.generation} takes an access for {generation}"
            )

    def table_swapped(self, driver: Driver, host: str) -> None:
        """See a driver's table, after a change of it or of a function."""
        if self.forgotten is not None:
            return
        for entry in driver.table.entries:
            function = self.functions.get(entry.function)
            if function is None or entry.held or entry.lost:
                continue
            # An entry that etcd has deleted is left to the watch; a machine started anew may have read before COMMIT.
            if driver.name not in function.drivers or self._world.was_power_cycled(host, entry.function):
                continue
            stored = self._world.etcd.state.get(keys.function_key(entry.function))
            if stored is None or entry.revision < stored.create_revision:
                continue
            base = (entry.virtual_address + entry.offset) % (1 << 64)
            if (entry.generation, base) != (function.generation, function.base) and entry.revision:
                self.violate(
                    2,
                    f"{driver.name} on {host} goes to {entry.function} at generation {entry.generation}, base {base:#x}"
                    f"; etcd has {function.generation}, {function.base:#x}",
                )

    def arrived(self, server: SimulatedServer, path: str, request: Any) -> Callable[[grpc.StatusCode], None]:
        """See a unary request reach a host; return what sees whether it was accepted."""
        method = path.rpartition("/")[2]
        if method == "AcknowledgeHold" or "attempt" not in request.DESCRIPTOR.fields_by_name:
            return lambda _: None
        attempt = (request.attempt.fleet_generation, request.attempt.revision)
        named = [e.function for e in request.entries] if hasattr(request, "entries") else [request.function]
        concerned = [(server.life.name, server.incarnation, function) for function in named]
        # A hold is placed at once, but answered only when its drivers know: by then it may be over.
        at_once = {key: self._attempts.get(key, (0, 0)) for key in concerned} if method == "PlaceHold" else {}

        def answered(code: grpc.StatusCode) -> None:
            if code is not grpc.StatusCode.OK:
                return
            for key in concerned:
                highest = self._attempts.get(key, (0, 0))
                before = at_once.get(key, highest)
                if attempt < before:
                    self.violate(9, f"{server.life.name} did {method} of {attempt} after {before}")
                self._attempts[key] = max(attempt, highest)

        return answered

    def delivered_again(self, server: SimulatedServer, path: str, data: bytes) -> None:
        """See a request arrive for the second time."""
        request = server.parse(path, data)
        if "attempt" in request.DESCRIPTOR.fields_by_name:
            over = {begun for record, begun in self.migrations.values() if record.phase in OVER}
            if request.attempt.revision in over:
                self.hits["duplicated request after FINISH"] += 1

    def created(self, instance: Instance, *, fresh: bool) -> None:
        """See a new instance before anything has been written into it."""
        memory = bytearray(instance.image.memory)
        for offset, data in instance.model.reset() if fresh else ():
            memory[offset : offset + len(data)] = bytes(len(data))
        if any(memory):
            self.violate(10, f"{instance.about.function} gets memory that is not zero")

    # --- the end ---

    def check_end(self) -> None:
        """Check what must hold once all is healed and quiet."""
        world, store = self._world, self._world.etcd.state
        for name, (record, _) in self.migrations.items():
            if record.phase not in OVER:
                self.violate(8, f"{name} is still {Phase.Name(record.phase)}")
        for prefix in (keys.LOCKS, keys.OWNERS):
            for item in store.list(prefix).items:
                self.violate(8, f"{item.key} is left")
        homes = {f"{f.device}/{f.vf_index}": f for f in self.functions.values()}
        for place in sorted(self.slots.keys() - homes.keys()):
            self.violate(8, f"slot {place} is left")
        for process in world.hosts.values():
            self._check_host(process.name, homes)

    def _check_host(self, name: str, homes: dict[str, Function]) -> None:
        host = self._world.hosts[name].host
        assert host is not None
        for hold in host.drivers.holds():
            self.violate(7, f"{name} holds {hold.driver}'s {hold.function} still, for {hold.migration}")
        seen = set()
        for instance in host.functions.instances():
            about = instance.about
            home = homes.get(f"{about.device}/{about.vf_index}")
            if home is None or (home.name, home.generation) != (about.function, about.generation):
                self.violate(8, f"{name} has {about.function} at generation {about.generation} still")
            elif not instance.is_serving and not (instance.state == 1 and about.complete):
                self.violate(11, f"{about.function} does not run at its home {name}")
            seen.add(about.function)
        for function in homes.values():
            if host_of(function.device) == name and function.status == 2 and function.name not in seen:
                self.violate(11, f"{function.name} is not at its home {name}")
        for item in self._world.etcd.state.list(keys.entries_prefix(name)).items:
            _, driver, function = item.key.rsplit("/", 2)
            there = {d.name: d.table.by_function for d in host.drivers.all()}
            entry = there.get(driver, {}).get(function)
            if entry is None or entry.revision != item.mod_revision or entry.held:
                self.violate(2, f"{name}'s table of {driver} has {entry} for {function} in the end")


def _is_home(function: Function, instance: Instance) -> bool:
    about = instance.about
    named = (about.identity, about.generation, about.device, about.vf_index)
    return named == (function.identity, function.generation, function.device, function.vf_index)


def _records(state: Etcd, prefix: str, kind: type[RecordT]) -> dict[str, RecordT]:
    return {item.key.removeprefix(prefix): kind.FromString(item.value) for item in state.list(prefix).items}
