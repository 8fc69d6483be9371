"""Passages on disk, by place or by docid: what is mined from, however much there is of it."""

from __future__ import annotations

import hashlib
import mmap
import struct
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from tdro_cli.data.formats import Passage, passage_text
from tdro_cli.protocols import Text

if TYPE_CHECKING:
    import numpy as np


def normalised(text: str) -> str:
    """The text without what case, white space and Unicode form make of it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_key(text: str) -> int:
    """64 bits that are equal for texts that are equal when normalised."""
    return _hash(_bytes(normalised(text)))


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


_LENGTHS = struct.Struct("<III")  # bytes of docid, title and text, which follow in a record


class PassageStore(Sequence[Text]):
    """The distinct passages that `write` put into a folder: places 0.. in an order that depends on docids alone.

    Memory does not grow with them, but for what the system keeps of the mapped files.
    """

    @staticmethod
    def write(folder: Path, passages: Iterable[Passage]) -> PassageStore:
        """Streams the passages to a new folder; of those with one docid the first. 24 bytes each while it writes.

        Two docids in 2**64 have one hash, and would be taken for one.
        """
        import numpy as np

        folder.mkdir(parents=True)
        hashes, offsets, keys = array("Q"), array("q"), array("Q")
        with open(folder / "passages.bin", "wb", buffering=1 << 20) as file:
            end = 0
            for passage in passages:
                fields = _bytes(passage.docid), _bytes(passage.title), _bytes(passage.text)
                hashes.append(_hash(fields[0]))
                offsets.append(end)
                keys.append(text_key(passage_text(passage)))
                end += file.write(b"".join((_LENGTHS.pack(*map(len, fields)), *fields)))
        sorted_hashes, first = np.unique(np.frombuffer(hashes, np.uint64), return_index=True)
        np.save(folder / "hashes.npy", sorted_hashes)
        np.save(folder / "offsets.npy", np.frombuffer(offsets, np.int64)[first])
        np.save(folder / "keys.npy", np.frombuffer(keys, np.uint64)[first])
        return PassageStore(folder)

    def __init__(self, folder: Path):
        import numpy as np

        self._hashes, self._offsets, self.keys = (
            # plain views: an element of a memory map's own class takes four times as long
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
            for name in ("hashes", "offsets", "keys")
        )
        with open(folder / "passages.bin", "rb") as file:
            self._records = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self) else b""

    def __len__(self) -> int:
        return len(self._hashes)

    @overload
    def __getitem__(self, index: int) -> Text: ...
    @overload
    def __getitem__(self, index: slice) -> list[Text]: ...
    def __getitem__(self, index: int | slice) -> Text | list[Text]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        passage = self.passage(index)
        return Text(passage.docid, passage_text(passage))

    def __iter__(self) -> Iterator[Text]:
        return map(self.__getitem__, range(len(self)))

    def passage(self, place: int) -> Passage:
        docid, title, text = self._fields(place, 3)
        return Passage(docid, title, text)

    def docid(self, place: int) -> str:
        return self._fields(place, 1)[0]

    def _fields(self, place: int, count: int) -> list[str]:
        """The first fields of the passage: docid, title, text."""
        start, fields = int(self._offsets[place]), []
        lengths = _LENGTHS.unpack_from(self._records, start)
        start += _LENGTHS.size
        for length in lengths[:count]:
            fields.append(self._records[start : start + length].decode("utf-8", "surrogatepass"))
            start += length
        return fields

    def places(self, docids: Iterable[str]) -> np.ndarray:
        """The place of each passage, -1 for those that are not here: int64."""
        import numpy as np

        wanted = np.array([_hash(_bytes(docid)) for docid in docids], np.uint64)
        place = np.searchsorted(self._hashes, wanted)
        near = np.minimum(place, len(self) - 1)
        return np.where(self._hashes[near] == wanted, place, -1) if len(self) else np.full(len(wanted), -1)


class Corpus(Sequence[Text]):
    """The passages of several stores one after the other; no docid is in two of them."""

    def __init__(self, stores: Sequence[PassageStore]):
        import numpy as np

        self.stores = stores
        self._starts = np.cumsum([0, *map(len, stores)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> Text: ...
    @overload
    def __getitem__(self, index: slice) -> list[Text]: ...
    def __getitem__(self, index: int | slice) -> Text | list[Text]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        store, place = self._in_store(index)
        return store[place]

    def __iter__(self) -> Iterator[Text]:
        for store in self.stores:
            yield from store

    def passage(self, place: int) -> Passage:
        store, inside = self._in_store(place)
        return store.passage(inside)

    def docid(self, place: int) -> str:
        store, inside = self._in_store(place)
        return store.docid(inside)

    def places(self, docids: Sequence[str]) -> np.ndarray:
        """The place of each passage, -1 for those that are not here: int64."""
        import numpy as np

        found = np.full(len(docids), -1)
        for store, start in zip(self.stores, self._starts, strict=False):
            inside = store.places(docids)
            found = np.where(inside >= 0, inside + start, found)
        return found

    def keys(self, places: Any) -> list[int]:
        """The text keys of the passages at `places`."""
        import numpy as np

        places = np.asarray(places, np.int64)
        keys = np.empty(len(places), np.uint64)
        for store, start in zip(self.stores, self._starts, strict=False):
            here = (places >= start) & (places < start + len(store))
            keys[here] = store.keys[places[here] - start]
        return keys.tolist()

    def _in_store(self, place: int) -> tuple[PassageStore, int]:
        if not 0 <= place < len(self):
            raise IndexError(f"the corpus has places 0..{len(self) - 1}, asked for {place}")
        number = int(self._starts.searchsorted(place, "right")) - 1
        return self.stores[number], int(place - self._starts[number])
