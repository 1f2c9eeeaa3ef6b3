"""A Linux guest in this terminal, with a function behind each socket that is named: `make guest SOCKETS=…`."""

import os
import sys
import tempfile
from pathlib import Path

from support.guest import make_initramfs, qemu

from vfleet.limits import GUEST_MESSAGE_TIMEOUT_MS

MODULES = "nvme,crc32c_generic,ext4,virtio_pci,virtio_net"


def main() -> None:
    """Become QEMU; Ctrl-A X ends it, and so does `poweroff -f` in the guest."""
    sockets = [Path(argument) for argument in sys.argv[1:]]
    if not sockets or not all(socket.is_socket() for socket in sockets):
        sys.exit('guest: SOCKETS="…"; expected the sockets of `vfleet attach FUNCTION --guest SOCKET`')
    initramfs = make_initramfs(Path(tempfile.gettempdir()) / "vfleet-guest")
    command = qemu(initramfs, sockets, f"quiet shell modules={MODULES}", GUEST_MESSAGE_TIMEOUT_MS)
    os.execv(command[0], [*command, "-serial", "mon:stdio", "-no-reboot"])


if __name__ == "__main__":
    main()
