"""A short run of chaos, without harm to etcd: the daemons survive, and chaos itself works."""

from pathlib import Path

import pytest
from fault.chaos import Options, run
from support.chaos.stage import MissingEtcdError, check_etcd_can_be_killed


async def test_a_short_run_leaves_nothing_wrong(tmp_path: Path):
    # In 8 s this seed kills and pauses daemons and cuts, freezes and delays what is between them.
    outcome = await run(Options(duration_s=8.0, seed=265, directory=tmp_path, members=1, kill_etcd=False))
    assert outcome.failures == []
    assert outcome.findings.messages == []
    for what in ("kills: host", "kills: coordinator", "pauses: host", "cuts: fabric", "freezes: etcd", "delays: etcd"):
        assert outcome.done[what]
    assert outcome.done["migrations done"]
    assert outcome.done["accesses verified, own drivers"]
    assert outcome.done["accesses verified, workloads"]


async def test_without_an_etcd_that_survives_it_is_said_what_to_install(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingEtcdError, match="apt-get install etcd-server"):
        await check_etcd_can_be_killed()
