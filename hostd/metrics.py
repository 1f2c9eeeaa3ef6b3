"""What a host tells Prometheus. All but the length of holds is read at a scrape from what the rooms know anyway: the
way of an access has nothing added to it.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, Metric

from hostd.host import Host
from vfleet.metrics import BLACKOUT_BUCKETS_S, ReadAtScrape, counters, gauge, gauges
from vfleet.v1.fabric_service_pb2 import Refusal
from vfleet.v1.types_pb2 import DeviceState

_STATES = {state: name.removeprefix("DEVICE_STATE_").lower() for name, state in DeviceState.items() if state}


def observe(host: Host, registry: CollectorRegistry) -> None:
    """Let a registry have a host's metrics."""
    lasted = Histogram(
        "vfleet_hold_duration_seconds",
        "How long this host's drivers were on hold: from each hold to its lift.",
        registry=registry,
        buckets=BLACKOUT_BUCKETS_S,
    )
    host.drivers.on_lifted(lasted.observe)
    registry.register(ReadAtScrape(lambda: _read(host)))


def _read(host: Host) -> Iterator[Metric]:
    yield gauge(
        "vfleet_host_registered", "1 while the host has its registration in etcd.", host.registration.is_registered
    )
    yield from _functions(host)
    yield from _drivers(host)
    yield from _traffic(host)


def _functions(host: Host) -> Iterator[Metric]:
    instances = host.functions.instances()
    states = dict.fromkeys(_STATES.values(), 0)
    for instance in instances:
        states[_STATES[instance.state]] += 1
    # Of what hardly ever happens no series is shown before it does: each of them costs every scrape.
    serving = [instance for instance in instances if instance.is_serving]
    yield gauges("vfleet_instances", "Instances of functions on this host, by state.", "state", states.items())
    accesses = CounterMetricFamily(
        "vfleet_function_accesses",
        "Accesses of drivers that took effect on functions that are at home here, for as long as they are attached.",
        labels=("function", "driver"),
    )
    for instance in serving:
        for sequencer in instance.image.sequencers():
            accesses.add_metric((instance.about.function, sequencer.driver), sequencer.last)
    yield accesses
    yield counters(
        "vfleet_function_unsupported_requests",
        "Accesses to places in functions that nobody claims, since their instances were made here.",
        "function",
        ((i.about.function, i.unsupported_requests) for i in serving if i.unsupported_requests),
    )
    yield counters(
        "vfleet_function_frames_dropped",
        "Frames that functions sent and nobody took, since their instances were made here.",
        "function",
        ((i.about.function, i.frames_dropped) for i in serving if i.frames_dropped),
    )


def _drivers(host: Host) -> Iterator[Metric]:
    drivers = host.drivers.all()
    yield gauge("vfleet_host_drivers", "Drivers on this host.", len(drivers))
    yield gauge(
        "vfleet_table_entries",
        "Entries of functions in this host's translation tables.",
        sum(bool(entry.function) for driver in drivers for entry in driver.table.entries),
    )
    yield gauge("vfleet_holds", "Entries that are on hold.", len(host.drivers.holds()))
    yield gauge(
        "vfleet_hold_oldest_age_seconds",
        "For how long the oldest hold has lasted; 0 if there is none.",
        host.drivers.oldest_hold_age_s(),
    )
    yield counters(
        "vfleet_translation_faults",
        "Accesses of drivers that their tables did not map, since the daemon was started.",
        "driver",
        ((driver.name, driver.translation_faults) for driver in drivers),
    )
    yield gauges(
        "vfleet_accesses_unanswered",
        "Accesses of drivers that wait in a queue or have no answer yet.",
        "driver",
        ((driver.name, driver.unanswered) for driver in drivers),
    )


def _traffic(host: Host) -> Iterator[Metric]:
    traffic = host.traffic
    yield CounterMetricFamily(
        "vfleet_fabric_accesses",
        "Accesses of other hosts' drivers that were carried out here.",
        value=traffic.accesses,
    )
    yield counters(
        "vfleet_fabric_refusals",
        "Batches of other hosts' accesses of which some were refused, to be sent again, by why.",
        "reason",
        ((Refusal.Name(reason).removeprefix("REFUSAL_").lower(), n) for reason, n in traffic.refusals.items()),
    )
    yield CounterMetricFamily(
        "vfleet_state_received_bytes", "State of functions received in migrations to here.", value=traffic.state_bytes
    )
