"""How many 4 KiB commands the NVMe model alone does in a second of processor time.

No engine, no sequences, no redo record, no driver.

PYTHONPATH=tests python -m support.nvme_rate [--seconds 2]
"""

import argparse
import sys
import time

from support.nvme_host import MAIN_ADDRESS, NAMESPACE_BYTES, PAGE, NvmeHost

from hostd.models import nvme_commands as io
from hostd.models import nvme_layout as layout

BLOCKS_A_PAGE = PAGE // layout.BLOCK_BYTES


def rate(opcode: int, depth: int, seconds: float) -> tuple[float, float]:
    """Return commands a second, and steps a command, at a queue depth of at most 64."""
    host = NvmeHost()
    host.enable()
    host.create_queues(entries=128)
    submission, completion = host.submission[1], host.completion[1]
    for number in range(128):
        buffer = MAIN_ADDRESS + (256 + number % 64) * PAGE
        block = number * BLOCKS_A_PAGE % (NAMESPACE_BYTES // layout.BLOCK_BYTES)
        entry = io_entry(opcode, number, buffer, block)
        host.put(submission.base + number * 64, entry)
    model, image, main = host.model, host.rig.image, host.rig.main
    memory = memoryview(image).toreadonly()
    done = steps = 0
    began = time.process_time()
    while (now := time.process_time()) - began < seconds:
        for doorbell, value in ((8, (done + depth) % 128), (12, done % 128)):
            for offset, data in model.write(memory, layout.DOORBELLS + doorbell, value.to_bytes(4, "little")) or ():
                image[offset : offset + len(data)] = data
        while (work := model.work(memory)) is not None:
            read = [bytes(main[r.address - MAIN_ADDRESS : r.address - MAIN_ADDRESS + r.length]) for r in work.reads]
            step = model.finish(memory, work, read)
            for offset, data in step.stores:
                image[offset : offset + len(data)] = data
            steps += 1
        done += depth
    assert completion.entries == 128
    return done / (now - began), steps / done


def io_entry(opcode: int, identifier: int, buffer: int, block: int) -> bytes:
    """Return the entry of a command of 4 KiB."""
    return layout.ENTRY.pack(opcode, 0, identifier, 1, buffer, 0, block, 0, BLOCKS_A_PAGE - 1, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    seconds = parser.parse_args().seconds
    for name, opcode in (("read", io.READ), ("write", io.WRITE)):
        for depth in (1, 8, 32):
            commands, steps = rate(opcode, depth, seconds)
            sys.stdout.write(f"{name:5} depth {depth:2}: {commands:9,.0f} a second, {steps:.2f} steps each\n")


if __name__ == "__main__":
    main()
