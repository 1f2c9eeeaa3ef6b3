"""A matching: every item at one of the seats that it may have, and no seat with more items than it has room for. Pure.

It is kept complete while items are fixed to seats, one after the other, as a search goes down, and let go as it goes
back; so that a search sees at once that what it has fixed leaves no seat for somebody. Items give way along augmenting
paths, found by a breadth-first search, so that "no" means that there is none.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence


class Matching:
    """Seats for items: `options` are those that each item may have, `room` how many items each seat takes.

    Items may share one sequence of options, which is then looked at once. The same arguments give the same matching.
    `is_complete` says whether every item has a seat; if not, nothing else may be asked.
    """

    def __init__(self, options: Mapping[str, Sequence[str]], room: Mapping[str, int]) -> None:
        self._options = options
        self._room = room
        self._fixed: Counter[str] = Counter()
        self._seats: dict[str, str] = {}  # of those that are not fixed
        self._items: defaultdict[str, dict[str, None]] = defaultdict(dict)  # the same the other way, in order
        self.is_complete = all(self._settle(item) for item in options)

    @property
    def seats(self) -> Mapping[str, str]:
        """The seats of the items that are not fixed."""
        return self._seats

    @classmethod
    def without_seat(cls, options: Mapping[str, Sequence[str]], room: Mapping[str, int]) -> list[str]:
        """Return as few items as can be, in order, without which all others have a seat."""
        matching = cls({}, room)
        matching._options = options
        return [item for item in options if not matching._settle(item)]

    def fix(self, item: str, seat: str) -> bool:
        """Fix an item to one of its seats; return False, and change nothing, if then not all would have one."""
        before, items = self._seats[item], self._items[seat]
        if self._fixed[seat] == self._room[seat]:
            return False
        self._leave(item)
        self._fixed[seat] += 1
        if len(items) > self._room[seat] - self._fixed[seat]:
            displaced = next(iter(items))
            self._leave(displaced)
            if not self._settle(displaced):
                self._take(displaced, seat)
                self._fixed[seat] -= 1
                self._take(item, before)
                return False
        return True

    def unfix(self, item: str, seat: str) -> None:
        """Let go of an item that is fixed to a seat."""
        self._fixed[seat] -= 1
        self._take(item, seat)

    def _take(self, item: str, seat: str) -> None:
        self._seats[item] = seat
        self._items[seat][item] = None

    def _leave(self, item: str) -> None:
        del self._items[self._seats.pop(item)][item]

    def _settle(self, item: str) -> bool:
        """Give an item without a seat one, if others can give way."""
        who_comes: dict[str, str] = {}
        looked_at: set[int] = set()
        waiting = deque((item,))
        while waiting:
            mover = waiting.popleft()
            options = self._options[mover]
            if id(options) in looked_at:
                continue
            looked_at.add(id(options))
            for seat in options:
                if seat in who_comes:
                    continue
                who_comes[seat] = mover
                if len(self._items[seat]) < self._room[seat] - self._fixed[seat]:
                    self._shift(item, seat, who_comes)
                    return True
                waiting.extend(self._items[seat])
        return False

    def _shift(self, item: str, seat: str, who_comes: Mapping[str, str]) -> None:
        while True:
            mover = who_comes[seat]
            if mover == item:
                self._take(mover, seat)
                return
            left = self._seats[mover]
            self._leave(mover)
            self._take(mover, seat)
            seat = left
