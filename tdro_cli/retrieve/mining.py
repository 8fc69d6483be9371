"""Hard negatives for every row of every task: which of a miner's passages to take, and an account of the choice."""

from __future__ import annotations

import hashlib
import heapq
import json
import mmap
import random
import tempfile
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload, runtime_checkable

from tdro_cli.artifacts import write_json
from tdro_cli.data.formats import Example, Passage, passage_text, write_examples
from tdro_cli.errors import RunFailed
from tdro_cli.protocols import NegativeMiner, Ranking, Text
from tdro_cli.registry import resolve

if TYPE_CHECKING:
    from tdro_cli.data.tasks import TaskStore
    from tdro_cli.recipe import Mine
    from tdro_cli.run.progress import Progress

READ_AT_ONCE = 1024  # rows
SHOWN_EXAMPLES, SHOWN_CHARACTERS = 10, 300
RANKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # last ranks of the histogram's bins


class Session(Protocol):
    """A miner at work. After the rankings of a task are read, `facts` says what there is to say about that task."""

    facts: Mapping[str, Any]

    def mine(
        self, queries: Sequence[Text], corpus: Iterable[Text], *, depth: int, prompt: str
    ) -> Iterator[Ranking]: ...


@runtime_checkable
class SessionMiner(Protocol):
    """Optional: a miner that holds something costly from task to task (a JVM, a model) or that uses the prompts.

    `cache`: a folder for what the next run may use again, shared by all runs; None: there is none.
    """

    def session(self, *, cache: Path | None) -> AbstractContextManager[Session]: ...


@contextmanager
def opened(miner: NegativeMiner, cache: Path | None) -> Iterator[Session]:
    """The miner's own session, or one around its `mine`."""
    if isinstance(miner, SessionMiner):
        with miner.session(cache=cache) as session:
            yield session
    else:
        yield _PlainSession(miner)


@dataclass
class _PlainSession:
    miner: NegativeMiner
    facts: Mapping[str, Any] = field(default_factory=dict)

    def mine(self, queries: Sequence[Text], corpus: Iterable[Text], *, depth: int, prompt: str) -> Iterator[Ranking]:
        return self.miner.mine(queries, corpus, depth=depth)


def mine_tasks(
    tasks: Sequence[TaskStore],
    section: Mine,
    *,
    prompts: Mapping[str, str],
    seed: int,
    folder: Path,
    progress: Progress,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Writes `folder`/tasks/NAME.jsonl.gz, every row of every task with its negatives, and `folder`/audit.json.

    Rows keep their order and all that they came with. A row's candidates are a task's own passages at the ranks of
    `section.rank_window`, without: known positives (of the row, and of any row that asks the same), the negatives that
    the row came with, whatever has the text of one of these or of the query, and what scores above
    `section.positive_margin` of the positive. The draw depends on (seed, task, query id) alone.

    Returns the audit. `prompts`: {task: prompt}, for miners that use it. `cache`: see `SessionMiner`.
    """
    miner = resolve("negative_miners", section.negative_miner.name, section.negative_miner.options)
    audit: dict[str, Any] = {
        "schema": 1,
        "miner": section.negative_miner.name,
        "settings": section.model_dump(mode="json"),
        "seed": seed,
        "tasks": {},
    }
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        session: Session | None = None
        for store in tasks:
            rows = _Rows(store, section)
            if rows.wanting and session is None:
                session = stack.enter_context(opened(miner, cache))
            target = folder / "tasks" / f"{store.name}.jsonl.gz"
            with _Passages(store.passages(), folder) if rows.wanting else nullcontext() as passages:
                work = _TaskMining(rows, passages, section, seed)
                with progress.start(f"mine {store.name}", len(rows.wanting), "queries") as bar:
                    write_examples(target, work.examples(session, prompts.get(store.name, ""), bar))
            audit["tasks"][store.name] = work.audit(session.facts if session and rows.wanting else {})
            if shortage := _shortage(store.name, audit["tasks"][store.name], section):
                progress.warn(shortage)
    write_json(folder / "audit.json", audit)
    return audit


def _shortage(name: str, audit: Mapping[str, Any], section: Mine) -> str | None:
    if not audit["rows_with_fewer"]:
        return None
    fewer, none, rows = audit["rows_with_fewer"], audit["rows_with_none"], audit["rows"]
    return f"task {name}: {fewer:,} of {rows:,} rows have fewer than {section.keep} negatives, {none:,} of them none"


# ---- choosing ----


@dataclass(frozen=True)
class Candidate:
    """A passage that a miner found: its rank from 1, known positives counted, and its score."""

    docid: str
    rank: int
    score: float


@dataclass
class Verdict:
    """What a ranking holds for one query: the candidates, and how many others were refused for what reason."""

    candidates: list[Candidate]
    positive_rank: int | None  # of the best known positive
    above_positive: int  # passages of the whole ranking that score above it
    dropped_by_margin: int = 0
    dropped_as_equal_text: int = 0


def score_limit(positive_score: float, margin: float) -> float:
    """The highest score that a candidate may have; for negative scores, too, a smaller margin is a lower limit.

    `margin` x the positive's score: TopK-PercPos of NV-Retriever (arXiv:2407.15831).
    """
    return positive_score + (margin - 1) * abs(positive_score)


def judge(
    ranking: Ranking,
    *,
    positives: set[str],
    refused: set[str],
    refused_texts: set[int],
    text_key: Mapping[str, int],
    window: tuple[int, int],
    margin: float | None,
) -> Verdict:
    """The candidates among a ranking, best first; each text once.

    `positives`, `refused`: docids. `text_key`: {docid: key of its text}; `refused_texts`: such keys. The margin is
    measured on the best known positive of the ranking. Where the ranking has none, the miner can't tell how good the
    candidates are, and they stay: it is the audit that says how often (`positives_found`).
    """
    ranked = [Candidate(*item) for item in zip(ranking.docids, _ranks(), ranking.scores, strict=False)]
    found = [candidate for candidate in ranked if candidate.docid in positives]
    best = max((candidate.score for candidate in found), default=None)
    limit = None if best is None or margin is None else score_limit(best, margin)
    verdict = Verdict([], min((candidate.rank for candidate in found), default=None), 0)
    texts = set(refused_texts)
    for candidate in ranked:
        if candidate.docid in positives or candidate.docid in refused:
            continue
        inside = window[0] <= candidate.rank <= window[1]
        if text_key[candidate.docid] in texts:
            verdict.dropped_as_equal_text += inside
            continue
        verdict.above_positive += best is not None and candidate.score > best
        if not inside:
            continue
        if limit is not None and candidate.score > limit:
            verdict.dropped_by_margin += 1
            continue
        texts.add(text_key[candidate.docid])
        verdict.candidates.append(candidate)
    return verdict


def _ranks() -> Iterator[int]:
    rank = 0
    while True:
        yield (rank := rank + 1)


def draw(candidates: Sequence[Candidate], count: int, sampling: str, generator: random.Random) -> list[Candidate]:
    """`count` of the candidates, fewer where there are fewer, best first: the first ones ("top") or any ("uniform")."""
    if sampling == "top" or len(candidates) <= count:
        return list(candidates[:count])
    return [candidates[i] for i in sorted(generator.sample(range(len(candidates)), count))]


def generator_of(seed: int, task: str, query_id: str) -> random.Random:
    """The random numbers of one query: the same wherever and whenever it is mined."""
    key = json.dumps([seed, task, query_id]).encode()
    return random.Random(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))


def text_key(text: str) -> int:
    """64 bits that are equal for texts that differ at most in case, white space and Unicode form."""
    data = normalised(text).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# ---- one task ----


class _Rows:
    """A task's rows: which want negatives, and what is known to answer the queries that are asked more than once."""

    def __init__(self, store: TaskStore, section: Mine):
        import numpy as np

        self.store, self.section = store, section
        key_of_row, wanting = np.empty(len(store), np.uint64), array("q")
        for i, example in enumerate(store):
            key_of_row[i] = text_key(example.query)
            if self.missing(example) > 0:
                wanting.append(i)
        self.wanting: Sequence[int] = wanting
        keys, counts = np.unique(key_of_row, return_counts=True)
        repeated = set(keys[counts > 1].tolist()) if wanting else set()
        self._shared: dict[int, list[Passage]] = {key: [] for key in repeated}
        if repeated:
            for row in np.flatnonzero(np.isin(key_of_row, keys[counts > 1])).tolist():
                self._shared[int(key_of_row[row])] += store.example(row).positives

    def missing(self, example: Example) -> int:
        """How many negatives to look for."""
        return self.section.keep - (len(example.negatives) if self.section.existing == "keep" else 0)

    def known_positives(self, example: Example, query_key: int) -> list[Passage]:
        return [*example.positives, *self._shared.get(query_key, ())]


class _Queries(Sequence):
    """The queries of some rows, read when they are asked for."""

    def __init__(self, store: TaskStore, rows: Sequence[int]):
        self._store, self._rows = store, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Text: ...
    @overload
    def __getitem__(self, index: slice) -> list[Text]: ...
    def __getitem__(self, index: int | slice) -> Text | list[Text]:
        rows = self._rows[index]
        if isinstance(index, slice):
            return [Text(example.query_id, example.query) for example in self._store.examples(rows)]
        example = self._store.example(rows)
        return Text(example.query_id, example.query)

    def __iter__(self) -> Iterator[Text]:
        for start in range(0, len(self), READ_AT_ONCE):
            yield from self[start : start + READ_AT_ONCE]


class _Passages:
    """A corpus on disk with random access by docid. In memory: the ids, an offset and a text's key for each."""

    def __init__(self, passages: Iterable[Passage], folder: Path):
        self._offset, self.keys = array("q"), array("Q")
        self._place: dict[str, int] = {}
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        for passage in passages:
            if passage.docid in self._place:
                continue
            self._place[passage.docid] = len(self._offset)
            self._offset.append(self._file.tell())
            self.keys.append(text_key(passage_text(passage)))
            self._file.write(json.dumps([passage.docid, passage.title, passage.text]).encode() + b"\n")
        self._file.flush()
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if self._place else None

    def __enter__(self) -> _Passages:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._map is not None:
            self._map.close()
        self._file.close()

    def __len__(self) -> int:
        return len(self._place)

    def __iter__(self) -> Iterator[Text]:
        for place in range(len(self)):
            passage = self._read(place)
            yield Text(passage.docid, passage_text(passage))

    def ids(self) -> Iterable[str]:
        return self._place.keys()

    def passage(self, docid: str) -> Passage:
        return self._read(self._place[docid])

    def __getitem__(self, docid: str) -> int:
        """The key of the passage's text."""
        return self.keys[self._place[docid]]

    def __contains__(self, docid: object) -> bool:
        return docid in self._place

    def _read(self, place: int) -> Passage:
        start = self._offset[place]
        return Passage(*json.loads(self._map[start : self._map.find(b"\n", start)]))


class _TaskMining:
    """The rows of a task with their negatives, and the counts that become the audit."""

    def __init__(self, rows: _Rows, passages: _Passages | None, section: Mine, seed: int):
        self.rows, self.passages, self.section, self.seed = rows, passages, section, seed
        self.name, self.miner = rows.store.name, section.negative_miner.name
        self.counts: Counter[str] = Counter()
        self.ranks, self.positive_ranks = Counter(), Counter()
        self.shown: list[tuple[float, str, dict[str, Any]]] = []
        self._sorted_ids: list[str] | None = None

    def examples(self, session: Session | None, prompt: str, bar: Any) -> Iterator[Example]:
        """Every row in order; those that want negatives with theirs."""
        wanting = iter(self.rows.wanting)
        due = next(wanting, None)
        if due is None:
            yield from map(self._counted, self.rows.store)
            return
        queries = _Queries(self.rows.store, self.rows.wanting)
        rankings = session.mine(queries, self.passages, depth=self.section.rank_window[1], prompt=prompt)
        with closing(rankings) if hasattr(rankings, "close") else nullcontext():
            for row, example in enumerate(self.rows.store):
                if row == due:
                    ranking = next(rankings, None)
                    self._check(ranking, example)
                    example = self._with_negatives(example, ranking)
                    bar.advance()
                    due = next(wanting, None)
                yield self._counted(example)

    def _check(self, ranking: Ranking | None, example: Example) -> None:
        """A plugin may do anything, and a shifted ranking would spoil every row silently."""
        found = "nothing" if ranking is None else f"a ranking for {ranking.query_id!r}"
        if ranking is None or ranking.query_id != example.query_id:
            problem = f"gave {found} where query {example.query_id!r} was due"
        elif strangers := [docid for docid in ranking.docids if docid not in self.passages]:
            problem = f"found {strangers[0]!r} for query {example.query_id!r}, which is not in the corpus"
        elif len(ranking.docids) != len(ranking.scores):
            problem = f"gave {len(ranking.docids)} passages and {len(ranking.scores)} scores for {example.query_id!r}"
        else:
            return
        remedy = "a miner yields one ranking a query, in the order of the queries"
        raise RunFailed(f"negative miner {self.miner!r} {problem}", where=f"task {self.name}", remedy=remedy)

    def _with_negatives(self, example: Example, ranking: Ranking) -> Example:
        generator = generator_of(self.seed, self.name, example.query_id)
        kept = example.negatives if self.section.existing == "keep" else ()
        count = self.rows.missing(example)
        query_key = text_key(example.query)
        known = self.rows.known_positives(example, query_key)
        positives, refused = {passage.docid for passage in known}, {passage.docid for passage in kept}
        refused_texts = {query_key, *(text_key(passage_text(passage)) for passage in (*known, *kept))}
        verdict = judge(
            ranking,
            positives=positives,
            refused=refused,
            refused_texts=refused_texts,
            text_key=self.passages,
            window=(self.section.rank_window[0], self.section.rank_window[1]),
            margin=self.section.positive_margin,
        )
        chosen = draw(verdict.candidates, count, self.section.sampling, generator)
        mined = [
            self._negative(c.docid, {"score": round(c.score, 6), "rank": c.rank, "miner": self.miner}) for c in chosen
        ]
        if self.section.pad and len(chosen) < count:
            refused |= positives | {c.docid for c in chosen}
            refused_texts |= {self.passages[c.docid] for c in chosen}
            padding = self._random(count - len(chosen), refused, refused_texts, generator)
            mined += [self._negative(docid, {"score": None, "rank": None, "miner": "random"}) for docid in padding]
            self.counts["padded"] += len(padding)
        self._note(example, ranking, verdict, chosen, mined, generator.random())
        negatives = (*kept, *mined)
        return Example(example.query_id, example.query, example.positives, negatives, example.extra)

    def _negative(self, docid: str, extra: dict[str, Any]) -> Passage:
        passage = self.passages.passage(docid)
        return Passage(passage.docid, passage.title, passage.text, extra)

    def _random(self, count: int, refused: set[str], refused_texts: set[int], generator: random.Random) -> list[str]:
        """Distinct passages that are not refused, fewer where the corpus has no more."""
        if self._sorted_ids is None:
            self._sorted_ids = sorted(self.passages.ids())  # so that the order of the file does not matter
        found: list[str] = []
        texts = set(refused_texts)
        tries = min(len(self._sorted_ids), 20 * count + len(refused))
        for place in generator.sample(range(len(self._sorted_ids)), tries):
            docid = self._sorted_ids[place]
            if docid not in refused and self.passages[docid] not in texts:
                found.append(docid)
                texts.add(self.passages[docid])
            if len(found) == count:
                break
        return found

    # ---- the audit ----

    def _counted(self, example: Example) -> Example:
        self.counts["rows"] += 1
        self.counts["negatives"] += len(example.negatives)
        self.counts["rows_with_none"] += not example.negatives
        self.counts["rows_with_fewer"] += len(example.negatives) < self.section.keep
        return example

    def _note(
        self,
        example: Example,
        ranking: Ranking,
        verdict: Verdict,
        chosen: list[Candidate],
        mined: list[Passage],
        order: float,
    ) -> None:
        self.counts["mined_rows"] += 1
        self.counts["nothing_found"] += not len(ranking.docids)
        self.counts["positives_found"] += verdict.positive_rank is not None
        self.counts["positives_first"] += verdict.positive_rank == 1
        self.counts["above_positive"] += verdict.above_positive
        self.counts["rows_above_positive"] += verdict.above_positive > 0
        self.counts["dropped_by_margin"] += verdict.dropped_by_margin
        self.counts["dropped_as_equal_text"] += verdict.dropped_as_equal_text
        self.counts["mined"] += len(chosen)
        self.ranks.update(candidate.rank for candidate in chosen)
        if verdict.positive_rank:
            self.positive_ranks[verdict.positive_rank] += 1
        if answers := [normalised(answer) for answer in _answers(example)]:
            self.counts["rows_with_answers"] += 1
            texts = [normalised(passage_text(passage)) for passage in mined]
            self.counts["negatives_with_answer"] += sum(any(answer in text for answer in answers) for text in texts)
        self._show(example, verdict, mined, order)

    def _show(self, example: Example, verdict: Verdict, mined: list[Passage], order: float) -> None:
        """Keeps the rows with the ten lowest random numbers, so that the order of the rows does not matter."""
        if len(self.shown) >= SHOWN_EXAMPLES and -order < self.shown[0][0]:
            return
        row = {
            "query_id": example.query_id,
            "query": example.query[:SHOWN_CHARACTERS],
            "positive": passage_text(example.positives[0])[:SHOWN_CHARACTERS] if example.positives else None,
            "positive_rank": verdict.positive_rank,
            "negatives": [
                {**passage.extra, "docid": passage.docid, "text": passage_text(passage)[:SHOWN_CHARACTERS]}
                for passage in mined
            ],
        }
        heapq.heappush(self.shown, (-order, example.query_id, row))
        if len(self.shown) > SHOWN_EXAMPLES:
            heapq.heappop(self.shown)

    def audit(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The counts of this task; shares are of the rows that were mined."""
        counts = self.counts
        mined_rows = max(1, counts["mined_rows"])
        found = max(1, counts["positives_found"])
        audit = {
            "rows": counts["rows"],
            "mined_rows": counts["mined_rows"],
            "copied": not counts["mined_rows"],
            "passages": len(self.passages) if self.passages is not None else None,
            **facts,
            "negatives": counts["negatives"],
            "mined": counts["mined"],
            "padded": counts["padded"],
            "rows_with_none": counts["rows_with_none"],
            "rows_with_fewer": counts["rows_with_fewer"],
            "nothing_found": counts["nothing_found"],
            "positives_found": counts["positives_found"],
            "share_positive_found": round(counts["positives_found"] / mined_rows, 4),
            "share_positive_first": round(counts["positives_first"] / mined_rows, 4),
            "candidates_above_positive": counts["above_positive"],
            "share_rows_above_positive": round(counts["rows_above_positive"] / found, 4),
            "dropped_by_margin": counts["dropped_by_margin"],
            "dropped_as_equal_text": counts["dropped_as_equal_text"],
            "ranks": _histogram(self.ranks),
            "positive_ranks": _histogram(self.positive_ranks),
            "examples": [row for _, _, row in sorted(self.shown, key=lambda item: (-item[0], item[1]))],
        }
        if counts["rows_with_answers"]:
            audit["rows_with_answers"] = counts["rows_with_answers"]
            audit["negatives_with_answer"] = counts["negatives_with_answer"]
        return audit


def _answers(example: Example) -> list[str]:
    """The accepted answer strings that a row brings along."""
    answers = example.extra.get("answers") or example.extra.get("answer") or []
    answers = [answers] if isinstance(answers, str) else answers
    return [answer for answer in answers if isinstance(answer, str) and answer.strip()]


def _histogram(ranks: Counter[int]) -> dict[str, int]:
    """{"1": n, "2": n, "3-5": n, ...}: how often each rank occurs."""
    edges = [*RANKS, max([RANKS[-1] + 1, *ranks])]
    bins, first = {}, 1
    for last in edges:
        count = sum(ranks[rank] for rank in ranks if first <= rank <= last)
        if count:
            bins[f"{first}-{last}" if last > first else f"{first}"] = count
        first = last + 1
    return bins
