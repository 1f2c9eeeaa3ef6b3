"""Whether a daemon serves, by the standard health service. As a program it is what tells a container's health:

    python -m vfleet.health HOST:PORT

It exits with 0 if the daemon there serves, else with 1 and one line. It is asked with the daemon's own certificate, in
the folder that VFLEET_TLS names; without that, in plaintext.
"""

import asyncio
import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from vfleet import rpc
from vfleet.errors import VfleetError
from vfleet.principal import server_name
from vfleet.process import BAD_INPUT_EXIT
from vfleet.security import INSECURE, TLS_VARIABLE, Security

TIMEOUT_S = 4.0


async def check_health(channel: grpc.aio.Channel, address: str, timeout_s: float) -> HealthCheckResponse:
    """Return what the daemon at the other end of the channel, at `address`, says. Raise UNREACHABLE if nothing."""
    method = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=HealthCheckRequest.SerializeToString,
        response_deserializer=HealthCheckResponse.FromString,
    )
    return await rpc.call(method, HealthCheckRequest(), address=address, timeout_s=timeout_s)


async def _what_is_wrong(address: str) -> str:
    """Return what is wrong with the daemon; nothing if it serves."""
    try:
        folder = os.environ.get(TLS_VARIABLE)
        keys = Security(tls=Path(folder)).open() if folder else INSECURE.open()
        channels = rpc.Channels(tls=keys.tls)
        try:
            own = keys.tls.credentials.principal if keys.tls is not None else None
            server = server_name(own.role, own.name) if own is not None else ""
            response = await check_health(channels.to(address, server), address, TIMEOUT_S)
        finally:
            await channels.close()
    except VfleetError as error:
        return error.message
    if response.status == HealthCheckResponse.SERVING:
        return ""
    return f"{address} says {HealthCheckResponse.ServingStatus.Name(response.status)}"


def main() -> None:
    """Ask the daemon that the command line names."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m vfleet.health HOST:PORT\n")
        sys.exit(BAD_INPUT_EXIT)
    wrong = asyncio.run(_what_is_wrong(sys.argv[1]))
    if wrong:
        sys.stderr.write(f"{wrong}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
