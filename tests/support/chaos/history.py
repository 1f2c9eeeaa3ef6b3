"""What drivers saw: one line of JSON for each access, written by whoever made it, read by the checker."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

WORD_BYTES = 8


@dataclass(frozen=True, slots=True)
class Access:
    """One access of 8 bytes at `offset` in the function's window; a driver's are in its program order.

    `value` is what was written, or what a read returned. Without an answer `sequence` and `end_s` are 0: it may have
    taken effect, or not. The times, of one clock, are from before it was sent to after its answer came.
    """

    driver: str
    function: str
    is_read: bool
    offset: int
    value: int
    sequence: int
    start_s: float
    end_s: float
    is_ok: bool = True

    @property
    def is_answered(self) -> bool:
        """Whether its answer came."""
        return self.sequence != 0


class Log:
    """A driver's accesses, in a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def add(self, access: Access) -> None:
        """Write an access down."""
        self._file.write(json.dumps(asdict(access)) + "\n")

    def close(self) -> None:
        """Write out what is not written yet."""
        self._file.close()


def read_logs(paths: Iterable[Path]) -> list[Access]:
    """Return all accesses; those of one driver are in its order."""
    return [Access(**json.loads(line)) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
