"""Bad networks: packets of a container that are lost, by iptables, or late, since a slow link (tbf) queues them.

The kernel of some test machines has no netem, which would do both.
"""

import json

from support.containers.container import Container
from support.containers.engine import run

LOSS = ("INPUT", "-m", "statistic", "--mode", "random", "--probability")
LOST_OF_ALL = "0.02"
RATE, BURST, LONGEST_DELAY = "2mbit", "3kb", "300ms"


async def _inside(container: Container, *command: str) -> str:
    return await run(("nsenter", "--target", str(container.process.pid), "--net", *command))


async def _interface(container: Container, network: str) -> str:
    for found in json.loads(await _inside(container, "ip", "-json", "address")):
        if any(own.get("local") == container.addresses[network] for own in found["addr_info"]):
            return str(found["ifname"])
    raise AssertionError(f"{container.name} is not on {network}")


async def lose_packets(container: Container) -> None:
    """Lose some of what comes to a container, on all its networks."""
    await _inside(container, "iptables", "-A", *LOSS, LOST_OF_ALL, "-j", "DROP")


async def slow_down(container: Container, network: str) -> None:
    """Let what leaves a container on a network queue."""
    shaped = ("tbf", "rate", RATE, "burst", BURST, "latency", LONGEST_DELAY)
    await _inside(container, "tc", "qdisc", "add", "dev", await _interface(container, network), "root", *shaped)


async def lost_packets(container: Container) -> int:
    """Return how many packets were lost."""
    rules = await _inside(container, "iptables", "--list", "INPUT", "--verbose", "--exact")
    return int(rules.splitlines()[-1].split()[0])


async def late_packets(container: Container, network: str) -> int:
    """Return how often a packet was late."""
    interface = await _interface(container, network)
    (queue,) = json.loads(await _inside(container, "tc", "-json", "-statistics", "qdisc", "show", "dev", interface))
    return int(queue["overlimits"])
