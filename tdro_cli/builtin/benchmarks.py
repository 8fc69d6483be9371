"""Test collections from local files, in the layouts in which they are published."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from tdro_cli.errors import Problems, TdroError, did_you_mean
from tdro_cli.protocols import Source, TestCollection, Text

LISTED = 20  # bad lines of one file that are reported together

Qrels = dict[str, dict[str, int]]

_WHITE = re.compile(r"[ \t\r\n]")


@dataclass(frozen=True)
class Folder:
    """A folder in BEIR layout, or a folder of such folders, each a subset.

    A collection is `corpus.jsonl`, `queries.jsonl` (both plain or .gz) and `qrels/SPLIT.tsv`.
    """

    path: str
    """the folder"""
    split: str = "test"
    """which judgements: qrels/SPLIT.tsv"""
    name: str | None = None
    """names the benchmark in tables; the folder's own name by default"""
    drop_same_id: bool = False
    """leave out a document whose id is the query's, as BEIR does for arguana and quora"""
    prompt: str | None = None
    """instruction for the queries; null: the evaluated model's own"""
    measures = ("nDCG@10", "R@100")

    @property
    def _name(self) -> str:
        return self.name or Path(self.path).resolve().name

    def _folders(self) -> dict[str, Path]:
        root = Path(self.path)
        if _find(root, "corpus.jsonl") or not root.is_dir():
            return {self._name: root}
        children = {child.name: child for child in sorted(root.iterdir()) if _find(child, "corpus.jsonl")}
        return children or {self._name: root}

    def subsets(self) -> list[str]:
        return list(self._folders())

    def missing_files(self) -> list[TdroError]:
        """One problem for each file that is not there."""
        return [problem for folder in self._folders().values() for problem in _missing_of_folder(folder, self.split)]

    def sources(self) -> list[Source]:
        """None: a folder of one's own is published nowhere."""
        return []

    def load(self, subset: str) -> TestCollection:
        """Reads queries and judgements; the corpus is read when it is iterated."""
        return _load_folder(
            _subset(self._folders(), subset, self._name),
            self.split,
            name=f"{self.name}/{subset}" if self.name and self.name != subset else subset,
            benchmark=self._name,
            prompt=self.prompt,
            drop_same_id=self.drop_same_id,
        )


BEIR_PLACE = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets"
BEIR_MD5 = {  # of the published archives, by their README
    "arguana": "8ad3e3c2a5867cdced806d6503f29b99",
    "climate-fever": "8b66f0a9126c521bae2bde127b4dc99d",
    "cqadupstack": "4e41456d7df8ee7760a7f866133bda78",
    "dbpedia-entity": "c2a39eb420a3164af735795df012ac2c",
    "fever": "5a818580227bfb4b35bb6fa46d9b6c03",
    "fiqa": "17918ed23cd04fb15047f73e6c3bd9d9",
    "hotpotqa": "f412724f78b0d91183a0e86805e16114",
    "msmarco": "444067daf65d982533ea17ebd59501e4",
    "nfcorpus": "a89dba18a62ef92f7d323ec890a0d38d",
    "nq": "d4d3d2e48787a744b6f6e691ff534307",
    "quora": "18fb154900ba42a600f84b839c173167",
    "scidocs": "38121350fc3a4d2f48850f6aff52e4a9",
    "scifact": "5f7d1de60b170fc8027bb7898e2efca1",
    "trec-covid": "ce62140cb23feb9becf6270d0d1fe6d1",
    "webis-touche2020": "46f650ba5a527fc69e0a6521c5a23563",
}
BEIR_SETS = tuple(BEIR_MD5)
CQADUPSTACK = (
    "android",
    "english",
    "gaming",
    "gis",
    "mathematica",
    "physics",
    "programmers",
    "stats",
    "tex",
    "unix",
    "webmasters",
    "wordpress",
)
SAME_ID_DROPPED = ("arguana", "quora")  # their queries are documents of the corpus


@dataclass(frozen=True)
class BEIR:
    """The 15 public BEIR sets, one folder each under `path` (arXiv:2104.08663).

    MS MARCO is scored on `dev`, which has labels. CQADupStack is 12 forums, `cqadupstack/FORUM`, which count as one set
    in an average.
    """

    path: str
    sets: tuple[str, ...] | None = None
    """names out of the 15; null: all"""
    prompt: str | None = None
    """instruction for the queries; null: the evaluated model's own"""
    measures = ("nDCG@10", "R@100")

    def __post_init__(self):
        _check_choice(self.sets, BEIR_SETS, "BEIR set")

    def _folders(self) -> dict[str, Path]:
        folders: dict[str, Path] = {}
        for name in self.sets or BEIR_SETS:
            parts = [f"{name}/{forum}" for forum in CQADUPSTACK] if name == "cqadupstack" else [name]
            folders |= {part: Path(self.path) / part for part in parts}
        return folders

    def subsets(self) -> list[str]:
        return list(self._folders())

    def missing_files(self) -> list[TdroError]:
        """One problem for each file that is not there."""
        return [
            problem
            for subset, folder in self._folders().items()
            for problem in _missing_of_folder(folder, self._split(subset), self._how(subset))
        ]

    def load(self, subset: str) -> TestCollection:
        """Reads queries and judgements; the corpus is read when it is iterated."""
        return _load_folder(
            _subset(self._folders(), subset, "beir"),
            self._split(subset),
            name=f"beir/{subset}",
            benchmark="beir",
            prompt=self.prompt,
            drop_same_id=subset in SAME_ID_DROPPED,
            how=self._how(subset),
        )

    def _split(self, subset: str) -> str:
        return "dev" if subset == "msmarco" else "test"

    def sources(self) -> list[Source]:
        """The archives of the sets that miss a file."""
        short = {
            subset.split("/")[0]: None
            for subset, folder in self._folders().items()
            if _missing_of_folder(folder, self._split(subset))
        }
        return [_beir_archive(name, Path(self.path)) for name in short]

    def _how(self, subset: str) -> str:
        return f"download {_beir_archive(subset.split('/')[0], Path(self.path)).url} and unpack it in {self.path}"


def _beir_archive(name: str, to: Path) -> Source:
    return Source(f"{BEIR_PLACE}/{name}.zip", to, BEIR_MD5[name], unpack=True)


MIRACL_SHARDS = {  # files of each language's corpus, by its publisher's loading script
    **{"ar": 5, "bn": 1, "en": 66, "es": 21, "fa": 5, "fi": 4, "fr": 30, "hi": 2, "id": 3},
    **{"ja": 14, "ko": 3, "ru": 20, "sw": 1, "te": 2, "th": 2, "zh": 10, "de": 32, "yo": 1},
}
MIRACL_LANGUAGES = tuple(MIRACL_SHARDS)


@dataclass(frozen=True)
class MIRACL:
    """MIRACL in 18 languages (arXiv:2210.09984): `miracl-v1.0-LANG/` and `miracl-corpus-v1.0-LANG/`.

    Both may lie in `path`, or in `path/miracl` and `path/miracl-corpus` as their repositories are named.
    """

    path: str
    languages: tuple[str, ...] | None = None
    """codes out of the 18; null: all"""
    split: str = "dev"
    """which topics and judgements"""
    prompt: str | None = None
    """instruction for the queries; null: the evaluated model's own"""
    measures = ("nDCG@10", "R@100")

    def __post_init__(self):
        _check_choice(self.languages, MIRACL_LANGUAGES, "MIRACL language")

    def subsets(self) -> list[str]:
        return list(self.languages or MIRACL_LANGUAGES)

    def missing_files(self) -> list[TdroError]:
        """One problem for each file that is not there."""
        return [problem for language in self.subsets() for problem in self._missing(language)]

    def load(self, subset: str) -> TestCollection:
        """Reads topics and judgements; the corpus shards are read when they are iterated."""
        _subset(dict.fromkeys(self.subsets()), subset, "miracl")
        if problems := self._missing(subset):
            raise Problems(problems)
        qrels_path = self._judged_file(subset, "qrels")
        qrels = _read_qrels(qrels_path)
        queries = _judged(_read_topics(self._judged_file(subset, "topics")), qrels, qrels_path)
        return TestCollection(
            name=f"miracl/{subset}",
            corpus=partial(_read_documents, self._shards(subset), id_key="docid"),
            queries=queries,
            qrels=qrels,
            prompt=self.prompt,
            provenance={"benchmark": "miracl", "path": self.path, "split": self.split, "language": subset},
        )

    def sources(self) -> list[Source]:
        """The files that are missing; they go into `path/REPOSITORY-v1.0-LANGUAGE` or wherever that is already."""
        return [
            Source(
                f"https://huggingface.co/datasets/miracl/{repository}/resolve/main/{folder.name}/{name}", folder / name
            )
            for language in self.subsets()
            for repository, folder, name in self._missing_names(language)
        ]

    def _missing(self, language: str) -> list[TdroError]:
        return [
            _missing(folder / name, f"get it from https://huggingface.co/datasets/miracl/{repository}")
            for repository, folder, name in self._missing_names(language)
        ]

    def _missing_names(self, language: str) -> Iterator[tuple[str, Path, str]]:
        """(repository, folder, file in it) of what is not there."""
        folder = self._folder("miracl", language)
        for kind in ("topics", "qrels"):
            path = self._judged_file(language, kind)
            if not path.is_file():
                yield "miracl", folder, str(path.relative_to(folder))
        folder, there = self._folder("miracl-corpus", language), {path.name for path in self._shards(language)}
        for number in range(MIRACL_SHARDS[language]):
            name = f"docs-{number}.jsonl.gz"
            if not {name, name.removesuffix(".gz")} & there:
                yield "miracl-corpus", folder, name

    def _folder(self, repository: str, language: str) -> Path:
        name = f"{repository}-v1.0-{language}"
        nested = Path(self.path) / repository / name
        return nested if nested.is_dir() else Path(self.path) / name

    def _judged_file(self, language: str, kind: str) -> Path:
        return self._folder("miracl", language) / kind / f"{kind}.miracl-v1.0-{language}-{self.split}.tsv"

    def _shards(self, language: str) -> list[Path]:
        folder = self._folder("miracl-corpus", language)
        shards = [*folder.glob("docs-*.jsonl.gz"), *folder.glob("docs-*.jsonl")]
        return sorted(shards, key=lambda path: (int(re.sub(r"\D", "", path.name.split(".")[0]) or 0), path.name))


MKQA_LANGUAGES = (
    *("ar", "da", "de", "es", "fi", "fr", "he", "hu", "it", "ja", "km", "ko", "ms"),
    *("nl", "no", "pl", "pt", "ru", "sv", "th", "tr", "vi", "zh_cn", "zh_hk", "zh_tw"),
)
MKQA_URL = "https://github.com/apple/ml-mkqa/raw/651b8cc85c407270b024157aff06ee6ab8c4fc6d/dataset/mkqa.jsonl.gz"
NOT_FOUND_IN_TEXT = ("unanswerable", "binary", "long_answer")  # answer types that no passage can hold as a string


@dataclass(frozen=True)
class MKQA:
    """MKQA questions in 25 languages, to be answered from English Wikipedia (arXiv:2007.15207).

    A hit is a passage that holds an English answer. `path` has `mkqa.jsonl.gz` and the passages: `corpus.jsonl` of
    BEIR's nq (2.7 million, as in the paper; here or in `nq/`) or DPR's `psgs_w100.tsv` (21 million), each plain or .gz.
    """

    path: str
    languages: tuple[str, ...] | None = None
    """codes out of the 25 and `en`; null: the 25"""
    questions: Literal["answerable", "all"] = "answerable"
    """`answerable`: those whose answer is a string (6,619, as in the paper); `all`: the others count as never found"""
    prompt: str | None = None
    """instruction for the queries; null: the evaluated model's own"""
    measures = ("accuracy@10", "accuracy@100")

    def __post_init__(self):
        _check_choice(self.languages, (*MKQA_LANGUAGES, "en"), "MKQA language")

    def subsets(self) -> list[str]:
        return list(self.languages or MKQA_LANGUAGES)

    def missing_files(self) -> list[TdroError]:
        """One problem for each file that is not there."""
        problems = []
        root = Path(self.path)
        if not self._questions_file():
            problems.append(_missing(root / "mkqa.jsonl.gz", f"get it from {MKQA_URL}"))
        if not self._passages():
            how = f"unpack {_beir_archive('nq', root).url} in {root}, or put DPR's psgs_w100.tsv.gz there"
            problems.append(_missing(root / "nq" / "corpus.jsonl", how))
        return problems

    def sources(self) -> list[Source]:
        """The questions and BEIR's nq, as far as they are missing."""
        root = Path(self.path)
        questions = [] if self._questions_file() else [Source(MKQA_URL, root / "mkqa.jsonl.gz")]
        return questions + ([] if self._passages() else [_beir_archive("nq", root)])

    def load(self, subset: str) -> TestCollection:
        """Reads the questions and answers; the passages are read when they are iterated."""
        _subset(dict.fromkeys(self.subsets()), subset, "mkqa")
        if problems := self.missing_files():
            raise Problems(problems)
        queries, answers = _read_mkqa(self._questions_file(), subset, self.questions == "answerable")
        return TestCollection(
            name=f"mkqa/{subset}",
            corpus=self._passages(),
            queries=queries,
            qrels={},
            prompt=self.prompt,
            answers=answers,
            provenance={"benchmark": "mkqa", "path": self.path, "questions": self.questions, "language": subset},
        )

    def _questions_file(self) -> Path | None:
        return _find(Path(self.path), "mkqa.jsonl")

    def _passages(self) -> Callable[[], Iterator[Text]] | None:
        root = Path(self.path)
        for folder in (root, root / "nq"):
            if path := _find(folder, "corpus.jsonl"):
                return partial(_read_documents, [path])
        path = _find(root, "psgs_w100.tsv")
        return partial(_read_dpr_passages, path) if path else None


# ---- folders in BEIR layout ----


def _load_folder(
    folder: Path,
    split: str,
    *,
    name: str,
    benchmark: str,
    prompt: str | None,
    drop_same_id: bool,
    how: str | None = None,
) -> TestCollection:
    if problems := _missing_of_folder(folder, split, how):
        raise Problems(problems)
    qrels_path = _find(folder / "qrels", f"{split}.tsv")
    qrels = _read_qrels(qrels_path)
    return TestCollection(
        name=name,
        corpus=partial(_read_documents, [_find(folder, "corpus.jsonl")]),
        queries=_judged(_read_queries(_find(folder, "queries.jsonl")), qrels, qrels_path),
        qrels=qrels,
        prompt=prompt,
        provenance={"benchmark": benchmark, "path": str(folder), "split": split},
        drop_same_id=drop_same_id,
    )


def _missing_of_folder(folder: Path, split: str, how: str | None = None) -> list[TdroError]:
    wanted = [(folder, "corpus.jsonl"), (folder, "queries.jsonl"), (folder / "qrels", f"{split}.tsv")]
    how = how or "a collection is corpus.jsonl[.gz], queries.jsonl[.gz] and qrels/SPLIT.tsv in one folder"
    problems = []
    for parent, name in wanted:
        if not _find(parent, name):
            splits = sorted(p.name.removesuffix(".gz").removesuffix(".tsv") for p in parent.glob("*.tsv*"))
            hint = f"the splits here are {', '.join(splits)}" if splits else how
            problems.append(_missing(parent / name, hint))
    return problems


def _missing(path: Path, how: str) -> TdroError:
    return TdroError(f"there is no {path}", where=str(path), remedy=how)


def _find(folder: Path, name: str) -> Path | None:
    """The file of that name in `folder`, plain or gzipped."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _subset(folders: Mapping[str, Any], subset: str, benchmark: str) -> Any:
    if subset not in folders:
        raise TdroError(f"{benchmark} has no subset {subset!r}", remedy=did_you_mean(subset, folders))
    return folders[subset]


def _check_choice(given: Sequence[str] | None, valid: Sequence[str], what: str) -> None:
    for name in given or ():
        if name not in valid:
            raise ValueError(f"there is no {what} {name!r}; {did_you_mean(name, valid)}")


# ---- files ----


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of the lines that are not blank."""
    from tdro_cli.data.formats import read_lines

    for number, line in read_lines(path, what="benchmark file"):  # only \n ends a line: text holds other separators
        try:
            yield number, line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise _bad(path, number, f"not UTF-8 at byte {error.start}") from error


def _open(path: Path) -> IO[str]:
    # only \n ends a line: text holds other line separators
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    return open(path, encoding="utf-8", newline="\n")


def _bad(path: Path, line: int, reason: str) -> TdroError:
    return TdroError(f"bad line: {reason}", where=f"{path}:{line}", remedy="mend or fetch the file again")


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    from tdro_cli.data.formats import json_value

    try:
        value = json_value(line)
    except ValueError as error:
        raise _bad(path, number, str(error)) from error
    if not isinstance(value, dict):
        raise _bad(path, number, f"a JSON object is expected, not {type(value).__name__}")
    return value


def _text_of(path: Path, number: int, value: Mapping[str, Any], key: str, default: str | None = None) -> str:
    text = value.get(key, default)
    if key == "_id" and isinstance(text, int) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(text, str):
        raise _bad(path, number, f"no {key!r}" if text is None else f"{key!r} is not text")
    return text


def _read_documents(paths: Sequence[Path], id_key: str = "_id") -> Iterator[Text]:
    """Documents of JSON-lines files, title before text as in training. A document may be empty, its id not."""
    from tdro_cli.data.formats import Passage, passage_text

    for path in paths:
        for number, line in _lines(path):
            value = _object(path, number, line)
            docid = _text_of(path, number, value, id_key)
            if not docid or _WHITE.search(docid):
                raise _bad(path, number, f"the id {docid!r} is empty or has white space, which run files can't hold")
            title = _text_of(path, number, value, "title", "") if value.get("title") is not None else ""
            yield Text(docid, passage_text(Passage(docid, title, _text_of(path, number, value, "text"))))


def _read_dpr_passages(path: Path) -> Iterator[Text]:
    """DPR's passages: a TSV with quotes, `id text title`."""
    import csv

    from tdro_cli.data.formats import Passage, passage_text, reading

    csv.field_size_limit(1 << 24)
    with reading(path, "benchmark file"), _open(path) as file:
        reader = csv.reader(file, delimiter="\t")
        for row in _each_row(reader, path):
            if reader.line_num == 1 and row == ["id", "text", "title"]:
                continue
            if len(row) != 3:
                raise _bad(path, reader.line_num, f"3 columns are expected (id, text, title), not {len(row)}")
            docid, text, title = row
            yield Text(docid, passage_text(Passage(docid, title, text)))


def _each_row(reader: Any, path: Path) -> Iterator[list[str]]:
    import csv

    try:
        yield from reader
    except csv.Error as error:
        raise _bad(path, reader.line_num, str(error)) from error


def _each_line(path: Path, take: Callable[[int, str], None]) -> None:
    """Gives every line to `take`; the first 20 bad ones are reported together."""
    problems: list[TdroError] = []
    for number, line in _lines(path):
        try:
            take(number, line)
        except TdroError as error:
            problems.append(error)
            if len(problems) == LISTED:
                break
    if problems:
        raise problems[0] if len(problems) == 1 else Problems(problems)


def _read_queries(path: Path) -> dict[str, Text]:
    queries: dict[str, Text] = {}

    def take(number: int, line: str) -> None:
        value = _object(path, number, line)
        _add_query(queries, path, number, _text_of(path, number, value, "_id"), _text_of(path, number, value, "text"))

    _each_line(path, take)
    return queries


def _read_topics(path: Path) -> dict[str, Text]:
    """MIRACL's topics: `id<TAB>query`."""
    queries: dict[str, Text] = {}

    def take(number: int, line: str) -> None:
        query_id, tab, text = line.partition("\t")
        if not tab:
            raise _bad(path, number, "2 columns are expected (id, query)")
        _add_query(queries, path, number, query_id, text)

    _each_line(path, take)
    return queries


def _add_query(queries: dict[str, Text], path: Path, number: int, query_id: str, text: str) -> None:
    if not query_id or _WHITE.search(query_id):
        raise _bad(path, number, f"the id {query_id!r} is empty or has white space, which run files can't hold")
    if not text.strip():
        raise _bad(path, number, f"the query {query_id!r} is empty")
    if query_id in queries:
        raise _bad(path, number, f"the query id {query_id!r} is given twice")
    queries[query_id] = Text(query_id, text)


def _read_qrels(path: Path) -> Qrels:
    """BEIR's three columns under a header, or TREC's four. Of a pair that is judged twice the last line holds."""
    qrels: Qrels = {}

    def take(number: int, line: str) -> None:
        columns = line.split("\t")
        if len(columns) not in (3, 4):
            columns = line.split()
        if len(columns) == 4:  # query, iteration, document, score
            columns = [columns[0], *columns[2:]]
        if len(columns) != 3:
            raise _bad(path, number, f"3 columns are expected (query-id, corpus-id, score), not {len(columns)}")
        query_id, docid, score = (column.strip() for column in columns)
        if number == 1 and (query_id, score) == ("query-id", "score"):
            return
        if not re.fullmatch(r"[-+]?[0-9]{1,9}", score):
            raise _bad(path, number, f"the score {score[:40]!r} is not a whole number of at most 9 digits")
        qrels.setdefault(query_id, {})[docid] = int(score)

    _each_line(path, take)
    if not qrels:
        raise TdroError("no judgements", where=str(path), remedy="fetch the file again")
    return qrels


def _judged(queries: Mapping[str, Text], qrels: Qrels, path: Path) -> list[Text]:
    """The queries that have judgements, in their file's order."""
    unknown = [query_id for query_id in qrels if query_id not in queries]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise TdroError(
            f"judged queries that the query file lacks: {', '.join(map(repr, unknown[:3]))}{more}",
            where=str(path),
            remedy="queries and judgements must be of one release",
        )
    return [query for query_id, query in queries.items() if query_id in qrels]


def _read_mkqa(path: Path, language: str, answerable: bool) -> tuple[list[Text], dict[str, tuple[str, ...]]]:
    """Questions in `language` and their English answers (texts and aliases) by question id."""
    queries: dict[str, Text] = {}
    answers: dict[str, tuple[str, ...]] = {}

    def take(number: int, line: str) -> None:
        value = _object(path, number, line)
        try:
            query_id, text = str(value["example_id"]), value["queries"][language]
            accepted = [answer for answer in value["answers"]["en"] if answer["type"] not in NOT_FOUND_IN_TEXT]
            strings = [s for answer in accepted for s in (answer.get("text"), *(answer.get("aliases") or ())) if s]
        except (KeyError, TypeError, AttributeError) as error:
            raise _bad(path, number, f"not an MKQA example in {language!r}: {error}") from error
        if not all(isinstance(one, str) for one in (text, *strings)):
            raise _bad(path, number, f"not an MKQA example in {language!r}: a question or an answer is not text")
        if strings or not answerable:
            _add_query(queries, path, number, query_id, text)
            answers[query_id] = tuple(dict.fromkeys(strings))

    _each_line(path, take)
    return list(queries.values()), answers
