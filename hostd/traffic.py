"""What came to this host from others, counted a message at a time."""

from collections import Counter
from dataclasses import dataclass, field

from vfleet.v1.fabric_service_pb2 import ExchangeResponse, Refusal


@dataclass(slots=True)
class Traffic:
    """Accesses that were carried out for other hosts, batches refused, bytes of state that were imported."""

    accesses: int = 0
    refusals: Counter[Refusal.ValueType] = field(default_factory=Counter)
    state_bytes: int = 0

    def exchanged(self, response: ExchangeResponse) -> None:
        """Count a batch by its answer."""
        self.accesses += len(response.answers)
        if response.refusal:
            self.refusals[response.refusal] += 1
