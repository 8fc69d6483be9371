"""Deduplicators: exact, simhash, minhash. How each decides is told in docs/dedup.md, with what each misses."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from tdro_cli.protocols import DuplicatePair, Text

if TYPE_CHECKING:
    import numpy as np

    Matches = tuple[np.ndarray, np.ndarray, np.ndarray]  # row in the chunk, held-out text, similarity; sorted

DENSE = "\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"  # Han, kana, Hangul, Yi: a character says a lot
UNSPACED = DENSE + "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # and Thai, Lao, Burmese, Khmer: no spaces between words
BESIDE_DENSE = re.compile(f"(?<=[{DENSE}]) | (?=[{DENSE}])")
UNSPACED_CHARACTER = re.compile(f"[{UNSPACED}]")
BEYOND_BMP = re.compile("[\U00010000-\U0010ffff]")
WORD = re.compile(f"[{UNSPACED}]|[^ {UNSPACED}]+")
LEAD_IN = re.compile(r"[^:：]{1,40}[:：]\s*")  # "Question: ", "Please tell me: "
SHORT = 150  # shingles; a lead-in of 40 characters leaves a longer text above every sensible threshold
MAX_TYPOS = 4  # in a text, besides one word in twenty; with more it is another one
SHORT_WORD = 4  # letters; one letter makes another word of it, so more must speak for a slip
LONG_TEXT = 8  # words, or LONG_UNSPACED characters: the rest says that it is the same question
LONG_UNSPACED = 12
COMMON = 3  # held-out texts that have a word which is often mistyped, as "of" and "the" are


@dataclass(frozen=True)
class Exact:
    """Equal after normalisation: Unicode form (NFKC), letter case, punctuation, spaces.

    `processes`: how many to use for large inputs; null for as many as there are cores.
    """

    execution_options: ClassVar = ("processes",)

    processes: int | None = None

    def __post_init__(self) -> None:
        _check_processes(self.processes)

    def duplicates(self, train: Iterable[Text], held_out: Iterable[Text]) -> Iterator[DuplicatePair]:
        ids, texts = _split(held_out)
        return _search(_EqualTexts(texts), train, ids, self.processes)


@dataclass(frozen=True)
class SimHash:
    """SimHash of 64 bits over windows of 4 characters, as in the paper's release: at most `max_distance` bits differ.

    The decisions of the `simhash` package. `similarity` is 1 - distance / 64.
    """

    execution_options: ClassVar = ("processes",)

    max_distance: int = 2
    processes: int | None = 1
    """for large inputs; null: as many as there are cores. Handing a text over costs about what hashing it does"""

    def __post_init__(self) -> None:
        _check_processes(self.processes)
        if not 0 <= self.max_distance <= 15:
            raise ValueError(f"max_distance must be in 0..15, got {self.max_distance}")

    def duplicates(self, train: Iterable[Text], held_out: Iterable[Text]) -> Iterator[DuplicatePair]:
        # the release leaves out held-out texts that are empty after its preparation, but no training text
        ids, texts = _split(text for text in held_out if text.text.replace("_", ""))
        return _search(_NearFingerprints(texts, self.max_distance), train, ids, self.processes)

    def weak_spots(self, texts: Iterable[str]) -> list[str]:
        """What to know about these held-out texts before one believes the result."""
        without_letters = marked = 0
        for text in texts:
            without_letters += not any(map(str.isalnum, text))
            marked += sum(unicodedata.category(character)[0] == "M" for character in text) * 10 > len(text)
        found = []
        if without_letters:
            found.append(f"texts without a letter or digit: {without_letters}; to simhash they equal all such texts")
        if marked:
            found.append(
                f"texts of more than a tenth combining marks, as Hindi and Thai are: {marked}; simhash drops "
                "the marks, so different words can look alike: check these pairs, or use minhash"
            )
        return found


@dataclass(frozen=True)
class MinHash:
    """The same question in other clothes: a typo, a dropped word, a lead-in, besides all that `exact` sees.

    Candidates come from MinHash with LSH over `num_permutations`; each is then verified: the true Jaccard similarity of
    the shingle sets is at least `threshold`, and what differs is left out, added or mistyped. Where words or numbers
    were exchanged for others (more than one word in twenty), it is another question. `similarity` is the Jaccard one.
    """

    execution_options: ClassVar = ("processes",)

    threshold: float = 0.6
    num_permutations: int = 128
    processes: int | None = None
    """for large inputs; null: as many as there are cores"""

    def __post_init__(self) -> None:
        _check_processes(self.processes)
        if not 0.2 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in 0.2..1, got {self.threshold}")
        if not 16 <= self.num_permutations <= 1024:
            raise ValueError(f"num_permutations must be in 16..1024, got {self.num_permutations}")

    def duplicates(self, train: Iterable[Text], held_out: Iterable[Text]) -> Iterator[DuplicatePair]:
        ids, texts = _split(held_out)
        return _search(_SameQuestions(texts, self.threshold, self.num_permutations), train, ids, self.processes)


def _check_processes(processes: int | None) -> None:
    if processes is not None and processes < 1:
        raise ValueError(f"processes must be at least 1, or null for all cores, got {processes}")


def _split(texts: Iterable[Text]) -> tuple[list[str], list[str]]:
    ids, contents = [], []
    for text in texts:
        ids.append(text.id)
        contents.append(text.text)
    return ids, contents


def _search(matcher: Any, train: Iterable[Text], ids: Sequence[str], processes: int | None) -> Iterator[DuplicatePair]:
    from tdro_cli.retrieve.deduplication import find_duplicates

    return find_duplicates(matcher, train, ids, processes)


# ---- what counts as the same text ----


def normalized(text: str) -> str:
    """The text without what does not change a question.

    NFKC, case folded (and the dotless and dotted i of Turkish made one); apostrophes and invisible characters deleted;
    other punctuation made a space, but for # % & @, which can carry the meaning, as symbols (+ = $ ...) do; spaces
    collapsed, and dropped beside Chinese, Japanese and Korean characters. Letters, digits and combining marks stay.
    A text of nothing but punctuation stays as it is.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = folded.replace("i\u0307", "i").replace("ı", "i")
    kept = folded
    for deleted, spaced in _dropped_characters()[: 2 if BEYOND_BMP.search(folded) else 1]:
        kept = spaced.sub(" ", deleted.sub("", kept))
    words = kept.split()
    return BESIDE_DENSE.sub("", " ".join(words or folded.split()))


@cache
def _dropped_characters() -> list[tuple[re.Pattern, re.Pattern]]:
    """Patterns of what is deleted and what becomes a space: up to U+FFFF, and beyond.

    Apart, as `re` looks a character of the first kind up at once, but tries those beyond one after the other.
    """
    patterns = []
    for codes in (range(0x10000), range(0x10000, 0x110000)):
        deleted, spaced = [], []
        for character in map(chr, codes):
            category = unicodedata.category(character)
            if character in "'’‘ʼ`´" or (category in ("Cf", "Cc", "Cs") and not character.isspace()):
                deleted.append(character)
            elif (category[0] == "P" and character not in "#%&@") or category == "Sk":
                spaced.append(character)
        first, second = (re.compile(f"[{re.escape(''.join(kept))}]+") for kept in (deleted, spaced))
        patterns.append((first, second))
    return patterns


def shingles(text: str) -> set[str]:
    """Windows of 3 characters of a normalised text, of 2 where a dense script begins; a space before and after."""
    if not text:
        return set()
    padded = f" {text} "
    found = {padded[i : i + 3] for i in range(len(padded) - 2)}
    if not padded.isascii():
        for i, character in enumerate(padded[:-1]):
            if character > "\u2e7f":
                found.discard(padded[i : i + 3])
                found.add(padded[i : i + 2])
    return found


def jaccard(one: set[str], other: set[str]) -> float:
    common = len(one & other)
    return common / ((len(one) + len(other) - common) or 1)


def only_slips(one: str, other: str, held_out_words: Mapping[str, int] = {}) -> bool:
    """Whether two normalised texts differ only in words left out, added, moved or mistyped, not exchanged for others.

    One exchanged word in twenty is allowed, no exchanged number; and, for a common word or in a long text, one short
    word of `one` with a letter more or less than one of `other`, or a wrong one that makes no held-out word of it.
    `held_out_words`: {word: number of held-out texts that have it}.
    """
    words, others = WORD.findall(one), WORD.findall(other)
    allowed = max(len(words), len(others)) // 20
    counted, counted_others = Counter(words), Counter(others)
    left, right = list((counted - counted_others).elements()), list((counted_others - counted).elements())
    if _digits(left) and _digits(right) and _digits(left) != _digits(right):
        return False
    if min(len(left), len(right)) > 2 * allowed + MAX_TYPOS:
        return False
    exchanged = _exchanged(left, right, allowed + 1)
    if exchanged == allowed + 1:
        exchanged -= _has_short_slip(left, right, held_out_words, len(others))
    return exchanged <= allowed


def _digits(words: Iterable[str]) -> str:
    return "".join(character for word in words for character in word if character.isdigit())


def _has_short_slip(
    words: Sequence[str], others: Sequence[str], held_out_words: Mapping[str, int], num_words: int
) -> bool:
    """Whether one of the words is a mistyped one of the others, though too short for `is_typo`."""
    return any(
        (num_words >= LONG_UNSPACED and UNSPACED_CHARACTER.match(other) and UNSPACED_CHARACTER.match(word))
        or (
            len(word) <= SHORT_WORD + 1
            and 2 <= len(other) <= SHORT_WORD
            and (len(word) != len(other) or word not in held_out_words)
            and (num_words >= LONG_TEXT or held_out_words.get(other, 0) >= COMMON)
            and not is_typo(word, other)
            and one_slip(word, other)
        )
        for word in words
        for other in others
    )


def _exchanged(words: Sequence[str], others: Sequence[str], most: int) -> int:
    """How many words stand for other ones, rather than being mistyped, split, joined, left out or added.

    Counts no further than `most`.
    """
    if "".join(words) == "".join(others):
        return 0
    few, many = sorted([list(words), list(others)], key=len)
    exchanged = 0
    for word in few:
        # one slip leaves the first letter or the last in place
        alike = (other for other in many if other[0] == word[0] or other[-1] == word[-1])
        near = next((other for other in alike if is_typo(word, other)), None)
        if near is None:
            exchanged += 1
            if exchanged > most:
                break
        else:
            many.remove(near)
    return exchanged


def is_typo(word: str, other: str) -> bool:
    """Whether one slip lies between, and the word is long enough to be known again.

    From 3 letters on, and for a wrong letter from 5: shorter words so near are mostly different words.
    """
    least = 5 if len(word) == len(other) and Counter(word) != Counter(other) else 3
    return min(len(word), len(other)) >= least and one_slip(word, other)


def one_slip(one: str, other: str) -> bool:
    """Whether two texts are equal, or one letter is too many, too few or wrong, or two neighbours are swapped."""
    if not -1 <= len(one) - len(other) <= 1:
        return False
    short, long = sorted([one, other], key=len)
    start = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    if len(short) < len(long):
        return short[start:] == long[start + 1 :]
    swapped = short[start : start + 2] == long[start : start + 2][::-1] and short[start + 2 :] == long[start + 2 :]
    return swapped or short[start + 1 :] == long[start + 1 :]


def without_lead_in(text: str) -> str | None:
    """The normalised text after a few words and a colon; None if there are none, or little comes after."""
    lead_in = LEAD_IN.match(text)
    rest = normalized(text[lead_in.end() :]) if lead_in else ""
    return rest if len(rest) >= 4 else None


# ---- matchers: built from the held-out texts, called with chunks of training texts, maybe in another process ----


class _EqualTexts:
    def __init__(self, held_out: Sequence[str]):
        self.held_out: dict[str, list[int]] = {}
        for index, text in enumerate(held_out):
            if key := normalized(text):
                self.held_out.setdefault(key, []).append(index)

    def __call__(self, texts: Sequence[str]) -> Matches:
        same = (self.held_out.get(normalized(text), ()) for text in texts)
        return _matches((row, h, 1.0) for row, found in enumerate(same) for h in found)


class _NearFingerprints:
    def __init__(self, held_out: Sequence[str], max_distance: int):
        import numpy as np

        from tdro_cli.retrieve.fingerprints import HammingIndex, SimHasher

        self.hasher, size = SimHasher(), 8192
        parts = [self.hasher(held_out[low : low + size]) for low in range(0, len(held_out), size)]
        self.index = HammingIndex(np.concatenate([np.empty(0, np.uint64), *parts]), max_distance)

    def __call__(self, texts: Sequence[str]) -> Matches:
        row, near, distance = self.index.pairs(self.hasher(texts))
        return row, near, 1 - distance / 64


class _SameQuestions:
    def __init__(self, held_out: Sequence[str], threshold: float, num_permutations: int):
        from tdro_cli.retrieve.fingerprints import MinHasher, MinHashIndex, rows_per_band

        self.held_out, self.threshold = held_out, threshold
        self.normalized = [normalized(text) for text in held_out]
        self.words = Counter(
            word for text in self.normalized for word in set(WORD.findall(text)) if len(word) <= SHORT_WORD + 1
        )
        self.latest: tuple[int, set[str]] = (-1, set())
        self.hasher = MinHasher(num_permutations)
        signatures = self._signatures(self.normalized)
        self.index = MinHashIndex(signatures, rows_per_band(threshold, num_permutations))
        # four standard deviations of the estimate; the copy of a short text behind a lead-in lies lower
        self.least_estimate = threshold - 4 * (threshold * (1 - threshold) / num_permutations) ** 0.5
        self.least_of_short = min(0.25, self.least_estimate)

    def _signatures(self, texts: Sequence[str]) -> np.ndarray:
        import numpy as np

        parts = [
            self.hasher([shingles(text) for text in texts[low : low + 4096]]) for low in range(0, len(texts), 4096)
        ]
        return np.concatenate(parts) if parts else self.hasher([])

    def __call__(self, texts: Sequence[str]) -> Matches:
        keys = [normalized(text) for text in texts]
        own = [shingles(key) for key in keys]
        least = [self.least_of_short if len(of_text) < SHORT else self.least_estimate for of_text in own]
        row, near = self.index.candidates(self.hasher(own), least)
        by_held_out = sorted(zip(near.tolist(), row.tolist(), strict=True))  # so that each is cut into shingles once
        found = [(i, h, self._similarity(texts[i], keys[i], own[i], h)) for h, i in by_held_out]
        return _matches(sorted(match for match in found if match[2] is not None))

    def _shingles(self, h: int) -> set[str]:
        if self.latest[0] != h:
            self.latest = (h, shingles(self.normalized[h]))
        return self.latest[1]

    def _similarity(self, text: str, key: str, own: set[str], h: int) -> float | None:
        """The Jaccard similarity to held-out text `h`, or None if that is another question."""
        other = self.normalized[h]
        if key == other:
            return 1.0 if key else None
        similarity = jaccard(own, self._shingles(h))
        if (similarity >= self.threshold or (len(own) < SHORT and one_slip(key, other))) and only_slips(
            key, other, self.words
        ):
            return similarity
        rest, other_rest = without_lead_in(text), without_lead_in(self.held_out[h])
        if other == rest or key == other_rest:
            return similarity
        # what is left out behind a lead-in would look as if it were exchanged for the lead-in
        if (
            rest
            and jaccard(shingles(rest), self._shingles(h)) >= self.threshold
            and only_slips(rest, other, self.words)
        ):
            return similarity
        return None


def _matches(found: Iterable[tuple[int, int, float]]) -> Matches:
    import numpy as np

    columns = list(zip(*found, strict=True)) or [(), (), ()]
    return np.array(columns[0], np.int64), np.array(columns[1], np.int64), np.array(columns[2], float)
