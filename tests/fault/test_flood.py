"""A flood, shorter and with fewer clients than that of `make flood`: memory stays bounded, and work goes on."""

from pathlib import Path

import pytest
from fault.flood import run
from support.flood import INSIDERS, KINDS, STRANGERS
from support.flooding import MIB

from vfleet.v1.records_pb2 import Phase

CLIENTS = 110
SECONDS = 8.0
# For so many clients. What a daemon has when nothing is wrong is not counted.
GROWTH_BYTES = 200 * MIB


@pytest.mark.parametrize("plaintext", [False, True], ids=["certificates", "plaintext"])
async def test_clients_that_mean_harm_harm_neither_daemons_nor_drivers_nor_migrations(
    tmp_path: Path, plaintext: bool
) -> None:
    # The driver's report is checked within: nothing lost, repeated, reordered or wrong.
    found, report = await run(tmp_path, CLIENTS, SECONDS, plaintext=plaintext)
    assert {migration.phase for migration in found.migrations} == (set() if plaintext else {Phase.PHASE_DONE})
    assert report.operations
    for name, memory in found.memory.items():
        assert memory.most <= memory.before + GROWTH_BYTES, name
    kinds = {what.partition(":")[0] for what in found.counts if what.endswith(": connections")}
    assert kinds == set([*STRANGERS, *INSIDERS] if plaintext else KINDS)
