"""A connection that is reset under a coordinator's call, as one of before a cut is: the call reaches its host still."""

# ruff: noqa: N802  # methods are named as the protos say

import asyncio
from random import Random

from support.chaos.proxy import Disturbance, Proxy
from support.fleet_values import three_hosts

from coordinator.hosts import Hosts
from coordinator.inventory import Inventory
from vfleet import rpc
from vfleet.process import LOOPBACK
from vfleet.v1.function_service_pb2 import ChangeStateRequest, ChangeStateResponse, FunctionInstance
from vfleet.v1.function_service_pb2_grpc import FunctionServiceServicer, add_FunctionServiceServicer_to_server

PATIENCE_S = 30.0


class Servicer(FunctionServiceServicer):
    """A host that answers the second time that it is asked."""

    def __init__(self) -> None:
        self.calls = 0
        self.asked = asyncio.Event()

    async def ChangeState(self, request: ChangeStateRequest, context) -> ChangeStateResponse:
        self.calls += 1
        if self.calls == 1:
            self.asked.set()
            await asyncio.Event().wait()
        return ChangeStateResponse(instance=FunctionInstance(function=request.function))


async def test_what_was_asked_over_a_connection_that_is_reset_is_asked_over_the_next() -> None:
    servicer, server = Servicer(), rpc.Server((), "h2-boot")
    add_FunctionServiceServicer_to_server(servicer, server.grpc)
    port = server.listen(f"{LOOPBACK}:0")
    await server.start()
    async with asyncio.timeout(PATIENCE_S), Proxy(lambda: f"{LOOPBACK}:{port}", Random()) as proxy:
        channels = rpc.Channels(lambda _: rpc.connect(proxy.address))
        inventory = Inventory()
        inventory.snapshot = three_hosts().snapshot()
        asking = asyncio.create_task(Hosts(inventory, channels).change_state("h2", ChangeStateRequest(function="vf1")))
        await servicer.asked.wait()
        proxy.disturb(Disturbance("cut"))
        proxy.heal()
        assert await asking
        await channels.close()
    await server.stop(0)
    assert servicer.calls == 2
