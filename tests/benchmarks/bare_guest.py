"""A bare vfio-user server: `python -m benchmarks.bare_guest SOCKET`. One process, one VMM, nothing checked.

It has registers, and one pair of NVMe queues at fixed places of guest memory, whose reads it answers from a medium in
its memory.
"""

import array
import mmap
import os
import socket
import struct
import sys

HEADER = struct.Struct("<HHIII")
ACCESS = struct.Struct("<QII")
COMMAND = struct.Struct("<BBHI16xQQQII")  # opcode, flags, identifier, namespace; PRPs; block; blocks - 1, 0
COMPLETION = struct.Struct("<IIHHHH")
READ_SUBMISSIONS, READ_COMPLETIONS, ENTRIES = 0x40000, 0x50000, 16
MEDIUM = bytes(16 << 20)
MAP, SET_INTERRUPTS, REGION_READ, REGION_WRITE, READ = 2, 8, 9, 10, 2
DOORBELL = 0x1008


def serve(connection: socket.socket) -> None:
    """Answer until the VMM goes."""
    memory, eventfd, head = memoryview(b""), -1, 0
    registers = bytearray(1 << 14)
    while True:
        data, ancillary, _, _ = connection.recvmsg(HEADER.size, socket.CMSG_SPACE(64))
        if not data:
            return
        identifier, command, length, flags, _ = HEADER.unpack(data)
        body = connection.recv(length - HEADER.size) if length > HEADER.size else b""
        descriptors = array.array("i", b"".join(each[2] for each in ancillary))
        answer = b""
        if command == REGION_READ:
            offset, _, count = ACCESS.unpack_from(body)
            answer = body[: ACCESS.size] + registers[offset : offset + count]
        elif command == REGION_WRITE:
            offset, _, count = ACCESS.unpack_from(body)
            registers[offset : offset + count] = body[ACCESS.size :]
            answer = body[: ACCESS.size]
            if offset == DOORBELL:
                tail = int.from_bytes(body[ACCESS.size :], "little")
                while head % ENTRIES != tail:
                    read(memory, head)
                    head += 1
                os.eventfd_write(eventfd, 1)
        elif command == MAP:
            memory = memoryview(mmap.mmap(descriptors[0], os.fstat(descriptors[0]).st_size))
        elif command == SET_INTERRUPTS:
            eventfd = descriptors[0]
        if not flags & 1 << 4:
            connection.sendall(HEADER.pack(identifier, command, HEADER.size + len(answer), 1, 0) + answer)


def read(memory: memoryview, head: int) -> None:
    """Carry out the read that is in the queue."""
    slot = head % ENTRIES
    _, _, identifier, _, address, _, block, blocks, _ = COMMAND.unpack_from(memory, READ_SUBMISSIONS + 64 * slot)
    length = (blocks + 1) * 512
    memory[address : address + length] = MEDIUM[block * 512 : block * 512 + length]
    status = 1 - head // ENTRIES % 2
    COMPLETION.pack_into(memory, READ_COMPLETIONS + 16 * slot, 0, 0, (slot + 1) % ENTRIES, 1, identifier, status)


def main() -> None:
    """Serve one VMM at the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(sys.argv[1])
        listener.listen(1)
        serve(listener.accept()[0])


if __name__ == "__main__":
    main()
