"""Work through a device, with a byte for each piece that is done on QEMU's debug port: whoever is outside sees gaps.

    beats.py reads ADDRESS           4 KiB reads of the NVMe controller at a PCI address, one at a time
    beats.py frames ADDRESS PEER     a frame every 2 ms from the network function at an address to that at another

A device that is gone is looked for until it, or another, is at the address. /tmp/stop ends it.
"""

import fcntl
import glob
import mmap
import os
import random
import socket
import struct
import sys
import threading
import time

BLOCK = 4096
BLOCKS = 2048
PERIOD_S = 0.002
LOOK_AGAIN_S = 0.001
PROTOCOL = 0x88B5  # for experiments
FRAME = b"\xff" * 6 + bytes(6) + PROTOCOL.to_bytes(2, "big") + bytes(50)
GET_FLAGS, SET_FLAGS, IS_UP = 0x8913, 0x8914, 1
FLAGS = struct.Struct("16sH22x")
PORT = 0xE9  # needs no interrupt, and has no state that QEMU could lose
ports = os.open("/dev/port", os.O_WRONLY)


def tell():
    os.pwrite(ports, b".", PORT)


def is_over():
    return os.path.exists("/tmp/stop")


def found(pattern):
    names = glob.glob(f"/sys/bus/pci/devices/{pattern}")
    if not names:
        raise FileNotFoundError(pattern)
    return os.path.basename(names[0])


def read(address):
    name = found(f"{address}/nvme/*/nvme*n*")
    file, buffers = os.open(f"/dev/{name}", os.O_RDONLY | os.O_DIRECT), [mmap.mmap(-1, BLOCK)]
    try:
        while not is_over():
            # Of a disk that is gone there is nothing to read.
            if os.preadv(file, buffers, random.randrange(BLOCKS) * BLOCK) != BLOCK:
                raise OSError("gone")
            tell()
    finally:
        os.close(file)


def connection(address):
    """Return a socket at the network function at an address, which is set up."""
    name = found(f"{address}/{'virtio*/' if glob.glob(f'/sys/bus/pci/devices/{address}/virtio*') else ''}net/*")
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(PROTOCOL))
    try:
        _, flags = FLAGS.unpack(fcntl.ioctl(made, GET_FLAGS, FLAGS.pack(name.encode(), 0)))
        fcntl.ioctl(made, SET_FLAGS, FLAGS.pack(name.encode(), flags | IS_UP))
        made.bind((name, PROTOCOL))
    except OSError:
        made.close()
        raise
    return made


def send(address):
    with connection(address) as sender:
        while not is_over():
            sender.send(FRAME)
            time.sleep(PERIOD_S)


def receive(receiver):
    while True:
        receiver.recv(BLOCK)
        tell()


what, address = sys.argv[1:3]
if what == "frames":
    threading.Thread(target=receive, args=(connection(sys.argv[3]),), daemon=True).start()
while not is_over():
    try:
        send(address) if what == "frames" else read(address)
    except OSError:
        time.sleep(LOOK_AGAIN_S)
os.remove("/tmp/stop")
