"""The guest of `support.guest` with devices of QEMU's own: what is done with them today is unplug them, or migrate it.

port1: nvme    port2: virtio-net    port3: igb    port4: a virtio-net that stays; all three on one hub

The igb is a PF, whose VF the guest can make and take away by itself.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from support.beats import Beats, port
from support.guest import VirtualMachine, make_initramfs, qemu
from support.qmp import Qmp

DEVICES: Mapping[str, Mapping[str, object]] = {
    "nvme": {"driver": "nvme", "bus": "port1", "serial": "1", "drive": "medium"},
    "virtio": {"driver": "virtio-net-pci", "bus": "port2", "netdev": "net2", "romfile": ""},
    "igb": {"driver": "igb", "bus": "port3", "netdev": "net3", "romfile": ""},
    "peer": {"driver": "virtio-net-pci", "bus": "port4", "netdev": "net4", "romfile": ""},
}
ADDRESSES = {name: f"0000:0{number}:00.0" for number, name in enumerate(DEVICES, 1)}
PF = f"/sys/bus/pci/devices/{ADDRESSES['igb']}"
VF = f"{ADDRESSES['igb']}/virtfn0"
VF_DRIVER = "/sys/bus/pci/drivers/igbvf"
MODULES = "nvme,virtio_pci,virtio_net,igb,igbvf"
MEDIUM_BYTES = 16 << 20


class EmulatedMachine:
    """The machine, wherever it runs by now. `machine` goes along."""

    def __init__(self, folder: Path) -> None:
        self.beats = Beats()
        self._folder = folder
        self._initramfs = make_initramfs(folder)
        self._medium = folder / "medium"
        with self._medium.open("wb") as medium:
            medium.truncate(MEDIUM_BYTES)
        self._number = 0
        self._stack = AsyncExitStack()

    async def begin(self) -> None:
        """Boot it."""
        self.machine = VirtualMachine(await self._start(), self._console)
        self._stack.push_async_callback(self.machine.end)
        await self._connect()
        await self.machine.connect(self._socket("agent"))

    async def end(self) -> None:
        """Power it off, at once."""
        await self._stack.aclose()

    async def replug(self, name: str) -> None:
        """Unplug a device, and plug it in again as soon as the guest has let it go."""
        await self._monitor.do("device_del", id=name)
        await self._monitor.event("DEVICE_DELETED", device=name)
        await self._monitor.do("device_add", id=name, **DEVICES[name])

    async def make_vf(self) -> None:
        """Make the VF, which works as long as its PF is up."""
        await self.machine.run(f"ip link set $(ls {PF}/net) up && echo 1 >{PF}/sriov_numvfs")

    async def replug_vf(self) -> None:
        """Take the VF from its driver, and give it back: what a guest does when one is unplugged and plugged in."""
        await self.machine.run(
            f"vf=$(basename $(readlink {PF}/virtfn0)) && echo $vf >{VF_DRIVER}/unbind && echo $vf >{VF_DRIVER}/bind"
        )

    async def end_vf(self) -> None:
        """Take the VF away."""
        await self.machine.run(f"echo 0 >{PF}/sriov_numvfs")

    async def migrate(self) -> float:
        """Migrate it to another QEMU on this machine, by a UNIX socket. Return its downtime in ms, as QEMU has it."""
        machine, source, monitor = self.machine, self.machine.process, self._monitor
        self._number += 1
        machine.process = await self._start("-incoming", f"unix:{self._socket('incoming')}")
        machine.console = self._console
        try:
            await self._connect()
            await monitor.do("migrate", uri=f"unix:{self._socket('incoming')}")
            while (state := await monitor.do("query-migrate")).get("status") != "completed":
                assert state.get("status") not in ("failed", "cancelled"), state
                await asyncio.sleep(0.02)
            await machine.connect(self._socket("agent"), is_up=True)
        finally:
            source.kill()
            await source.wait()
        return float(str(state["downtime"]))

    async def _start(self, *more: str) -> asyncio.subprocess.Process:
        command = qemu(self._initramfs, (), f"modules={MODULES}")
        for number, (name, device) in enumerate(DEVICES.items(), 1):
            command += ["-device", f"pcie-root-port,id=port{number},slot={number},bus=pcie.0"]
            command += ["-device", json.dumps({"id": name, **device})]
            command += ["-netdev", f"hubport,id=net{number},hubid=0"] if "netdev" in device else []
        medium = {"driver": "file", "filename": str(self._medium), "node-name": "medium"}
        command += ["-blockdev", json.dumps(medium), "-serial", f"file:{self._console}"]
        command += ["-serial", f"unix:{self._socket('agent')},server=on,wait=off", *port(self._socket("beats"))]
        command += ["-qmp", f"unix:{self._socket('monitor')},server=on,wait=off", *more]
        self._console.touch()
        with self._console.with_suffix(".log").open("wb") as log:
            return await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )

    async def _connect(self) -> None:
        self._monitor = await Qmp.connect(self._socket("monitor"))
        self._stack.push_async_callback(self._monitor.close)
        self.beats.listen(self._socket("beats"))

    @property
    def _console(self) -> Path:
        return self._socket("console")

    def _socket(self, name: str) -> Path:
        return self._folder / f"{name}{self._number}"


@asynccontextmanager
async def emulated_machine(folder: Path) -> AsyncIterator[EmulatedMachine]:
    """Run the machine, and end it."""
    emulated = EmulatedMachine(folder)
    try:
        await emulated.begin()
        yield emulated
    finally:
        await emulated.end()
