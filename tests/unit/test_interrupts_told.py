"""What a client driver is told of interrupts: several may be told as one, with their number."""

from contextlib import aclosing
from pathlib import Path

from support.bench import Bench

from hostd.client_access import ClientAccess
from hostd.workload import Workloads
from hostd.workloads.kinds import new_workload
from vfleet.limits import INTERRUPT_PAGE_ADDRESS
from vfleet.v1.driver_service_pb2 import NOTIFICATION_KIND_INTERRUPT, NOTIFICATION_KIND_LISTENING

PAGE = 1 << 48 | INTERRUPT_PAGE_ADDRESS


async def test_interrupts_before_anyone_looked_are_told_as_one_and_none_is_forgotten(tmp_path: Path):
    bench = Bench(tmp_path)
    bench.drivers.recorded("d1", 4096)
    bench.drivers.attach(bench.message(0x0002_1110 << 32))
    receiver = bench.drivers.require("d1").receivers["vf1"]

    def interrupt(vector: int) -> None:
        receiver.write(receiver.last + 1, PAGE, vector.to_bytes(4, "little"))

    access = ClientAccess(bench.drivers, Workloads(bench.drivers, bench.ledger, bench.clock, new_workload))
    async with aclosing(access.notifications("d1")) as told:
        assert (await anext(told)).kind == NOTIFICATION_KIND_LISTENING
        for vector in (1, 2, 1, 1):
            interrupt(vector)
        seen = [await anext(told), await anext(told)]
        assert [(n.kind, n.function, n.vector, n.interrupts) for n in seen] == [
            (NOTIFICATION_KIND_INTERRUPT, "vf1", 1, 3),
            (NOTIFICATION_KIND_INTERRUPT, "vf1", 2, 1),
        ]
        interrupt(1)
        again = await anext(told)
        assert (again.vector, again.interrupts) == (1, 4)
        for _ in range(3000):
            interrupt(5)
        assert (await anext(told)).interrupts == 3000
    bench.close()
