"""The instances on this host, each in its slot, a VF of a device. Durable: a record of each, and its image's file."""

from typing import BinaryIO

from hostd.engine_part import ENGINE_BYTES
from hostd.image import FunctionImage, image_bytes
from hostd.instance import Instance
from hostd.ledger import Ledger
from hostd.models import create_model
from hostd.models.base import BusMaster, DeviceModel
from hostd.remains import Remains
from vfleet import failpoint
from vfleet.address import bar_span
from vfleet.v1.host_records_pb2 import InstanceRecord
from vfleet.v1.types_pb2 import DEVICE_STATE_STOP

_KIND = "instance"

Slot = tuple[str, int]
"""A device and a VF index."""


class Slots:
    """All slots that are taken. Of a function there may be several instances, of different attempts."""

    def __init__(self, ledger: Ledger, remains: Remains) -> None:
        self._ledger = ledger
        self._remains = remains
        self._by_slot: dict[Slot, Instance] = {}
        self._by_function: dict[str, list[Instance]] = {}
        for record in ledger.all(_KIND, InstanceRecord):
            self.add(self._open(record))

    def files(self) -> set[str]:
        """Return the names of the mapped files that instances use."""
        return {instance.record.file for instance in self.instances()}

    def instances(self) -> list[Instance]:
        """Return all instances, by slot."""
        return [self._by_slot[slot] for slot in sorted(self._by_slot)]

    def instances_of(self, function: str) -> list[Instance]:
        """Return a function's instances, in the order in which they came."""
        return self._by_function.get(function, [])

    def find(self, slot: Slot) -> Instance | None:
        """Return the instance in a slot, or None."""
        return self._by_slot.get(slot)

    def make(self, record: InstanceRecord, model: DeviceModel) -> Instance:
        """Open a new instance, all of its image zero. Nothing of it lasts until it is saved and added."""
        # A file that a killed daemon left without a record is not this function's.
        self._ledger.delete_file(record.file)
        instance = self._open(record, model)
        instance.is_blank = True
        return instance

    def save(self, instance: Instance) -> None:
        """Write an instance's record."""
        self._ledger.put(_KIND, _key(_slot_of(instance)), instance.record)

    def add(self, instance: Instance) -> None:
        """Let a new instance take its slot."""
        self._by_slot[_slot_of(instance)] = instance
        self._by_function.setdefault(instance.about.function, []).append(instance)

    def remove(self, instance: Instance) -> None:
        """Reset an instance out of existence: nobody reaches its memory any more, and its slot is free and zero."""
        slot = _slot_of(instance)
        self._ledger.delete(_KIND, _key(slot))
        failpoint.reach("hostd.remove.halfway")
        self._ledger.delete_file(instance.record.file)
        del self._by_slot[slot]
        self._by_function[instance.about.function].remove(instance)
        instance.about.state = DEVICE_STATE_STOP
        self._remains.add(instance.release())

    def open_image(self, instance: Instance) -> BinaryIO:
        """Open the file of an instance's image, for a copy."""
        return self._ledger.open_file(instance.record.file)

    def close(self) -> None:
        """Unmap all images."""
        for instance in self.instances():
            instance.close()

    def _open(self, record: InstanceRecord, model: DeviceModel | None = None) -> Instance:
        """Open an instance; with a model, a new one, whose file isn't there yet."""
        about = record.instance
        bars = {bar.index: bar.size_bytes for bar in about.bars}
        is_new = model is not None
        model = model or create_model(about.model, about.identity, bars)
        model_bytes = bar_span(bars) + model.private_bytes
        if not isinstance(model, BusMaster):
            mapped = self._ledger.map_file(record.file, image_bytes(model_bytes), exists=not is_new)
            return Instance(record, model, FunctionImage(mapped, is_new=is_new))
        mapped = self._ledger.map_file(record.file, image_bytes(model_bytes + ENGINE_BYTES), exists=not is_new)
        return Instance(record, model, FunctionImage(mapped, model_bytes, is_new=is_new))


def _slot_of(instance: Instance) -> Slot:
    return instance.about.device, instance.about.vf_index


def _key(slot: Slot) -> str:
    return f"{slot[0]}/{slot[1]}"
