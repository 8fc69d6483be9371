"""Which of the passages that a miner found for a query become its negatives: rules on ranks, scores and texts."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from tdro_cli.protocols import Ranking

if TYPE_CHECKING:
    from tdro_cli.recipe import PositiveMargin, Sampling


class Candidate(NamedTuple):
    """A passage that a miner found: its rank from 1, known positives counted, and its score.

    `miner_score`: where a rescorer gave `score`, the score that it had before.
    """

    docid: str
    rank: int
    score: float
    miner_score: float | None = None


@dataclass(frozen=True)
class Pool:
    """What a ranking holds for one query.

    `candidates`: best first, from the window, each text once. `equal_texts`: passages of the window that are none since
    they have the text of a known positive, a given negative, the query or a better candidate. `positive_rank`,
    `positive_score`: of the best known positive, None where it was not found. `beaten`: whether a passage that is no
    known positive, of whatever rank, scores above it.
    """

    candidates: Sequence[Candidate]
    equal_texts: int
    positive_rank: int | None
    positive_score: float | None
    beaten: bool

    @property
    def above_positive(self) -> int:
        """Candidates that score above the positive: likely positives that nobody has marked."""
        best = self.positive_score
        return 0 if best is None else sum(candidate.score > best for candidate in self.candidates)


def pool_of(
    ranking: Ranking,
    keys: Sequence[int],
    *,
    positives: Collection[str],
    refused: Collection[str],
    refused_texts: Collection[int],
    window: Sequence[int],
) -> Pool:
    """The candidates of a ranking. `keys`: of the ranked passages' texts; `refused_texts`: such keys.

    `positives`, `refused`: docids. The ranks of `window` are counted from 1, known positives included.
    """
    candidates, texts, equal_texts = [], set(refused_texts), 0
    positive_rank = positive_score = None
    best_other = -math.inf
    first, last = window
    ranked = zip(ranking.docids, map(float, ranking.scores), keys, strict=True)
    for rank, (docid, score, key) in enumerate(ranked, 1):
        if docid in positives:
            positive_rank = positive_rank or rank
            positive_score = score if positive_score is None else max(score, positive_score)
            continue
        inside = first <= rank <= last
        if docid in refused:
            continue
        if key in texts:
            equal_texts += inside
            continue
        if score > best_other:
            best_other = score
        if inside:
            texts.add(key)
            candidates.append(Candidate(docid, rank, score))
    beaten = positive_score is not None and best_other > positive_score
    return Pool(candidates, equal_texts, positive_rank, positive_score, beaten)


def rescored(pool: Pool, scores: Sequence[float], positive_scores: Sequence[float]) -> Pool:
    """The pool with other scores for its candidates, in their order, and for the known positives; best first again."""
    renewed = [
        candidate._replace(score=score, miner_score=candidate.score)
        for candidate, score in zip(pool.candidates, scores, strict=True)
    ]
    best = max(positive_scores, default=None)
    beaten = best is not None and any(candidate.score > best for candidate in renewed)
    ordered = sorted(renewed, key=lambda candidate: (-candidate.score, candidate.rank))
    return replace(pool, candidates=ordered, positive_score=best, beaten=beaten)


def score_limit(positive_score: float, margin: PositiveMargin) -> float:
    """The highest score that a candidate may have.

    `relative` is TopK-PercPos, `absolute` TopK-MarginPos and `threshold` TopK-Abs of NV-Retriever (arXiv:2407.15831).
    For negative scores, too, a smaller share is a lower limit.
    """
    if margin.name == "threshold":
        return margin.value
    if margin.name == "absolute":
        return positive_score - margin.value
    return positive_score + (margin.value - 1) * abs(positive_score)


def within_margin(pool: Pool, margin: PositiveMargin | None) -> Sequence[Candidate]:
    """The candidates that score at most what the margin allows.

    A margin from the positive is measured on the best known one. Where the ranking has none, the miner can't tell how
    good the candidates are, and they stay: it is the audit that says how often (`positives_found`).
    """
    if margin is None or (margin.name != "threshold" and pool.positive_score is None):
        return pool.candidates
    limit = score_limit(pool.positive_score or 0.0, margin)
    return [candidate for candidate in pool.candidates if candidate.score <= limit]


def draw(
    candidates: Sequence[Candidate],
    count: int,
    sampling: Sampling,
    generator: random.Random,
    positive_score: float | None = None,
) -> list[Candidate]:
    """`count` distinct candidates, fewer where there are fewer, best first.

    `simans` draws with p ∝ exp(-a (score - positive_score - b)²) (SimANS, arXiv:2210.11773), without a positive's score
    as `uniform` does.
    """
    if sampling.name == "top" or len(candidates) <= count:
        return list(candidates[:count])
    if sampling.name == "uniform" or positive_score is None:
        return [candidates[i] for i in sorted(generator.sample(range(len(candidates)), count))]
    # the `count` largest of log p plus Gumbel noise are draws without replacement; log p can't underflow as p does
    key = [
        -sampling.a * (candidate.score - positive_score - sampling.b) ** 2 + _gumbel(generator)
        for candidate in candidates
    ]
    largest = sorted(range(len(candidates)), key=lambda i: -key[i])[:count]
    return [candidates[i] for i in sorted(largest)]


def _gumbel(generator: random.Random) -> float:
    return -math.log(generator.expovariate(1.0) or 5e-324)


def generator_of(seed: int, task: str, query_id: str) -> random.Random:
    """The random numbers of one query: the same wherever and whenever it is mined."""
    key = json.dumps([seed, task, query_id]).encode()
    return random.Random(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))
