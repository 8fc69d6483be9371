"""What mining found and took, task by task: counts, the share of likely false negatives, rows to read."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tdro_cli.data.formats import Example, Passage, passage_text
from tdro_cli.retrieve.choosing import Candidate, Pool
from tdro_cli.retrieve.passages import normalised

SHOWN_EXAMPLES, SHOWN_CHARACTERS = 10, 300
READ_CHARACTERS, READ_NEGATIVES = 160, 4  # of the same rows on the page
RANKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # last ranks of the histogram's bins


@dataclass
class Tally:
    """Counts over the mined rows of a task. Those of several ranks add up to those of one."""

    counts: Counter[str] = field(default_factory=Counter)
    ranks: Counter[int] = field(default_factory=Counter)
    positive_ranks: Counter[int] = field(default_factory=Counter)
    shown: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)

    def note(
        self,
        example: Example,
        found: int,
        pool: Pool,
        kept: Sequence[Candidate],
        chosen: Sequence[Candidate],
        num_mined: int,
        mined: Callable[[], Sequence[Passage]],
        order: float,
    ) -> None:
        """One row: `found` passages in its ranking, `kept` by the margin, `chosen`, `mined` with padding.

        `mined` is asked only where its texts are looked at. `order`: a random number; the rows with the lowest are
        shown.
        """
        best = pool.positive_score
        self.counts.update(
            mined_rows=1,
            nothing_found=not found,
            positives_found=pool.positive_rank is not None,
            positives_first=pool.positive_rank == 1,
            positives_scored=best is not None,
            rows_above_positive=pool.beaten,
            candidates=len(pool.candidates),
            candidates_compared=0 if best is None else len(pool.candidates),
            candidates_above_positive=pool.above_positive,
            dropped_by_margin=len(pool.candidates) - len(kept),
            dropped_as_equal_text=pool.equal_texts,
            mined=len(chosen),
            mined_above_positive=0 if best is None else sum(candidate.score > best for candidate in chosen),
            padded=num_mined - len(chosen),
        )
        self.ranks.update(candidate.rank for candidate in chosen)
        if pool.positive_rank:
            self.positive_ranks[pool.positive_rank] += 1
        self._note_answers(example, mined)
        self._show(example, pool, mined, order)

    def _note_answers(self, example: Example, mined: Callable[[], Sequence[Passage]]) -> None:
        if answers := [normalised(answer) for answer in _answers(example)]:
            texts = [normalised(passage_text(passage)) for passage in mined()]
            inside = sum(any(answer in text for answer in answers) for text in texts)
            self.counts.update(
                rows_with_answers=1, negatives_of_rows_with_answers=len(texts), negatives_with_answer=inside
            )

    def _show(self, example: Example, pool: Pool, mined: Callable[[], Sequence[Passage]], order: float) -> None:
        if len(self.shown) >= SHOWN_EXAMPLES and -order < self.shown[0][0]:
            return
        row = {
            "query_id": example.query_id,
            "query": example.query[:SHOWN_CHARACTERS],
            "positive": passage_text(example.positives[0])[:SHOWN_CHARACTERS] if example.positives else None,
            "positive_rank": pool.positive_rank,
            "positive_score": None if pool.positive_score is None else round(pool.positive_score, 6),
            "negatives": [
                {**passage.extra, "docid": passage.docid, "text": passage_text(passage)[:SHOWN_CHARACTERS]}
                for passage in mined()
            ],
        }
        self._add((-order, example.query_id, row))

    def _add(self, row: tuple[float, str, dict[str, Any]]) -> None:
        """A heap by order and query id: which rows are shown does not depend on the order of the rows."""
        heapq.heappush(self.shown, row)
        if len(self.shown) > SHOWN_EXAMPLES:
            heapq.heappop(self.shown)

    def add(self, other: Tally) -> None:
        self.counts.update(other.counts)
        self.ranks.update(other.ranks)
        self.positive_ranks.update(other.positive_ranks)
        for row in other.shown:
            self._add(row)

    def to_json(self) -> dict[str, Any]:
        pairs = {name: sorted(getattr(self, name).items()) for name in ("counts", "ranks", "positive_ranks")}
        return {**pairs, "shown": self.shown}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Tally:
        counters = {name: Counter(dict(value[name])) for name in ("counts", "ranks", "positive_ranks")}
        return Tally(**counters, shown=[tuple(row) for row in value["shown"]])


def _answers(example: Example) -> list[str]:
    """The accepted answer strings that a row brings along."""
    answers = example.extra.get("answers") or example.extra.get("answer") or []
    answers = [answers] if isinstance(answers, str) else answers
    return [answer for answer in answers if isinstance(answer, str) and answer.strip()]


def task_audit(tally: Tally, rows: Counter[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The account of one task. `rows`: counts over all its rows, `facts`: what the miner says.

    The likely false negatives are counted among the window's candidates and among the negatives that were taken.
    """
    counts = tally.counts
    audit = {
        "rows": rows["rows"],
        "mined_rows": counts["mined_rows"],
        "copied": not counts["mined_rows"],
        **facts,
        "negatives": rows["negatives"],
        "mined": counts["mined"],
        "padded": counts["padded"],
        "rows_with_none": rows["rows_with_none"],
        "rows_with_fewer": rows["rows_with_fewer"],
        "nothing_found": counts["nothing_found"],
        "positives_found": counts["positives_found"],
        "share_positive_found": _share(counts["positives_found"], counts["mined_rows"]),
        "share_positive_first": _share(counts["positives_first"], counts["mined_rows"]),
        "share_rows_above_positive": _share(counts["rows_above_positive"], counts["positives_scored"]),
        "candidates": counts["candidates"],
        "candidates_above_positive": counts["candidates_above_positive"],
        "share_candidates_above_positive": _share(counts["candidates_above_positive"], counts["candidates_compared"]),
        "dropped_by_margin": counts["dropped_by_margin"],
        "dropped_as_equal_text": counts["dropped_as_equal_text"],
        "share_equal_text": _share(
            counts["dropped_as_equal_text"], counts["candidates"] + counts["dropped_as_equal_text"]
        ),
        "mined_above_positive": counts["mined_above_positive"],
        "share_mined_above_positive": _share(counts["mined_above_positive"], counts["mined"]),
        "ranks": histogram(tally.ranks),
        "positive_ranks": histogram(tally.positive_ranks),
        "examples": [row for _, _, row in sorted(tally.shown, key=lambda item: (-item[0], item[1]))],
    }
    if counts["rows_with_answers"]:
        audit["rows_with_answers"] = counts["rows_with_answers"]
        audit["negatives_with_answer"] = counts["negatives_with_answer"]
        audit["share_with_answer"] = _share(counts["negatives_with_answer"], counts["negatives_of_rows_with_answers"])
    return audit


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def histogram(ranks: Counter[int]) -> dict[str, int]:
    """{"1": n, "2": n, "3-5": n, ...}: how often each rank occurs."""
    edges = [*RANKS, max([RANKS[-1] + 1, *ranks])]
    bins, first = {}, 1
    for last in edges:
        count = sum(ranks[rank] for rank in ranks if first <= rank <= last)
        if count:
            bins[f"{first}-{last}" if last > first else f"{first}"] = count
        first = last + 1
    return bins


# ---- the page ----


def audit_page(audit: Mapping[str, Any]) -> str:
    """The audit as Markdown: a table, and ten rows of each task to read."""
    mined = {name: task for name, task in audit["tasks"].items() if not task["copied"]}
    lines = [f"# Hard negatives: {audit['miner']}", "", *_table(audit["tasks"])]
    if mined:
        lines += ["", "![ranks of the negatives and of the positives](ranks.png)"]
    for name, task in mined.items():
        lines += ["", f"## {name}", "", *(line for row in task["examples"] for line in _row(row))]
    return "\n".join(lines) + "\n"


_COLUMNS = {
    "rows": "rows",
    "mined": "mined",
    "padded": "padded",
    "rows_with_fewer": "rows with too few",
    "share_positive_found": "positive found",
    "share_positive_first": "found first",
    "share_candidates_above_positive": "candidates above positive",
    "share_equal_text": "equal text",
    "share_mined_above_positive": "taken above positive",
    "share_with_answer": "answer inside",
}


def _table(tasks: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield f"| task | {' | '.join(_COLUMNS.values())} |"
    yield "|---|" + "---:|" * len(_COLUMNS)
    for name, task in tasks.items():
        yield f"| {name} | {' | '.join(_cell(key, task.get(key)) for key in _COLUMNS)} |"


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if key.startswith("share") else f"{value:,}"


def _row(row: Mapping[str, Any]) -> Iterator[str]:
    yield f"* **{_brief(row['query'])}** (`{row['query_id']}`)"
    found = f"rank {row['positive_rank']}" if row["positive_rank"] else "not found"
    score = "" if row["positive_score"] is None else f", {row['positive_score']:.4g}"
    yield f"  * positive, {found}{score}: {_brief(row['positive'] or '')}"
    for negative in row["negatives"][:READ_NEGATIVES]:
        found = f"rank {negative['rank']}, {negative['score']:.4g}" if negative["rank"] else "at random"
        yield f"  * {found}: {_brief(negative['text'])}"
    more = len(row["negatives"]) - READ_NEGATIVES
    if more > 0:
        yield f"  * and {more} more"


def _brief(text: str) -> str:
    """One line of text that Markdown leaves alone."""
    line = " ".join(text.split())
    cut = line if len(line) <= READ_CHARACTERS else f"{line[: READ_CHARACTERS - 1]}…"
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in cut)
