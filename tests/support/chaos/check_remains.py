"""The checker of what is left: etcd's records against each other, against the hosts, and against the history.

Invariant 8 (after DONE or ABORTED nothing is left), and what the records must say of homes, generations, offsets and
slots, computed anew from the places that they name.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import TypeVar

from google.protobuf.message import Message
from support.chaos.findings import Findings
from support.chaos.remains import HostRemains, Record, Remains

from vfleet.v1.records_pb2 import Driver, Function, FunctionStatus, Host, Migration, Move, Phase, Slot
from vfleet.v1.types_pb2 import DeviceState, TableEntry

OVER = frozenset({Phase.PHASE_DONE, Phase.PHASE_ABORTED})
QUIET = frozenset({DeviceState.DEVICE_STATE_RUNNING, DeviceState.DEVICE_STATE_STOP})

MessageT = TypeVar("MessageT", bound=Message)


def decoded(records: Mapping[str, Record], kind: str, message: type[MessageT]) -> dict[str, MessageT]:
    """Return the records of a kind (the first word of their keys), by the rest of their keys."""
    return {
        key.removeprefix(f"{kind}/"): message.FromString(record.value)
        for key, record in records.items()
        if key.startswith(f"{kind}/")
    }


def unfinished(records: Mapping[str, Record]) -> list[str]:
    """Return the migrations that are not over."""
    return [name for name, m in decoded(records, "migrations", Migration).items() if m.phase not in OVER]


def outcomes(records: Mapping[str, Record]) -> Counter[str]:
    """Return how many migrations are in which phase, how many were "adopted", and how many a host "resolved"."""
    counts: Counter[str] = Counter()
    for migration in decoded(records, "migrations", Migration).values():
        counts[Phase.Name(migration.phase)] += 1
        counts["adopted"] += migration.finished_by not in ("", migration.coordinator)
        counts["resolved"] += (
            migration.abort_reason.startswith("host ") and "past its deadline" in migration.abort_reason
        )
    return counts


def last_sequences(hosts: Mapping[str, HostRemains]) -> dict[tuple[str, str], int]:
    """Return how far each function says that it got with each driver, by driver and function."""
    return {
        (driver, instance.function): last
        for host in hosts.values()
        for instance in host.instances
        for driver, last in instance.last_sequences.items()
    }


def check_remains(remains: Remains, findings: Findings) -> None:
    """Check all that is left."""
    functions = decoded(remains.records, "functions", Function)
    for name in unfinished(remains.records):
        findings.add("unfinished", f"migration {name} is not over")
    for kind in ("locks", "owners"):
        for key in remains.records:
            findings.expect("residue", not key.startswith(f"{kind}/"), f"etcd has {key}")
    _check_slots(remains.records, functions, findings)
    _check_homes(remains.records, functions, findings)
    _check_moves(remains.records, functions, findings)
    _check_instances(functions, remains.hosts, findings)
    _check_tables(remains.records, functions, remains.hosts, findings)


def _check_slots(records: Mapping[str, Record], functions: Mapping[str, Function], findings: Findings) -> None:
    expected = {f"{f.device}/{f.vf_index}": Slot(function=f.name) for f in functions.values()}
    slots = decoded(records, "slots", Slot)
    for key in expected.keys() | slots.keys():
        about = f"slot {key} is recorded as {_text(slots.get(key))}, not {_text(expected.get(key))}"
        findings.expect("residue", slots.get(key) == expected.get(key), about)


def _check_homes(records: Mapping[str, Record], functions: Mapping[str, Function], findings: Findings) -> None:
    hosts = decoded(records, "hosts", Host)
    for function in functions.values():
        active = function.status == FunctionStatus.FUNCTION_STATUS_ACTIVE
        findings.expect("lost", active, f"{function.name} is {FunctionStatus.Name(function.status)}")
        host = hosts[function.device.partition("/")[0]]
        device = next(device for device in host.devices if device.name == function.device)
        rid = device.routing_id + device.first_vf_offset + (function.vf_index - 1) * device.vf_stride
        base = host.segment << 48 | rid << 32
        findings.expect(
            "misrouted", function.base == base, f"{function.name} has base {function.base:#x}, not {base:#x}"
        )


def _check_moves(records: Mapping[str, Record], functions: Mapping[str, Function], findings: Findings) -> None:
    """Check that the moves that were committed, and only they, lead to each function's home, one from the other."""
    moves: dict[str, list[Move]] = defaultdict(list)
    for migration in decoded(records, "migrations", Migration).values():
        if migration.phase == Phase.PHASE_DONE:
            for move in migration.moves:
                moves[move.function].append(move)
    for name, function in functions.items():
        chain = sorted(moves[name], key=lambda move: move.target.generation)
        generations = [move.target.generation for move in chain]
        whole = generations == list(range(2, function.generation + 1))
        findings.expect("mismatches", whole, f"{name} at generation {function.generation} was moved to {generations}")
        places = [move.source for move in chain[1:]] + [function]
        for move, place in zip(chain, places, strict=False):
            at = (move.target.device, move.target.vf_index)
            findings.expect(
                "mismatches", at == (place.device, place.vf_index), f"{name} was moved to {at}, and left else"
            )


def _check_instances(functions: Mapping[str, Function], hosts: Mapping[str, HostRemains], findings: Findings) -> None:
    homes = {(f.device, f.vf_index, f.name, f.generation) for f in functions.values()}
    for host, remains in hosts.items():
        for hold in remains.holds:
            findings.add("residue", f"{host} holds {hold.function} of {hold.driver} for {hold.migration}")
        for instance in remains.instances:
            place = instance.device, instance.vf_index, instance.function, instance.generation
            findings.expect("residue", place in homes, f"{host} has an instance that is no home: {place}")
            homes.discard(place)
            function = functions.get(instance.function)
            quiet = (
                instance.complete
                and instance.state in QUIET
                and not instance.HasField("stopped_by")
                and (function is None or instance.base == function.base)
            )
            findings.expect("residue", quiet, f"{host} has an instance that waits: {_text(instance)}")
    for place in sorted(homes):
        findings.add("lost", f"no host has the home {place}")


def _check_tables(
    records: Mapping[str, Record],
    functions: Mapping[str, Function],
    hosts: Mapping[str, HostRemains],
    findings: Findings,
) -> None:
    entries = decoded(records, "entries", TableEntry)
    attached = {(driver, function.name) for function in functions.values() for driver in function.drivers}
    for key, entry in entries.items():
        findings.expect("residue", (entry.driver, entry.function) in attached, f"etcd has an entry {key} of nobody")
        function = functions.get(entry.function, Function())
        leads = (entry.virtual_address + entry.offset) % (1 << 64)
        right = leads == function.base and entry.generation == function.generation
        findings.expect("misrouted", right, f"entry {key} leads to {leads:#x}, the home is {function.base:#x}")
    found = {(entry.driver, entry.function) for entry in entries.values()}
    for driver, name in sorted(attached - found):
        findings.add("lost", f"driver {driver} has no entry for {name}")
    drivers = {(driver.host, driver.name) for driver in decoded(records, "drivers", Driver).values()}
    there = {(host, driver.driver) for host, remains in hosts.items() for driver in remains.drivers}
    for who in sorted(drivers ^ there):
        findings.add("residue", f"only one of etcd and the host knows of driver {who}")
    stored = {key: (e.virtual_address, e.offset, e.generation, False) for key, e in entries.items()}
    own = dict(_own_entries(hosts))
    for key in sorted(stored.keys() | own.keys()):
        same = stored.get(key) == own.get(key)
        findings.expect("residue", same, f"entry {key} is {own.get(key)} at the host, {stored.get(key)} in etcd")
    for host, remains in hosts.items():
        for state in remains.drivers:
            for name, count in state.unanswered.items():
                findings.add("unfinished", f"{host}: {count} accesses of {state.driver} to {name} wait", count)


def _own_entries(hosts: Mapping[str, HostRemains]) -> Iterator[tuple[str, tuple[int, int, int, bool]]]:
    for host, remains in hosts.items():
        for driver in remains.drivers:
            for entry in driver.entries:
                if entry.function:
                    about = entry.virtual_address, entry.offset, entry.generation, entry.held
                    yield f"{host}/{driver.driver}/{entry.function}", about


def _text(message: Message | None) -> str:
    return " ".join(str(message).split()) or "empty"
