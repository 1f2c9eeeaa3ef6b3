"""A holder's messages that hostd has not said to be done, in order, and how many there may be."""

from collections import deque
from collections.abc import Iterator

from hostd.guest.frames import Kind
from hostd.guest.vmm_socket import Received

MAX_QUEUED = 4096
MAX_QUEUED_BYTES = 1 << 20
MAX_QUEUED_DESCRIPTORS = 64


class Item:
    """A message of the VMM, or that one came or went, until it is done."""

    __slots__ = ("answer_by_s", "kind", "message", "number")

    def __init__(self, number: int, kind: Kind, message: Received, answer_by_s: float) -> None:
        self.number = number
        self.kind = kind
        self.message = message
        self.answer_by_s = answer_by_s


class MessageQueue:
    """The items; while one of the bounds above is reached there is no room for what a VMM says next."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._bytes = self._descriptors = 0

    def __iter__(self) -> Iterator[Item]:
        """Return all of them, the oldest first."""
        return iter(self._items)

    @property
    def has_room(self) -> bool:
        """Whether there is room for more."""
        return (
            len(self._items) < MAX_QUEUED
            and self._bytes < MAX_QUEUED_BYTES
            and self._descriptors < MAX_QUEUED_DESCRIPTORS
        )

    def put(self, item: Item) -> None:
        """Append one, whose descriptors belong to the queue from now on."""
        self._items.append(item)
        self._bytes += len(item.message.data)
        self._descriptors += len(item.message.descriptors)

    def finish(self, number: int) -> None:
        """Let go of all up to a number."""
        while self._items and self._items[0].number <= number:
            message = self._items.popleft().message
            self._bytes -= len(message.data)
            self._descriptors -= len(message.descriptors)
            message.close()
