"""Training files as memory-mapped Arrow caches: any row of millions at once, at no cost in memory."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from tdro_cli.artifacts import (
    digest_file,
    digest_file_once,
    digest_of,
    is_complete,
    manifest_of,
    memo_of,
    publishing,
    read_json,
    remembered_digest,
    stamp_of,
    write_json,
)
from tdro_cli.data.formats import (
    Example,
    FirstSeen,
    Passage,
    bad_row_error,
    detect_format,
    passage_text,
    read_numbered_examples,
    reading,
)
from tdro_cli.errors import Problems, TdroError

if TYPE_CHECKING:
    import pyarrow

IMPORT_VERSION = 1  # raise it when the cached rows would differ for the same file
BATCH_ROWS = 1024
SHOWN_PROBLEMS = 20


class TaskStore:
    """The examples of one training file, read from its cache.

    `format`: the layout of the file. `rejected`: rows left out (`--skip-bad-rows`), kept in `folder/rejected.jsonl`.
    `warnings`: what is odd about the file but no error. `facts`: counts and mean lengths in characters.
    """

    def __init__(self, name: str, path: Path, folder: Path):
        import pyarrow as pa

        self.name, self.path, self.folder = name, path, folder
        meta = read_json(folder / "meta.json")
        self.digest: str = meta["digest"]
        self.format: str = meta["format"]
        self.rejected: int = meta["rejected"]
        self.warnings: list[str] = meta["warnings"]
        self.facts: dict[str, Any] = meta["facts"]
        self._num_rows: int = meta["facts"]["rows"]
        self._file = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow")))

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the same cache."""
        return TaskStore, (self.name, self.path, self.folder)

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[Example]:
        for batch in self._batches():
            yield from map(_example, batch.to_pylist())

    def example(self, i: int) -> Example:
        """Row i. Raises IndexError outside 0..len-1."""
        return self.examples([i])[0]

    def examples(self, rows: Sequence[int] | np.ndarray) -> list[Example]:
        """Rows in the order asked for, repetitions allowed. Raises IndexError outside 0..len-1."""
        row_N = np.asarray(rows, np.int64)
        if len(row_N) and not (row_N.min() >= 0 and row_N.max() < len(self)):
            raise IndexError(f"task {self.name} has rows 0..{len(self) - 1}, asked for {row_N.min()}..{row_N.max()}")
        found: list[Example] = [None] * len(row_N)
        number, batch = -1, None
        for i in np.argsort(row_N, kind="stable").tolist():  # each batch is opened once
            wanted, offset = divmod(int(row_N[i]), BATCH_ROWS)
            if wanted != number:
                number, batch = wanted, self._file.get_batch(wanted)
            found[i] = _example(batch.slice(offset, 1).to_pylist()[0])
        return found

    def held_out_rows(self, fraction: float, *, most: int | None = None) -> np.ndarray:
        """Rows to keep aside, sorted, int64: those whose query text hashes below `fraction` of the range.

        The same query text is on the same side in every task and file, whatever the order of the rows; a larger
        fraction holds the rows of a smaller one. `most`: no more than this many, those of the smallest hashes. Raises
        ValueError unless 0 <= fraction <= 1.
        """
        hashes = self._query_hashes()
        rows = np.flatnonzero(_is_held_out(hashes, fraction))
        if most is not None and len(rows) > most:
            rows = np.sort(rows[np.argsort(hashes[rows], kind="stable")[:most]])
        return rows

    def held_in_rows(self, fraction: float) -> np.ndarray:
        """The rows that `held_out_rows(fraction)` leaves, sorted, int64."""
        return np.flatnonzero(~_is_held_out(self._query_hashes(), fraction))

    def rows_with_negatives(self) -> np.ndarray:
        """The rows that have a negative passage, sorted, int64."""
        return np.flatnonzero(
            np.concatenate(
                [
                    np.diff(batch.column("passages").offsets.to_numpy()) > batch.column("num_positives").to_numpy()
                    for batch in self._batches()
                ]
            )
        )

    def passages(self) -> Iterator[Passage]:
        """The distinct passages of the file: the first of each `docid`, in order of appearance."""
        for batch in self._batches():
            passages = batch.column("passages").values
            yield from map(_passage, passages.filter(passages.field("first")).to_pylist())

    def _batches(self) -> Iterator[pyarrow.RecordBatch]:
        return map(self._file.get_batch, range(self._file.num_record_batches))

    def _query_hashes(self) -> np.ndarray:
        hashes = [batch.column("query_hash").to_numpy() for batch in self._batches()]
        return np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)


def open_task(
    name: str,
    path: str | Path,
    *,
    cache: Path,
    skip_bad_rows: bool = False,
    advance: Callable[[int], object] | None = None,
) -> TaskStore:
    """The task's training file with random access; imported into `cache` the first time its content is met.

    Raises Problems naming up to 20 bad rows, or TdroError for a file that cannot be used, and then leaves nothing
    behind. With `skip_bad_rows` they are left out, counted, and kept in `rejected.jsonl`. `advance(n)` is called with
    the rows read while importing. Several processes may open the same file at once: one imports, the others wait.
    """
    path, cache = Path(path), Path(cache)
    memo = memo_of(path, cache / "index")
    with reading(path):
        stamp = stamp_of(path)
        remembered = remembered_digest(memo, stamp)
        content = remembered or digest_file(path)
    digest = digest_of({"import_version": IMPORT_VERSION, "content": content, "skip_bad_rows": skip_bad_rows})
    folder = cache / f"{digest[:32]}{'-skip' if skip_bad_rows else ''}"
    store = _open_entry(name, path, folder)
    if store is None:
        with _locked(folder.with_name(f".{folder.name}.lock")):
            store = _open_entry(name, path, folder)  # another process may have made it while this one waited
            if store is None:
                _make_entry(path, folder, digest, stamp, skip_bad_rows, advance or (lambda rows: None))
                store = TaskStore(name, path, folder)
    if not remembered:
        write_json(memo, {"stamp": stamp, "sha256": content})
    return store


# ---- the cache ----


def _open_entry(name: str, path: Path, folder: Path) -> TaskStore | None:
    """The store if its cache is whole: complete, and its files those that were written."""
    if not is_complete(folder):
        return None
    try:
        written, index = manifest_of(folder)["files"], folder.parent / "index"
        if digest_file(folder / "meta.json") != written["meta.json"]:
            return None
        # read again only where size, time or inode have changed since it was found whole
        if digest_file_once(folder / "rows.arrow", index) != written["rows.arrow"]:
            return None
        return TaskStore(name, path, folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time is inside, for one `path`; the file is gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed, also when the process dies
            if not _is_at(path, file):
                continue  # the process before removed the file that this one waited for
            try:
                yield
            finally:
                path.unlink()
            return


def _is_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _make_entry(
    path: Path, folder: Path, digest: str, stamp: list[int], skip_bad_rows: bool, advance: Callable[[int], object]
) -> None:
    for left in [folder, *folder.parent.glob(f".{folder.name}.*.partial")]:
        shutil.rmtree(left, ignore_errors=True)  # damaged, or of a process that was killed: the lock is ours
    with publishing(folder, lambda: {"kind": "task", "file": path.name, "digest": digest}) as aside:
        with open(aside / "rejected.jsonl", "w") if skip_bad_rows else nullcontext() as file:
            meta = _import(path, aside / "rows.arrow", _Rejected(path, file), advance)
        with reading(path):
            if stamp_of(path) != stamp:
                raise TdroError("the training file changed while it was read", where=f"{path}", remedy="run again")
        write_json(aside / "meta.json", {"digest": digest, **meta})


class _Rejected:
    """Bad rows: written to `file`, or, where there is none, collected to be raised together."""

    def __init__(self, path: Path, file: TextIO | None):
        self.path, self.file, self.count = path, file, 0
        self.errors: list[TdroError] = []

    def __call__(self, number: int, reason: str, row: str) -> None:
        self.count += 1
        if self.file:
            record = {"file": self.path.name, "line": number, "reason": reason, "row": row}
            self.file.write(json.dumps(record) + "\n")
        elif self.count <= SHOWN_PROBLEMS:
            self.errors.append(bad_row_error(self.path, number, reason))

    def raise_errors(self) -> None:
        if more := self.count - len(self.errors) if self.errors else 0:
            self.errors.append(TdroError(f"and {more:,} more bad rows", where=f"{self.path}"))
        if self.errors:
            raise Problems(self.errors)


# ---- from examples to Arrow ----


def _import(path: Path, target: Path, rejected: _Rejected, advance: Callable[[int], object]) -> dict[str, Any]:
    """Streams the file into `target` and returns what there is to know about it."""
    import pyarrow as pa

    facts, docids = _Facts(), FirstSeen()
    conflicts = _DocidConflicts(path)
    examples = read_numbered_examples(path, on_bad_row=rejected)
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, _schema()) as writer:
        while numbered := list(islice(examples, BATCH_ROWS)):
            advance(len(numbered))
            if rejected.errors:
                continue  # nothing will be kept; the rest is read to count what is wrong with it
            batch = [example for _, example in numbered]
            passages = [passage for example in batch for passage in example.positives + example.negatives]
            # process-bound hashes will do: they are compared within this import only
            content = [hash((passage.title, passage.text)) for passage in passages]
            is_first, first_content = docids.note([hash(passage.docid) for passage in passages], content)
            conflicts.note(numbered, passages, first_content != np.asarray(content))
            facts.note(batch, passages)
            writer.write_batch(_record_batch(batch, passages, is_first))
    rejected.raise_errors()
    if not facts.rows:
        remedy = "every row is bad: run without --skip-bad-rows to see why" if rejected.count else "write a row"
        raise TdroError("no row of the training file can be used", where=f"{path}", remedy=remedy)
    return {
        "format": detect_format(path),
        "rejected": rejected.count,
        "warnings": conflicts.warnings(),
        "facts": {**facts.summary(), "distinct_passages": len(docids)},
    }


class _DocidConflicts:
    """Passages whose docid was seen with another text: the first text is the one that `passages()` gives."""

    def __init__(self, path: Path):
        self.path, self.count = path, 0
        self._shown: list[str] = []

    def note(self, numbered: list[tuple[int, Example]], passages: list[Passage], differs: np.ndarray) -> None:
        if not differs.any():
            return
        self.count += int(differs.sum())
        lines = [number for number, example in numbered for _ in example.positives + example.negatives]
        for i in np.flatnonzero(differs)[: SHOWN_PROBLEMS - len(self._shown)]:
            place = f"{self.path.name}:{lines[i]}"
            self._shown.append(f"docid {passages[i].docid!r} names another text than before ({place})")

    def warnings(self) -> list[str]:
        more = self.count - len(self._shown)
        return self._shown + ([f"and {more:,} more docids that name another text than before"] if more else [])


class _Facts:
    """Counts and lengths of the accepted rows."""

    def __init__(self) -> None:
        self.rows = self.without_negatives = self.query_characters = self.passage_characters = 0
        self._positives, self._negatives = _Count(), _Count()

    def note(self, batch: list[Example], passages: list[Passage]) -> None:
        self.rows += len(batch)
        self.without_negatives += sum(not example.negatives for example in batch)
        self.query_characters += sum(len(example.query) for example in batch)
        self.passage_characters += sum(len(passage_text(passage)) for passage in passages)
        self._positives.note([len(example.positives) for example in batch])
        self._negatives.note([len(example.negatives) for example in batch])

    def summary(self) -> dict[str, Any]:
        passages = self._positives.total + self._negatives.total
        return {
            "rows": self.rows,
            "positives": vars(self._positives),
            "negatives": vars(self._negatives),
            "rows_without_negatives": self.without_negatives,
            "mean_query_characters": round(self.query_characters / self.rows, 2),
            "mean_passage_characters": round(self.passage_characters / passages, 2),
        }


class _Count:
    """Passages of one kind: in all, and the fewest and the most of a row."""

    def __init__(self) -> None:
        self.total, self.max = 0, 0
        self.min: int | None = None

    def note(self, counts: list[int]) -> None:
        self.total += sum(counts)
        self.min = min(counts) if self.min is None else min(self.min, *counts)
        self.max = max(self.max, *counts)


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    text = pa.string()
    passage = pa.struct(
        {"docid": text, "title": text, "text": text, "extra": text, "first": pa.bool_()}  # first of its docid
    )
    return pa.schema(
        {
            "query_id": text,
            "query": text,
            "query_hash": pa.uint64(),
            "num_positives": pa.int32(),
            "passages": pa.list_(passage),  # the positives, then the negatives
            "extra": text,  # a JSON object, or null
        }
    )


def _record_batch(batch: list[Example], passages: list[Passage], is_first: np.ndarray) -> pyarrow.RecordBatch:
    import pyarrow as pa

    schema, text = _schema(), pa.string()
    ends = np.cumsum([0] + [len(example.positives) + len(example.negatives) for example in batch], dtype=np.int32)
    columns = {
        "docid": pa.array([passage.docid for passage in passages], text),
        "title": pa.array([passage.title for passage in passages], text),
        "text": pa.array([passage.text for passage in passages], text),
        "extra": pa.array([_extra_json(passage.extra) for passage in passages], text),
        "first": pa.array(is_first),
    }
    struct = pa.StructArray.from_arrays(list(columns.values()), fields=list(schema.field("passages").type.value_type))
    return pa.record_batch(
        [
            pa.array([example.query_id for example in batch], text),
            pa.array([example.query for example in batch], text),
            pa.array([_query_hash(example.query) for example in batch], pa.uint64()),
            pa.array([len(example.positives) for example in batch], pa.int32()),
            pa.ListArray.from_arrays(pa.array(ends), struct, type=schema.field("passages").type),
            pa.array([_extra_json(example.extra) for example in batch], text),
        ],
        schema=schema,
    )


def _is_held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be from 0 to 1, got {fraction}")
    limit = int(fraction * 2**64)
    return hashes < np.uint64(limit) if limit < 2**64 else np.ones(len(hashes), bool)


def _query_hash(query: str) -> int:
    """Uniform over 0..2**64-1, and the same for the same text on every machine."""
    return int.from_bytes(hashlib.sha256(query.encode()).digest()[:8], "big")


def _extra_json(extra: Any) -> str | None:
    return json.dumps(extra, ensure_ascii=False) if extra else None


def _example(row: dict[str, Any]) -> Example:
    passages = [_passage(passage) for passage in row["passages"]]
    positives, negatives = passages[: row["num_positives"]], passages[row["num_positives"] :]
    return Example(row["query_id"], row["query"], tuple(positives), tuple(negatives), _extra(row))


def _passage(row: dict[str, Any]) -> Passage:
    return Passage(row["docid"], row["title"], row["text"], _extra(row))


def _extra(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads(row["extra"]) if row["extra"] else {}
