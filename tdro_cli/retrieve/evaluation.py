"""How well models retrieve: rankings, measures, and whether a difference is more than chance.

S seeds, N queries, Q queries, D embedding size, K documents kept for a query. A collection's name may say where it
belongs: `BENCHMARK/SUBSET`, and `BENCHMARK/SET/PART` where the parts count as one set in an average.
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache as remembered
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tdro_cli.artifacts import write_json, write_text
from tdro_cli.errors import RunFailed, TdroError, did_you_mean
from tdro_cli.protocols import Ranking, TestCollection, Text
from tdro_cli.retrieve import significance
from tdro_cli.run.progress import Progress, Silent

if TYPE_CHECKING:
    from tdro_cli.model.embedding import Embedder
    from tdro_cli.recipe import Eval

BM25 = "bm25"
SIGNIFICANT = 0.01  # the paper's level for a star
ANSWER_MEASURES = ("accuracy@10", "accuracy@100")  # where answers are known instead of judgements

Values = Mapping[str, Mapping[str, Mapping[str, float]]]  # collection -> measure -> query id -> value


@dataclass(frozen=True)
class CollectionResult:
    """What one model reaches on one collection: {measure: {query id: value}}."""

    collection: str
    values: Mapping[str, Mapping[str, float]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Mean over all queries of each measure."""
        return {measure: _mean(by_query.values()) for measure, by_query in self.values.items()}


# ---- one model, one collection ----


def evaluate_model(
    model: Embedder | Literal["bm25"],
    collection: TestCollection,
    *,
    depth: int,
    measures: Sequence[str],
    folder: Path,
    cache: Path,
    prompt: str | None = None,
    progress: Progress | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    shard_documents: int = 8192,
) -> CollectionResult:
    """Ranks the corpus for every query and measures it. Writes the TREC run `folder/runs/COLLECTION.trec`.

    A query for which nothing is found counts 0, and so does one without a relevant document. The collection's prompt
    goes before `prompt`; None for both is the model's own. Corpus embeddings are kept under `cache` in `dtype`, in
    shards of `shard_documents`: see `search.ShardStore`. A document whose id is the query's is left out only if
    `collection.provenance["drop_same_id"]`.
    """
    progress = progress or Silent()
    measures = _fitting(measures, collection, depth)
    if not collection.queries:
        raise TdroError(f"{collection.name} has no queries", remedy="look at its query and judgement files")
    began = time.monotonic()
    drop_same_id = bool(collection.provenance.get("drop_same_id"))
    corpus = _WatchedCorpus(collection)
    with progress.start(f"{collection.name}", None, "documents") as bar:
        if model == BM25:
            rankings = _lexical_rankings(collection, corpus.read(bar.advance), depth + drop_same_id)
        else:
            prompt = collection.prompt if collection.prompt is not None else prompt
            store = _store(model, cache, dtype, shard_documents)
            rankings = _dense_rankings(model, collection, corpus.read(bar.advance), depth + drop_same_id, prompt, store)
    corpus.check(progress)
    rankings = [_cut(ranking, depth, drop_same_id, collection.name) for ranking in rankings]
    write_run(folder / "runs" / f"{folder_name(collection.name)}.trec", rankings, tag=folder.name)
    values = _values(collection, rankings, measures)
    facts = {"documents": corpus.count, "queries": len(collection.queries), "seconds": time.monotonic() - began}
    return CollectionResult(collection.name, values, facts)


class _WatchedCorpus:
    """Counts the documents that pass, and notices relevant ones that don't."""

    def __init__(self, collection: TestCollection):
        self.collection, self.count = collection, 0
        self.unseen = {docid for judged in collection.qrels.values() for docid, score in judged.items() if score > 0}

    def read(self, advance: Callable[[int], None]) -> Iterator[Text]:
        for text in self.collection.corpus():
            self.count += 1
            self.unseen.discard(text.id)
            if self.count % 1000 == 0:
                advance(1000)
            yield text
        advance(self.count % 1000)

    def check(self, progress: Progress) -> None:
        if not self.count:
            raise TdroError(f"the corpus of {self.collection.name} is empty", remedy="fetch its corpus file again")
        if self.unseen:
            some = ", ".join(sorted(self.unseen)[:3])
            progress.warn(
                f"{self.collection.name}: {len(self.unseen)} documents judged relevant are not in the corpus ({some}); "
                "they count as not found"
            )


def _store(model: Embedder, cache: Path, dtype: Literal["float16", "float32"], shard_documents: int):
    from tdro_cli.retrieve.search import ShardStore

    return ShardStore(cache, model.encode_passages, model.digest, dtype, shard_documents)


def _dense_rankings(
    model: Embedder, collection: TestCollection, corpus: Iterable[Text], depth: int, prompt: str | None, store: Any
) -> list[Ranking]:
    import numpy as np

    from tdro_cli.retrieve.search import search_corpus

    query_QD = model.encode_queries([query.text for query in collection.queries], prompt)
    if not np.isfinite(query_QD).all():
        raise RunFailed(
            f"the model gives no finite embedding for a query of {collection.name}",
            remedy="look for where the training diverged",
        )
    score_QK, ids = search_corpus(query_QD, store.shards(corpus), depth)
    return [
        Ranking(query.id, docids, scores)
        for query, docids, scores in zip(collection.queries, ids, score_QK.tolist(), strict=True)
    ]


def _lexical_rankings(collection: TestCollection, corpus: Iterable[Text], depth: int) -> list[Ranking]:
    from tdro_cli.retrieve.lucene import bm25_rankings

    return list(bm25_rankings(collection.queries, corpus, depth=depth))


def _cut(ranking: Ranking, depth: int, drop_same_id: bool, collection: str) -> Ranking:
    """The best `depth` of a ranking. Raises TdroError for a document that is there twice."""
    if len(set(ranking.docids)) < len(ranking.docids):
        twice = next(docid for i, docid in enumerate(ranking.docids) if docid in ranking.docids[:i])
        raise TdroError(
            f"two documents of {collection} have the id {twice!r}", remedy="mend the corpus: ids name one document each"
        )
    pairs = [
        (docid, score)
        for docid, score in zip(ranking.docids, ranking.scores, strict=True)
        if not (drop_same_id and docid == ranking.query_id)
    ][:depth]
    return Ranking(ranking.query_id, tuple(docid for docid, _ in pairs), tuple(score for _, score in pairs))


def write_run(path: Path, rankings: Iterable[Ranking], *, tag: str) -> None:
    """A TREC run: query, Q0, document, rank from 1, score (enough digits for float32), tag."""
    lines = [
        f"{ranking.query_id} Q0 {docid} {rank} {score:.9g} {tag}\n"
        for ranking in rankings
        for rank, (docid, score) in enumerate(zip(ranking.docids, ranking.scores, strict=True), 1)
    ]
    write_text(path, "".join(lines))


def folder_name(name: str) -> str:
    """A model's or a collection's name as one file name: 'BAAI/bge-m3' -> 'BAAI_bge-m3'."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("_.") or "_"


# ---- measures ----


def check_measures(names: Iterable[str], depth: int) -> None:
    """Raises TdroError for a measure that ir-measures doesn't know or that looks deeper than `depth`."""
    for name in names:
        answer = _answer_cutoff(name)
        cutoff = answer or _parsed(name).params.get("cutoff")
        if cutoff and cutoff > depth:
            raise TdroError(
                f"{name} looks at {cutoff} documents of a query, but only {depth} are retrieved",
                where="eval.depth",
                remedy=f"set eval.depth to {cutoff} or more",
            )


def _fitting(names: Sequence[str], collection: TestCollection, depth: int) -> list[str]:
    """Of the asked measures those that the collection can be scored by: answers or judgements."""
    by_answer = collection.answers is not None
    fitting = [name for name in names if bool(_answer_cutoff(name)) == by_answer]
    if by_answer and not fitting:
        fitting = [name for name in ANSWER_MEASURES if _answer_cutoff(name) <= depth]
    if not fitting:
        raise TdroError(
            f"none of the measures {', '.join(names)} fits {collection.name}",
            where="eval.measures",
            remedy="accuracy@K needs answers and the others need judgements: add for instance "
            + ("accuracy@10" if by_answer else "nDCG@10"),
        )
    check_measures(fitting, depth)
    return fitting


def _answer_cutoff(name: str) -> int | None:
    """K of 'accuracy@K', else None. (ir-measures' own `Accuracy` is another thing.)"""
    match = re.fullmatch(r"accuracy@([1-9]\d*)", name)
    return int(match[1]) if match else None


def _parsed(name: str) -> Any:
    import ir_measures

    try:
        return ir_measures.parse_measure(name)
    except (NameError, ValueError, SyntaxError, AttributeError, TypeError) as error:
        known = ["nDCG@10", "R@100", "RR@10", "AP@100", "P@10", "Success@10", "accuracy@10"]
        meant = next((other for other in known if other.lower() == name.lower()), name)
        hint = did_you_mean(name, known) if meant == name else f"did you mean {meant!r}? Capitals count"
        raise TdroError(
            f"there is no measure {name!r}",
            where="eval.measures",
            remedy=f"{hint}; or another name of ir-measures, in its spelling",
        ) from error


def _values(
    collection: TestCollection, rankings: Sequence[Ranking], measures: Sequence[str]
) -> dict[str, dict[str, float]]:
    if collection.answers is not None:
        return _answer_values(collection, rankings, measures)
    return measure_run(collection.qrels, rankings, measures)


def measure_run(
    qrels: Mapping[str, Mapping[str, int]], rankings: Iterable[Ranking], measures: Sequence[str]
) -> dict[str, dict[str, float]]:
    """{measure: {query id: value}} by ir-measures, over every query of `qrels`; 0 where nothing was found."""
    import ir_measures

    run = {ranking.query_id: dict(zip(ranking.docids, map(float, ranking.scores), strict=True)) for ranking in rankings}
    parsed = {_parsed(name): name for name in measures}
    values = {name: dict.fromkeys(qrels, 0.0) for name in measures}
    try:
        for metric in ir_measures.iter_calc(list(parsed), {q: dict(judged) for q, judged in qrels.items()}, run):
            if metric.query_id in qrels:
                values[parsed[metric.measure]][metric.query_id] = float(metric.value)
    except (ValueError, RuntimeError) as error:
        raise TdroError(
            f"ir-measures can't compute {', '.join(measures)}: {error}",
            where="eval.measures",
            remedy="install the package it names, or leave that measure out",
        ) from error
    return values


def _answer_values(
    collection: TestCollection, rankings: Sequence[Ranking], measures: Sequence[str]
) -> dict[str, dict[str, float]]:
    """accuracy@K: 1 where one of the first K passages holds an answer. The corpus is read once more."""
    wanted: dict[str, list[tuple[int, str]]] = {}
    for ranking in rankings:
        for rank, docid in enumerate(ranking.docids, 1):
            wanted.setdefault(docid, []).append((rank, ranking.query_id))
    patterns = {query_id: _patterns(answers) for query_id, answers in collection.answers.items()}
    first_hit: dict[str, int] = {}
    for text in collection.corpus():
        if places := wanted.get(text.id):
            passage = _matchable(text.text)
            for rank, query_id in places:
                if rank < first_hit.get(query_id, rank + 1) and any(p in passage for p in patterns.get(query_id, ())):
                    first_hit[query_id] = rank
    return {
        name: {q.id: float(first_hit.get(q.id, _answer_cutoff(name) + 1) <= _answer_cutoff(name)) for q in queries}
        for name, queries in ((name, collection.queries) for name in measures)
    }


def has_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether an answer's words stand in `text` next to each other, as DPR compares them (arXiv:2004.04906).

    NFD, lower case; a word is a run of letters, digits and marks, or a single other character. Scripts that put no
    space between words (Han, kana, Thai, Lao, Khmer, Burmese) are compared letter by letter: there a run is no word.
    """
    passage = _matchable(text)
    return any(pattern in passage for pattern in _patterns(answers))


def _patterns(answers: Iterable[str]) -> list[str]:
    patterns = (_matchable(answer) for answer in answers)
    return [pattern for pattern in patterns if pattern.strip()]  # an answer without a word would be in every passage


def _matchable(text: str) -> str:
    """The words of a text with a space before and after each."""
    return f" {' '.join(_words().findall(unicodedata.normalize('NFD', text).lower()))} "


@remembered
def _words() -> Any:
    import regex

    unspaced = "".join(rf"\p{{{s}}}" for s in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar"))
    return regex.compile(rf"(?V1)[{unspaced}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{unspaced}]]+|[^\p{{Z}}\p{{C}}]")


# ---- all models, all collections ----


def evaluate(
    models: Mapping[str, Callable[[], Embedder] | Literal["bm25"]],
    collections: Sequence[TestCollection],
    section: Eval,
    folder: Path,
    cache: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates every model on every collection and tests them against `section.compare_to`.

    Writes `folder/MODEL/` (runs, per_query.parquet, measures.json) for each, `folder/measures.json` of the last model
    and `folder/comparison.json`. Returns {"measures": {model: ...}, "comparison": ... or None}.
    """
    progress = progress or Silent()
    _check_names(models, collections, section)
    summaries, values = {}, {}
    for name, make in models.items():
        model = make if make == BM25 else make()
        results = [
            evaluate_model(
                model,
                collection,
                depth=section.depth,
                measures=section.measures,
                folder=folder / folder_name(name),
                cache=cache,
                prompt=section.prompt,
                progress=progress,
            )
            for collection in collections
        ]
        values[name] = {result.collection: result.values for result in results}
        summaries[name] = summary(name, values[name])
        write_per_query(folder / folder_name(name) / "per_query.parquet", values[name])
        write_json(folder / folder_name(name) / "measures.json", summaries[name])
        del model
    main = list(models)[-1]
    write_json(folder / "measures.json", summaries[main])
    comparison = None
    if section.compare_to in models and len(models) > 1:
        comparison = compare(values, baseline=section.compare_to)
        write_json(folder / "comparison.json", comparison)
    return {"measures": summaries, "comparison": comparison}


def _check_names(models: Mapping[str, Any], collections: Sequence[TestCollection], section: Eval) -> None:
    if not models or not collections:
        raise TdroError("nothing to evaluate", where="eval", remedy="name at least one model and one collection")
    if section.compare_to is not None and section.compare_to not in models:
        raise TdroError(
            f"compare_to names {section.compare_to!r}, which is not evaluated",
            where="eval.compare_to",
            remedy=did_you_mean(section.compare_to, models),
        )
    for what, names in (("models", list(models)), ("collections", [c.name for c in collections])):
        folders: dict[str, str] = {}
        for name in names:
            if folder_name(name) in folders:
                clash = f"{folders[folder_name(name)]!r} and {name!r}"
                raise TdroError(f"two {what} would share a file: {clash}", where="eval", remedy="rename one of them")
            folders[folder_name(name)] = name
    for name in section.measures:
        check_measures([name], section.depth)


def summary(model: str, values: Values) -> dict[str, Any]:
    """The content of measures.json: means by collection, macro-averages over all and over each benchmark.

    A macro-average is the mean over sets of their means, as in the paper; the parts of a set (CQADupStack's forums) are
    averaged first. A measure is averaged over the sets that have it.
    """
    results = {
        collection: {measure: _mean(by_query.values()) for measure, by_query in by_measure.items()}
        for collection, by_measure in values.items()
    }
    benchmarks = dict.fromkeys(name.split("/")[0] for name in values if "/" in name)
    return {
        "schema": 1,
        "model": model,
        "results": results,
        "average": _averages(results),
        "benchmarks": {
            name: _averages({c: r for c, r in results.items() if c.startswith(f"{name}/")}) for name in benchmarks
        },
    }


def _averages(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    measures = dict.fromkeys(measure for by_measure in results.values() for measure in by_measure)
    averages = {}
    for measure in measures:
        weights = collection_weights([c for c, by_measure in results.items() if measure in by_measure])
        averages[measure] = sum(weight * results[collection][measure] for collection, weight in weights.items())
    return averages


def collection_weights(collections: Iterable[str]) -> dict[str, float]:
    """The share of each collection in a macro-average: sets weigh the same, and so do the parts within a set."""
    collections = list(collections)
    unit = {name: "/".join(name.split("/")[:2]) for name in collections}
    units = list(unit.values())
    return {name: 1 / len(set(units)) / units.count(unit[name]) for name in collections}


def write_per_query(path: Path, values: Values) -> None:
    """Columns collection, query_id, measure, value (float64)."""
    import os

    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = [
        (collection, query_id, measure, value)
        for collection, by_measure in values.items()
        for measure, by_query in by_measure.items()
        for query_id, value in by_query.items()
    ]
    columns = zip(*rows, strict=True) if rows else ([], [], [], [])
    types = (pa.string(), pa.string(), pa.string(), pa.float64())
    arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    parquet.write_table(pa.table(arrays, ["collection", "query_id", "measure", "value"]), aside)
    os.replace(aside, path)


def read_per_query(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """What `write_per_query` wrote: {collection: {measure: {query id: value}}}."""
    import pyarrow.parquet as parquet

    if not path.is_file():
        raise TdroError(f"there is no {path}", remedy="give a folder that `tdro eval` has written for a model")
    values: dict[str, dict[str, dict[str, float]]] = {}
    table = parquet.read_table(path)
    for row in zip(*(table[name].to_pylist() for name in ("collection", "measure", "query_id", "value")), strict=True):
        collection, measure, query_id, value = row
        values.setdefault(collection, {}).setdefault(measure, {})[query_id] = value
    return values


# ---- comparison ----


def compare(values: Mapping[str, Values], *, baseline: str, seed: int = 0, level: float = 0.95) -> dict[str, Any]:
    """The content of comparison.json: every model against `baseline`, by collection and macro-averaged.

    `values` holds the per-query values of each model. Tests pair queries; `p_holm` is the t-test's p corrected for the
    number of collections. The p of an average is that of the randomisation test of the macro-averaged difference. What
    another training seed would do is not known from one run a model: see `compare_seeds`.
    """
    rows, averages = [], []
    for model in values:
        if model != baseline:
            for measure, shared in _shared_measures(values[baseline], values[model]).items():
                diffs = _differences(values[baseline], values[model], measure, shared)
                rows += _query_rows(values[baseline], values[model], model, measure, diffs, seed, level)
                averages += _average_rows(values[baseline], values[model], model, measure, diffs, seed, level)
    return {
        "schema": 1,
        "baseline": baseline,
        "models": [model for model in values if model != baseline],
        "seed_noise": "unknown",
        "level": level,
        "rows": rows,
        "averages": averages,
    }


def _shared_measures(baseline: Values, model: Values) -> dict[str, list[str]]:
    """{measure: the collections that both have it for}."""
    shared: dict[str, list[str]] = {}
    for collection, by_measure in model.items():
        for measure in by_measure:
            if measure in baseline.get(collection, {}):
                shared.setdefault(measure, []).append(collection)
    return shared


def _differences(baseline: Values, model: Values, measure: str, collections: Sequence[str]) -> dict[str, list[float]]:
    """Model minus baseline for each query, in the baseline's order of queries."""
    diffs = {}
    for collection in collections:
        a, b = model[collection][measure], baseline[collection][measure]
        if a.keys() != b.keys():
            raise TdroError(
                f"the runs on {collection} are not over the same queries ({len(a)} and {len(b)})",
                remedy="evaluate both models on the same files",
            )
        diffs[collection] = [a[query_id] - value for query_id, value in b.items()]
    return diffs


def _query_rows(
    baseline: Values,
    model: Values,
    name: str,
    measure: str,
    diffs: Mapping[str, Sequence[float]],
    seed: int,
    level: float,
) -> list[dict[str, Any]]:
    rows = []
    for collection, diff in diffs.items():
        zeros = [0.0] * len(diff)
        rows.append(
            {
                "model": name,
                "collection": collection,
                "measure": measure,
                "queries": len(diff),
                "baseline_value": _mean(baseline[collection][measure].values()),
                "model_value": _mean(model[collection][measure].values()),
                "difference": _mean(diff),
                "p_t_test": significance.paired_t_test(diff, zeros),
                "p_randomisation": significance.randomisation_test(diff, zeros, seed=seed),
                "interval": list(significance.bootstrap_interval(diff, seed=seed, level=level)),
            }
        )
    corrected = significance.holm([row["p_t_test"] for row in rows])
    return [{**row, "p_holm": p} for row, p in zip(rows, corrected, strict=True)]


def _average_rows(
    baseline: Values,
    model: Values,
    name: str,
    measure: str,
    diffs: Mapping[str, Sequence[float]],
    seed: int,
    level: float,
) -> list[dict[str, Any]]:
    """One row for each benchmark of two collections or more, and one for all."""
    rows = []
    for benchmark, collections in _scopes(diffs).items():
        weights = collection_weights(collections)
        # each query weighs by its share of the macro-average; flipping signs then tests that average
        weighted = [weights[c] / len(diffs[c]) * d for c in collections for d in diffs[c]]
        interval = significance.stratified_bootstrap_interval(
            [diffs[c] for c in collections], weights=[weights[c] for c in collections], seed=seed, level=level
        )
        rows.append(
            {
                "model": name,
                "benchmark": benchmark,
                "measure": measure,
                "collections": len(collections),
                "baseline_value": sum(weights[c] * _mean(baseline[c][measure].values()) for c in collections),
                "model_value": sum(weights[c] * _mean(model[c][measure].values()) for c in collections),
                "difference": sum(weighted),
                "p_randomisation": significance.randomisation_test(weighted, [0.0] * len(weighted), seed=seed),
                "interval": list(interval),
            }
        )
    return rows


def _scopes(collections: Iterable[str]) -> dict[str, list[str]]:
    """{benchmark: its collections} and {"all": every one}, where there is more than one to average."""
    collections = list(collections)
    scopes: dict[str, list[str]] = {}
    for name in collections:
        if "/" in name:
            scopes.setdefault(name.split("/")[0], []).append(name)
    if len(scopes) != 1 or len(next(iter(scopes.values()))) < len(collections):
        scopes["all"] = collections
    return {name: members for name, members in scopes.items() if len(members) > 1}


def compare_seeds(
    pairs: Sequence[tuple[Values, Values]], *, baseline: str, model: str, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """Compares two ways of training from several seeds: `pairs` holds (baseline, model) values of each seed.

    Seed is a level of the test. For a collection, `p_seeds` is the t-test over the S differences of the means, and
    `interval` resamples seeds and queries; `p_queries` (queries alone, averaged over seeds) is what one would believe
    without looking at seeds. For the averages, `p_seeds` tests the S macro-averaged differences, and `p_cells` all
    seeds x collections, which is right only if a method's gain is the same on all of them. Raises ValueError for
    fewer than 2 seeds.
    """
    if len(pairs) < 2:
        raise ValueError("the noise of seeds can be told from 2 seeds on")
    rows, averages = [], []
    for measure, collections in _shared_measures(*pairs[0]).items():
        by_seed = [_differences(base, other, measure, collections) for base, other in pairs]
        measured = [_seed_row(pairs, by_seed, model, measure, c, seed, level) for c in collections]
        corrected = significance.holm([row["p_seeds"] for row in measured])
        rows += [{**row, "p_holm": p} for row, p in zip(measured, corrected, strict=True)]
        averages += _seed_averages(by_seed, model, measure, collections)
    return {
        "schema": 1,
        "baseline": baseline,
        "models": [model],
        "seed_noise": "measured",
        "seeds": len(pairs),
        "level": level,
        "rows": rows,
        "averages": averages,
    }


def _seed_row(
    pairs: Sequence[tuple[Values, Values]],
    by_seed: Sequence[Mapping[str, Sequence[float]]],
    model: str,
    measure: str,
    collection: str,
    seed: int,
    level: float,
) -> dict[str, Any]:
    diff_SN = [diffs[collection] for diffs in by_seed]
    if len({tuple(base[collection][measure]) for base, _ in pairs}) > 1:
        raise TdroError(f"the seeds are not over the same queries of {collection}", remedy="use the same test files")
    mean_S = [_mean(diff) for diff in diff_SN]
    mean_N = [_mean(column) for column in zip(*diff_SN, strict=True)]
    return {
        "model": model,
        "collection": collection,
        "measure": measure,
        "queries": len(mean_N),
        "baseline_value": _mean([_mean(base[collection][measure].values()) for base, _ in pairs]),
        "model_value": _mean([_mean(other[collection][measure].values()) for _, other in pairs]),
        "difference": _mean(mean_S),
        "differences": mean_S,
        "seed_spread": _spread(mean_S),
        "p_seeds": significance.paired_t_test(mean_S, [0.0] * len(mean_S)),
        "p_queries": significance.paired_t_test(mean_N, [0.0] * len(mean_N)),
        "interval": list(significance.two_level_interval(diff_SN, seed=seed, level=level)),
    }


def _seed_averages(
    by_seed: Sequence[Mapping[str, Sequence[float]]], model: str, measure: str, collections: Sequence[str]
) -> list[dict[str, Any]]:
    rows = []
    for benchmark, members in _scopes(collections).items():
        weights = collection_weights(members)
        macro_S = [sum(weights[c] * _mean(diffs[c]) for c in members) for diffs in by_seed]
        cells = [_mean(diffs[c]) for diffs in by_seed for c in members]
        rows.append(
            {
                "model": model,
                "benchmark": benchmark,
                "measure": measure,
                "collections": len(members),
                "difference": _mean(macro_S),
                "differences": macro_S,
                "seed_spread": _spread(macro_S),
                "p_seeds": significance.paired_t_test(macro_S, [0.0] * len(macro_S)),
                "p_cells": significance.paired_t_test(cells, [0.0] * len(cells)),
            }
        )
    return rows


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def _spread(values: Sequence[float]) -> float:
    """Sample standard deviation."""
    from statistics import stdev

    return stdev(values)


# ---- tables ----


def comparison_table(comparison: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text, the header first: one a measure and collection, then the averages. A star: p <= 0.01."""
    seeds = comparison["seed_noise"] != "unknown"
    several = len(comparison["models"]) > 1
    tests = (
        [("p (seeds)", "p_seeds"), ("p (queries)", "p_queries"), ("p (Holm)", "p_holm")]
        if seeds
        else [("p (t-test)", "p_t_test"), ("p (random.)", "p_randomisation"), ("p (Holm)", "p_holm")]
    )
    header = [
        *(["model"] if several else []),
        *("measure", "collection"),
        comparison["baseline"],
        "compared" if several else comparison["models"][0],
        "difference",
        f"{comparison['level']:.0%} interval",
        *(["seed spread"] if seeds else []),
        *(title for title, _ in tests),
    ]
    table = [header]
    for row in (*comparison["rows"], *comparison["averages"]):
        decisive = row.get("p_holm", row.get("p_seeds", row.get("p_randomisation")))
        table.append(
            [
                *([row["model"]] if several else []),
                row["measure"],
                row.get("collection") or f"average ({row['benchmark']}, {row['collections']})",
                _number(row.get("baseline_value")),
                _number(row.get("model_value")),
                f"{row['difference']:+.4f}" + ("*" if decisive <= SIGNIFICANT else ""),
                f"{row['interval'][0]:+.4f} to {row['interval'][1]:+.4f}" if "interval" in row else "",
                *([f"{row['seed_spread']:.4f}"] if seeds else []),
                *(_p(row.get(key)) for _, key in tests),
            ]
        )
    return table


def comparison_note(comparison: Mapping[str, Any]) -> str:
    """What must be said under the table."""
    star = f"* p <= {SIGNIFICANT} (corrected over collections by Holm)."
    if comparison["seed_noise"] == "unknown":
        return f"{star} One seed a model: seed noise is unknown, p values are over queries only."
    return f"{star} {comparison['seeds']} seeds: stars are over seeds; p (queries) ignores them."


def results_table(
    summaries: Mapping[str, Mapping[str, Any]], comparison: Mapping[str, Any] | None = None
) -> list[list[str]]:
    """The paper's Table 3: a row a model, a column a benchmark and measure, in per cent.

    Beside a compared model's value stand the gain over the baseline and a star for p <= 0.01.
    """
    scopes = list(dict.fromkeys(name for s in summaries.values() for name in s["benchmarks"]))
    columns = [
        (scope, measure)
        for scope in scopes or ["all"]
        for measure in dict.fromkeys(m for s in summaries.values() for m in _scope(s, scope))
    ]
    gains = {
        (row["model"], row["benchmark"], row["measure"]): row for row in (comparison["averages"] if comparison else ())
    }
    table = [["model", *(measure if scope == "all" else f"{scope} {measure}" for scope, measure in columns)]]
    for model, found in summaries.items():
        cells = [model]
        for scope, measure in columns:
            value = _scope(found, scope).get(measure)
            cell = "" if value is None else f"{100 * value:.1f}"
            if cell and (gain := gains.get((model, scope, measure))):
                p = gain.get("p_randomisation", gain.get("p_seeds"))
                cell += ("*" if p <= SIGNIFICANT else "") + f" ({100 * gain['difference']:+.1f})"
            cells.append(cell)
        table.append(cells)
    return table


def _scope(summary: Mapping[str, Any], scope: str) -> Mapping[str, float]:
    return summary["average"] if scope == "all" else summary["benchmarks"].get(scope, {})


def render_markdown(table: Sequence[Sequence[str]], note: str = "") -> str:
    """A Markdown table of rows of text, the header first."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in table]
    numeric = [_is_numeric(table, column) for column in range(len(table[0]))]
    lines.insert(1, "|" + "|".join("---:" if right else "---" for right in numeric) + "|")
    return "\n".join([*lines, *(["", note.replace("*", chr(92) + "*")] if note else [])]) + "\n"


def render_latex(table: Sequence[Sequence[str]], note: str = "") -> str:
    """A LaTeX tabular (package booktabs) of rows of text, the header first."""
    columns = "".join("r" if _is_numeric(table, column) else "l" for column in range(len(table[0])))
    rows = [" & ".join(map(_escape_latex, row)) + r" \\" for row in table]
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}", *([rf"% {note}"] if note else [])]) + "\n"


def _is_numeric(table: Sequence[Sequence[str]], column: int) -> bool:
    cells = [row[column] for row in table[1:] if row[column]]
    return bool(cells) and all(re.match(r"[+<-]?\s?\d", cell) for cell in cells)


def _escape_latex(text: str) -> str:
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    return text.replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ").replace("<", "$<$")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"
