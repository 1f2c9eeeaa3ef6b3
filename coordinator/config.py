"""Settings of a coordinator, from its command line."""

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.queueing import DEFAULT_ALLOWANCE, Allowance
from coordinator.retention import Retention
from vfleet.daemon import (
    DEFAULT_LEASE_TTL_S,
    Parser,
    check_address,
    check_lease_ttl,
    check_log_format,
    security,
)
from vfleet.errors import VfleetError, invalid_field
from vfleet.names import check_name
from vfleet.security import INSECURE, Security

DEFAULT_KEPT = 10_000
DEFAULT_KEPT_DAYS = 30
MAX_KEPT = 100_000
MAX_KEPT_DAYS = 3650
MAX_LIMIT = 10_000
_LIMITS = ("--max-migrations", "--max-migrations-per-host", "--max-migrations-per-device")


@dataclass(frozen=True, slots=True)
class Config:
    """What a coordinator is told: its name, where to listen and where it is found, etcd's endpoints, its lease's TTL,
    how much to log, how many migrations may be under way, how its connections are secured.

    And how many records of migrations that are over are kept, and for how many days.

    Raise INVALID_FIELD for what can't be.
    """

    name: str
    listen: str
    etcd: tuple[str, ...]
    lease_ttl_s: int = DEFAULT_LEASE_TTL_S
    log_level: str = "info"
    log_format: str = "console"
    metrics: str | None = None
    keep_migrations: int = DEFAULT_KEPT
    keep_migrations_days: int = DEFAULT_KEPT_DAYS
    allowance: Allowance = DEFAULT_ALLOWANCE
    security: Security = INSECURE
    advertise: str | None = None

    def __post_init__(self) -> None:
        check_name("--name", self.name)
        self.security.check("--listen", check_address("--listen", self.listen, least_port=0))
        if self.advertise is not None:
            self.security.check("--advertise", check_address("--advertise", self.advertise, least_port=1))
        for endpoint in self.etcd:
            self.security.check_etcd("--etcd", check_address("--etcd", endpoint, least_port=1))
        check_lease_ttl("--lease-ttl-s", self.lease_ttl_s)
        check_log_format("--log-format", self.log_format)
        if self.metrics is not None:
            self.security.check("--metrics", check_address("--metrics", self.metrics, least_port=0))
        _check_kept("--keep-migrations", self.keep_migrations, MAX_KEPT)
        _check_kept("--keep-migrations-days", self.keep_migrations_days, MAX_KEPT_DAYS)
        for field, value in zip(
            _LIMITS, (self.allowance.fleet, self.allowance.host, self.allowance.device), strict=True
        ):
            if not 1 <= value <= MAX_LIMIT:
                raise invalid_field(field, value, f"1 to {MAX_LIMIT}")

    @property
    def retention(self) -> Retention:
        """What is kept of the records of migrations."""
        return Retention(self.keep_migrations, self.keep_migrations_days * 86_400)


def _check_kept(field: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise invalid_field(field, value, f"1 to {most}")


def parse(arguments: Sequence[str]) -> Config:
    """Return the settings. Exit with 2 and one line on stderr if they are not what is expected."""
    parser = Parser(prog="vfleet-coordinator", description="Moves functions between hosts.")
    parser.add_argument("--name", required=True, help="the coordinator's name, unique in the fleet")
    default = DEFAULT_ALLOWANCE
    for option, number, where in zip(
        _LIMITS,
        (default.fleet, default.host, default.device),
        ("in the fleet", "from or to one host", "from or to one device"),
        strict=True,
    ):
        text = f"how many migrations may be under way {where}; others wait (%(default)s)"
        parser.add_argument(option, metavar="N", type=int, default=number, help=text)
    parser.add_common_arguments()
    parser.add_argument(
        "--keep-migrations",
        metavar="N",
        type=int,
        default=DEFAULT_KEPT,
        help="how many records of migrations that are over are kept (%(default)s)",
    )
    parser.add_argument(
        "--keep-migrations-days",
        metavar="DAYS",
        type=int,
        default=DEFAULT_KEPT_DAYS,
        help="for how long they are kept (%(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        return Config(
            name=options.name,
            listen=options.listen,
            etcd=tuple(options.etcd.split(",")),
            lease_ttl_s=options.lease_ttl_s,
            log_level=options.log_level,
            log_format=options.log_format,
            metrics=options.metrics,
            keep_migrations=options.keep_migrations,
            keep_migrations_days=options.keep_migrations_days,
            allowance=Allowance(
                options.max_migrations, options.max_migrations_per_host, options.max_migrations_per_device
            ),
            security=security(options),
            advertise=options.advertise,
        )
    except VfleetError as error:
        parser.error(error.message)
