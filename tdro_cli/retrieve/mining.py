"""Hard negatives for every row of every task: who is asked, what is taken, and an account of it."""

from __future__ import annotations

import json
import math
import mmap
import random
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from tdro_cli import artifacts
from tdro_cli.data.formats import Example, Passage, passage_text, read_passages, write_examples
from tdro_cli.errors import RunFailed
from tdro_cli.protocols import MiningSession, NegativeMiner, Ranking, Ranks, SessionMiner, Text
from tdro_cli.registry import resolve
from tdro_cli.retrieve.audit import Tally, audit_page, task_audit
from tdro_cli.retrieve.choosing import Candidate, Pool, draw, generator_of, pool_of, rescored, within_margin
from tdro_cli.retrieve.passages import Corpus, PassageStore, text_key

if TYPE_CHECKING:
    import numpy as np

    from tdro_cli.data.tasks import TaskStore
    from tdro_cli.recipe import Mine
    from tdro_cli.run.progress import Progress

    Scorer = Callable[[Sequence[tuple[str, str]]], Sequence[float]]

PART_QUERIES = (
    2048  # what a rank takes at a time: always whole parts, so that they are the same for any number of ranks
)
KNOWN_PLACES = 1 << 16  # docids whose place is remembered: some 10 MB
ROWS_AT_ONCE = 64  # whose candidates are read, and rescored, together


@dataclass(frozen=True)
class Alone:
    """The only process."""

    rank: int = 0
    size: int = 1

    def barrier(self) -> None: ...


@contextmanager
def opened(miner: NegativeMiner, cache: Path | None = None, world: Ranks = Alone()) -> Iterator[MiningSession]:
    """The miner's own session, or one around its `mine`."""
    if isinstance(miner, SessionMiner):
        with miner.session(cache=cache, world=world) as session:
            yield session
    else:
        yield _PlainSession(miner)


@dataclass
class _PlainSession:
    miner: NegativeMiner
    facts: Mapping[str, Any] = field(default_factory=dict)

    def mine(self, queries: Sequence[Text], corpus: Iterable[Text], *, depth: int, prompt: str) -> Iterator[Ranking]:
        return self.miner.mine(queries, corpus, depth=depth)


def worth_dividing(section: Mine) -> bool:
    """Whether several ranks gain anything: a miner that says so, or a rescorer, computes most of the time."""
    miner = resolve("negative_miners", section.negative_miner.name, section.negative_miner.options)
    return section.rescorer is not None or getattr(miner, "divides", False)


def mine_tasks(
    tasks: Sequence[TaskStore],
    section: Mine,
    *,
    prompts: Mapping[str, str],
    seed: int,
    folder: Path | None,
    scratch: Path,
    progress: Progress,
    cache: Path | None = None,
    world: Ranks = Alone(),
) -> dict[str, Any]:
    """Writes `folder`/tasks/NAME.jsonl.gz, every row of every task with its negatives, and the audit beside it.

    Rows keep their order and all that they came with. A row's candidates are passages of the task, and of the file that
    `section.corpora` names for it, at the ranks of `section.rank_window`, without: known positives (of the row, and of
    any row that asks the same), the negatives that the row came with, whatever has the text of one of these or of the
    query, and what scores above `section.positive_margin`. The draw depends on (seed, task, query id) alone.

    Every rank of `world` calls this with the same arguments, but only the first has a `folder` and returns the audit.
    `scratch`: a folder that they share and that is removed at the end. `prompts`: {task: prompt}, for miners that use
    it. `cache`: see `SessionMiner`.
    """
    if folder is not None:
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
        scratch.mkdir(parents=True)
    world.barrier()
    try:
        with ExitStack() as stack:
            work = _Work(section, seed, folder, scratch, progress, cache, world, stack)
            audits = {store.name: work.mine(store, prompts.get(store.name, "")) for store in tasks}
    finally:
        if folder is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    settings = {"miner": section.negative_miner.name, "settings": section.model_dump(mode="json"), "seed": seed}
    audit = {"schema": 2, **settings, "tasks": audits}
    if folder is not None:
        _write_audit(folder, audit)
    return audit


def _write_audit(folder: Path, audit: Mapping[str, Any]) -> None:
    from tdro_cli.report.figures import rank_figure

    artifacts.write_json(folder / "audit.json", audit)
    artifacts.write_text(folder / "audit.md", audit_page(audit))
    mined = {name: task for name, task in audit["tasks"].items() if task["ranks"]}
    if mined:
        rank_figure(folder / "ranks", mined)


@dataclass
class _Work:
    """What the tasks have in common: how to mine, and what is costly to start."""

    section: Mine
    seed: int
    folder: Path | None
    scratch: Path
    progress: Progress
    cache: Path | None
    world: Ranks
    stack: ExitStack
    session: MiningSession | None = None
    score: Scorer | None = None

    def mine(self, store: TaskStore, prompt: str) -> dict[str, Any]:
        """Mines one task; its audit, on the first rank."""
        rows, corpus = _Rows(store, self.section), Corpus([])
        if len(rows.wanting):
            self._start()
            corpus = self._corpus(store)
            self._choose(rows, corpus, prompt)
            self.world.barrier()
        audit = {} if self.folder is None else self._collect(rows, corpus)
        shutil.rmtree(self._place("own", store), ignore_errors=True)
        return audit

    def _start(self) -> None:
        """Loads what costs, once there is need of it."""
        if self.session is None:
            choice, rescorer = self.section.negative_miner, self.section.rescorer
            miner = resolve("negative_miners", choice.name, choice.options)
            self.session = self.stack.enter_context(opened(miner, self.cache, self.world))
            if rescorer is not None:
                self.score = resolve("rescorers", rescorer.name, rescorer.options).start()

    def _place(self, what: str, store: TaskStore) -> Path:
        return self.scratch / what / store.name

    def _corpus(self, store: TaskStore) -> Corpus:
        """The task's own passages, after those of the file that is named for it; the first rank writes them."""
        stores = []
        if file := self.section.corpora.get(store.name):
            shared = self.scratch / "corpora" / artifacts.digest_of(file)[:32]
            if self.folder is not None and not shared.exists():
                with self.progress.start(f"read {Path(file).name}", None, "passages") as bar:
                    PassageStore.write(shared, _watched(read_passages(file), bar))
            self.world.barrier()
            stores.append(PassageStore(shared))
        own = self._place("own", store)
        if self.folder is not None:
            PassageStore.write(own, self._not_in(stores, store))
        self.world.barrier()
        return Corpus([*stores, PassageStore(own)])

    def _not_in(self, stores: Sequence[PassageStore], task: TaskStore) -> Iterator[Passage]:
        """The task's passages whose docids are in none of the stores; warns of those that have another text there."""
        other, passages = 0, task.passages()
        while some := list(islice(passages, 1024)):
            known = Corpus(stores)
            places = known.places([passage.docid for passage in some]).tolist()
            yield from (passage for passage, place in zip(some, places, strict=True) if place < 0)
            twice = [(passage, place) for passage, place in zip(some, places, strict=True) if place >= 0]
            keys = known.keys([place for _, place in twice])
            other += sum(text_key(passage_text(passage)) != key for (passage, _), key in zip(twice, keys, strict=True))
        if other:
            self.progress.warn(
                f"task {task.name}: {other:,} docids name another text in {self.section.corpora[task.name]}; "
                "where such a passage becomes a negative it has the text of that file"
            )

    def _choose(self, rows: _Rows, corpus: Corpus, prompt: str) -> None:
        """Mines this rank's share of the rows; leaves its choices and counts in the scratch folder."""
        queries = _Queries(rows.store, rows.share(self.world), rows.wanting)
        mining = _TaskMining(rows, corpus, self.section, self.seed, self.score)
        part = self._place("parts", rows.store)
        part.mkdir(parents=True, exist_ok=True)
        rankings = self.session.mine(queries, corpus, depth=self.section.rank_window[1], prompt=prompt)
        with (
            self.progress.start(f"mine {rows.store.name}", len(queries), "queries") as bar,
            open(part / f"{self.world.rank}.jsonl", "w", encoding="utf-8") as file,
        ):
            for row, negatives in mining.choices(queries.rows, iter(rankings)):
                file.write(json.dumps([row, negatives], ensure_ascii=False) + "\n")
                bar.advance()
        facts = dict(self.session.facts)
        artifacts.write_json(part / f"{self.world.rank}.json", {"tally": mining.tally.to_json(), "facts": facts})

    def _collect(self, rows: _Rows, corpus: Corpus) -> dict[str, Any]:
        """Writes the task's rows with what all ranks have chosen."""
        parts, tally, facts = self._place("parts", rows.store), Tally(), []
        for path in sorted(parts.glob("*.json")):
            part = artifacts.read_json(path)
            tally.add(Tally.from_json(part["tally"]))
            facts.append(part["facts"])
        counts: Counter[str] = Counter()
        examples = _with_negatives(rows, corpus, _Choices(sorted(parts.glob("*.jsonl")), len(rows.store)))
        write_examples(
            self.folder / "tasks" / f"{rows.store.name}.jsonl.gz",
            (_counted(example, counts, self.section.keep) for example in examples),
        )
        shutil.rmtree(parts, ignore_errors=True)
        known = {"passages": len(corpus), **_together(facts)} if facts else {}
        if counts["rows_with_fewer"]:
            self.progress.warn(
                f"task {rows.store.name}: {counts['rows_with_fewer']:,} of {counts['rows']:,} rows have fewer than "
                f"{self.section.keep} negatives, {counts['rows_with_none']:,} of them none"
            )
        return task_audit(tally, counts, known)


def _watched(passages: Iterable[Passage], bar: Any) -> Iterator[Passage]:
    for number, passage in enumerate(passages, 1):
        if number % 1000 == 0:
            bar.advance(1000)
        yield passage


def _together(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the ranks say of a task: whole numbers added up, anything else as the first says it."""
    return {key: _added([fact.get(key) for fact in facts]) for key in facts[0]}


def _added(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return _together(values)
    return sum(values) if isinstance(values[0], int) else values[0]


def _counted(example: Example, counts: Counter[str], keep: int) -> Example:
    number = len(example.negatives)
    counts.update(rows=1, negatives=number, rows_with_none=not number, rows_with_fewer=number < keep)
    return example


# ---- one task ----


class _Rows:
    """A task's rows: which want negatives, and what is known to answer the queries that are asked more than once."""

    def __init__(self, store: TaskStore, section: Mine):
        import numpy as np

        self.store, self.section = store, section
        key_of_row, wanting, order = np.empty(len(store), np.uint64), array("q"), array("Q")
        for i, example in enumerate(store):
            key_of_row[i] = text_key(example.query)
            if self.missing(example) > 0:
                wanting.append(i)
                order.append(text_key(example.query_id))
        # by a hash of their ids: neither what is encoded together nor a rank's share depends on the order of the file
        self.wanting = np.frombuffer(wanting, np.int64)[np.argsort(np.frombuffer(order, np.uint64), kind="stable")]
        keys, counts = np.unique(key_of_row, return_counts=True)
        repeated = keys[counts > 1] if len(wanting) else keys[:0]
        self._shared: dict[int, list[Passage]] = {key: [] for key in repeated.tolist()}
        for row in np.flatnonzero(np.isin(key_of_row, repeated)).tolist():
            self._shared[int(key_of_row[row])] += store.example(row).positives

    def share(self, world: Ranks) -> np.ndarray:
        """This rank's share of `wanting`: whole parts of `PART_QUERIES`, but for the last of all."""
        import numpy as np

        parts = [self.wanting[start : start + PART_QUERIES] for start in range(0, len(self.wanting), PART_QUERIES)]
        return np.concatenate([self.wanting[:0], *parts[world.rank :: world.size]])

    def missing(self, example: Example) -> int:
        """How many negatives to look for."""
        return self.section.keep - len(self.kept(example))

    def kept(self, example: Example) -> Sequence[Passage]:
        """The negatives that the row came with and keeps."""
        return example.negatives if self.section.existing == "keep" else ()

    def known_positives(self, example: Example, query_key: int) -> list[Passage]:
        return [*example.positives, *self._shared.get(query_key, ())]


class _Queries(Sequence[Text]):
    """The queries of some rows, read when they are asked for. `of_all_ranks`: those of every rank's rows."""

    def __init__(self, store: TaskStore, rows: np.ndarray, of_all_ranks: np.ndarray | None = None):
        self._store, self.rows = store, rows
        self.of_all_ranks = self if of_all_ranks is None else _Queries(store, of_all_ranks)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Text: ...
    @overload
    def __getitem__(self, index: slice) -> list[Text]: ...
    def __getitem__(self, index: int | slice) -> Text | list[Text]:
        if isinstance(index, slice):
            return [Text(example.query_id, example.query) for example in self._store.examples(self.rows[index])]
        example = self._store.example(int(self.rows[index]))
        return Text(example.query_id, example.query)

    def __iter__(self) -> Iterator[Text]:
        for start in range(0, len(self), 1024):
            yield from self[start : start + 1024]


class _TaskMining:
    """What is chosen for the rows of a task, with the counts that become its audit."""

    def __init__(self, rows: _Rows, corpus: Corpus, section: Mine, seed: int, score: Scorer | None):
        self.rows, self.corpus, self.section, self.seed, self.score = rows, corpus, section, seed, score
        self.name, self.miner, self.tally = rows.store.name, section.negative_miner.name, Tally()
        self._place_of: dict[str, int] = {}

    def choices(self, rows: Any, rankings: Iterator[Ranking]) -> Iterator[tuple[int, list]]:
        """(row, its negatives as [docid, what is known of it] pairs) for each of the rows, in their order."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE]
            seekers = [self._seeker(example, next(rankings, None)) for example in self.rows.store.examples(some)]
            if self.score is not None:
                self._rescore(seekers)
            yield from zip(map(int, some), map(self._chosen, seekers), strict=True)
        for _ in rankings:  # a miner without a query may still have to work for the other ranks
            pass

    def _seeker(self, example: Example, ranking: Ranking | None) -> _Seeker:
        places = self._checked(ranking, example)
        query_key, kept = text_key(example.query), self.rows.kept(example)
        known = self.rows.known_positives(example, query_key)
        positives, refused = {passage.docid for passage in known}, {passage.docid for passage in kept}
        texts = {query_key, *(text_key(passage_text(passage)) for passage in (*known, *kept))}
        pool = pool_of(
            ranking,
            self.corpus.keys(places),
            positives=positives,
            refused=refused,
            refused_texts=texts,
            window=self.section.rank_window,
        )
        return _Seeker(example, known, pool, len(ranking.docids), positives | refused, texts)

    def _checked(self, ranking: Ranking | None, example: Example) -> np.ndarray:
        """The places of the ranked passages. A plugin may do anything, and a shifted ranking would spoil every row."""
        problem, places = None, self._places([] if ranking is None else ranking.docids)
        if ranking is None or ranking.query_id != example.query_id:
            found = "nothing" if ranking is None else f"a ranking for {ranking.query_id!r}"
            problem = f"gave {found} where query {example.query_id!r} was due"
        elif (places < 0).any():
            stranger = ranking.docids[int(places.argmin())]
            problem = f"found {stranger!r} for query {example.query_id!r}, which is not in the corpus"
        elif len(ranking.docids) != len(ranking.scores):
            problem = f"gave {len(ranking.docids)} passages and {len(ranking.scores)} scores for {example.query_id!r}"
        if problem:
            remedy = "a miner yields one ranking a query, in the order of the queries"
            raise RunFailed(f"negative miner {self.miner!r} {problem}", where=f"task {self.name}", remedy=remedy)
        return places

    def _places(self, docids: Sequence[str]) -> np.ndarray:
        """As `Corpus.places`, which takes longer: a passage is found for many queries."""
        import numpy as np

        known = self._place_of
        if new := [docid for docid in docids if docid not in known]:
            if len(known) + len(new) > KNOWN_PLACES:
                known.clear()
                new = list(docids)
            known.update(zip(new, self.corpus.places(new).tolist(), strict=True))
        return np.fromiter(map(known.__getitem__, docids), np.int64, len(docids))

    def _rescore(self, seekers: Sequence[_Seeker]) -> None:
        """Scores all candidates and positives of the rows at once."""
        pairs = [
            (seeker.example.query, text)
            for seeker in seekers
            for text in (
                *map(self._text, seeker.pool.candidates),
                *(passage_text(passage) for passage in seeker.known),
            )
        ]
        scores = list(map(float, self.score(pairs)))
        if len(scores) != len(pairs) or not all(map(math.isfinite, scores)):
            what = f"{len(scores)} scores" if len(scores) != len(pairs) else "a score that is not a finite number"
            raise RunFailed(
                f"rescorer {self.section.rescorer.name!r} gave {what} for {len(pairs)} pairs",
                where=f"task {self.name}",
                remedy="a rescorer gives one finite score a pair, in the order of the pairs",
            )
        given = iter(scores)
        for seeker in seekers:
            candidates = list(islice(given, len(seeker.pool.candidates)))
            seeker.pool = rescored(seeker.pool, candidates, list(islice(given, len(seeker.known))))

    def _text(self, candidate: Candidate) -> str:
        return passage_text(self.corpus.passage(int(self.corpus.places([candidate.docid])[0])))

    def _chosen(self, seeker: _Seeker) -> list:
        example, section = seeker.example, self.section
        generator = generator_of(self.seed, self.name, example.query_id)
        candidates = within_margin(seeker.pool, section.positive_margin)
        count = self.rows.missing(example)
        chosen = draw(candidates, count, section.sampling, generator, seeker.pool.positive_score)
        found = [(candidate.docid, self._provenance(candidate)) for candidate in chosen]
        if section.pad and len(chosen) < count:
            padding = self._padding(count - len(chosen), seeker, chosen, generator)
            found += [(docid, {"score": None, "rank": None, "miner": "random"}) for docid in padding]
        self.tally.note(
            example,
            seeker.found,
            seeker.pool,
            candidates,
            chosen,
            len(found),
            lambda: _negatives(self.corpus, found),
            generator.random(),
        )
        return found

    def _provenance(self, candidate: Candidate) -> dict[str, Any]:
        extra = {"score": round(candidate.score, 6), "rank": candidate.rank, "miner": self.miner}
        if candidate.miner_score is not None:
            extra |= {"miner_score": round(candidate.miner_score, 6), "rescorer": self.section.rescorer.name}
        return extra

    def _padding(self, count: int, seeker: _Seeker, chosen: Sequence[Candidate], generator: random.Random) -> list[str]:
        """Distinct passages that are neither known nor chosen, at random; fewer where the corpus has no more."""
        docids = seeker.refused | {candidate.docid for candidate in chosen}
        chosen_places = self.corpus.places([candidate.docid for candidate in chosen])
        texts = seeker.texts | set(self.corpus.keys(chosen_places))
        found: list[str] = []
        tries = min(len(self.corpus), 20 * count + len(docids))
        places = generator.sample(range(len(self.corpus)), tries)
        for place, key in zip(places, self.corpus.keys(places), strict=True):
            docid = self.corpus.docid(place)
            if docid not in docids and key not in texts:
                found.append(docid)
                texts.add(key)
            if len(found) == count:
                break
        return found


@dataclass
class _Seeker:
    """A row that wants negatives: what answers it, what is found for it, the docids and texts that it may not have."""

    example: Example
    known: Sequence[Passage]
    pool: Pool
    found: int
    refused: set[str]
    texts: set[int]


def _negatives(corpus: Corpus, found: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Passage]:
    """The passages of [docid, what is known of it] pairs."""
    places = corpus.places([docid for docid, _ in found]).tolist()
    passages = zip(map(corpus.passage, places), found, strict=True)
    return [Passage(passage.docid, passage.title, passage.text, extra) for passage, (_, extra) in passages]


# ---- the rows as they are written ----


class _Choices:
    """What the ranks have written about the rows of a task, by row: [docid, what is known of it] pairs."""

    def __init__(self, paths: Sequence[Path], num_rows: int):
        import numpy as np

        self._maps = [_mapped(path) for path in paths if path.stat().st_size]
        self._number, self._start = np.full(num_rows, -1, np.int32), np.zeros(num_rows, np.int64)
        for number, lines in enumerate(self._maps):
            start = 0
            for line in iter(lines.readline, b""):
                row = int(line[1 : line.index(b",")])
                self._number[row], self._start[row] = number, start
                start += len(line)

    def __getitem__(self, row: int) -> list:
        number, start = int(self._number[row]), int(self._start[row])
        if number < 0:
            return []
        lines = self._maps[number]
        return json.loads(lines[start : lines.find(b"\n", start)])[1]


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _with_negatives(rows: _Rows, corpus: Corpus, choices: _Choices) -> Iterator[Example]:
    """Every row in order; those that wanted negatives with theirs."""
    for row, example in enumerate(rows.store):
        if rows.missing(example) <= 0:
            yield example
            continue
        negatives = (*rows.kept(example), *_negatives(corpus, choices[row]))
        yield Example(example.query_id, example.query, example.positives, negatives, example.extra)
