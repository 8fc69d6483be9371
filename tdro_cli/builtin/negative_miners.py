"""Negative miners: what ranks a task's passages for its queries.

A miner's `session` (see `tdro_cli.protocols.SessionMiner`) holds what is costly to start from task to task.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from tdro_cli.protocols import Ranking, Ranks, Text


@dataclass(frozen=True)
class BM25:
    """Lucene's BM25 through pyserini, in a Java process of its own.

    `language`: "auto" chooses the analyzer of each task by its passages' scripts and stop words; or a language code, or
    "multilingual", "standard" or "whitespace". k1 and b are Anserini's defaults.
    """

    execution_options: ClassVar = ("threads", "heap")

    k1: float = 0.9
    """how soon repetitions of a word stop to count"""
    b: float = 0.4
    """how much long passages are held back, 0..1"""
    language: str = "auto"
    threads: int = 2
    """of indexing and search"""
    heap: str = "2g"
    """memory of the Java process"""

    def __post_init__(self) -> None:
        from tdro_cli.retrieve.lucene import analyzer_of

        if self.k1 < 0 or not 0 <= self.b <= 1:
            raise ValueError(f"k1 must be >= 0 and b in 0..1, got k1={self.k1}, b={self.b}")
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.language != "auto":
            analyzer_of(self.language)

    def mine(self, queries: Sequence[Text], corpus: Iterable[Text], *, depth: int) -> Iterator[Ranking]:
        with self.session() as session:
            yield from session.mine(queries, corpus, depth=depth)

    @contextmanager
    def session(self, *, cache: Path | None = None, world: Ranks | None = None) -> Iterator[_BM25Session]:
        """One JVM for several tasks, on each rank. `cache` is not used: indexing is faster than reading would be."""
        from tdro_cli.retrieve.lucene import LuceneProcess

        with LuceneProcess(heap=self.heap) as process:
            yield _BM25Session(self, process)


@dataclass
class _BM25Session:
    miner: BM25
    process: Any
    facts: dict[str, Any] = field(default_factory=dict)

    def mine(
        self, queries: Sequence[Text], corpus: Iterable[Text], *, depth: int, prompt: str = ""
    ) -> Iterator[Ranking]:
        from tdro_cli.retrieve.lucene import bm25_rankings

        options = {name: getattr(self.miner, name) for name in ("language", "k1", "b", "threads")}
        self.facts = {}
        return bm25_rankings(queries, corpus, depth=depth, process=self.process, chosen=self.facts, **options)


@dataclass(frozen=True)
class Dense:
    """Exact search by the embeddings of any saved model, Hugging Face or sentence-transformers model `source`.

    `token_budget`: tokens, padding included, that go through the model at once. `prompts`: "task" puts the task's
    prompt before its queries, "model" the model's own; "auto" is "task" for models that we saved. `dtype`: the
    precision to compute in. `query_length`, `passage_length`: tokens that are read of a text, prompt included (default:
    the model's own). `cache`: the folder of the embeddings, named by their content, so that another run with the same
    model and text encodes nothing (default: the one of the run, else a temporary one).
    """

    divides: ClassVar = True
    execution_options: ClassVar = ("token_budget", "cache")

    source: str
    token_budget: int = 16384
    prompts: Literal["auto", "task", "model"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    query_length: int | None = None
    passage_length: int | None = None
    cache: str | None = None

    def mine(self, queries: Sequence[Text], corpus: Iterable[Text], *, depth: int) -> Iterator[Ranking]:
        with self.session() as session:
            yield from session.mine(queries, corpus, depth=depth)

    @contextmanager
    def session(self, *, cache: Path | None = None, world: Ranks | None = None) -> Iterator[_DenseSession]:
        """The model, loaded once for several tasks. With several ranks, `cache` is a folder that all of them see."""
        import tempfile

        from tdro_cli.model.embedding import load_embedder

        embedder = load_embedder(
            self.source,
            token_budget=self.token_budget,
            dtype=self.dtype,
            query_length=self.query_length,
            passage_length=self.passage_length,
        )
        ours = (Path(self.source) / "tdro_encoder.json").is_file()
        use_task_prompt = self.prompts == "task" or (self.prompts == "auto" and ours)
        with ExitStack() as stack:
            folder = Path(self.cache) if self.cache else cache and cache / "embeddings"
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tdro-embeddings-")))
            yield _DenseSession(embedder, folder, use_task_prompt, world)


@dataclass
class _DenseSession:
    embedder: Any
    cache: Path
    use_task_prompt: bool
    world: Ranks | None
    facts: dict[str, Any] = field(default_factory=dict)

    def mine(
        self, queries: Sequence[Text], corpus: Iterable[Text], *, depth: int, prompt: str | None = None
    ) -> Iterator[Ranking]:
        from tdro_cli.retrieve.search import search

        self.facts = {"model": self.embedder.digest, "queries_encoded": 0, "passages_encoded": 0}
        prompt = prompt if self.use_task_prompt else None
        query_store = self._store("queries", prompt, lambda texts: self.embedder.encode_queries(texts, prompt))
        passage_store = self._store("passages", None, self.embedder.encode_passages)
        saved = passage_store.saved(corpus, encoded=self._count("passages_encoded"), ranks=self.world)
        for _, query_ids, query_QD in query_store.shards(queries, encoded=self._count("queries_encoded")):
            score_QK, index_QK = search(query_QD, saved.chunks(), depth, device=self.embedder.device)
            yield from map(Ranking, query_ids, saved.ids_of(index_QK), score_QK.tolist())

    def _store(self, side: str, prompt: str | None, encode: Any) -> Any:
        from tdro_cli.artifacts import digest_of
        from tdro_cli.retrieve.mining import PART_QUERIES
        from tdro_cli.retrieve.search import ShardStore

        digest = digest_of({"model": self.embedder.digest, "side": side, "prompt": prompt})
        # of the size of a rank's parts: what is encoded and searched together is the same for any number of ranks
        return ShardStore(self.cache, encode, digest, dtype="float32", shard_documents=PART_QUERIES)

    def _count(self, what: str) -> Any:
        def encoded(number: int, now: bool) -> None:
            self.facts[what] += number if now else 0

        return encoded


@dataclass(frozen=True)
class Hybrid:
    """Reciprocal rank fusion of several miners: the score of a passage is the sum of 1 / (k + rank) over them.

    `miners`: a list of {name, options}. Cormack, Clarke and Büttcher, SIGIR 2009; k = 60 is theirs.
    """

    miners: list[dict[str, Any]]
    k: int = 60
    """added to every rank"""

    def __post_init__(self) -> None:
        if len(self.miners) < 2 or not all(isinstance(miner.get("name"), str) for miner in self.miners):
            raise ValueError("miners must be a list of at least two {name, options}")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def mine(self, queries: Sequence[Text], corpus: Iterable[Text], *, depth: int) -> Iterator[Ranking]:
        with self.session() as session:
            yield from session.mine(queries, corpus, depth=depth)

    @contextmanager
    def session(self, *, cache: Path | None = None, world: Ranks | None = None) -> Iterator[_HybridSession]:
        """The sessions of all miners."""
        from tdro_cli.retrieve.mining import Alone, opened

        with ExitStack() as stack:
            names = [f"{position} {miner['name']}" for position, miner in enumerate(self.miners, 1)]
            sessions = [stack.enter_context(opened(miner, cache, world or Alone())) for miner in self._resolved()]
            yield _HybridSession(self.k, names, sessions)

    @property
    def divides(self) -> bool:
        return any(getattr(miner, "divides", False) for miner in self._resolved())

    def _resolved(self) -> list[Any]:
        from tdro_cli.registry import resolve

        return [resolve("negative_miners", miner["name"], miner.get("options")) for miner in self.miners]


@dataclass
class _HybridSession:
    k: int
    names: list[str]
    sessions: list[Any]
    facts: dict[str, Any] = field(default_factory=dict)

    def mine(
        self, queries: Sequence[Text], corpus: Iterable[Text], *, depth: int, prompt: str = ""
    ) -> Iterator[Ranking]:
        if isinstance(corpus, Iterator):
            corpus = list(corpus)
        found = [session.mine(queries, corpus, depth=depth, prompt=prompt) for session in self.sessions]
        for rankings in zip(*found, strict=True):
            yield fused(rankings, k=self.k, depth=depth)
        self.facts = {name: session.facts for name, session in zip(self.names, self.sessions, strict=True)}


def fused(rankings: Sequence[Ranking], *, k: int, depth: int) -> Ranking:
    """The reciprocal rank fusion of one query's rankings; equal scores in the order of docids."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, docid in enumerate(ranking.docids, 1):
            scores[docid] = scores.get(docid, 0.0) + 1 / (k + rank)
    best = sorted(scores, key=lambda docid: (-scores[docid], docid))[:depth]
    return Ranking(rankings[0].query_id, best, [scores[docid] for docid in best])
