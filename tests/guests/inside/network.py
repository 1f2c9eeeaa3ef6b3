"""Traffic between two guests: a TCP stream of numbered blocks with checksums, and a datagram to and fro every 10 ms.

    network.py serve               verify the stream, send datagrams back
    network.py send ADDRESS RATE   send the stream, RATE blocks of 16 KiB a second at most, and the datagrams

The last line of output says how far it is.
"""

import json
import os
import socket
import struct
import sys
import threading
import time
import zlib

PORT = 7000
BLOCK = 16 << 10
HEAD = struct.Struct("<QI")  # number, checksum of the rest
PING_S = 0.01
STOP = "/tmp/stop"
report = {"blocks": 0, "mismatches": 0, "pings": 0, "longest_gap_ms": 0.0, "ended": ""}


def content(number):
    return struct.pack("<QQ", number, ~number & 0xFFFFFFFFFFFFFFFF) * ((BLOCK - HEAD.size) // 16)


def take(connection, length):
    data = bytearray()
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


def serve():
    listener = socket.create_server(("", PORT))
    threading.Thread(target=send_back, daemon=True).start()
    connection, _ = listener.accept()
    size = HEAD.size + len(content(0))
    while (block := take(connection, size)) is not None:
        number, checksum = HEAD.unpack_from(block)
        if number != report["blocks"] or zlib.crc32(block[HEAD.size :]) != checksum:
            report["mismatches"] += 1
        report["blocks"] += 1
    report["ended"] = "the sender has closed it"


def send_back():
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("", PORT))
    while True:
        data, address = datagrams.recvfrom(64)
        datagrams.sendto(data, address)


def send(address, rate):
    connection = socket.create_connection((address, PORT))
    threading.Thread(target=ping, args=(address,), daemon=True).start()
    began = time.monotonic()
    while not os.path.exists(STOP):
        data = content(report["blocks"])
        connection.sendall(HEAD.pack(report["blocks"], zlib.crc32(data)) + data)
        report["blocks"] += 1
        time.sleep(max(0.0, began + report["blocks"] / rate - time.monotonic()))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
    report["ended"] = "all was taken"


def ping(address):
    """Note the longest time between two datagrams that come back, since the file /tmp/measure was last touched."""
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.connect((address, PORT))
    threading.Thread(target=send_pings, args=(datagrams,), daemon=True).start()
    last, measured = time.monotonic(), 0.0
    while True:
        datagrams.recv(64)
        now = time.monotonic()
        began = os.stat("/tmp/measure").st_mtime if os.path.exists("/tmp/measure") else 0.0
        if began != measured:
            measured, report["longest_gap_ms"], report["pings"] = began, 0.0, 0
        else:
            report["longest_gap_ms"] = max(report["longest_gap_ms"], (now - last) * 1000)
        report["pings"] += 1
        last = now


def send_pings(datagrams):
    number = 0
    while True:
        number += 1
        datagrams.send(struct.pack("<Q", number))
        time.sleep(PING_S)


work = threading.Thread(
    target=serve if sys.argv[1] == "serve" else send,
    args=() if sys.argv[1] == "serve" else (sys.argv[2], float(sys.argv[3])),
)
work.start()
while work.is_alive():
    time.sleep(0.1)
    print(json.dumps(report), flush=True)
print(json.dumps(report), flush=True)
