"""Fleets as values: snapshots built from records, for tests of what decides purely; and a store that holds one."""

from google.protobuf.message import Message
from support.fake_host import device

from coordinator.planner import Limits
from coordinator.snapshot import Snapshot
from vfleet.address import Location, table_offset
from vfleet.etcd import keys
from vfleet.etcd.records import encode
from vfleet.etcd.store import Compare, KeyValue, Listing, Put, Target, Transaction
from vfleet.v1.migration_service_pb2 import MoveRequest
from vfleet.v1.records_pb2 import Device, Driver, Function, FunctionStatus, Host, Slot
from vfleet.v1.types_pb2 import Attempt, TableEntry

LIMITS = Limits(operations=128, request_bytes=3 << 19)


class FleetValues:
    """Records by key, each written at a revision of its own; `snapshot()` is the fleet that they make."""

    def __init__(self) -> None:
        self.items: dict[str, KeyValue] = {}
        self.revision = 0

    def put(self, key: str, value: Message | str) -> int:
        """Write a key and return the revision."""
        self.revision += 1
        data = value.encode() if isinstance(value, str) else encode(value)
        created = self.items[key].create_revision if key in self.items else self.revision
        self.items[key] = KeyValue(key, data, created, self.revision)
        return self.revision

    def host(self, name: str, segment: int, *devices: Device, registered: bool = True) -> None:
        record = Host(name=name, segment=segment, address=f"{name}:1", incarnation=f"{name}-boot", devices=devices)
        self.put(keys.host_key(name), record)
        if registered:
            self.put(keys.registration_key(name), f"{name}-boot")

    def function(self, name: str, home: Device, segment: int, vf_index: int, *drivers: str, **more: object) -> None:
        """Put a function at home, its slot, and an entry for each driver, given as DRIVER@HOST."""
        base = Location(segment, home.routing_id + vf_index).base
        record = Function(
            name=name,
            identity=7,
            generation=3,
            device=home.name,
            vf_index=vf_index,
            base=base,
            bars=home.bars,
            status=FunctionStatus.FUNCTION_STATUS_ACTIVE,
            attempt=Attempt(fleet_generation=1, revision=1),
            drivers=sorted(driver.partition("@")[0] for driver in drivers),
            model=home.model,
            incarnation=f"{home.host}-boot",
        )
        for field, value in more.items():
            setattr(record, field, value)
        self.put(keys.function_key(name), record)
        self.put(keys.slot_key(home.name, vf_index), Slot(function=name))
        for number, text in enumerate(sorted(drivers), start=1):
            driver, _, host = text.partition("@")
            address = number << 40
            entry = TableEntry(
                driver=driver,
                function=name,
                virtual_address=address,
                length_bytes=2 << 20,
                offset=table_offset(base, address),
                generation=3,
                host=host,
            )
            self.put(keys.driver_key(driver), Driver(name=driver, host=host))
            self.put(keys.entry_key(host, driver, name), entry)

    def snapshot(self) -> Snapshot:
        """Return the fleet."""
        return Snapshot(Listing(self.revision, tuple(self.items[key] for key in sorted(self.items))))

    def commit(self, transaction: Transaction) -> bool:
        """Carry out a transaction, as etcd would, and return whether its comparisons held."""
        if not all(self._holds(compare) for compare in transaction.compares):
            return False
        self.revision += 1
        for write in transaction.writes:
            before = self.items.pop(write.key, None)
            if isinstance(write, Put):
                created = before.create_revision if before else self.revision
                self.items[write.key] = KeyValue(write.key, write.value, created, self.revision, write.lease)
        return True

    def _holds(self, compare: Compare) -> bool:
        kv = self.items.get(compare.key)
        if compare.target is Target.VALUE:
            return kv is not None and kv.value == compare.expected
        revisions = (kv.create_revision, kv.mod_revision) if kv else (0, 0)
        return revisions[compare.target is Target.MOD_REVISION] == compare.expected


def three_hosts() -> FleetValues:
    """Return h1 to h3 with nic0 each; vf1 (drivers d1 on h1 and d2 on h3) and vf2 (none) are on h1/nic0."""
    fleet = FleetValues()
    for segment, name in enumerate(("h1", "h2", "h3"), start=1):
        fleet.host(name, segment, device(f"{name}/nic0"))
    fleet.function("vf1", device("h1/nic0"), 1, 1, "d1@h1", "d2@h3")
    fleet.function("vf2", device("h1/nic0"), 1, 2)
    return fleet


def move(function: str, target: str, vf_index: int = 0) -> MoveRequest:
    """Return what is asked for: a function to a device."""
    return MoveRequest(function=function, target_device=target, target_vf_index=vf_index)
