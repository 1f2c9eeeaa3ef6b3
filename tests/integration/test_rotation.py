"""Certificates are replaced, and then the CA itself, under a cluster at work: nothing stops, and the old ones end."""

import asyncio
import contextlib
import shutil
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from support.certs import LOOPBACK, make_certs
from support.local_cluster import Cluster, eventually, running

from vfleet.certificates import issue, make_ca
from vfleet.v1.records_pb2 import Phase

SHOW = Path(__file__).parents[2] / "vfleet" / "topologies" / "show.yaml"
WHO = [("host", "h1"), ("host", "h2"), ("host", "h3"), ("coordinator", "c1"), ("operator", "local"), ("etcd", "local")]
DAEMONS = WHO[:4]


def replace(path: Path, content: bytes) -> None:
    """Replace a file as `mv` does."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)


class Certs:
    """The certificates of a cluster, which a first CA has issued, and a second one."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_certs(folder / "first")
        self.second = folder / "second"
        make_ca(self.second, name="another CA")
        self._count = 0
        # etcd reads its certificate whenever it needs it, but its CA only when it starts.
        replace(self.folder / "etcd-local" / "ca.crt", self.cas(self.folder, self.second))

    def cas(self, *folders: Path) -> bytes:
        return b"".join((folder / "ca.crt").read_bytes() for folder in folders)

    def trust(self, *folders: Path) -> None:
        """Let everybody trust these CAs and no other."""
        for kind, name in WHO[:-1]:
            replace(self.folder / f"{kind}-{name}" / "ca.crt", self.cas(*folders))

    def renew(self, ca: Path) -> dict[tuple[str, str], bytes]:
        """Give everybody a new certificate, file by file, and return them."""
        self._count += 1
        renewed = {}
        for kind, name in WHO:
            new = self.folder / f"new-{self._count}-{kind}-{name}"
            names = {"addresses": LOOPBACK, "dns": ["localhost"]} if kind == "etcd" else {}
            issue(ca, new, kind, name, **names)
            for file in ("tls.crt", "tls.key"):
                shutil.move(new / file, self.folder / f"{kind}-{name}" / file)
            renewed[kind, name] = (self.folder / f"{kind}-{name}" / "tls.crt").read_bytes()
        return renewed


@pytest.fixture
def certs(tmp_path: Path) -> Certs:
    return Certs(tmp_path)


@pytest.fixture
async def cluster(tmp_path: Path, certs: Certs) -> AsyncIterator[Cluster]:
    async with running(tmp_path, topology=SHOW, certs=certs.folder) as cluster:
        yield cluster


def address(cluster: Cluster, who: tuple[str, str]) -> str:
    kind, name = who
    return (cluster.local.hosts if kind == "host" else cluster.local.coordinators)[name].address


async def shown(at: str, folder: Path) -> bytes | None:
    """Return the certificate that a daemon shows to who has this folder; None if it does not take that."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    context.set_alpn_protocols(["h2"])
    host, _, port = at.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        # In TLS 1.3 a client learns that it is refused by what it reads next: else that is the server's SETTINGS.
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
        taken = bool(await reader.read(9))
        return writer.get_extra_info("ssl_object").getpeercert(binary_form=True) if taken else None
    except OSError:
        return None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def all_daemons(cluster: Cluster, folder: Path, right: Callable[[tuple[str, str], bytes | None], bool]) -> None:
    """Wait until what each daemon shows, or doesn't, is right."""
    for who in DAEMONS:

        async def is_right(who: tuple[str, str] = who) -> bool:
            return right(who, await shown(address(cluster, who), folder))

        await eventually(is_right)


@pytest.mark.timeout(400)
async def test_certificates_and_then_the_ca_are_replaced_under_load(cluster: Cluster, certs: Certs) -> None:
    await cluster.fleet.create_function("vf1", "h2/mem0")
    await cluster.work("d1", "vf1", "h1", memory_bytes=2 << 20)
    operator, old = certs.folder / "operator-local", certs.folder / "viewer-local"

    async def goes_on(name: str, device: str, change: Callable[[], dict[tuple[str, str], bytes] | None]) -> None:
        """Change something while a migration is under way, which then is done like another after it."""
        await cluster.begin(name, {"vf1": device}, bandwidth_mib_per_s=1)
        renewed = change()
        if renewed is not None:
            der = {who: ssl.PEM_cert_to_DER_cert(pem.decode()) for who, pem in renewed.items()}
            await all_daemons(cluster, operator, lambda who, found: found == der[who])
        assert (await cluster.over(name)).phase == Phase.PHASE_DONE
        assert (await cluster.move(f"{name}-after", {"vf1": "h2/mem0"})).phase == Phase.PHASE_DONE
        await cluster.until_working()

    await goes_on("same-ca", "h3/mem0", lambda: certs.renew(certs.folder))
    issue(certs.second, certs.second / "viewer", "viewer", "second")
    await goes_on("both-cas", "h3/mem0", lambda: certs.trust(certs.folder, certs.second))
    await all_daemons(cluster, certs.second / "viewer", lambda _, found: found is not None)
    await goes_on("new-ca", "h1/mem0", lambda: certs.renew(certs.second))
    await goes_on("only-new-ca", "h3/mem0", lambda: certs.trust(certs.second))
    await all_daemons(cluster, old, lambda _, found: found is None)
    await cluster.stop_workloads()
    assert not (await cluster.fleet.check_fleet()).differences


async def test_a_file_that_is_broken_changes_nothing_and_is_named_in_the_log(cluster: Cluster, certs: Certs) -> None:
    before = await shown(cluster.local.hosts["h2"].address, certs.folder / "operator-local")
    await cluster.fleet.create_function("vf1", "h2/nic0")
    replace(certs.folder / "host-h2" / "tls.crt", b"-----BEGIN CERTIFICATE-----\nhalf of")

    async def is_logged() -> bool:
        assert await shown(cluster.local.hosts["h2"].address, certs.folder / "operator-local") == before
        return "tls.crt can't be used" in cluster.local.hosts["h2"].log.read_text()

    await eventually(is_logged)
    await cluster.work("d1", "vf1", "h1")
    assert (await cluster.move("m1", {"vf1": "h3/nic0"})).phase == Phase.PHASE_DONE
    await cluster.stop_workloads()
