"""What a guest waits for at its NVMe controllers: reads of a register, and 4 KiB reads at random places, in turns.

    accesses.py ROUNDS SECONDS ADDRESS…     controllers by PCI address; SECONDS for each kind of each in each round

Each round is a line of output: microseconds for one, by kind, one number a controller. Registers are read through the
BAR's file in sysfs, which a kernel with iomem=relaxed lets one map. Of reads with a depth of 8, eight are under way.
"""

import glob
import json
import mmap
import os
import random
import sys
import threading
import time

BLOCK = 4096
BLOCKS = 2048
STATUS = 0x1C // 4
rounds, seconds, addresses = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]


class Controller:
    def __init__(self, address):
        place = f"/sys/bus/pci/devices/{address}"
        while not (disks := glob.glob(f"{place}/nvme/*/nvme*n*")):
            time.sleep(0.05)  # the kernel is still looking
        (self.disk,) = map(os.path.basename, disks)
        self.registers = memoryview(mmap.mmap(os.open(f"{place}/resource0", os.O_RDWR), BLOCK)).cast("I")

    def register(self):
        registers = self.registers
        return microseconds(lambda: registers[STATUS])

    def reads(self, depth):
        began, counts = time.monotonic(), []
        end = began + seconds
        threads = [threading.Thread(target=self.read, args=(number, end, counts)) for number in range(depth)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (time.monotonic() - began) / sum(counts) * 1e6

    def read(self, number, end, counts):
        file, buffers = os.open(f"/dev/{self.disk}", os.O_RDONLY | os.O_DIRECT), [mmap.mmap(-1, BLOCK)]
        choose, count = random.Random(number).random, 0
        while not count or time.monotonic() < end:
            os.preadv(file, buffers, int(choose() * BLOCKS) * BLOCK)
            count += 1
        counts.append(count)
        os.close(file)


def microseconds(work):
    began, count = time.monotonic(), 0
    while not count or time.monotonic() - began < seconds:
        work()
        count += 1
    return (time.monotonic() - began) / count * 1e6


controllers = [Controller(address) for address in addresses]
kinds = {"register": Controller.register, "depth 1": lambda each: each.reads(1), "depth 8": lambda each: each.reads(8)}
for number in range(rounds):
    # Whoever goes first is another in each round.
    turn = number % len(controllers)
    order = controllers[turn:] + controllers[:turn]
    took = {name: {each: kind(each) for each in order} for name, kind in kinds.items()}
    print(json.dumps({name: [of[each] for each in controllers] for name, of in took.items()}), flush=True)
