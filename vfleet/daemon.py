"""What both daemons' processes have in common: one-line errors, an announcement, signals, exit codes.

Exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 bad input. Once it is ready, a daemon writes one JSON line with
its address to standard output; everything else goes to standard error.
"""

import argparse
import asyncio
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

from vfleet import failpoint, log, tracing
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.process import BAD_INPUT_EXIT
from vfleet.security import ETCD_TLS_VARIABLE, TLS_VARIABLE, Security

DEFAULT_LEASE_TTL_S = 5
MAX_FILES = 65_536
LOG_FORMAT_VARIABLE = "VFLEET_LOG_FORMAT"

# What can't be right as it is given, whatever else changes.
_BAD_INPUT = (Reason.INVALID_FIELD, Reason.NOT_FOUND, Reason.SEGMENT_TAKEN)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2 and one line."""
        self.exit(BAD_INPUT_EXIT, f"{self.prog}: {message}\n")

    def add_common_arguments(self) -> None:
        """Add what every daemon is told: where to listen, certificates, etcd's endpoints, its lease, what to log."""
        self.add_argument(
            "--listen",
            metavar="HOST:PORT",
            default="127.0.0.1:0",
            help="where to serve gRPC; port 0 for any (%(default)s)",
        )
        self.add_argument(
            "--advertise",
            metavar="HOST:PORT",
            help="where the fleet finds it, if not where it listens (behind a proxy, or in a container)",
        )
        self.add_argument("--etcd", metavar="HOST:PORT[,...]", required=True, help="endpoints of etcd")
        self.add_argument(
            "--tls", metavar="DIR", type=Path, help=f"folder with ca.crt, tls.crt and tls.key, or {TLS_VARIABLE}"
        )
        self.add_argument(
            "--etcd-tls",
            metavar="DIR",
            type=Path,
            help=f"the same for etcd, if it has certificates of another CA, or {ETCD_TLS_VARIABLE}",
        )
        self.add_argument(
            "--insecure", action="store_true", help="plaintext instead, on loopback addresses alone; for trials"
        )
        self.add_argument(
            "--lease-ttl-s",
            metavar="SECONDS",
            type=int,
            default=DEFAULT_LEASE_TTL_S,
            help="how long after its death others count on it (%(default)s)",
        )
        self.add_argument(
            "--metrics",
            metavar="HOST:PORT",
            help="where to serve metrics for Prometheus, to whoever can connect; port 0 for any (nowhere)",
        )
        self.add_argument("--log-level", choices=log.LEVELS, default="info", help="how much to log (%(default)s)")
        self.add_argument(
            "--log-format",
            metavar="|".join(log.FORMATS),
            default=os.environ.get(LOG_FORMAT_VARIABLE) or "console",
            help=f"how to log, for people or for programs; the environment's {LOG_FORMAT_VARIABLE} is the default",
        )


def security(options: argparse.Namespace) -> Security:
    """Return what options of the parser say of certificates. Raise INVALID_FIELD for nothing, or both."""
    return Security.given(options.tls, options.etcd_tls, insecure=options.insecure)


def check_address(field: str, value: str, *, least_port: int) -> str:
    """Return `value` if it is HOST:PORT; else raise INVALID_FIELD naming `field`."""
    host, _, port = value.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not least_port <= int(port) <= 65535:
        raise invalid_field(field, value, f"HOST:PORT with a port from {least_port} to 65535")
    return value


def check_lease_ttl(field: str, value: int) -> int:
    """Return `value` if a lease can have it as its TTL; else raise INVALID_FIELD naming `field`."""
    if not 1 <= value <= 3600:
        raise invalid_field(field, value, "1 to 3600 seconds")
    return value


def check_log_format(field: str, value: str) -> str:
    """Return `value` if lines can be logged like that; else raise INVALID_FIELD naming `field`."""
    if value not in log.FORMATS:
        raise invalid_field(field, value, " or ".join(log.FORMATS))
    return value


def announce(address: str, metrics: str | None = None) -> None:
    """Say on standard output that the daemon is ready, where, and at which URL its metrics are.

    What is in memory by now stays there, so the collector of garbage is to look at it no more: while it looks at tens
    of thousands of objects, some driver may be on hold.
    """
    gc.collect()
    gc.freeze()
    sys.stdout.write(json.dumps({"address": address, "metrics": metrics}) + "\n")
    sys.stdout.flush()


def run(program: str, log_level: str, log_format: str, serve: Callable[[log.Writer], Awaitable[None]]) -> None:
    """Run a daemon until SIGTERM or SIGINT cancels it. Exit with 1 or 2 and one line if it fails."""
    try:
        with log.logging_to_stderr(log_level, log_format) as writer:
            _allow_files()
            failpoint.enable(os.environ)
            try:
                asyncio.run(_until_signal(serve(writer)))
            finally:
                tracing.close()
    except VfleetError as error:
        sys.stderr.write(f"{program}: {error.message}\n")
        # A file of certificates may be in the middle of its renewal, or the clock wrong that it is compared with.
        is_bad_input = error.reason in _BAD_INPUT and "certificate_file" not in error.metadata
        sys.exit(BAD_INPUT_EXIT if is_bad_input else 1)


def _allow_files() -> None:
    """Let the process open as many files as it may be let: connections in numbers are not to keep it from its own."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if most == resource.RLIM_INFINITY else min(MAX_FILES, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


async def _until_signal(work: Awaitable[None]) -> None:
    serving = asyncio.ensure_future(work)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    try:
        await serving
    except asyncio.CancelledError:
        return
