"""What a watch has told its consumer: enough to tell the difference where the history does not reach back."""

from collections.abc import Iterable

from cairn.cluster.base import Change, Entry, Listing


class Known:
    """Keys under a prefix with the revision of their last change. `next`: the first revision not told yet."""

    def __init__(self, since: Listing) -> None:
        self.next = since.revision + 1
        self._modified = {entry.key: entry.modified for entry in since.entries}

    def tell(self, changes: Iterable[Change]) -> tuple[Change, ...]:
        """Of changes in order of revisions, those that are new; they count as told."""
        new = tuple(change for change in changes if change.revision >= self.next)
        for change in new:
            if change.entry is None:
                self._modified.pop(change.key, None)
            else:
                self._modified[change.key] = change.revision
        if new:
            self.next = new[-1].revision + 1
        return new

    def difference(self, listing: Listing, *, another: bool = False) -> tuple[Change, ...]:
        """What leads from the keys told to those of `listing`, which count as told.

        another: it is another store's, whose revisions mean nothing here; so is one that is behind what was told.
        """
        another = another or listing.revision < self.next - 1
        now = {entry.key for entry in listing.entries}
        gone = [Change(key, None, listing.revision) for key in self._modified if key not in now]
        put = [
            Change(entry.key, entry, entry.modified)
            for entry in sorted(listing.entries, key=_by_revision)
            if another or self._modified.get(entry.key) != entry.modified
        ]
        self._modified = {entry.key: entry.modified for entry in listing.entries}
        self.next = listing.revision + 1
        return (*gone, *put)


def _by_revision(entry: Entry) -> int:
    return entry.modified
