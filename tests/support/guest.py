"""A virtual machine: QEMU with kernel and initramfs of `tests/guests/image.sh`, and an agent inside that obeys."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

from support.local_cluster import Cluster, eventually

from vfleet.v1.types_pb2 import GUEST_STATE_WAITING, Guest

GUESTS = Path(__file__).parents[1] / "guests"
BOOT_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 120.0
# What a program reports is new after so long: to be asked more often would take a large part of an emulated processor.
REPORT_PERIOD_S = 0.1
# Times of a guest that no busy machine makes fail.
PATIENT = {"longest_hold_ms": 20_000, "message_timeout_ms": 60_000}
MEMORY_BYTES = 384 << 20


@cache
def image() -> Path:
    """Return the folder with QEMU, kernel and initramfs, which is made the first time."""
    made = subprocess.run([GUESTS / "image.sh"], stdout=subprocess.PIPE, check=True, text=True)
    return Path(made.stdout.strip())


class VirtualMachine:
    """A machine that runs. `console` is where its kernel writes."""

    def __init__(self, process: asyncio.subprocess.Process, console: Path) -> None:
        self.process = process
        self.console = console
        self._reader = asyncio.StreamReader()
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self, agent: Path, *, is_up: bool = False) -> None:
        """Wait until the agent is there, which says so when the machine has booted: not if it `is_up` already."""
        await self._disconnect()
        async with asyncio.timeout(BOOT_TIMEOUT_S):
            while True:
                try:
                    self._reader, self._writer = await asyncio.open_unix_connection(agent)
                    break
                except OSError:
                    assert self.process.returncode is None, self.console.read_text(errors="replace")[-2000:]
                    await asyncio.sleep(0.05)
            if not is_up:
                await self.until_ready()

    async def until_ready(self) -> None:
        """Wait until the agent says that it is there, after a boot."""
        async with asyncio.timeout(BOOT_TIMEOUT_S):
            while True:
                line = await self._reader.readline()
                assert line, f"the machine has ended: {self.console.read_text(errors='replace')[-2000:]}"
                if b'"ready"' in line:
                    return

    async def end(self) -> None:
        """Power it off, at once."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._disconnect()

    async def _disconnect(self) -> None:
        if self._writer is not None:
            self._writer.close()
            await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)

    async def ask(self, **request: object) -> Mapping[str, object]:
        """Let the agent do something, and return its answer."""
        assert self._writer is not None
        self._writer.write(json.dumps(request).encode() + b"\n")
        await self._writer.drain()
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            line = await self._reader.readline()
        assert line, f"the machine has ended: {self.console.read_text(errors='replace')[-2000:]}"
        answer = json.loads(line)
        assert "error" not in answer, answer
        return answer

    async def run(self, command: str) -> str:
        """Run a shell command, which is to succeed, and return what it says."""
        answer = await self.ask(run=command)
        assert answer["code"] == 0, answer
        return str(answer["output"])

    async def reboot(self) -> None:
        """Let it reboot, at once, and wait until it is up again."""
        assert self._writer is not None
        self._writer.write(json.dumps({"start": "reboot", "program": ["/usr/bin/busybox", "reboot", "-f"]}).encode())
        self._writer.write(b"\n")
        await self.until_ready()

    async def start(self, name: str, *program: str) -> None:
        """Start a program in the background."""
        await self.ask(start=name, program=program)

    async def report(self, name: str) -> tuple[dict[str, object], bool]:
        """Return what a program that was started has reported last, and whether it still runs."""
        await asyncio.sleep(REPORT_PERIOD_S)
        answer = await self.ask(report=name)
        report = answer["report"] or {}
        assert isinstance(report, dict)
        assert "error" not in report, report
        return report, bool(answer["running"])


@asynccontextmanager
async def virtual_machine(
    folder: Path,
    sockets: Sequence[Path],
    *,
    modules: Sequence[str] = ("nvme", "crc32c_generic", "ext4"),
    message_timeout_ms: int = 60_000,
    reboots: bool = False,
    kernel: str = "",
    more: Sequence[str] = (),
    shares_memory: bool = True,
) -> AsyncIterator[VirtualMachine]:
    """Run a machine with a function behind each of these sockets, and end it.

    `kernel` are further arguments of the kernel, `more` of QEMU, after two serial ports. Memory that isn't shared
    has no descriptor: functions reach it by messages.
    """
    console, agent = folder / "console", folder / "agent.sock"
    initramfs = make_initramfs(folder)
    command = [
        *qemu(
            initramfs,
            sockets,
            f"modules={','.join(modules)} {kernel}",
            message_timeout_ms,
            shares_memory=shares_memory,
        ),
        *("-serial", f"file:{console}", "-serial", f"unix:{agent},server=on,wait=off"),
        *(() if reboots else ("-no-reboot",)),
        *more,
    ]
    with (folder / "qemu.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
        )
    console.touch()
    machine = VirtualMachine(process, console)
    try:
        await machine.connect(agent)
        yield machine
    finally:
        await machine.end()
        initramfs.unlink()


def qemu(
    initramfs: Path,
    sockets: Sequence[Path],
    arguments: str,
    message_timeout_ms: int = 60_000,
    *,
    shares_memory: bool = True,
) -> list[str]:
    """Return the command that runs a machine, but for its serial ports. `arguments` are the kernel's."""
    made = image()
    command = [
        *(made / "qemu", "-nodefaults", "-display", "none", "-accel", "tcg,thread=multi", "-cpu", "max"),
        *("-machine", "q35,memory-backend=m0", "-m", f"{MEMORY_BYTES >> 20}M"),
        *("-object", f"memory-backend-{'memfd,share=on' if shares_memory else 'ram'},id=m0,size={MEMORY_BYTES}"),
        *("-kernel", made / "kernel", "-initrd", initramfs),
        *("-append", f"console=ttyS0 no_timer_check panic=-1 {arguments}"),
    ]
    for number, socket in enumerate(sockets, 1):
        device = {
            "driver": "vfio-user-pci",
            "bus": f"port{number}",
            "id": f"function{number}",
            "socket": {"type": "unix", "path": str(socket)},
            "x-msg-timeout": message_timeout_ms,
        }
        command += ["-device", f"pcie-root-port,id=port{number},slot={number},bus=pcie.0"]
        command += ["-device", json.dumps(device)]
    return [str(part) for part in command]


def make_initramfs(folder: Path) -> Path:
    """Put the programs of `tests/guests/inside` into an initramfs of its own, in a folder that is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "initramfs"
    inside = {each.name: each.read_bytes() for each in (GUESTS / "inside").iterdir() if each.is_file()}
    with path.open("wb") as whole, (image() / "initramfs").open("rb") as base:
        shutil.copyfileobj(base, whole)
        whole.write(archive(inside))
    return path


def archive(files: Mapping[str, bytes]) -> bytes:
    """Return files, all of them executable, as a cpio archive (newc), as an initramfs is made of."""
    made = b""
    for number, (name, content) in enumerate([*files.items(), ("TRAILER!!!", b"")]):
        path = name.encode() + b"\0"
        fields = (number + 1, 0o100755, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + path
        made += head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
    return made


async def attach_guest(cluster: Cluster, function: str, driver: str, host: str, folder: Path, **times: int) -> Path:
    """Attach a virtual machine's driver, and return its socket once that is there."""
    socket = folder / f"{driver}.sock"
    await cluster.fleet.attach_driver(function, driver, host=host, guest=Guest(socket=str(socket), **times))

    async def is_there() -> bool:
        return (await cluster.fleet.get_driver(driver)).guest_state == GUEST_STATE_WAITING

    await eventually(is_there)
    return socket


async def dmesg_of(machine: VirtualMachine, subjects: str) -> list[str]:
    """Return what the kernel has said of these subjects since it booted that is nobody's business to be said."""
    told = await machine.run(
        f"dmesg | grep -iE '{subjects}' | grep -iE 'error|timeout|timed out|reset|abort|fail|down|remov|hung' || true"
    )
    return told.splitlines()


async def storage_operations(machine: VirtualMachine) -> int:
    """Return how many operations `storage.py` has done and verified, which runs."""
    report, runs = await machine.report("storage")
    assert runs, report
    return int(str(report.get("operations", 0)))


async def finish_storage(machine: VirtualMachine) -> dict[str, object]:
    """Let `storage.py` end, check its file system, and report."""
    await machine.run("touch /tmp/stop")
    while (answer := await machine.report("storage"))[1]:
        pass
    return answer[0]
