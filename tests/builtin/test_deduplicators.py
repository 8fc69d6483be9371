import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simhash import Simhash, SimhashIndex

from tdro_cli.builtin.deduplicators import Exact, MinHash, SimHash, is_typo, normalized, only_slips, shingles
from tdro_cli.protocols import Deduplicator, DuplicatePair, Text
from tdro_cli.registry import resolve
from tdro_cli.retrieve.fingerprints import (
    CHINESE,
    HammingIndex,
    MinHasher,
    ShingleTable,
    SimHasher,
    md5_tails,
    plain_fingerprint,
    rows_per_band,
)

QUESTION = "Which enzyme breaks down lactose in the small intestine?"
HELD_OUT = [
    QUESTION,
    "哪种酶分解乳糖并且在小肠里起作用？",
    "小腸で乳糖を分解する酵素は何ですか？",
    "소장에서 젖당을 분해하는 효소는 무엇입니까?",
    "छोटी आँत में लैक्टोज़ को कौन सा एंजाइम तोड़ता है?",
    "เอนไซม์ใดย่อยแล็กโทสในลำไส้เล็ก",
    "ما هو الإنزيم الذي يكسر اللاكتوز في الأمعاء الدقيقة؟",
    "Ποιο ένζυμο διασπά τη λακτόζη στο λεπτό έντερο;",
    "Какой фермент расщепляет лактозу в тонкой кишке?",
    "İnce bağırsakta laktozu hangi enzim parçalar?",
    "",
    "?!…",
]
ALL = [Exact(processes=1), SimHash(processes=1), MinHash(processes=1)]


def as_released(text):
    """The preparation of the paper's release."""
    import jieba

    jieba.setLogLevel(60)
    text = text.replace("_", "")
    return " ".join(jieba.lcut(text)) if CHINESE.search(text) else text


def texts(contents):
    return [Text(str(number), content) for number, content in enumerate(contents)]


def found(deduplicator, train, held_out):
    return {(p.train_id, p.held_out_id) for p in deduplicator.duplicates(texts(train), texts(held_out))}


def package_pairs(train, held_out, max_distance=2):
    """What the release finds: `simhash` objects, its index, its preparation."""
    index = SimhashIndex(
        [(str(h), Simhash(as_released(text))) for h, text in enumerate(held_out) if text.replace("_", "")],
        k=max_distance,
    )
    return {(str(i), h) for i, text in enumerate(train) for h in index.get_near_dups(Simhash(as_released(text)))}


# ---- simhash: the package's decisions ----

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
few_letters = st.text(alphabet="abcAB ıİßΣσς_é中文Ωไทย कि\u0301\u200f1٣²Ⅷ\n\0", max_size=30)


@settings(max_examples=300, deadline=None)
@given(st.lists(any_text | few_letters, min_size=1, max_size=20))
@example(["ΑΣ_Α 中", "ΑΣ中ΑΣ", "_", "", "İİİ"])
def test_fingerprints_equal_those_of_the_package(contents):
    assert SimHasher()(contents).tolist() == [Simhash(as_released(text)).value for text in contents]


@settings(max_examples=100, deadline=None)
@given(few_letters)
def test_the_plain_rule_is_the_one_of_the_package(text):
    assert plain_fingerprint(text) == Simhash(as_released(text)).value


def test_one_hasher_keeps_agreeing_over_thousands_of_texts():
    source, hasher = random.Random(0), SimHasher()
    alphabets = ["abcdefgh ", "абвгдежз ", "小腸乳糖分解酵素 ", "कखगघिी ", "αβγδΣς ", "aA_1 ", "ابتثج\u200f "]
    for _ in range(20):
        contents = ["".join(source.choices(source.choice(alphabets), k=source.randint(0, 80))) for _ in range(200)]
        assert hasher(contents).tolist() == [Simhash(as_released(text)).value for text in contents]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("ab1", max_size=12), min_size=1, max_size=15),
    st.lists(st.text("ab1 _", max_size=12), min_size=1, max_size=15),
    st.integers(0, 6),
)
def test_decisions_equal_those_of_the_package(train, held_out, max_distance):
    assert found(SimHash(max_distance, processes=1), train, held_out) == package_pairs(train, held_out, max_distance)


def test_decisions_equal_those_of_the_package_on_changed_questions():
    source = random.Random(1)
    train = []
    for question in HELD_OUT:
        train += [question, question.upper(), question + "_", f" {question} ?", unicodedata.normalize("NFD", question)]
        for _ in range(20):
            cut = source.randrange(len(question) + 1)
            train.append(question[:cut] + source.choice(["x", "", " ", "中", "é"]) + question[cut + 1 :])
    assert found(SimHash(processes=1), train, HELD_OUT) == package_pairs(train, HELD_OUT)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ΑΣσΒ中文京aBİ1 ._-\u0301\n", max_size=20))
def test_segmentation_by_jieba_changes_at_most_sigmas(text):
    assert Simhash(as_released(text)).value == SimHasher()([text])[0]
    if "Σ" not in text:
        assert Simhash(as_released(text)).value == Simhash(text.replace("_", "")).value


def test_segmentation_by_jieba_changes_a_capital_sigma_that_ends_a_word():
    assert Simhash(as_released("中文ΑΣ")).value != Simhash("中文ΑΣ").value


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=16), min_size=1, max_size=50))
def test_md5_of_many_short_messages_equals_hashlib(messages):
    import hashlib

    words = np.frombuffer(b"".join(message.ljust(16, b"\0") for message in messages), np.uint64).reshape(-1, 2).T
    tails = md5_tails(words, np.array([len(message) for message in messages], np.uint64))
    assert tails.tobytes() == b"".join(hashlib.md5(message).digest()[8:] for message in messages)


def test_a_text_of_one_megabyte_is_hashed_by_the_same_rule():
    source = random.Random(2)
    varied = "".join(source.choices("abcdefghijklmnop ", k=1 << 20))
    # the package fails on windows that occur more than 255 times under NumPy 2: here each of "a" and few of `varied`
    assert SimHasher()(["a" * (1 << 20)])[0] == Simhash("aaaa").value
    assert SimHasher()([varied])[0] == Simhash(varied).value


def test_more_characters_than_a_table_can_name():
    letters = [chr(code) for code in range(0x110000) if chr(code).isalnum()]
    assert len(letters) > 0xFFFE
    halves = ["".join(letters[:60_000]), "".join(letters[60_000:70_000])]
    hasher = SimHasher()
    assert hasher([*halves, "abc"]).tolist() == [Simhash(text).value for text in [*halves, "abc"]]
    assert hasher(["".join(letters)])[0] == Simhash("".join(letters)).value


def test_every_letter_is_lower_cased_and_kept_as_python_does():
    codes = [code for code in range(0x110000) if chr(code).isalnum() or chr(code) != chr(code).lower()]
    contents = [chr(code) for code in codes[:: len(codes) // 8000]] + [chr(code) for code in codes if code < 0x2000]
    assert SimHasher()(contents).tolist() == [plain_fingerprint(text) for text in contents]


def test_bits_are_counted_exactly_whatever_the_lengths_of_the_texts():
    source = random.Random(3)
    contents = ["".join(source.choices("ab", k=length)) for length in [*range(70), 255, 256, 257, 258, 259, 1023, 5000]]
    source.shuffle(contents)
    assert SimHasher()(contents).tolist() == [plain_fingerprint(text) for text in contents]


def test_a_full_shingle_table_forgets_and_goes_on(monkeypatch):
    from tdro_cli.retrieve import fingerprints

    monkeypatch.setattr(fingerprints, "MIN_BITS", 4)
    monkeypatch.setattr(fingerprints, "MAX_BITS", 6)
    table = ShingleTable()
    for low in range(0, 500, 25):
        keys = np.arange(low, low + 60, dtype=np.uint64)
        parts = [keys[:20], keys[20:20], keys[10:]]  # some are new in two parts
        found = table.hashes(parts, lambda new: new * np.uint64(7))
        assert [part.tolist() for part in found] == [(part * np.uint64(7)).tolist() for part in parts]
        assert table.used <= 32


@pytest.mark.parametrize("max_distance", [0, 1, 2, 3, 7, 15])
def test_banded_search_finds_what_brute_force_finds(max_distance):
    generator = np.random.default_rng(max_distance)
    held_out = generator.integers(0, 1 << 63, 300).astype(np.uint64)
    queries = held_out[generator.integers(0, 300, 400)].copy()
    for row in range(400):
        for bit in generator.integers(0, 64, row % 20):
            queries[row] ^= np.uint64(1) << np.uint64(bit)
    distance = np.bitwise_count(queries[:, None] ^ held_out[None, :])
    expected = [(i, h, int(distance[i, h])) for i, h in zip(*np.nonzero(distance <= max_distance), strict=True)]
    row, near, far = HammingIndex(held_out, max_distance).pairs(queries)
    assert list(zip(row.tolist(), near.tolist(), far.tolist(), strict=True)) == expected


def test_search_is_the_same_in_small_blocks(monkeypatch):
    from tdro_cli.retrieve import fingerprints

    held_out = np.repeat(np.arange(5, dtype=np.uint64), 40)
    index = HammingIndex(held_out, 2)
    whole = index.pairs(held_out)
    monkeypatch.setattr(fingerprints, "MAX_CANDIDATES", 7)
    assert all((a == b).all() for a, b in zip(whole, index.pairs(held_out), strict=True))


def test_simhash_similarity_counts_equal_bits():
    assert list(SimHash(processes=1).duplicates([Text("t", "One, two!")], [Text("h", "one two")])) == [
        DuplicatePair("t", "h", 1.0)
    ]


def test_simhash_weak_spots_are_as_documented():
    assert found(SimHash(processes=1), ["...", "🙂", ""], ["?!"]) == {("0", "0"), ("1", "0"), ("2", "0")}
    assert found(SimHash(processes=1), ["कि"], ["की"]) == {("0", "0")}  # vowel signs are combining marks
    spots = SimHash().weak_spots(["?!", "छोटी आँत में", "plain"])
    assert (
        len(spots) == 2 and spots[0].startswith("texts without a letter or digit: 1") and "combining marks" in spots[1]
    )
    assert SimHash().weak_spots(["plain", "中文"]) == []


# ---- odd texts, for every deduplicator ----

MEGABYTE = "".join(random.Random(4).choices("abcdefghij klmnop qrstuv wxyz ", k=1 << 20))
NAMES = ["exact", "simhash", "minhash"]


@pytest.mark.parametrize("deduplicator", ALL, ids=NAMES)
@pytest.mark.parametrize(
    "text",
    [
        "a",
        "文",
        "ก",
        "٣",
        "שלום עולם, מה שלומך היום?",
        "\u202bمرحبا بالعالم\u202c",
        "𝒜 mathematical 𝔸lphabet 🙂🙂",
        "e\u0301" * 40,
        MEGABYTE,
    ],
    ids=[
        "one letter",
        "one ideograph",
        "one Thai",
        "one digit",
        "Hebrew",
        "embedded Arabic",
        "astral",
        "marks",
        "1 MB",
    ],
)
def test_a_copy_of_an_odd_text_is_found_and_no_other(deduplicator, text):
    others = ["b", "語", "ข", "٤", "ביי", "كتاب على الطاولة", "plain words", "o\u0308", MEGABYTE[::-1]]
    pairs = found(deduplicator, [*others, text], [text])
    assert pairs == {(str(len(others)), "0")}


@pytest.mark.parametrize("deduplicator", ALL, ids=NAMES)
def test_an_empty_held_out_text_is_found_by_nothing_that_has_a_letter(deduplicator):
    assert found(deduplicator, ["a", "what?", "文"], ["", " ", "\n"]) == set()


@pytest.mark.parametrize("deduplicator", [Exact(processes=1), MinHash(processes=1)], ids=["exact", "minhash"])
def test_marks_of_writing_direction_change_nothing(deduplicator):
    question = "ما هو الإنزيم الذي يكسر اللاكتوز في الأمعاء الدقيقة؟"
    marked = [f"\u202b{question}\u202c", "\u2067" + question.replace(" ", "\u200f ") + "\u2069", f"\ufeff{question}"]
    assert found(deduplicator, marked, [question]) == {("0", "0"), ("1", "0"), ("2", "0")}


def test_minhash_finds_changed_passages_and_no_others_of_the_template():
    def passage(disease, gene):
        return (
            f"{disease} is inherited in an autosomal recessive pattern. Mutations in the {gene} gene cause {disease}. "
            "Both copies of the gene in each cell have mutations. The parents of an affected person each carry one "
            "copy of the mutated gene, but they typically do not show signs and symptoms of the condition."
        )

    held_out = [passage("Cohen syndrome", "VPS13B"), passage("Wilson disease", "ATP7B")]
    train = [
        held_out[0].replace("typically ", "").replace("autosomal", "autosmal"),
        f"Answer: {held_out[1]}",
        passage("Batten disease", "CLN3"),
    ]
    assert found(MinHash(processes=1), train, held_out) == {("0", "0"), ("1", "1")}


# ---- exact ----


@pytest.mark.parametrize("question", [text for text in HELD_OUT if len(text) > 5])
def test_exact_sees_through_form_case_punctuation_and_spaces(question):
    changed = [
        unicodedata.normalize("NFD", question),
        question.upper(),
        question.lower(),
        f'"{question}"',
        question.rstrip("?؟？;"),
        question.replace(" ", "  ") + " ",
    ]
    assert found(Exact(processes=1), changed, [question]) == {(str(i), "0") for i in range(len(changed))}


def test_exact_folds_full_width_letters():
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in QUESTION)
    assert found(Exact(processes=1), [wide], [QUESTION]) == {("0", "0")}


def test_normalisation_by_hand():
    assert normalized("  Don’t  STOP — it's 5% of C# & C++! ") == "dont stop its 5% of c# & c++"
    assert normalized("什么 是，酶？ DNA的") == "什么是酶dna的"
    assert normalized("Ｆｕｌｌ\u200b width") == "full width"
    assert normalized("Iı İi") == "ii ii"
    assert normalized("की") != normalized("कि")
    assert normalized("?!") == "?!" and normalized(" \n") == ""


@given(st.text(max_size=60))
def test_normalising_twice_changes_nothing_more(text):
    assert normalized(normalized(text)) == normalized(text)


def test_exact_keeps_different_questions_apart():
    assert not found(Exact(processes=1), ["C++ or C", "कि", "10.5", "?!"], ["C# or C", "की", "105", "!?", ""])


# ---- minhash ----


@pytest.mark.parametrize(
    ("changed", "original"),
    [
        ("Which enzyme breaks down latcose in the small intestine?", QUESTION),  # letters swapped
        ("Which enzyme breaks down lactos in the small intestine?", QUESTION),  # a letter lost
        ("Which enzyme breaks down in the small intestine?", QUESTION),  # a word lost
        ("Please tell me: " + QUESTION, QUESTION),
        ("Q: " + QUESTION.upper(), QUESTION),
        ("Question: Which enzyme breaks down lactose in the intestine?", QUESTION),
        ("Question: What is salt?", "What is salt?"),  # a short question keeps little in common with its copy
        ("哪种酶分解乳糖并且小在肠里起作用？", HELD_OUT[1]),
        ("소장에서 젖당을 분해하는 효소는 무입엇니까?", HELD_OUT[3]),
        ("छोटी आँत में लैक्टोज़ को कौन एंजाइम तोड़ता है?", HELD_OUT[4]),
        ("ما هو الإنزيم الذي يكسر اللاكتوز في الأمعاء؟", HELD_OUT[6]),
    ],
)
def test_minhash_finds_the_same_question_changed(changed, original):
    assert found(MinHash(processes=1), [changed], [original]) == {("0", "0")}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What are the treatments for Cohen syndrome?", "What are the treatments for Cowden syndrome?"),
        ("How many people lived in Bergen in 1890?", "How many people lived in Bergen in 1891?"),
        ("What is diabetes?", "What is diabetes insipidus and how is it treated?"),
        ("Why did the ship leave the harbour early?", "When did the ship leave the harbour early?"),
        ("abc", "xyz"),
        ("", ""),
    ],
)
def test_minhash_keeps_other_questions_apart(one, other):
    assert not found(MinHash(processes=1), [one], [other])


def test_minhash_similarity_is_the_true_jaccard_similarity():
    # " abcdefghij " and " abcdefghijk " of 10 and 11 windows share 9
    (pair,) = MinHash(threshold=0.5, processes=1).duplicates([Text("t", "abcdefghij")], [Text("h", "abcdefghijk")])
    assert pair.similarity == pytest.approx(9 / 12)
    assert shingles("ab") == {" ab", "ab "} and shingles("中文") == {" 中文", "中文", "文 "}


def test_candidates_are_not_missed_at_the_threshold():
    """1,000 pairs of random sets at Jaccard 0.6: the index is made to miss one in a thousand at the most."""
    source = random.Random(3)
    hasher, rows = MinHasher(128), rows_per_band(0.6, 128)
    assert rows == 3 and 1 - (1 - 0.6**rows) ** (128 // rows) > 0.999
    from tdro_cli.retrieve.fingerprints import MinHashIndex

    def word():
        return "".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=3))

    pairs = []
    for _ in range(1000):
        common = {word() for _ in range(60)}
        pairs.append((common | {word() for _ in range(20)}, common | {word() for _ in range(20)}))
    one, other = (hasher([pair[side] for pair in pairs]) for side in range(2))
    row, near = MinHashIndex(other, rows).candidates(one, 0.25)
    assert (row == near).sum() >= 995


def test_signatures_estimate_the_jaccard_similarity():
    one = {f"{i:03}" for i in range(0, 300)}
    other = {f"{i:03}" for i in range(100, 400)}
    a, b = MinHasher(1024)([one, other])
    assert (a == b).mean() == pytest.approx(0.5, abs=0.06)


def test_slips_and_other_words():
    assert is_typo("lactose", "latcose") and is_typo("lactose", "lactse") and is_typo("lactose", "lactase")
    assert not is_typo("cat", "car") and not is_typo("type", "tape") and is_typo("from", "form")
    assert only_slips("a b c d", "a b d") and not only_slips("a b c d", "a b x d")
    assert only_slips("post operative care", "postoperative care")
    assert not only_slips("grade 1 burns", "grade 2 burns") and only_slips("a 65 year old", "a year old")


# ---- all of them ----


@pytest.mark.parametrize("deduplicator", ALL, ids=lambda d: type(d).__name__)
def test_pairs_come_in_order_and_name_the_given_ids(deduplicator):
    train = [Text("b", QUESTION), Text("a", "no such question at all"), Text("b", QUESTION.lower())]
    held_out = [Text("z", QUESTION), Text("y", "another thing"), Text("x", QUESTION)]
    pairs = list(deduplicator.duplicates(iter(train), iter(held_out)))
    assert [pair[:2] for pair in pairs] == [("b", "z"), ("b", "x"), ("b", "z"), ("b", "x")]
    assert all(pair.similarity == 1.0 for pair in pairs)


@pytest.mark.parametrize("deduplicator", ALL, ids=lambda d: type(d).__name__)
def test_odd_texts_are_taken(deduplicator):
    odd = ["", " ", "a", "中", "\u200f", "\0", "?", "שלום עולם", "a" * (1 << 20), "\U0001f600", "é", "\ud800", "\n\n"]
    pairs = found(deduplicator, odd, odd)
    letters = [str(i) for i, text in enumerate(odd) if any(map(str.isalnum, text))]
    assert {(i, i) for i in letters} <= pairs
    assert ("0", "0") not in pairs  # an empty held-out text repeats nothing
    assert found(deduplicator, [], odd) == found(deduplicator, odd, []) == set()


@pytest.mark.parametrize("deduplicator", ALL, ids=lambda d: type(d).__name__)
def test_a_deduplicator_is_a_plugin(deduplicator):
    assert isinstance(deduplicator, Deduplicator)
    assert resolve("deduplicators", type(deduplicator).__name__.lower(), {"processes": 1}) == deduplicator


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SimHash(max_distance=16), "max_distance"),
        (lambda: MinHash(threshold=1.5), "threshold"),
        (lambda: MinHash(num_permutations=1), "num_permutations"),
        (lambda: Exact(processes=0), "processes"),
    ],
)
def test_a_wrong_option_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_importing_the_plugins_is_light():
    code = "import sys, tdro_cli.builtin.deduplicators; print({'numpy', 'jieba', 'scipy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
