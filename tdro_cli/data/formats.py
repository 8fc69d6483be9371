"""Training files: what their rows may look like, and how a row becomes an `Example`.

Containers: JSON lines (plain, gzip, zstandard) and Parquet. Layouts: the authors' (`tdro`), FlagEmbedding's
(`flagembedding`), and pairs or triplets as sentence-transformers reads them (`sentence-transformers`).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from tdro_cli.artifacts import refuse_endless
from tdro_cli.errors import TdroError

LAYOUTS = {
    "tdro": "query_id, query, positive_passages [{docid, title, text}], negative_passages",
    "flagembedding": "query, pos [text], neg [text]",
    "sentence-transformers": "anchor and positive, query and answer, question and answer, or sentence1 and sentence2, "
    "with negative or negative_1, negative_2 ...; or an array [query, positive, negative ...]",
}
PAIRS = (
    ("anchor", "positive"),
    ("query", "positive"),
    ("question", "positive"),
    ("query", "answer"),
    ("question", "answer"),
    ("sentence1", "sentence2"),
)
BAD_ROW_REMEDY = "fix the line or pass --skip-bad-rows"
_CHUNK_ROWS, _CHUNK_BYTES = 1024, 1 << 24
MOST_LINE_BYTES = 1 << 28  # 256 MiB: what has no line ends would be read into memory as a whole
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet"}
_SUFFIXES = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd", ".parquet": "parquet", ".pq": "parquet"}

BadRow = Callable[[int, str, str], object]  # line number from 1, reason, the row as it was read


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage; `extra` holds the further keys of its JSON object (score, rank ...), kept when it is rewritten."""

    docid: str
    title: str
    text: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Example:
    """A query with its positive and hard negative passages; `extra` holds the further keys of the row (answers ...)."""

    query_id: str
    query: str
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...]
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


def passage_text(passage: Passage) -> str:
    """Title, space, text (arXiv:2408.10613); the other alone where one of them is empty."""
    return f"{passage.title} {passage.text}" if passage.title and passage.text else passage.title or passage.text


def detect_format(path: str | Path) -> str:
    """The layout of a training file, a key of `LAYOUTS`. Raises TdroError for an unknown one."""
    path, first = Path(path), None
    for rows in _chunks(_rows(path)):
        if layout := _layout_of_chunk(path, rows):
            return layout.name
        first = first or rows[0]
    if first is None:
        raise _no_rows(path)
    raise bad_row_error(path, first.number, str(first.reason))


def read_examples(path: str | Path, *, on_bad_row: BadRow | None = None) -> Iterator[Example]:
    """The examples of a training file in order, streamed; the layout is detected from the first rows.

    A bad row raises TdroError, or is given to `on_bad_row(line_number, reason, row)` and left out. A file that cannot
    be read to its end raises TdroError in every case. Keeps 16 bytes a row, to find a repeated `query_id`.
    """
    return (example for _, example in read_numbered_examples(path, on_bad_row=on_bad_row))


def read_numbered_examples(path: str | Path, *, on_bad_row: BadRow | None = None) -> Iterator[tuple[int, Example]]:
    """As `read_examples`, with the line (in Parquet: row) number of each, from 1."""
    path = Path(path)
    report = on_bad_row or partial(_refuse, path)
    layout, seen = None, FirstSeen()
    for rows in _chunks(_rows(path)):
        layout = layout or _layout_of_chunk(path, rows)
        examples = [_example_or_reason(row, layout) for row in rows]
        accepted = [(row.number, one) for row, one in zip(rows, examples, strict=True) if not isinstance(one, str)]
        is_first, first_line = seen.note([hash(e.query_id) for _, e in accepted], [number for number, _ in accepted])
        repeated = {number: first_line[i] for i, (number, _) in enumerate(accepted) if not is_first[i]}
        for row, example in zip(rows, examples, strict=True):
            if isinstance(example, str):
                report(row.number, example, row.raw())
            elif row.number in repeated:
                reason = f"query_id {example.query_id!r} is already in line {repeated[row.number]}"
                report(row.number, reason, row.raw())
            else:
                yield row.number, example


def read_passages(path: str | Path) -> Iterator[Passage]:
    """The passages of a JSON lines or Parquet file, streamed: docid (or _id, id), title, text (or contents).

    An id may be absent; then it is made from the content. Raises TdroError for a bad row or file.
    """
    path = Path(path)
    try:
        for row in _rows(path):
            try:
                passage = _corpus_passage(row)
            except _BadRow as bad:
                raise TdroError(f"bad row: {bad}", where=f"{path}:{row.number}", remedy="mend or remove it") from None
            yield passage
    except TdroError as error:
        words = error.message.replace("training file", "file of passages")
        raise TdroError(words, where=error.where, remedy=error.remedy) from error


def read_row(value: Any, number: int) -> Example | str:
    """The example in one row that was read elsewhere, of whatever layout it has, or the reason why there is none."""
    try:
        plain = _plain(value)
        layout = _layout_of_row(plain)
        if layout is None:
            return f"unknown layout: found the keys {', '.join(map(str, plain))}"
        return layout.example(plain, number)
    except _BadRow as bad:
        return str(bad)


def write_examples(path: str | Path, examples: Iterable[Example]) -> int:
    """Writes the authors' layout as JSON lines (.gz and .zst compressed) and returns the number of rows.

    The bytes are a function of the examples. The file appears when it is complete.
    """
    path = Path(path)
    if _SUFFIXES.get(path.suffix) == "parquet":
        raise TdroError("examples are written as JSON lines, not Parquet", where=f"{path}", remedy="name it .jsonl.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    count = 0
    try:
        with _open_to_write(aside) as file:
            for example in examples:
                file.write(json.dumps(as_row(example), ensure_ascii=False, allow_nan=False).encode() + b"\n")
                count += 1
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return count


def as_row(example: Example) -> dict[str, Any]:
    """The example as a JSON object in the authors' layout."""
    return {
        "query_id": example.query_id,
        "query": example.query,
        "positive_passages": [_as_object(passage) for passage in example.positives],
        "negative_passages": [_as_object(passage) for passage in example.negatives],
        **{key: value for key, value in example.extra.items() if key not in _ROW_KEYS},
    }


class FirstSeen:
    """64-bit keys with the 64-bit value that each came with first: 16 bytes a distinct key, added in batches.

    Sorted runs of growing length, merged when they are of like length, so that n keys cost O(n log n).
    """

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def note(self, keys, values) -> tuple[np.ndarray, np.ndarray]:
        """For each key: whether it is new here, and the value of its first occurrence."""
        keys, values = np.asarray(keys, np.int64), np.asarray(values, np.int64)
        unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        value, known = values[first], np.zeros(len(unique), bool)
        for run_keys, run_values in self._runs:
            at = np.searchsorted(run_keys, unique).clip(max=len(run_keys) - 1)
            hit = run_keys[at] == unique
            value[hit] = run_values[at[hit]]
            known |= hit
        self._add(unique[~known], value[~known])
        is_first = np.zeros(len(keys), bool)
        is_first[first[~known]] = True
        return is_first, value[inverse]

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self._runs)

    def _add(self, keys: np.ndarray, values: np.ndarray) -> None:
        if not len(keys):
            return
        while self._runs and len(self._runs[-1][0]) < 2 * len(keys):
            run_keys, run_values = self._runs.pop()
            keys, values = np.concatenate([run_keys, keys]), np.concatenate([run_values, values])
            order = np.argsort(keys, kind="stable")
            keys, values = keys[order], values[order]
        self._runs.append((keys, values))


# ---- from a row to an example ----

_PASSAGE_KEYS = frozenset({"docid", "title", "text"})
_ROW_KEYS = frozenset({"query_id", "query", "positive_passages", "negative_passages"})


class _BadRow(Exception):
    """Why a row cannot be used."""


class _Layout(NamedTuple):
    name: str
    example: Callable[[Any, int], Example]


def _layout_of_row(row: Any) -> _Layout | None:
    if isinstance(row, list):
        texts = len(row) >= 2 and all(isinstance(text, str) for text in row)
        return _Layout("sentence-transformers", _from_array) if texts else None
    if "positive_passages" in row or "negative_passages" in row:
        return _Layout("tdro", _from_authors)
    if "pos" in row:
        return _Layout("flagembedding", _from_flagembedding)
    for query_key, positive_key in PAIRS:
        if query_key in row and positive_key in row and not _is_scored_pair(row):
            from_columns = partial(_from_columns, query_key=query_key, positive_key=positive_key)
            return _Layout("sentence-transformers", from_columns)
    return None


def _is_scored_pair(row: Mapping[str, Any]) -> bool:
    """A pair of sentences with a similarity or a class is not a query with its positive."""
    return "sentence1" in row and not row.keys().isdisjoint({"score", "label"})


def _layout_of_chunk(path: Path, rows: list[_Row]) -> _Layout | None:
    """The layout of the first row that has one; None while no row can be read at all."""
    readable = [row for row in rows if row.reason is None]
    for row in readable:
        if layout := _layout_of_row(row.value):
            return layout
    if readable:
        raise _unknown_layout(path, readable[0])
    if rows[0].number == 1 and rows[0].raw().strip() in {"[", "{", "[{"}:
        raise TdroError(
            "one JSON document over several lines", where=f"{path}:1", remedy="write one JSON object a line, no array"
        )
    return None


def _unknown_layout(path: Path, row: _Row) -> TdroError:
    found, remedy = "an array", "write one JSON object a line"
    if isinstance(row.value, Mapping):
        found = f"the keys {', '.join(map(str, row.value)) or '(none)'}"
        if "_id" in row.value:
            remedy = "a BEIR corpus or query file? Join queries, qrels and corpus into training examples"
        elif _is_scored_pair(row.value):
            remedy = "keep the positive pairs only, as anchor and positive"
        else:
            remedy = "rename the keys"
    return TdroError(
        f"unknown layout of training data: found {found}",
        where=f"{path}:{row.number}",
        remedy=f"{remedy}; {_known_layouts()}",
    )


def _no_rows(path: Path, what: str = "training file") -> TdroError:
    return TdroError(f"the {what} is empty", where=f"{path}", remedy="write at least one row")


def _known_layouts() -> str:
    return "known: " + "; ".join(f"{name} ({keys})" for name, keys in LAYOUTS.items())


def _example_or_reason(row: _Row, layout: _Layout | None) -> Example | str:
    if row.reason is not None:
        return row.reason
    assert layout is not None
    try:
        return layout.example(row.value, row.number)
    except _BadRow as bad:
        return str(bad)


def _refuse(path: Path, number: int, reason: str, raw: str) -> None:
    raise bad_row_error(path, number, reason)


def bad_row_error(path: Path, number: int, reason: str) -> TdroError:
    """The error that names a row which cannot be used."""
    return TdroError(f"bad row: {reason}", where=f"{path}:{number}", remedy=BAD_ROW_REMEDY)


def _from_authors(row: Any, number: int) -> Example:
    _require_object(row)
    return Example(
        query_id=_query_id(row, number),
        query=_query(row, "query"),
        positives=_passages(row, "positive_passages", "positive", required=True),
        negatives=_passages(row, "negative_passages", "negative"),
        extra={key: value for key, value in row.items() if key not in _ROW_KEYS},
    )


def _from_flagembedding(row: Any, number: int) -> Example:
    _require_object(row)
    return Example(
        query_id=_query_id(row, number),
        query=_query(row, "query"),
        positives=_texts(row, "pos", "positive", required=True),
        negatives=_texts(row, "neg", "negative"),
        extra=_further(row, {"query_id", "query", "pos", "neg"}),
    )


def _from_columns(row: Any, number: int, *, query_key: str, positive_key: str) -> Example:
    _require_object(row)
    negative_keys = sorted(
        (key for key in row if re.fullmatch(r"negative(_\d+)?", key)), key=lambda key: int(key[9:] or -1)
    )
    if row.get(positive_key) is None:
        raise _BadRow(f"no positive: {positive_key} is missing")
    return Example(
        query_id=_query_id(row, number),
        query=_query(row, query_key),
        positives=(_passage_of_text(row[positive_key], positive_key),),
        negatives=tuple(_passage_of_text(row[key], key) for key in negative_keys if row[key] is not None),
        extra=_further(row, {"query_id", query_key, positive_key, *negative_keys}),
    )


def _further(row: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The keys left over; one that means something else in the authors' layout is set apart by an underscore."""
    return {f"{key}_" if key in _ROW_KEYS else key: value for key, value in row.items() if key not in known}


def _from_array(row: Any, number: int) -> Example:
    if not isinstance(row, list):
        raise _BadRow(f"an array of texts was expected, as in the rows before, and this is {_kind(row)}")
    if len(row) < 2:
        raise _BadRow("no positive: the array holds fewer than two texts")
    return Example(
        query_id=f"row-{number}",
        query=_query({"query": row[0]}, "query"),
        positives=(_passage_of_text(row[1], "positive"),),
        negatives=tuple(_passage_of_text(text, f"negative {i}") for i, text in enumerate(row[2:], 1)),
    )


def _require_object(row: Any) -> None:
    if not isinstance(row, dict):
        raise _BadRow(f"not a JSON object but {_kind(row)}")


def _query_id(row: Mapping[str, Any], number: int) -> str:
    return _identifier(row.get("query_id"), "query_id") or f"row-{number}"


def _query(row: Mapping[str, Any], key: str) -> str:
    query = row.get(key)
    if query is None:
        raise _BadRow(f"no query: {key} is missing")
    if not isinstance(query, str):
        raise _BadRow(f"{key} is {_kind(query)}, not text")
    if not query.strip():
        raise _BadRow(f"{key} is empty")
    return query


def _identifier(value: Any, key: str) -> str | None:
    """An id as text; None where it is absent."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise _BadRow(f"{key} is {_kind(value)}, not text")
    if not value.strip():
        raise _BadRow(f"{key} is empty")
    return value


def _items(row: Mapping[str, Any], key: str, role: str, required: bool) -> list[Any]:
    items = row.get(key)
    if items is None:
        items = []
    if not isinstance(items, list):
        raise _BadRow(f"{key} is {_kind(items)}, not an array")
    if required and not items:
        raise _BadRow(f"no {role}: {key} is {'empty' if key in row else 'missing'}")
    return items


def _texts(row: Mapping[str, Any], key: str, role: str, required: bool = False) -> tuple[Passage, ...]:
    items = _items(row, key, role, required)
    return tuple(_passage_of_text(text, f"{role} {i}") for i, text in enumerate(items, 1))


def _passages(row: Mapping[str, Any], key: str, role: str, required: bool = False) -> tuple[Passage, ...]:
    return tuple(_passage(item, role, i) for i, item in enumerate(_items(row, key, role, required), 1))


def _passage_of_text(text: Any, place: str) -> Passage:
    if not isinstance(text, str):
        raise _BadRow(f"{place} is {_kind(text)}, not text")
    if not text.strip():
        raise _BadRow(f"{place} is empty")
    return Passage(_docid("", text), "", text)


def _passage(item: Any, role: str, i: int | None) -> Passage:
    name = role if i is None else f"{role} {i}"
    if not isinstance(item, dict):
        raise _BadRow(f"{name} is {_kind(item)}, not an object with docid, title and text")
    title, text = item.get("title"), item.get("text")
    title, text = "" if title is None else title, "" if text is None else text
    if not isinstance(title, str) or not isinstance(text, str):
        raise _BadRow(f"the title or text of {name} is not text")
    if not (text.strip() or title.strip()):
        raise _BadRow(f"{name} is empty: neither title nor text")
    docid = _identifier(item.get("docid"), f"docid of {name}") or _docid(title, text)
    return Passage(docid, title, text, {key: value for key, value in item.items() if key not in _PASSAGE_KEYS})


def _corpus_passage(row: _Row) -> Passage:
    if row.reason is not None:
        raise _BadRow(row.reason)
    _require_object(row.value)
    name = next((key for key in ("docid", "_id", "id") if key in row.value), "docid")
    text = row.value.get("text", row.value.get("contents"))
    item = {"docid": row.value.get(name), "title": row.value.get("title"), "text": text}
    passage = _passage(item, "the passage", None)
    return Passage(passage.docid, passage.title, passage.text)


def _docid(title: str, text: str) -> str:
    """A name made from the content, so that equal passages have one name in every file."""
    return "text-" + hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()[:24]


def _as_object(passage: Passage) -> dict[str, Any]:
    extra = {key: value for key, value in passage.extra.items() if key not in _PASSAGE_KEYS}
    return {"docid": passage.docid, "title": passage.title, "text": passage.text, **extra}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


# ---- from a file to rows ----


class _Row(NamedTuple):
    """A row as read: `value`, or the `reason` why there is none. `source`: the bytes of the line, None in Parquet."""

    number: int
    value: Any
    reason: str | None
    source: bytes | None

    def raw(self) -> str:
        if self.source is None:
            return json.dumps(self.value, ensure_ascii=False, default=str)
        return self.source.decode(errors="replace").rstrip("\r\n")


def _rows(path: Path) -> Iterator[_Row]:
    return _parquet_rows(path) if _container(path) == "parquet" else _json_rows(path)


def _chunks(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    """Bounded by rows and by bytes, so that long lines do not pile up."""
    chunk, size = [], 0
    for row in rows:
        chunk.append(row)
        size += len(row.source or b"")
        if len(chunk) == _CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def read_lines(path: Path, *, what: str = "training file") -> Iterator[tuple[int, bytes]]:
    """Number from 1 and bytes of the lines that are not blank, of a plain, gzip or zstandard file.

    Raises TdroError, which calls the file `what`, if it cannot be read or is Parquet.
    """
    kind = _container(path, what)
    if kind == "parquet":
        raise TdroError("Parquet has no lines", where=f"{path}", remedy="write it as JSON lines")
    for number, line in enumerate(_lines(path, kind, what), 1):
        if len(line) > MOST_LINE_BYTES:
            raise TdroError(
                f"a line of more than {MOST_LINE_BYTES >> 20} MiB",
                where=f"{path}:{number}",
                remedy=f"a {what} has one JSON object a line; is this one?",
            )
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line and not line.isspace():
            yield number, line


def _container(path: Path, what: str = "training file") -> str:
    """gzip, zstd, parquet or plain, by the first bytes; TdroError where the name says something else."""
    with reading(path, what), open(path, "rb") as file:
        head = file.read(4)
    if not head:
        raise _no_rows(path, what)
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "plain")
    named = _SUFFIXES.get(path.suffix, kind)
    if named != kind:
        remedy = "write it again, or rename it after what it holds"
        raise TdroError(f"not a {named} file, as its name says", where=f"{path}", remedy=remedy)
    return kind


@contextmanager
def reading(path: Path, what: str = "training file") -> Iterator[None]:
    """Turns what can go wrong with the file itself into a TdroError."""
    try:
        refuse_endless(path)
        yield
    except FileNotFoundError as error:
        raise TdroError(f"no such {what}", where=f"{path}", remedy="check the path") from error
    except IsADirectoryError as error:
        remedy = "name a file: .jsonl, .jsonl.gz, .jsonl.zst or .parquet"
        if (path / "corpus.jsonl").exists() or (path / "corpus.jsonl.gz").exists():
            remedy += " (this is a test collection in BEIR layout)"
        raise TdroError(f"the {what} is a folder", where=f"{path}", remedy=remedy) from error
    except (OSError, ValueError, EOFError, zlib.error) as error:  # pyarrow's ArrowInvalid is a ValueError
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        remedy = "the file is damaged or cut short: fetch or write it again"
        raise TdroError(f"the {what} cannot be read: {reason}", where=f"{path}", remedy=remedy) from error


def _lines(path: Path, kind: str, what: str = "training file") -> Iterator[bytes]:
    with reading(path, what):
        if kind == "plain":
            with open(path, "rb", buffering=1 << 20) as file:
                yield from iter(lambda: file.readline(MOST_LINE_BYTES + 1), b"")
        else:
            import pyarrow as pa

            with pa.input_stream(str(path), compression=kind) as stream:
                file = io.BufferedReader(stream, 1 << 20)
                yield from iter(lambda: file.readline(MOST_LINE_BYTES + 1), b"")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number[:40]} is beyond a number of 64 bits")
    return value


_decode_json = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite).decode


def json_value(line: str) -> Any:
    """The value in a line of JSON, which can be written again. Raises ValueError with what is wrong in our words."""
    try:
        value = _decode_json(line)
        if "\\ud" in line or "\\uD" in line:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair (\\ud800 to \\udfff)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    return value


def _json_rows(path: Path) -> Iterator[_Row]:
    for number, line in read_lines(path):
        try:
            value = json_value(line.decode().rstrip("\r\n"))
        except UnicodeDecodeError as error:
            yield _Row(number, None, f"not UTF-8 at byte {error.start}", line)
        except ValueError as error:
            yield _Row(number, None, str(error), line)
        else:
            reason = None if isinstance(value, (dict, list)) else f"not a JSON object but {_kind(value)}"
            yield _Row(number, value, reason, line)


def _parquet_rows(path: Path) -> Iterator[_Row]:
    import pyarrow.parquet as parquet

    with reading(path):
        number = 0
        with parquet.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(batch_size=_CHUNK_ROWS):
                for i in range(batch.num_rows):
                    number += 1
                    yield _parquet_row(number, batch.slice(i, 1))


def _parquet_row(number: int, batch: Any) -> _Row:
    try:
        return _Row(number, _plain(batch.to_pylist()[0]), None, None)
    except UnicodeDecodeError as error:
        return _Row(number, None, f"not UTF-8 at byte {error.start}", None)
    except _BadRow as bad:
        return _Row(number, None, str(bad), None)


def _plain(value: Any) -> Any:
    """A value of a column as JSON can hold it; columns that are null in this row are left out."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # data frames write NaN where there is nothing
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (bytes, tuple)):
        raise _BadRow(f"a column holds {'binary data' if isinstance(value, bytes) else 'a map'}, not text")
    return str(value)


@contextmanager
def _open_to_write(path: Path) -> Iterator[IO[bytes] | io.BufferedIOBase]:
    kind = _SUFFIXES.get(path.suffix, "plain")
    if kind == "zstd":
        import pyarrow as pa

        with pa.output_stream(str(path), compression="zstd") as stream, io.BufferedWriter(stream, 1 << 20) as file:
            yield file
        return
    with open(path, "wb") as raw:
        if kind == "plain":
            yield raw
        else:
            # no time and no name in the header: equal examples give equal bytes
            with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as packed:
                yield packed
