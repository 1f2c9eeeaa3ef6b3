"""What `vfleet up` does about the functions and drivers that its topology declares: it asks a coordinator for them.

It asks as a person would, once, when the cluster has come up; that it did is remembered nowhere. What is there stays as
it is, wherever it has gone meanwhile; what isn't, whoever ended it, is made.
"""

from collections.abc import Awaitable, Callable, Sequence

from vfleet.cli.guest_states import until_told
from vfleet.client import FleetClient
from vfleet.clock import Clock
from vfleet.declared import DeclaredDriver, DeclaredFunction
from vfleet.errors import VfleetError
from vfleet.host_client import HostClient
from vfleet.v1.types_pb2 import GUEST_STATE_LOST, GUEST_STATE_UNSPECIFIED, Guest, GuestState

PATIENCE_S = 30.0


class Declaration:
    """Sees to it that what is declared is there. `say` is given what is, `complain` a line for each failure."""

    def __init__(
        self,
        fleet: FleetClient,
        host: Callable[[str], HostClient],
        clock: Clock,
        say: Callable[[str], None],
        complain: Callable[[str], None],
    ) -> None:
        """`host` makes the client of a host."""
        self._fleet = fleet
        self._host = host
        self._clock = clock
        self._say = say
        self._complain = complain

    async def ask_for(self, functions: Sequence[DeclaredFunction]) -> None:
        """Make the functions that aren't there, and attach the drivers that aren't. One that fails keeps none back."""
        try:
            known = await self._fleet.list_functions() if functions else []
        except VfleetError as error:
            self._complain(f"nothing that the topology declares was asked for: {error.message}")
            return
        there = {function.name: function.device for function in known}
        for function in functions:
            what = f"function {function.name} of the topology"
            if await self._is_done(what, self._make(function, there.get(function.name))):
                for driver in function.drivers:
                    await self._is_done(
                        f"{what}, driver {function.driver_name(driver)}", self._attach(function, driver)
                    )

    async def _is_done(self, what: str, work: Awaitable[str]) -> bool:
        try:
            self._say(await work)
        except VfleetError as error:
            self._complain(f"{what}: {error.message}")
            return False
        return True

    async def _make(self, function: DeclaredFunction, home: str | None) -> str:
        if home is not None:
            return f"function {function.name} is there: {home}"
        made = await self._fleet.create_function(function.name, function.device, vf_index=function.vf_index or 0)
        return f"function {made.name} is made: {made.device}, VF {made.vf_index}"

    async def _attach(self, function: DeclaredFunction, driver: DeclaredDriver) -> str:
        name, host = function.driver_name(driver), function.driver_host(driver)
        guest = Guest(socket=driver.guest) if driver.guest else None
        memory = driver.main_memory or 0
        await self._fleet.attach_driver(function.name, name, host=host, main_memory_bytes=memory, guest=guest)
        if guest is None:
            return f"  driver {name} on {host} has it"
        if await self._told_state(host, name, GUEST_STATE_UNSPECIFIED) == GUEST_STATE_LOST:
            # It was under a virtual machine when the cluster ended, and the device ended with it.
            await self._fleet.detach_driver(function.name, name)
            await self._fleet.attach_driver(function.name, name, host=host, main_memory_bytes=memory, guest=guest)
            await self._told_state(host, name, GUEST_STATE_UNSPECIFIED, GUEST_STATE_LOST)
        return f"  driver {name} on {host} offers it at {guest.socket}"

    async def _told_state(self, host: str, driver: str, *passing: GuestState.ValueType) -> GuestState.ValueType:
        """Return what has become of a guest, by its host's own word: etcd's may be of before the cluster came up."""
        async with self._host(host) as client:
            return await until_told(lambda: client.get_driver(driver), self._clock, passing, PATIENCE_S)
