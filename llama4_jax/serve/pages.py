"""Who holds which page, and what it is called: reference counts, and names by content.

The name of a page follows from every token up to its end, the pictures among them, and the salt of
the request, so equal names mean equal keys and values. Names of different places never agree.
"""

import collections
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

Name = bytes


class PagePool:
    """Pages by number: each is free, held by so many rows, or cached under its name.

    Args:
      count: of pages.
      keep: whether a named page that nobody holds stays cached until its place is needed.
    """

    def __init__(self, count: int, *, keep: bool = True):
        self.count = count
        self._keep = keep
        self._free = list(range(count - 1, -1, -1))
        self._holders: dict[int, int] = {}
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._page_of: dict[Name, int] = {}
        self._name_of: dict[int, Name] = {}

    @property
    def available(self) -> int:
        """Pages that `take` can give: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> int:
        """Pages that rows hold."""
        return len(self._holders)

    def take(self) -> int:
        """Give a page to its first holder: a free one, or else the one that was cached first."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Add a holder to a page that is held or cached."""
        if page in self._cached:
            del self._cached[page]
        self._holders[page] = self._holders.get(page, 0) + 1

    def release(self, pages: Sequence[int], *, first_to_go: bool = False) -> None:
        """Take one holder from each page; the last of a row are the first to lose their names.

        Args:
          pages: of a row, in order.
          first_to_go: whether their places are needed less than those of all that are cached.
        """
        for page in pages if first_to_go else reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._name_of and self._keep:
                self._cached[page] = None
                self._cached.move_to_end(page, last=not first_to_go)
                continue
            self._forget(page)
            self._free.append(page)

    def name(self, page: int, name: Name) -> None:
        """Name a page that is held, unless another one has the name already."""
        if name not in self._page_of and page not in self._name_of:
            self._page_of[name] = page
            self._name_of[page] = name

    def find(self, names: Iterable[Name]) -> list[int]:
        """Return the pages of these names, up to the first that has none."""
        found = []
        for name in names:
            page = self._page_of.get(name)
            if page is None:
                break
            found.append(page)
        return found

    def _forget(self, page: int) -> None:
        name = self._name_of.pop(page, None)
        if name is not None:
            del self._page_of[name]


class PageNames:
    """The names of a row's pages, made as its tokens become known.

    Args:
      page_size: tokens of a page.
      salt: rows of different salts share no page.
      tiles: of each image tile its first token, the one after its last, and a digest of its pixels:
        its tokens are all the same, whatever it shows.
    """

    def __init__(
        self, page_size: int, *, salt: str = "", tiles: Sequence[tuple[int, int, bytes]] = ()
    ):
        self._page_size = page_size
        self._tiles = tiles
        self._names: list[Name] = []
        self._last = hashlib.blake2b(salt.encode(), digest_size=16).digest()

    def up_to(self, tokens_T: np.ndarray) -> list[Name]:
        """Return the names of all full pages of tokens, of which earlier ones have not changed."""
        size = self._page_size
        for page in range(len(self._names), len(tokens_T) // size):
            start, end = page * size, (page + 1) * size
            digest = hashlib.blake2b(self._last, digest_size=16)
            digest.update(np.ascontiguousarray(tokens_T[start:end], np.int32).tobytes())
            for first, stop, pixels in self._tiles:
                if first < end and start < stop:
                    digest.update((first - start).to_bytes(8, signed=True) + pixels)
            self._last = digest.digest()
            self._names.append(self._last)
        return self._names
