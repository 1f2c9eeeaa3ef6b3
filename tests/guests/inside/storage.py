"""Verified I/O on a device in the guest, past the cache and by several threads; with a file system also of files.

    storage.py DEVICE DEPTH        blocks of one file on ext4, and files that are written, synced, dropped and read
    storage.py DEVICE DEPTH raw    larger blocks of the device itself, few, which are soon read again

Each block has content that no other write has; it is read back and compared. /tmp/stop ends it; /tmp/measure, touched,
begins to measure the longest read or write of a block anew; /tmp/anew begins all anew, and what was seen and written
before is forgotten. The last line of output says how far it is, and with `least` the thread that is furthest behind.
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
PAGE = 4096
BLOCK = PAGE if HAS_FILES else 4 * PAGE
BLOCKS_A_THREAD = 128 if HAS_FILES else 8
STOP, MEASURE, ANEW = "/tmp/stop", "/tmp/measure", "/tmp/anew"
NOTHING = {"operations": 0, "mismatches": 0, "errors": 0, "files": 0, "longest_ms": 0.0, "first_error": ""}
report = dict(NOTHING)
lock = threading.Lock()
beginnings = 0
counts = [0] * DEPTH  # of each thread


def note(beginning, is_right, what, took_s=0.0):
    """Note what came of an operation, unless all was begun anew meanwhile."""
    with lock:
        if beginning != beginnings:
            return
        report["operations"] += 1
        report["longest_ms"] = max(report["longest_ms"], took_s * 1000)
        if not is_right:
            report["mismatches"] += 1
            report["first_error"] = report["first_error"] or what


def note_error(error, beginning=None):
    with lock:
        if beginning not in (None, beginnings):
            return
        report["errors"] += 1
        report["first_error"] = report["first_error"] or f"{type(error).__name__}: {error}"


def content(thread, block, version):
    words = [struct.pack("<QQQQ", thread, block, version, page) for page in range(BLOCK // PAGE)]
    return b"".join(word * (PAGE // 32) for word in words)


def blocks(thread):
    """Write and read blocks of this thread's part."""
    choose = random.Random(thread)
    versions = {}
    file = os.open(PLACE, os.O_RDWR | os.O_DIRECT)
    buffer = mmap.mmap(-1, BLOCK)
    beginning = version = 0
    while not os.path.exists(STOP):
        if beginning != beginnings:
            beginning, versions = beginnings, {}
        block = choose.randrange(BLOCKS_A_THREAD)
        place = (thread * BLOCKS_A_THREAD + block) * BLOCK
        began = time.monotonic()
        try:
            if block in versions and choose.random() < 0.6:
                buffer[:] = bytes(BLOCK)
                done = os.preadv(file, [buffer], place)
                took_s = time.monotonic() - began
                is_right = done == BLOCK and buffer[:] == content(thread, block, versions[block])
                note(beginning, is_right, f"block {block}", took_s)
            else:
                version += 1
                buffer[:] = content(thread, block, version)
                done = os.pwritev(file, [buffer], place)
                versions[block] = version
                note(beginning, done == BLOCK, f"write of block {block}", time.monotonic() - began)
        except OSError as error:
            versions.pop(block, None)
            note_error(error, beginning)
        counts[thread] += 1
    os.close(file)


def files():
    """Write files, sync them, drop them from the cache, and read them back."""
    number = 0
    while not os.path.exists(STOP):
        number += 1
        path = f"{MOUNT}/file{number % 8}"
        data = random.Random(number).randbytes(random.Random(-number).randrange(1, 64 << 10))
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with open("/proc/sys/vm/drop_caches", "w") as drop:
            drop.write("3")
        with open(path, "rb") as file:
            found = hashlib.blake2b(file.read()).digest()
        note(0, found == hashlib.blake2b(data).digest(), f"file {number}")
        report["files"] = number


def guarded(work, *arguments):
    try:
        work(*arguments)
    except Exception as error:
        note_error(error)


def touched(path):
    """When a file was last touched; 0 if it never was."""
    return os.stat(path).st_mtime if os.path.exists(path) else 0.0


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
measured, begun = touched(MEASURE), touched(ANEW)
while any(thread.is_alive() for thread in threads):
    time.sleep(0.1)
    with lock:
        if touched(ANEW) != begun:
            begun, beginnings = touched(ANEW), beginnings + 1
            report.update(NOTHING, beginning=beginnings)
        if touched(MEASURE) != measured:
            measured, report["longest_ms"] = touched(MEASURE), 0.0
        print(json.dumps({**report, "least": min(counts)}), flush=True)
if HAS_FILES:
    run("/usr/bin/busybox", "umount", MOUNT)
    report["device_ios"] = device_ios() - ios_before
    run("/usr/sbin/e2fsck", "-fn", DEVICE)
report["is_over"] = True
print(json.dumps(report), flush=True)
