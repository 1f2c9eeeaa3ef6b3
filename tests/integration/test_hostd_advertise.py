"""A host is found where it says that it is found, which need not be where it listens."""

from pathlib import Path
from random import Random

import pytest
from support.local_cluster import DEMO

from vfleet.errors import Reason, VfleetError
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.keys import host_key
from vfleet.etcd.records import decode
from vfleet.etcd.server import EtcdServer
from vfleet.local import Daemon
from vfleet.v1.records_pb2 import Host


def hostd(etcd: EtcdServer, tmp_path: Path, *more: str) -> Daemon:
    about = ["--topology", str(DEMO), "--host", "h1", "--data-dir", str(tmp_path / "h1"), "--etcd", etcd.endpoint]
    about.append("--insecure")
    return Daemon("h1", "hostd", [*about, *more], log=tmp_path / "h1.log", random=Random())


async def test_the_fleet_is_told_the_advertised_addresses(etcd: EtcdServer, store: EtcdStore, tmp_path: Path):
    daemon = hostd(etcd, tmp_path, "--advertise", "127.0.0.2:7001", "--advertise-fabric", "127.0.0.3:7001")
    await daemon.start()
    try:
        stored = await store.get(host_key("h1"))
        assert stored is not None
        assert decode(Host, stored).address == "127.0.0.2:7001"
        assert decode(Host, stored).fabric_address == "127.0.0.3:7001"
        assert daemon.address != "127.0.0.2:7001"
    finally:
        await daemon.stop()


@pytest.mark.parametrize("option", ["--advertise", "--advertise-fabric"])
@pytest.mark.parametrize("address", ["h1.example", "h1.example:0", ":7001"])
async def test_an_address_that_can_not_be_reached_is_refused(
    etcd: EtcdServer, tmp_path: Path, option: str, address: str
):
    with pytest.raises(VfleetError, match=f"{option} is") as refused:
        await hostd(etcd, tmp_path, option, address).start()
    assert refused.value.reason is Reason.INVALID_FIELD
