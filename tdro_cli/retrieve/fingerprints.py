"""Fingerprints of many texts at once, and indexes that find near ones: SimHash and MinHash.

Q texts, H held-out texts, S shingles, P permutations; B texts of a block, L windows of the longest of them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

WIDTH = 4  # characters of a shingle
MAX_CHARACTERS = 0xFFFE  # distinct ones that 16 bits can name, besides these two
DROPPED, UNSEEN = 0, 0xFFFF  # a character that is no letter or digit, and pads; one that has no name yet
OUTSIDE = np.uint64(0xFFFF_FFFF_FFFF_FFFE)  # no window: it holds the character 0xFFFF and is not `EMPTY`
EMPTY = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
MULTIPLIER = np.uint64(0x9E37_79B9_7F4A_7C15)  # 2**64 / golden ratio: Fibonacci hashing
MIN_BITS, MAX_BITS = 16, 22  # slots of a shingle table; at the most 64 MB
ENTRY = np.dtype([("key", np.uint64), ("value", np.uint64)])  # side by side: one access to memory finds both
BLOCK = 1 << 16  # windows looked up, and counted, together: so many stay in the processor's cache
MD5_START = [np.uint32(word) for word in (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)]
MD5_CONSTANTS = [np.uint32(int(abs(math.sin(step + 1)) * 2**32)) for step in range(64)]
MD5_SHIFTS = ((7, 12, 17, 22), (5, 9, 14, 20), (4, 11, 16, 23), (6, 10, 15, 21))
MD5_BLOCK = 8192  # messages hashed together: their words stay in the processor's cache
CHINESE = re.compile("[㐀-䶿一-鿿]")


def release_text(text: str) -> str:
    """A text whose SimHash is what the paper's release gets after deleting underscores and cutting Chinese by jieba.

    The cut puts spaces between, which the hash drops again. What it changes is one letter: a capital Σ at the end of a
    word is lower-cased to ς, but jieba makes every letter that is neither Chinese nor ASCII a word of its own, and then
    it becomes σ. So that letter is written here, and jieba need not run.
    """
    text = text.replace("_", "")
    return text.replace("Σ", "σ") if "Σ" in text and CHINESE.search(text) else text


def plain_fingerprint(text: str) -> int:
    """The SimHash of one text, by the rule's own words: what `SimHasher` must equal."""
    kept = "".join(character for character in release_text(text).lower() if character.isalnum())
    shingles = [kept[i : i + WIDTH] for i in range(max(len(kept) - WIDTH + 1, 1))]
    counts = [0] * 64
    for shingle in shingles:
        value = int.from_bytes(hashlib.md5(shingle.encode(), usedforsecurity=False).digest()[-8:], "big")
        for bit in range(64):
            counts[bit] += value >> bit & 1
    return sum(1 << bit for bit in range(64) if counts[bit] * 2 > len(shingles))


class SimHasher:
    """SimHash of the paper's release, by whole chunks of texts.

    Underscores go, letters become lower-case, only letters and digits (`str.isalnum`: no combining marks) stay; all
    windows of 4 characters, counted, each hashed by the last 8 bytes of its MD5; a bit is set where strictly more than
    half of the windows have it. Each distinct window is hashed once and remembered, so memory is bounded by the table
    (64 MB), the longest text, and nothing else.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.id_of = np.full(0x110000, UNSEEN, np.uint16)
        self.utf8_of = np.zeros(MAX_CHARACTERS + 1, np.uint32)
        self.utf8_length_of = np.zeros(MAX_CHARACTERS + 1, np.uint64)
        self.num_characters = 0
        self.table = ShingleTable()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Fingerprints [Q] uint64."""
        if not texts:
            return np.empty(0, np.uint64)
        joined = "".join(texts)
        # only Σ is lower-cased by what stands around it, and needs its text's own preparation; elsewhere an underscore
        # is dropped like any other sign
        if "Σ" in joined:
            texts = [release_text(text).lower() if "Σ" in text else text for text in texts]
            joined = "".join(texts)
        code = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        character = self._character_ids(code)
        if character is None:
            return self._in_halves(texts)
        kept = character != DROPPED
        num_kept = sums_of_runs(kept, np.fromiter(map(len, texts), np.int64, len(texts)))
        return self._fingerprints(character[kept], num_kept)

    def _fingerprints(self, character: np.ndarray, length_Q: np.ndarray) -> np.ndarray:
        """Fingerprints [Q] of texts that stand one after the other in `character`."""
        fingerprint_Q = np.empty(len(length_Q), np.uint64)
        start_Q = np.cumsum(length_Q) - length_Q
        blocks = list(_blocks_of_like_length(length_Q))
        windows = [_windows(character, start_Q[rows], length_Q[rows]) for rows in blocks]
        hashes = self.table.hashes([key_LB.reshape(-1) for key_LB, _ in windows], self._md5_tails)
        for rows, (key_LB, num_windows_B), hash_S in zip(blocks, windows, hashes, strict=True):
            fingerprint_Q[rows] = _majority(hash_S.reshape(key_LB.shape), num_windows_B)
        # the last 8 bytes of an MD5 are read as one number, the first byte highest
        return fingerprint_Q.astype("<u8").view(">u8").astype(np.uint64)

    def _in_halves(self, texts: Sequence[str]) -> np.ndarray:
        """For texts of more distinct characters than 16 bits can name."""
        if len(texts) == 1:
            return np.array([plain_fingerprint(texts[0])], np.uint64)
        middle = len(texts) // 2
        return np.concatenate([self(texts[:middle]), self(texts[middle:])])

    def _character_ids(self, code: np.ndarray) -> np.ndarray | None:
        """Numbers from 1 for lower-case characters, in the order of their coming; None if there are too many at once.

        0 for those that are neither letter nor digit.
        """
        character = self.id_of.take(code)
        unseen = character == UNSEEN
        if not unseen.any():
            return character
        if not self._name(np.unique(code[unseen])):
            self._forget()
            if not self._name(np.unique(code)):
                return None
        return self.id_of.take(code)

    def _name(self, new: np.ndarray) -> bool:
        """Gives numbers to characters; False where 16 bits have too few."""
        # only İ becomes two characters, of which the second is dropped
        lower = {code: chr(code).lower()[0] for code in new.tolist()}
        kept = sorted({ord(one) for one in lower.values() if one.isalnum()})
        named = [code for code in kept if self.id_of[code] == UNSEEN]
        if self.num_characters + len(named) > MAX_CHARACTERS:
            return False
        first = self.num_characters + 1
        self.num_characters += len(named)
        self.id_of[named] = np.arange(first, first + len(named))
        encoded = [chr(code).encode() for code in named]
        self.utf8_of[first : first + len(named)] = [int.from_bytes(one, "little") for one in encoded]
        self.utf8_length_of[first : first + len(named)] = [len(one) for one in encoded]
        for code, one in lower.items():
            self.id_of[code] = self.id_of[ord(one)] if one.isalnum() else DROPPED
        return True

    def _md5_tails(self, key: np.ndarray) -> np.ndarray:
        """The last 8 bytes of the MD5 of each shingle's UTF-8."""
        characters = key.view(np.uint16).reshape(-1, WIDTH)
        message = np.zeros((2, len(key)), np.uint64)
        length = np.zeros(len(key), np.uint64)
        for column in characters.T:
            _append(message, length, self.utf8_of[column])
            length += self.utf8_length_of[column]
        return md5_tails(message, length)


def _append(message: np.ndarray, length: np.ndarray, word: np.ndarray) -> None:
    """Puts the 4 bytes of each word behind the first `length` bytes of its 16-byte message [2, S], in place."""
    word, bits = word.astype(np.uint64), length * np.uint64(8)
    half = np.uint64(64)
    message[0] |= word << bits  # NumPy shifts of 64 bits or more give 0
    message[1] |= np.where(bits >= half, word << (bits - half), word >> (half - bits))


def md5_tails(message: np.ndarray, length_S: np.ndarray) -> np.ndarray:
    """The last 8 bytes, in that order, of the MD5 (RFC 1321) of messages of at most 16 bytes: [S] uint64.

    `message` [2, S] uint64 holds the bytes, the first one lowest, and zeros behind them.
    """
    message = message.copy()
    _append(message, length_S, np.full(len(length_S), 0x80, np.uint32))
    tails = np.empty(len(length_S), np.uint64)
    for low in range(0, len(tails), MD5_BLOCK):
        part = slice(low, low + MD5_BLOCK)
        tails[part] = _md5_block(message[:, part], length_S[part])
    return tails


def _md5_block(message: np.ndarray, length_S: np.ndarray) -> np.ndarray:
    low_half = np.uint64(0xFFFF_FFFF)
    words = {2 * i: (message[i] & low_half).astype(np.uint32) for i in range(2)}
    words |= {2 * i + 1: (message[i] >> np.uint64(32)).astype(np.uint32) for i in range(2)}
    words[4] = np.where(length_S == 16, np.uint32(0x80), np.uint32(0))  # the end mark of a message of 16 bytes
    words[14] = (length_S * np.uint64(8)).astype(np.uint32)
    a, b, c, d = (np.full(len(length_S), start, np.uint32) for start in MD5_START)
    mixed = np.empty_like(a)
    for step in range(63):  # the last one makes no part of these 8 bytes
        turn = step // 16
        if turn == 0:
            np.bitwise_xor(c, d, out=mixed)
            mixed &= b
            mixed ^= d
            index = step
        elif turn == 1:
            np.bitwise_xor(b, c, out=mixed)
            mixed &= d
            mixed ^= c
            index = (5 * step + 1) % 16
        elif turn == 2:
            np.bitwise_xor(b, c, out=mixed)
            mixed ^= d
            index = (3 * step + 5) % 16
        else:
            np.invert(d, out=mixed)
            mixed |= b
            mixed ^= c
            index = 7 * step % 16
        mixed += a
        mixed += MD5_CONSTANTS[step]
        if index in words:
            mixed += words[index]
        shift = MD5_SHIFTS[turn][step % 4]
        np.left_shift(mixed, np.uint32(shift), out=a)
        mixed >>= np.uint32(32 - shift)
        a |= mixed
        a += b
        a, b, c, d = d, a, b, c
    b += MD5_START[2]
    c += MD5_START[3]
    return (b.astype(np.uint64) | c.astype(np.uint64) << np.uint64(32)).astype("<u8").view(np.uint64)


def sums_of_runs(value: np.ndarray, length_Q: np.ndarray) -> np.ndarray:
    """Sums over consecutive runs of the given lengths, which may be 0: [Q] int64."""
    start = np.cumsum(length_Q) - length_Q
    return np.add.reduceat(np.append(value, 0), start, dtype=np.int64) * (length_Q > 0)


def _blocks_of_like_length(length_Q: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of the texts, longest first, so that those of a block have about `BLOCK` windows, padding included."""
    order, start = np.argsort(-length_Q, kind="stable"), 0
    while start < len(order):
        count = max(1, BLOCK // int(_num_windows(length_Q[order[start]])))
        yield order[start : start + count]
        start += count


def _num_windows(length: np.ndarray) -> np.ndarray:
    """A text of fewer than 4 characters is one window."""
    return np.maximum(length - (WIDTH - 1), 1)


def _windows(character: np.ndarray, start_B: np.ndarray, length_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All windows of 4 characters as keys [L, B] uint64, `OUTSIDE` behind a text's last, and their number [B].

    The first character is the lowest 16 bits; a text of fewer than 4 is padded with 0. The longest text comes first.
    """
    num_windows_B = _num_windows(length_B)
    position = np.arange(int(num_windows_B[0]) + WIDTH - 1)[:, None]
    place = position + start_B
    inside = position < length_B
    padded = np.append(character, np.uint16(0))
    character_LB = padded.take(np.where(inside, place, len(character))).astype(np.uint64)
    pair = character_LB[:-1] | character_LB[1:] << np.uint64(16)
    key_LB = pair[:-2] | pair[2:] << np.uint64(32)
    return np.where(position[: len(key_LB)] < num_windows_B, key_LB, OUTSIDE), num_windows_B


def _majority(hash_LB: np.ndarray, num_windows_B: np.ndarray) -> np.ndarray:
    """The bits that more than half of a text's hashes have: [B] uint64. Padding must be 0; `hash_LB` is overwritten.

    All 64 bits are counted at once: `count[i]` holds bit i of the 64 counts of each text.
    """
    count = _bit_counts(hash_LB)
    least = (num_windows_B // 2).astype(np.uint64)
    above, equal = np.zeros(len(least), np.uint64), np.full(len(least), EMPTY)
    for i in reversed(range(len(count))):
        bit_of_least = np.uint64(0) - (least >> np.uint64(i) & np.uint64(1))  # in all 64 places
        above |= equal & count[i] & ~bit_of_least
        equal &= ~(count[i] ^ bit_of_least)
    return above


def _bit_counts(row_LB: np.ndarray) -> list[np.ndarray]:
    """How many rows have each bit, as binary digits, lowest first: a list of [B] uint64. Overwrites the rows.

    Three rows of one digit become one of that digit and a carry of the next (a carry-save adder).
    """
    digits = []
    while len(row_LB):
        carry = np.empty((len(row_LB) // 2, row_LB.shape[1]), np.uint64)
        num_carries = 0
        while len(row_LB) > 1:
            third = max(len(row_LB) // 3, 1)
            a, b, c = row_LB[:third], row_LB[third : 2 * third], row_LB[2 * third : 3 * third]
            carried = carry[num_carries : num_carries + third]
            num_carries += third
            np.bitwise_and(a, b, out=carried)
            a ^= b
            if len(c):
                np.bitwise_and(a, c, out=b)
                carried |= b
                a ^= c
            rest = row_LB[3 * third :]
            row_LB[third : third + len(rest)] = rest
            row_LB = row_LB[: third + len(rest)]
        digits.append(row_LB[0])
        row_LB = carry[:num_carries]
    return digits


class ShingleTable:
    """Remembers the MD5 tails of shingles by key: open addressing, at most half full, emptied when it can't grow."""

    def __init__(self) -> None:
        self._clear(MIN_BITS)

    def _clear(self, bits: int) -> None:
        self.bits, self.used = bits, 0
        self.entries = np.zeros(1 << bits, ENTRY)
        self.keys, self.values = self.entries["key"], self.entries["value"]  # views
        self.keys[:] = EMPTY
        self._insert(np.array([OUTSIDE]), np.zeros(1, np.uint64))

    def hashes(self, keys: Sequence[np.ndarray], compute: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
        """The hash of each shingle: [S] uint64 for each of `keys`. `compute(keys)` gives those of keys that are new."""
        found = [self._find(key_S) for key_S in keys]
        new = [key_S[absent] for key_S, (_, absent) in zip(keys, found, strict=True)]
        if any(map(len, new)):
            distinct, where = np.unique(np.concatenate(new), return_inverse=True)
            tails = compute(distinct)
            ends = np.cumsum([len(absent) for _, absent in found])[:-1]
            for (value_S, absent), places in zip(found, np.split(where, ends), strict=True):
                value_S[absent] = tails[places]
            self._remember(distinct, tails)
        return [value_S for value_S, _ in found]

    def _slots(self, key: np.ndarray) -> np.ndarray:
        return (key * MULTIPLIER >> np.uint64(64 - self.bits)).view(np.int64)

    def _find(self, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The value of each key, and the indices of those that are absent."""
        slot = self._slots(key)
        entry = self.entries.take(slot)
        value = entry["value"].copy()
        pending = np.flatnonzero(entry["key"] != key)
        key, slot, entry = key[pending], slot[pending], entry[pending]
        absent = []
        while len(pending):
            free = entry["key"] == EMPTY
            absent.append(pending[free])
            further = np.flatnonzero(~free)
            pending, key, slot = pending[further], key[further], (slot[further] + 1) & (len(self.entries) - 1)
            entry = self.entries.take(slot)
            hit = entry["key"] == key
            value[pending[hit]] = entry["value"][hit]
            miss = np.flatnonzero(~hit)
            pending, key, slot, entry = pending[miss], key[miss], slot[miss], entry[miss]
        return value, np.concatenate(absent) if absent else np.empty(0, np.int64)

    def _remember(self, key: np.ndarray, value: np.ndarray) -> None:
        """Adds distinct new keys."""
        if self.used + len(key) > len(self.keys) // 2:
            old = self.entries[self.keys != EMPTY]
            needed = (2 * (self.used + len(key)) - 1).bit_length()
            bits = max(self.bits, min(needed + 1, MAX_BITS))  # one more, as what is there must be put in anew
            if needed > MAX_BITS:
                self._clear(MAX_BITS)
                room = len(self.keys) // 2 - self.used
                key, value = key[:room], value[:room]
            else:
                self._clear(bits)
                self._insert(old["key"], old["value"])
        self._insert(key, value)

    def _insert(self, key: np.ndarray, value: np.ndarray) -> None:
        self.used += len(key)
        slot = self._slots(key)
        while len(key):
            free = self.keys[slot] == EMPTY
            self.keys[slot[free]] = key[free]  # of several that want a slot one wins; the others see it and go on
            lost = self.keys[slot] != key
            self.values[slot[~lost]] = value[~lost]
            key, value, slot = key[lost], value[lost], (slot[lost] + 1) & (len(self.keys) - 1)


class HammingIndex:
    """Finds all fingerprints within `max_distance` bits.

    Two such fingerprints agree in at least one of `max_distance + 1` bands of bits (Manku, Jain and Das Sarma 2007):
    only those that do are compared, and none is missed.
    """

    def __init__(self, fingerprint_H: np.ndarray, max_distance: int):
        if not 0 <= max_distance <= 15:
            raise ValueError(f"max_distance must be in 0..15, got {max_distance}")
        self.fingerprints, self.max_distance = np.asarray(fingerprint_H, np.uint64), max_distance
        edges = [64 * band // (max_distance + 1) for band in range(max_distance + 2)]
        self.bands = [(np.uint64(low), _ones(high - low)) for low, high in pairwise(edges)]
        self.sorted_bands = []
        for shift, mask in self.bands:
            value = self.fingerprints >> shift & mask
            order = np.argsort(value, kind="stable")
            occupied = np.zeros(1 << FILTER_BITS, bool)
            occupied[value & _ones(FILTER_BITS)] = True
            self.sorted_bands.append((value[order], order, occupied))

    def pairs(self, fingerprint_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All (i, h, distance) with fingerprint_Q[i] near the index's h, sorted by i, then h: int64 arrays."""
        found = [pairs for band in range(len(self.bands)) for pairs in self._pairs_of_band(fingerprint_Q, band)]
        row, near, distance = (np.concatenate([part[k] for part in found] or [np.empty(0, np.int64)]) for k in range(3))
        order = np.lexsort((near, row))
        return row[order], near[order], distance[order]

    def _pairs_of_band(self, fingerprint_Q: np.ndarray, band: int) -> Iterator[tuple[np.ndarray, ...]]:
        shift, mask = self.bands[band]
        ordered, order, occupied = self.sorted_bands[band]
        value = fingerprint_Q >> shift & mask
        row = np.flatnonzero(occupied[value & _ones(FILTER_BITS)])
        low = np.searchsorted(ordered, value[row], "left")
        count = np.searchsorted(ordered, value[row], "right") - low
        for part in _blocks(count):
            candidate_row, candidate = _expand(row[part], low[part], count[part], order)
            different = fingerprint_Q[candidate_row] ^ self.fingerprints[candidate]
            distance = np.bitwise_count(different).astype(np.int64)
            near = distance <= self.max_distance
            for earlier_shift, earlier_mask in self.bands[:band]:
                near &= (different >> earlier_shift & earlier_mask) != 0  # that band has found it
            yield candidate_row[near], candidate[near], distance[near]


FILTER_BITS = 20
MAX_CANDIDATES = 1 << 22  # compared at once


def _ones(num_bits: int) -> np.uint64:
    return np.uint64((1 << num_bits) - 1)


def _blocks(count: np.ndarray) -> Iterator[slice]:
    """Slices of rows of at most `MAX_CANDIDATES` candidates together, or of a single row."""
    total, low = np.cumsum(count), 0
    while low < len(count):
        before = total[low - 1] if low else 0
        high = max(int(np.searchsorted(total, before + MAX_CANDIDATES, "right")), low + 1)
        yield slice(low, high)
        low = high


class MinHasher:
    """MinHash signatures: the share of equal entries of two estimates the Jaccard similarity of their shingle sets."""

    def __init__(self, num_permutations: int):
        # the permutations are part of the method, not an option: the same texts always give the same candidates
        generator = np.random.default_rng(2408_10613)
        self.offset_P = generator.integers(0, 1 << 32, num_permutations, np.uint32)
        self.factor_P = generator.integers(0, 1 << 31, num_permutations, np.uint32) * np.uint32(2) + np.uint32(1)

    def __call__(self, shingles: Sequence[frozenset[str] | set[str]]) -> np.ndarray:
        """Signatures [Q, P] uint32; a text without shingles gets all ones."""
        signature_QP = np.full((len(shingles), len(self.factor_P)), 0xFFFF_FFFF, np.uint32)
        filled = np.array([row for row, own in enumerate(shingles) if own], np.int64)
        if not len(filled):
            return signature_QP
        length = np.fromiter((len(shingles[row]) for row in filled), np.int64, len(filled))
        value_S = _shingle_values([shingle for row in filled for shingle in shingles[row]])
        start = np.cumsum(length) - length
        for p, (offset, factor) in enumerate(zip(self.offset_P, self.factor_P, strict=True)):
            signature_QP[filled, p] = np.minimum.reduceat((value_S ^ offset) * factor, start)
        return signature_QP


def _shingle_values(shingles: Sequence[str]) -> np.ndarray:
    """32 well-mixed bits of each shingle of at most 3 characters, the same on every machine: [S] uint32."""
    padded = "".join([shingle.ljust(3, "\0") for shingle in shingles]).encode("utf-32-le", "surrogatepass")
    code = np.frombuffer(padded, np.uint32).reshape(-1, 3).astype(np.uint64)
    mixed = code[:, 0] | code[:, 1] << np.uint64(21) | code[:, 2] << np.uint64(42)
    for factor in (0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB):  # the finaliser of SplitMix64
        mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(factor)
    return (mixed >> np.uint64(32)).astype(np.uint32)


def rows_per_band(threshold: float, num_permutations: int, recall: float = 0.999) -> int:
    """The most rows a band of a MinHash index can have and still meet pairs at `threshold` with that probability."""
    for rows in range(num_permutations, 1, -1):
        if 1 - (1 - threshold**rows) ** (num_permutations // rows) >= recall:
            return rows
    return 1


class MinHashIndex:
    """Candidates for being near: texts whose signatures agree in a whole band of entries."""

    def __init__(self, signature_HP: np.ndarray, rows: int):
        self.signatures, self.rows = signature_HP, rows
        self.num_bands = signature_HP.shape[1] // rows
        self.bands = []
        for band in range(self.num_bands):
            value = self._band(signature_HP, band)
            order = np.argsort(value, kind="stable")
            self.bands.append((value[order], order))

    def _band(self, signature: np.ndarray, band: int) -> np.ndarray:
        value = np.zeros(len(signature), np.uint64)
        for column in range(band * self.rows, (band + 1) * self.rows):
            value = (value ^ signature[:, column]) * MULTIPLIER
            value ^= value >> np.uint64(29)
        return value

    def candidates(
        self, signature_QP: np.ndarray, least_estimate_Q: float | Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """All (i, h) that share a band and whose estimated similarity is at least that of i, sorted by i, then h."""
        least = np.broadcast_to(np.asarray(least_estimate_Q, float), len(signature_QP))
        found = [np.empty(0, np.int64)]
        for band, (ordered, order) in enumerate(self.bands):
            value = self._band(signature_QP, band)
            low = np.searchsorted(ordered, value, "left")
            count = np.searchsorted(ordered, value, "right") - low
            met = np.flatnonzero(count)
            for part in _blocks(count[met]):
                row, near = _expand(met[part], low[met[part]], count[met[part]], order)
                found.append(np.unique(row * len(self.signatures) + near))
        pair = np.unique(np.concatenate(found))
        row, near = np.divmod(pair, max(len(self.signatures), 1))
        similar = np.empty(len(row), bool)
        for begin in range(0, len(row), 1 << 16):
            part = slice(begin, begin + (1 << 16))
            similar[part] = (signature_QP[row[part]] == self.signatures[near[part]]).mean(1) >= least[row[part]]
        return row[similar], near[similar]


def _expand(row: np.ndarray, low: np.ndarray, count: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row with every entry of its range low..low+count of `order`."""
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(row, count), order[np.repeat(low, count) + offset]
