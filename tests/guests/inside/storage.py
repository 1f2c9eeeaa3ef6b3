"""Verified I/O on a device in the guest, past the cache and by several threads; with a file system also of files.

    storage.py DEVICE DEPTH        blocks of one file on ext4, and files that are written, synced, dropped and read
    storage.py DEVICE DEPTH raw    blocks of the device itself

Each block has content that no other write has; it is read back and compared. /tmp/stop ends it, /tmp/measure, touched,
begins to measure anew. The last line of output says how far it is.
"""

import hashlib
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import threading
import time

DEVICE, DEPTH, HAS_FILES = sys.argv[1], int(sys.argv[2]), sys.argv[3:] != ["raw"]
MOUNT = "/mnt"
PLACE = f"{MOUNT}/blocks" if HAS_FILES else DEVICE
BLOCK = 4096
BLOCKS_A_THREAD = 128
STOP, MEASURE = "/tmp/stop", "/tmp/measure"
report = {"operations": 0, "mismatches": 0, "errors": 0, "files": 0, "longest_ms": 0.0, "first_error": ""}
lock = threading.Lock()


def note(began, is_right, what):
    took_ms = (time.monotonic() - began) * 1000
    with lock:
        report["operations"] += 1
        report["longest_ms"] = max(report["longest_ms"], took_ms)
        if not is_right:
            report["mismatches"] += 1
            report["first_error"] = report["first_error"] or what


def content(thread, block, version):
    return struct.pack("<QQQQ", thread, block, version, thread ^ block ^ version) * (BLOCK // 32)


def blocks(thread):
    """Write and read blocks of this thread's part."""
    choose = random.Random(thread)
    versions = {}
    file = os.open(PLACE, os.O_RDWR | os.O_DIRECT)
    buffer = mmap.mmap(-1, BLOCK)
    version = 0
    while not os.path.exists(STOP):
        block = choose.randrange(BLOCKS_A_THREAD)
        place = (thread * BLOCKS_A_THREAD + block) * BLOCK
        began = time.monotonic()
        if block in versions and choose.random() < 0.6:
            buffer[:] = bytes(BLOCK)
            done = os.preadv(file, [buffer], place)
            note(began, done == BLOCK and buffer[:] == content(thread, block, versions[block]), f"block {block}")
        else:
            version += 1
            buffer[:] = content(thread, block, version)
            done = os.pwritev(file, [buffer], place)
            versions[block] = version
            note(began, done == BLOCK, f"write of block {block}")
    os.close(file)


def files():
    """Write files, sync them, drop them from the cache, and read them back."""
    number = 0
    while not os.path.exists(STOP):
        number += 1
        path = f"{MOUNT}/file{number % 8}"
        data = random.Random(number).randbytes(random.Random(-number).randrange(1, 64 << 10))
        began = time.monotonic()
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with open("/proc/sys/vm/drop_caches", "w") as drop:
            drop.write("3")
        with open(path, "rb") as file:
            found = hashlib.blake2b(file.read()).digest()
        note(began, found == hashlib.blake2b(data).digest(), f"file {number}")
        report["files"] = number


def guarded(work, *arguments):
    try:
        work(*arguments)
    except Exception as error:
        with lock:
            report["errors"] += 1
            report["first_error"] = report["first_error"] or f"{type(error).__name__}: {error}"


def run(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    if done.returncode:
        print(done.stdout, flush=True)
        sys.exit(f"{command[0]} ended with {done.returncode}")


def device_ios():
    with open(f"/sys/class/block/{os.path.basename(DEVICE)}/stat") as file:
        numbers = file.read().split()
    return int(numbers[0]) + int(numbers[4])


if HAS_FILES:
    run("/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", DEVICE)
    run("/usr/bin/busybox", "mount", "-t", "ext4", DEVICE, MOUNT)
    with open(PLACE, "wb") as file:
        file.write(bytes(DEPTH * BLOCKS_A_THREAD * BLOCK))
        os.fsync(file.fileno())
ios_before = device_ios()
threads = [threading.Thread(target=guarded, args=(blocks, number)) for number in range(DEPTH)]
if HAS_FILES:
    threads.append(threading.Thread(target=guarded, args=(files,)))
for thread in threads:
    thread.start()
measured = 0.0
while any(thread.is_alive() for thread in threads):
    time.sleep(0.1)
    began = os.stat(MEASURE).st_mtime if os.path.exists(MEASURE) else 0.0
    with lock:
        if began != measured:
            measured, report["longest_ms"] = began, 0.0
        print(json.dumps(report), flush=True)
if HAS_FILES:
    run("/usr/bin/busybox", "umount", MOUNT)
    report["device_ios"] = device_ios() - ios_before
    run("/usr/sbin/e2fsck", "-fn", DEVICE)
report["is_over"] = True
print(json.dumps(report), flush=True)
