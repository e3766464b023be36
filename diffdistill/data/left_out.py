"""What a reader finds and does not use: files seen = files used + files named here, by reason."""

from collections.abc import Iterable

from diffdistill.data.collection import listed

NUM_EXAMPLES = 3


class LeftOut:
    """Counts by reason, with a few names of each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """One file more that is not used."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(name)

    def with_more(self, reason: str, names: Iterable[str]) -> "LeftOut":
        """These and more that are left out for one reason."""
        made = LeftOut()
        made.merge(self)
        for name in names:
            made.add(reason, name)
        return made

    def merge(self, other: "LeftOut") -> None:
        """Those of `other` too."""
        for reason, count in other.counts.items():
            examples = [*self._examples.get(reason, []), *other._examples[reason]]
            self.counts[reason] = self.counts.get(reason, 0) + count
            self._examples[reason] = examples[:NUM_EXAMPLES]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def notes(self, origin: str, *, used: int, what: str = "files") -> tuple[str, ...]:
        """One line for the user; none where everything is used.  used: how many are."""
        if not self.total:
            return ()
        return (f"{origin}: {self.total:,} of {self.total + used:,} {what} are not used: {self}",)

    def __str__(self) -> str:
        parts = [
            f"{count:,} x {reason} ({listed(self._examples[reason])}{', ...' if count > NUM_EXAMPLES else ''})"
            for reason, count in self.counts.items()
        ]
        return "; ".join(parts)
