"""What `minhash` finds of real test questions that were changed, by kind of change and by language.

`pytest -s -m slow tests/builtin/test_changed_questions.py` prints the table of docs/dedup.md.
"""

import gzip
import json
import os
import random
import unicodedata
from collections import defaultdict
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from tdro_cli.builtin.deduplicators import MinHash
from tdro_cli.protocols import Text

REAL = Path(os.environ.get("TDRO_REAL_DATA", Path(__file__).parents[3] / "shared/data"))
pytestmark = pytest.mark.skipif(
    not (REAL / "test").is_dir(), reason="needs the real data: ../shared/data or TDRO_REAL_DATA"
)
WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)} | {0x20: 0x3000}
WITHOUT_SPACES = ("zh", "th")  # a word is no more than a few characters there


def without_punctuation(text, source):
    return "".join(" " if unicodedata.category(c)[0] == "P" else c for c in text)


def spaces(text, source):
    return source.choice([f"  {text} ", text.replace(" ", "  "), text.replace(" ", "\u00a0"), text + "\n"])


def letters_of(text):
    """Places of letters inside words; a changed digit would make another question."""
    return [i for i, c in enumerate(text) if c.isalpha()]


def typo(kind):
    def changed(text, source):
        place = source.choice(letters_of(text))
        letter = source.choice([c for c in text if c.isalpha()])
        if kind == "insert":
            return text[:place] + letter + text[place:]
        if kind == "delete":
            return text[:place] + text[place + 1 :]
        if kind == "substitute":
            return text[:place] + letter + text[place + 1 :]
        return text[:place] + text[place + 1 : place + 2] + text[place] + text[place + 2 :]

    return changed


def dropped_word(text, source):
    """Without one of its words, but for numbers; without two characters where words are not told apart."""
    words = text.split(" ")
    if len(words) < 4 or any("\u0e00" <= c <= "\u0e7f" or c >= "\u3000" for c in text):
        places = [i for i in range(len(text) - 1) if text[i : i + 2].isalpha()]
        place = source.choice(places or [0])
        return text[:place] + text[place + 2 :]
    droppable = [i for i, word in enumerate(words) if not any(map(str.isdigit, word))]
    gone = source.choice(droppable)
    return " ".join(words[:gone] + words[gone + 1 :])


def prefix(text, source):
    return source.choice(["Q: ", "Question: ", "please tell me: ", "问题：", "Frage: "]) + text


CHANGES = {
    "case": lambda text, source: source.choice([text.upper(), text.lower(), text.title()]),
    "no punctuation": without_punctuation,
    "end": lambda text, source: text.rstrip(" ?？؟") + source.choice(["?", "？", " ?", "!", ".", ""]),
    "quotes": lambda text, source: source.choice([f'"{text}"', f"«{text}»", f"({text})", f"- {text}"]),
    "spaces": spaces,
    "full width": lambda text, source: text.translate(WIDE),
    "NFD": lambda text, source: unicodedata.normalize("NFD", text),
    "zero width": lambda text, source: text.replace(" ", "\u200b ", 1) + "\ufeff",
    "letter inserted": typo("insert"),
    "letter deleted": typo("delete"),
    "letter wrong": typo("substitute"),
    "letters swapped": typo("swap"),
    "word dropped": dropped_word,
    "prefix": prefix,
}


@cache
def real_questions():
    """(language, id, text) of all test queries."""
    found = []
    for folder in sorted((REAL / "test").iterdir()):
        with gzip.open(folder / "queries.jsonl.gz", "rt", encoding="utf-8") as file:
            for line in map(json.loads, file):
                language = line["_id"][:2] if folder.name == "xquad_multi" else "en"
                found.append((language, f"{folder.name}/{line['_id']}", line["text"]))
    return found


def recall(changes, questions, held_out, per_question=1, seed=1):
    """{(name, language): [found, all]} and the pairs missed, and the number of false pairs."""
    train, truth = [], {}
    for name, change in changes.items():
        for language, identifier, text in questions:
            for copy in range(per_question):
                source = random.Random(f"{seed} {name} {identifier} {copy}")
                key = f"{len(train)}"
                train.append(Text(key, change(text, source)))
                truth[key] = (name, language, identifier, text)
    alike = defaultdict(set)
    for pair in MinHash(processes=1).duplicates(train, [Text(i, text) for _, i, text in held_out]):
        alike[pair.train_id].add(pair.held_out_id)
    counts, missed, wrong = defaultdict(lambda: [0, 0]), [], []
    texts = {i: text for _, i, text in held_out}
    for one in train:
        name, language, identifier, text = truth[one.id]
        hit = identifier in alike[one.id]
        counts[name, language][0] += hit
        counts[name, language][1] += 1
        if not hit:
            missed.append((name, language, text, one.text))
        wrong += [(one.text, texts[i]) for i in alike[one.id] - {identifier} if texts[i] != text]
    return counts, missed, wrong


def by_kind(counts, place=0):
    """{kind (or, with place 1, language): share found}."""
    sums = defaultdict(lambda: [0, 0])
    for key, (hit, number) in counts.items():
        sums[key[place]][0] += hit
        sums[key[place]][1] += number
    return {key: hit / number for key, (hit, number) in sums.items()}


def some_of_each_language(number):
    found = defaultdict(list)
    for question in random.Random(2).sample(real_questions(), len(real_questions())):
        found[question[0]].append(question)
    return [question for questions in found.values() for question in questions[:number]]


TYPOS = {"letter inserted", "letter deleted", "letter wrong", "letters swapped", "word dropped"}


def test_minhash_finds_changed_test_questions_of_every_language():
    counts, _, _ = recall(CHANGES, some_of_each_language(12), real_questions())
    shares = by_kind(counts)
    assert {kind: share for kind, share in shares.items() if share < 1 and kind not in TYPOS} == {}
    assert min(shares[kind] for kind in TYPOS - {"letter wrong"}) >= 0.97
    assert shares["letter wrong"] >= 0.93  # some make another word of a short one: "as" for "is"
    assert min(by_kind(counts, 1).values()) >= 0.96


def both(one, other):
    return lambda text, source: other(one(text, source), source)


def test_minhash_finds_questions_changed_twice():
    pairs = {
        f"{one} + {other}": both(CHANGES[one], CHANGES[other])
        for one in ("prefix", "letters swapped", "word dropped", "full width")
        for other in ("case", "no punctuation", "NFD", "letter deleted", "end")
    }
    counts, _, _ = recall(pairs, some_of_each_language(4), real_questions())
    assert sum(hit for hit, _ in counts.values()) >= 0.95 * sum(number for _, number in counts.values())


@pytest.mark.slow
def test_table_of_all_questions_and_pairs_of_changes():
    counts, missed, wrong = recall(CHANGES, real_questions(), real_questions())
    pairs = {f"{a} + {b}": both(CHANGES[a], CHANGES[b]) for a, b in combinations(CHANGES, 2)}
    twice, missed_twice, wrong_twice = recall(pairs, some_of_each_language(40), real_questions())
    for title, shares in (("kind", by_kind(counts)), ("language", by_kind(counts, 1)), ("two", by_kind(twice))):
        print(f"\n{title}")
        for key, share in sorted(shares.items(), key=lambda item: item[1]):
            print(f"  {key:35} {share:.4f}")
    print(f"missed {len(missed)} and {len(missed_twice)}; joined with another question {len({*wrong, *wrong_twice})}")
    assert sum(hit for hit, _ in counts.values()) >= 0.99 * sum(number for _, number in counts.values())
    assert sum(hit for hit, _ in twice.values()) >= 0.95 * sum(number for _, number in twice.values())


LOOK_ALIKES = [
    ("What is the capital of Iran?", "What is the capital of Iraq?"),
    ("Who was king of Spain in 1890?", "Who was queen of Spain in 1890?"),
    ("Who was king of Spain in 1890?", "Who was king of Spain in 1891?"),
    ("What are signs of hepatitis A in children who travel?", "What are signs of hepatitis B in children who travel?"),
    ("vitamin B12 deficiency symptoms", "vitamin B6 deficiency symptoms"),
    ("What are the treatments for Cohen syndrome?", "What are the treatments for Cowden syndrome?"),
    ("谁是法国总统？", "谁是德国总统？"),
    ("ใครคือกษัตริย์ของสเปน", "ใครคือราชินีของสเปน"),
    ("Кто был королём Испании?", "Кто был королевой Испании?"),
    ("is aspirin safe", "is insulin safe"),
    ("How do I turn the light on in my car?", "How do I turn the light off in my car?"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), LOOK_ALIKES)
def test_minhash_keeps_look_alikes_apart(one, other):
    held_out = [Text(identifier, text) for _, identifier, text in real_questions()]
    for train, asked in ((one, other), (other, one)):
        pairs = MinHash(processes=1).duplicates([Text("t", train)], [*held_out, Text("h", asked)])
        assert [pair.held_out_id for pair in pairs] == []


def test_minhash_joins_few_of_the_real_questions_with_one_another():
    """The only pairs differ by one word more: "an algorithm", "another algorithm"."""
    questions = [Text(identifier, text) for _, identifier, text in real_questions()]
    text_of = {question.id: question.text for question in questions}
    joined = [
        pair for pair in MinHash(processes=1).duplicates(questions, questions) if pair.train_id < pair.held_out_id
    ]
    assert len([pair for pair in joined if text_of[pair.train_id] != text_of[pair.held_out_id]]) <= 12
