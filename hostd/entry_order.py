"""Which of two words about a table's entry is the later one, and whether a hold outlives it. Pure."""

from dataclasses import replace

from hostd.translation import Entry
from vfleet.v1.hold_service_pb2 import Hold


def taken_over(
    entry: Entry, own: Entry | None, hold: Hold | None, *, keep_held: bool, goes_back: bool
) -> tuple[Entry | None, bool]:
    """Return an entry of etcd, held or not, if it is newer than the `own` one, and whether its move ended the `hold`.

    `goes_back` lets one of an earlier generation be newer than one whose revision a raised fleet generation took away.
    """
    if own is not None and _is_as_new(own, entry, goes_back):
        # It came by another way before; a hold of the generation that is over is to be lifted still.
        return None, hold is not None and hold.generation < own.generation and not keep_held
    held = hold is not None and (keep_held or hold.generation >= entry.generation)
    return replace(entry, held=held), hold is not None and not held


def _is_as_new(own: Entry, entry: Entry, goes_back: bool) -> bool:
    is_forgotten = not own.revision and own.generation > entry.generation
    return own.revision >= entry.revision or (is_forgotten and not goes_back)
