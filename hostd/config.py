"""The daemon's settings, from its command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vfleet.daemon import Parser, check_address, check_lease_ttl, check_log_format, security
from vfleet.errors import VfleetError
from vfleet.security import Security


@dataclass(frozen=True, slots=True)
class Config:
    """What hostd is told at its start. Raise INVALID_FIELD for what can't be."""

    topology: Path
    host: str | None
    data_dir: Path
    etcd: tuple[str, ...]
    listen: str
    advertise: str | None
    advertise_fabric: str | None
    power_cycle: bool
    lease_ttl_s: int
    log_level: str
    log_format: str
    metrics: str | None
    allow_faults: bool
    security: Security

    def __post_init__(self) -> None:
        self.security.check("--listen", check_address("--listen", self.listen, least_port=0))
        for option, address in (("--advertise", self.advertise), ("--advertise-fabric", self.advertise_fabric)):
            if address is not None:
                self.security.check(option, check_address(option, address, least_port=1))
        for endpoint in self.etcd:
            self.security.check_etcd("--etcd", check_address("--etcd", endpoint, least_port=1))
        check_lease_ttl("--lease-ttl-s", self.lease_ttl_s)
        check_log_format("--log-format", self.log_format)
        if self.metrics is not None:
            self.security.check("--metrics", check_address("--metrics", self.metrics, least_port=0))


def parse(arguments: Sequence[str]) -> Config:
    """Return the settings. Exit with 2 and one line on stderr if they are not what is expected."""
    parser = Parser(prog="vfleet-hostd", description="One host of a fleet: a simulated PCI segment and its drivers.")
    parser.add_argument("--topology", metavar="FILE", type=Path, required=True, help="the fleet's topology file")
    parser.add_argument("--host", metavar="NAME", help="which of the file's hosts, if it has several")
    parser.add_argument("--data-dir", metavar="DIR", type=Path, required=True, help="where the host's state survives")
    parser.add_argument(
        "--power-cycle", action="store_true", help="begin as a machine does that was switched off: with no state"
    )
    parser.add_argument(
        "--allow-faults", action="store_true", help="let tests make functions fail (FunctionService.InjectFault)"
    )
    parser.add_common_arguments()
    parser.add_argument(
        "--advertise-fabric",
        metavar="HOST:PORT",
        help="where other hosts find it, if they have a network of their own",
    )
    options = parser.parse_args(arguments)
    try:
        return Config(
            topology=options.topology,
            host=options.host,
            data_dir=options.data_dir,
            etcd=tuple(options.etcd.split(",")),
            listen=options.listen,
            advertise=options.advertise,
            advertise_fabric=options.advertise_fabric,
            power_cycle=options.power_cycle,
            lease_ttl_s=options.lease_ttl_s,
            log_level=options.log_level,
            log_format=options.log_format,
            metrics=options.metrics,
            allow_faults=options.allow_faults,
            security=security(options),
        )
    except VfleetError as error:
        parser.error(error.message)
