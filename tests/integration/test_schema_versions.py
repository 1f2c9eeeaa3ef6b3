"""A record that a newer vfleet wrote is refused by whoever reads it, with its key and both versions, and stays."""

from pathlib import Path
from random import Random

import pytest
from support.local_cluster import DEMO, eventually, running

from vfleet.errors import VfleetError
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.keys import function_key, host_key
from vfleet.etcd.records import SCHEMA_VERSION
from vfleet.etcd.server import EtcdServer
from vfleet.etcd.store import Put, Transaction
from vfleet.local import Daemon
from vfleet.v1.records_pb2 import Function, Host

NEWER = SCHEMA_VERSION + 1
SAID = f"has schema version {NEWER}; this vfleet reads 1 to {SCHEMA_VERSION}"


async def put(store: EtcdStore, key: str, record: Function | Host) -> None:
    record.schema_version = NEWER
    await store.commit(Transaction((), (Put(key, record.SerializeToString()),)))


def daemon(module: str, etcd: EtcdServer, tmp_path: Path, *arguments: str) -> Daemon:
    about = [*arguments, "--etcd", etcd.endpoint, "--insecure"]
    return Daemon(module, module, about, log=tmp_path / f"{module}.log", random=Random())


async def test_a_coordinator_does_not_start_on_it(etcd: EtcdServer, store: EtcdStore, tmp_path: Path):
    await put(store, function_key("vf1"), Function(name="vf1"))
    with pytest.raises(VfleetError, match=f"/vfleet/functions/vf1 {SAID}"):
        await daemon("coordinator", etcd, tmp_path, "--name", "c1").start()


async def test_a_coordinator_at_work_ends_on_it(tmp_path: Path):
    async with running(tmp_path) as cluster:
        coordinator = cluster.local.coordinators["c1"]
        await put(cluster.store, function_key("vf1"), Function(name="vf1"))
        assert SAID in await coordinator.ended()


async def test_a_host_does_not_start_on_its_own_record(etcd: EtcdServer, store: EtcdStore, tmp_path: Path):
    await put(store, host_key("h1"), Host(name="h1", segment=1))
    about = ("--topology", str(DEMO), "--host", "h1", "--data-dir", str(tmp_path / "h1"))
    with pytest.raises(VfleetError, match=f"/vfleet/hosts/h1 {SAID}"):
        await daemon("hostd", etcd, tmp_path, *about).start()


async def test_a_host_at_work_says_so_and_goes_on_with_what_it_has(tmp_path: Path):
    async with running(tmp_path) as cluster:
        await cluster.fleet.create_function("vf1", "h1/nic0")
        await cluster.work("d1", "vf1", "h1")
        log = cluster.local.hosts["h1"].log
        await put(cluster.store, host_key("h9"), Host(name="h9", segment=9))

        async def has_said_so() -> bool:
            return f"/vfleet/hosts/h9 {SAID}" in log.read_text()

        await eventually(has_said_so)
        await cluster.until_working()
