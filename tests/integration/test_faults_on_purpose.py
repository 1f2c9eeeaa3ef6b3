"""Faults that a test asks a real hostd for: only where that is allowed, and what the driver's workload says of them."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.local_cluster import Cluster, eventually, refusal, running

from vfleet.errors import Reason
from vfleet.rpc import Channels, call
from vfleet.v1.driver_service_pb2 import WorkloadOptions
from vfleet.v1.function_service_pb2 import FaultKind, InjectFaultRequest, InjectFaultResponse
from vfleet.v1.function_service_pb2_grpc import FunctionServiceStub
from vfleet.v1.types_pb2 import DeviceState

TOPOLOGY = Path(__file__).with_name("data") / "devices.yaml"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path, topology=TOPOLOGY) as cluster:
        yield cluster


async def inject(cluster: Cluster, kind: FaultKind.ValueType, count: int = 0) -> InjectFaultResponse:
    channels, address = Channels(), cluster.local.hosts["h1"].address
    request = InjectFaultRequest(function="vf1", generation=1, kind=kind, count=count)
    try:
        return await call(
            FunctionServiceStub(channels.to(address)).InjectFault, request, address=address, timeout_s=10.0
        )
    finally:
        await channels.close()


async def test_faults_are_refused_or_seen_by_the_driver(cluster: Cluster) -> None:
    await cluster.fleet.create_function("vf1", "h1/accel0")
    await cluster.fleet.attach_driver("vf1", "d1", host="h2", main_memory_bytes=1 << 20)
    refused = await refusal(inject(cluster, FaultKind.FAULT_KIND_DEVICE))
    assert refused.reason is Reason.ILLEGAL_STATE
    assert "--allow-faults" in refused.message
    await cluster.local.hosts["h1"].kill()
    await cluster.local.hosts["h1"].restart("--allow-faults")
    await cluster.until_registered("h1")
    host = cluster.hosts["h2"]
    # One command at a time is never fetched with another, so the fault hits the ring, or that command's data.
    await host.start_workload("d1", "vf1", WorkloadOptions(kind="accelerator", window=1, seed=1))
    await inject(cluster, FaultKind.FAULT_KIND_DEVICE)
    (instance,) = await cluster.hosts["h1"].list_functions()
    assert instance.state == DeviceState.DEVICE_STATE_ERROR
    await cluster.hosts["h1"].reset_function("vf1", generation=1)

    async def runs() -> bool:
        (instance,) = await cluster.hosts["h1"].list_functions()
        return instance.state == DeviceState.DEVICE_STATE_RUNNING

    await eventually(runs)
