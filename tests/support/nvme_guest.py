"""A guest without a virtual machine: as much of an NVMe driver as it takes to see whether its device works."""

import os
import select
import struct
from pathlib import Path

from support.vmm import SharedMemory, Vmm

MEMORY_BYTES = 4 << 20
PAGE = 4096
ASQ, ACQ, AQA, CC, CSTS, VS = 0x28, 0x30, 0x24, 0x14, 0x1C, 0x08
SUBMISSIONS, COMPLETIONS, BUFFER = 0x10000, 0x20000, 0x30000
ENABLE = 0x00460001
IDENTIFY = 6


class NvmeGuest:
    """A VMM and a driver that asks the controller what it is, one command at a time.

    Its memory is mapped, or reached by messages: its counts as specified ("whole"), or as in QEMU 10.1 ("short").
    """

    def __init__(self, path: Path, messages: str = "") -> None:
        self.messages = messages
        self.memory = SharedMemory(MEMORY_BYTES)
        self.eventfd = os.eventfd(0)
        self.tail = self.submitted = 0
        self.vmm = Vmm(path)

    def close(self) -> None:
        self.vmm.close()
        self.memory.close()
        os.close(self.eventfd)

    def begin(self) -> None:
        self.vmm.begin()
        self.vmm.is_short = self.messages == "short"
        mapped = self.vmm.map_for_messages(self.memory) if self.messages else self.vmm.map(self.memory, 0)
        assert not mapped.error
        assert not self.vmm.set_eventfds(0, (self.eventfd,)).error
        self.enable()

    def enable(self, submissions: int = SUBMISSIONS) -> None:
        self.tail = self.submitted = 0
        self.memory.content[COMPLETIONS : COMPLETIONS + PAGE] = bytes(PAGE)
        for register, value in ((AQA, 15 << 16 | 15), (ASQ, submissions), (ACQ, COMPLETIONS), (CC, ENABLE)):
            self.vmm.write(0, register, value.to_bytes(4, "little"))
        assert self.status() == 1

    def status(self) -> int:
        return int.from_bytes(self.vmm.read(0, CSTS, 4), "little")

    def submit(self) -> None:
        """Ask the controller to identify itself; the doorbell is posted."""
        command = struct.pack("<BBHI16xQQII", IDENTIFY, 0, self.tail, 0, BUFFER, 0, 1, 0).ljust(64, b"\0")
        at = SUBMISSIONS + 64 * self.tail
        self.memory.content[at : at + 64] = command
        self.tail = (self.tail + 1) % 16
        self.submitted += 1
        self.vmm.write(0, 0x1000, self.tail.to_bytes(4, "little"), posted=True)

    def interrupted(self) -> None:
        while not select.select([self.eventfd], [], [], 0)[0]:
            ready, _, _ = select.select([self.eventfd, self.vmm.socket], [], [], 30)
            assert ready, "no interrupt came"
            if self.vmm.socket in ready:
                self.vmm.serve(self.vmm.receive_any())
        os.eventfd_read(self.eventfd)

    def completed(self) -> None:
        """Wait for the interrupt, and take the completion of the command that was submitted last."""
        at = COMPLETIONS + 16 * ((self.tail - 1) % 16)
        phase = 1 - (self.submitted - 1) // 16 % 2
        status = 1 - phase
        while status & 1 != phase:
            # A hostd that takes over interrupts once more than it has to.
            self.interrupted()
            _, _, _, _, identifier, status = struct.unpack("<IIHHHH", self.memory.content[at : at + 16])
        assert (identifier, status >> 1) == ((self.tail - 1) % 16, 0)
        self.vmm.write(0, 0x1004, self.tail.to_bytes(4, "little"), posted=True)
        assert self.memory.content[BUFFER + 516 : BUFFER + 520] == (1).to_bytes(4, "little")  # namespaces
        self.memory.content[BUFFER : BUFFER + PAGE] = bytes(PAGE)

    def identify(self) -> None:
        self.submit()
        self.completed()


def runs(pid: int) -> bool:
    """Whether a process is there that is no zombie."""
    command = Path(f"/proc/{pid}/cmdline")
    return command.exists() and bool(command.read_bytes())
