"""What is left when all is over, gathered from outside: etcd's records, the hosts' own lists, the devices' memory.

etcd is read by the synchronous client of the etcd3 package, hosts by their services; no logic of a daemon is used.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import etcd3
from support.chaos.drivers import LOCAL_MEMORY
from support.chaos.history import WORD_BYTES

from vfleet.client import FleetClient
from vfleet.driver import DriverClient, Read
from vfleet.host_client import HostClient
from vfleet.v1.driver_service_pb2 import DriverState, WorkloadReport
from vfleet.v1.function_service_pb2 import FunctionInstance
from vfleet.v1.hold_service_pb2 import Hold

PREFIX = "/vfleet/"
AUDITOR = "auditor"
PAGE_BYTES = 4096
LOCAL_MEMORY_BYTES = 0x10000
# The registers that can be read, by the data sheet in docs/device-model.md.
REGISTERS = (
    *range(0x00, 0x38, 8),
    *(0x100 + 0x40 * channel + register for channel in range(8) for register in range(0x00, 0x38, 8)),
)


@dataclass(frozen=True, slots=True)
class Record:
    """A key of etcd, without its prefix: its value, and the revision that last wrote it."""

    value: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class HostRemains:
    """What one host says that it has."""

    instances: Sequence[FunctionInstance]
    drivers: Sequence[DriverState]
    holds: Sequence[Hold]


@dataclass(frozen=True, slots=True)
class Remains:
    """All that is left. `words` are the functions' registers and memory, by function and offset in its window."""

    records: Mapping[str, Record]
    hosts: Mapping[str, HostRemains]
    words: Mapping[str, Mapping[int, int]]
    workloads: Sequence[WorkloadReport]


async def read_records(endpoint: str) -> dict[str, Record]:
    """Return all records of the fleet, read at the etcd member at `endpoint`."""

    def read() -> dict[str, Record]:
        host, _, port = endpoint.rpartition(":")
        with etcd3.client(host=host, port=int(port), timeout=10) as client:
            return {
                about.key.decode().removeprefix(PREFIX): Record(value, about.mod_revision)
                for value, about in client.get_prefix(PREFIX)
            }

    return await asyncio.to_thread(read)


async def read_host(client: HostClient) -> HostRemains:
    """Return what a host says that it has."""
    return HostRemains(await client.list_functions(), await client.list_drivers(), await client.list_holds())


async def read_words(fleet: FleetClient, host: HostClient, host_name: str, function: str) -> dict[int, int]:
    """Return a function's registers and local memory, as a driver sees them that is attached just for this."""
    entry = await fleet.attach_driver(function, AUDITOR, host=host_name)
    reads = [Read(entry.virtual_address + offset, WORD_BYTES) for offset in REGISTERS]
    pages = range(LOCAL_MEMORY, LOCAL_MEMORY + LOCAL_MEMORY_BYTES, PAGE_BYTES)
    reads += [Read(entry.virtual_address + offset, PAGE_BYTES) for offset in pages]
    try:
        data = [answer.data async for answer in DriverClient(host, AUDITOR).stream(reads)]
    finally:
        await fleet.detach_driver(function, AUDITOR)
    words = {offset: int.from_bytes(word, "little") for offset, word in zip(REGISTERS, data, strict=False)}
    for start, page in zip(pages, data[len(REGISTERS) :], strict=True):
        for offset in range(0, PAGE_BYTES, WORD_BYTES):
            words[start + offset] = int.from_bytes(page[offset : offset + WORD_BYTES], "little")
    return words
