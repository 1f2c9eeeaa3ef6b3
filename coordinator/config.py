"""Settings of a coordinator, from its command line."""

from collections.abc import Sequence
from dataclasses import dataclass

from vfleet.daemon import DEFAULT_LEASE_TTL_S, Parser, check_address, check_lease_ttl
from vfleet.errors import VfleetError
from vfleet.names import check_name


@dataclass(frozen=True, slots=True)
class Config:
    """What a coordinator is told: its name, where to listen, etcd's endpoints, its lease's TTL, how much to log.

    Raise INVALID_FIELD for what can't be.
    """

    name: str
    listen: str
    etcd: tuple[str, ...]
    lease_ttl_s: int = DEFAULT_LEASE_TTL_S
    log_level: str = "info"

    def __post_init__(self) -> None:
        check_name("--name", self.name)
        check_address("--listen", self.listen, least_port=0)
        for endpoint in self.etcd:
            check_address("--etcd", endpoint, least_port=1)
        check_lease_ttl("--lease-ttl-s", self.lease_ttl_s)


def parse(arguments: Sequence[str]) -> Config:
    """Return the settings. Exit with 2 and one line on stderr if they are not what is expected."""
    parser = Parser(prog="vfleet-coordinator", description="Moves functions between hosts.")
    parser.add_argument("--name", required=True, help="the coordinator's name, unique in the fleet")
    parser.add_common_arguments()
    options = parser.parse_args(arguments)
    try:
        return Config(
            name=options.name,
            listen=options.listen,
            etcd=tuple(options.etcd.split(",")),
            lease_ttl_s=options.lease_ttl_s,
            log_level=options.log_level,
        )
    except VfleetError as error:
        parser.error(error.message)
