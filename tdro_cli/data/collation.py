"""From the rows of a batch to token lists, with what tells equal texts apart.

B queries, M passages of all queries together, P positives of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np

from tdro_cli.data.batching import Batch, BatchPlan, choose_passages
from tdro_cli.data.formats import Example, passage_text
from tdro_cli.data.tasks import TaskStore
from tdro_cli.data.tokenization import TextTokenizer

NO_TEXT = -1  # fills ragged rows of text ids


@dataclass(frozen=True)
class TrainingTask:
    """A task as a training run uses it: `rows` are those of the file, in its order; a range where it is all of them."""

    name: str
    store: TaskStore
    rows: np.ndarray | range
    prompt: str
    symmetric: bool
    in_batch_negatives: bool

    def file_rows(self, row_W: np.ndarray) -> np.ndarray:
        """The rows of the file that the batch's row numbers stand for."""
        return row_W if isinstance(self.rows, range) else self.rows[row_W]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """One rank's share of a batch. A query's passages stand together, its positive first.

    `first_B`: index of each query's positive among the passages; `count_B`: how many passages it has.
    Text ids are equal where the texts are: `positive_ids_BP` names all positives of the row, filled with NO_TEXT.
    The texts are without prompts. Token ids are int32.
    """

    queries: list[np.ndarray]
    passages: list[np.ndarray]
    task_B: np.ndarray
    row_B: np.ndarray
    first_B: np.ndarray
    count_B: np.ndarray
    query_id_B: np.ndarray
    passage_id_M: np.ndarray
    positive_ids_BP: np.ndarray
    query_texts: Sequence[str] = ()
    passage_texts: Sequence[str] = ()

    def owner_M(self) -> np.ndarray:
        """The query that each passage belongs to."""
        return np.repeat(np.arange(len(self.queries)), self.count_B)

    def __getstate__(self) -> dict[str, Any]:
        """Few large arrays in place of many small ones: to be sent to another process at no cost."""
        return {**self.__dict__, **{side: _joined(getattr(self, side)) for side in ("queries", "passages")}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            {**state, "queries": _divided(*state["queries"]), "passages": _divided(*state["passages"])}
        )


def collate(
    plan: BatchPlan,
    batch: Batch,
    part: slice,
    tasks: Sequence[TrainingTask],
    tokenizer: TextTokenizer,
    *,
    hard_negatives: int,
) -> TokenBatch:
    """Reads and tokenizes the rows of `part` of the batch, all tasks together: many tasks cost what few do."""
    task_B, row_B, visit_B = batch.task_B[part], batch.row_B[part], batch.visit_B[part]
    file_row_B, examples = _read(tasks, task_B, row_B)
    positive_B, negatives_B = choose_passages(
        plan,
        task_B,
        row_B,
        visit_B,
        positives_B=np.array([len(example.positives) for example in examples], dtype=np.int64),
        negatives_B=np.array([len(example.negatives) for example in examples], dtype=np.int64),
        wanted=hard_negatives,
    )
    chosen = [
        [example.positives[positive], *(example.negatives[i] for i in negatives)]
        for example, positive, negatives in zip(examples, positive_B, negatives_B, strict=True)
    ]
    count_B = np.array([len(own) for own in chosen], dtype=np.int64)
    query_texts = [example.query for example in examples]
    passage_texts = [passage_text(passage) for own in chosen for passage in own]
    prompts = [tasks[number].prompt for number in task_B]
    alike = [tasks[number].prompt if tasks[number].symmetric else "" for number in np.repeat(task_B, count_B)]
    return TokenBatch(
        queries=_divided(*_joined(tokenizer.queries(query_texts, prompts))),
        passages=_divided(*_joined(tokenizer.passages(passage_texts, alike))),
        task_B=task_B,
        row_B=file_row_B,
        first_B=np.cumsum(count_B) - count_B,
        count_B=count_B,
        query_id_B=np.array([text_id(text) for text in query_texts], dtype=np.int64),
        passage_id_M=np.array([text_id(text) for text in passage_texts], dtype=np.int64),
        positive_ids_BP=_rectangle([[text_id(passage_text(p)) for p in example.positives] for example in examples]),
        query_texts=query_texts,
        passage_texts=passage_texts,
    )


def _read(tasks: Sequence[TrainingTask], task_B: np.ndarray, row_B: np.ndarray) -> tuple[np.ndarray, list[Example]]:
    """The rows in their files, and what stands there."""
    file_row_B = np.zeros(len(task_B), dtype=np.int64)
    examples: list[Any] = [None] * len(task_B)
    for number in np.unique(task_B):
        where = np.flatnonzero(task_B == number)
        file_row_B[where] = tasks[number].file_rows(row_B[where])
        for place, example in zip(where, tasks[number].store.examples(file_row_B[where]), strict=True):
            examples[place] = example
    return file_row_B, examples


def _joined(token_lists: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """All tokens end to end, int32, and the length of each text."""
    length_N = np.fromiter(map(len, token_lists), dtype=np.int64, count=len(token_lists))
    if isinstance(next(iter(token_lists), None), np.ndarray):
        return np.concatenate(token_lists), length_N
    return np.fromiter(chain.from_iterable(token_lists), dtype=np.int32, count=int(length_N.sum())), length_N


def _divided(token_T: np.ndarray, length_N: np.ndarray) -> list[np.ndarray]:
    ends = np.cumsum(length_N).tolist()
    return [token_T[start:end] for start, end in pairwise([0, *ends])]


def text_id(text: str) -> int:
    """A 63-bit number for a text; equal texts have equal numbers, in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def _rectangle(rows: Sequence[Sequence[int]]) -> np.ndarray:
    filled = np.full((len(rows), max(map(len, rows), default=0)), NO_TEXT, dtype=np.int64)
    for place, row in enumerate(rows):
        filled[place, : len(row)] = row
    return filled
