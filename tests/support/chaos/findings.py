"""What a checker found. Each kind is a number that has to be zero."""

from collections import Counter

KINDS = ("lost", "repeated", "reordered", "misrouted", "mismatches", "residue", "unfinished")


class Findings:
    """How much of each kind was found, and in words, what."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.found: list[tuple[str, str]] = []

    @property
    def messages(self) -> list[str]:
        """What was found, each with its kind."""
        return [f"{kind}: {message}" for kind, message in self.found]

    def add(self, kind: str, message: str, count: int = 1) -> None:
        """Note `count` of a kind (nothing if 0)."""
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; expected one of {KINDS}")
        if count:
            self.counts[kind] += count
            self.found.append((kind, message))

    def expect(self, kind: str, holds: object, message: str) -> None:
        """Note one of a kind unless `holds` is true."""
        self.add(kind, message, count=not holds)
