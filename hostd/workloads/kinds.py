"""Which driver a workload is, by the kind that its options name. A new kind of device adds its driver here."""

from collections.abc import Callable, Mapping

from hostd.drivers import Drivers
from hostd.models.accelerator import Accelerator
from hostd.models.checker import Checker
from hostd.models.nvme import Nvme
from hostd.models.virtio_net import VirtioNet
from hostd.workload import Workload
from hostd.workloads.accelerator import AcceleratorDriver
from hostd.workloads.device_workload import DeviceWorkload
from hostd.workloads.nvme import NvmeDriver
from hostd.workloads.port import NewDriver
from hostd.workloads.virtio_net import VirtioNetDriver
from vfleet.clock import Clock
from vfleet.errors import invalid_field
from vfleet.v1.host_records_pb2 import WorkloadRecord

DRIVERS: Mapping[str, NewDriver] = {
    Accelerator.name: AcceleratorDriver,
    Nvme.name: NvmeDriver,
    VirtioNet.name: VirtioNetDriver,
}


def new_workload(
    record: WorkloadRecord, drivers: Drivers, clock: Clock, save: Callable[[WorkloadRecord], None]
) -> Workload:
    """Return the workload of a record. Raise INVALID_FIELD for a kind that there isn't."""
    kind = record.options.kind or Checker.name
    if kind == Checker.name:
        return Workload(record, drivers, clock, save)
    if kind not in DRIVERS:
        kinds = ", ".join(sorted((Checker.name, *DRIVERS)))
        raise invalid_field("options.kind", kind, f"one of {kinds}")
    return DeviceWorkload(record, drivers, clock, save, DRIVERS[kind])
