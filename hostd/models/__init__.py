"""The simulated device models, by name. They know nothing of hosts or migrations."""

from collections.abc import Callable, Mapping

from hostd.models.accelerator import Accelerator
from hostd.models.base import BusMaster, DeviceModel
from hostd.models.checker import Checker
from hostd.models.nvme import Nvme
from hostd.models.virtio_net import VirtioNet
from vfleet.address import AddressError, bar_layout
from vfleet.errors import invalid_field
from vfleet.limits import MAX_DRIVERS

MODELS: Mapping[str, Callable[[int, Mapping[int, int]], DeviceModel]] = {
    model.name: model for model in (Checker, Accelerator, Nvme, VirtioNet)
}

# Those that send frames to each other, and take them.
NETWORK_MODELS = frozenset((VirtioNet.name,))


def create_model(name: str, identity: int, bar_bytes: Mapping[int, int]) -> DeviceModel:
    """Return a function of the model: `identity` is 1 to 2**64 - 1, `bar_bytes` maps each BAR's index to its size.

    Raise VfleetError INVALID_FIELD naming `model`, `identity` or `bars`, also for BARs that the model can't work with.
    """
    if name not in MODELS:
        raise invalid_field("model", name, f"one of {', '.join(sorted(MODELS))}")
    if not 1 <= identity < 1 << 64:
        raise invalid_field("identity", identity, "1 to 2**64 - 1")
    try:
        bar_layout(bar_bytes)
    except AddressError as error:
        raise invalid_field("bars", dict(bar_bytes), f"BARs that can exist: {error}") from None
    return MODELS[name](identity, bar_bytes)


def max_drivers(model: DeviceModel) -> int:
    """Return how many drivers one function can have: a bus master's DMA goes to the main memory of one."""
    return 1 if isinstance(model, BusMaster) else MAX_DRIVERS
