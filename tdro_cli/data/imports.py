"""Training files from elsewhere: Hugging Face datasets, and the judgements of a BEIR collection."""

from __future__ import annotations

import gzip
import json
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tdro_cli.data.formats import Example, Passage, read_row, write_examples
from tdro_cli.errors import Problems, TdroError

AT_ONCE = 4096
SHOWN_PROBLEMS = 20
COLUMNS = ("query_id", "query", "positive", "negative", "title")
BEIR_FILES = ("corpus.jsonl", "queries.jsonl")


def import_task(
    source: str,
    to: Path,
    *,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    advance: Callable[[int], object] = lambda rows: None,
) -> dict[str, Any]:
    """Writes the training file `to` and returns {"source", "kind", "file", "rows", "skipped"}.

    `source`: a folder in BEIR layout (`split` names qrels/SPLIT.tsv); a folder of `datasets.save_to_disk`, a file or
    folder of Parquet or JSON lines; or a hub name. `columns`: which column of the rows is `query`, `positive`,
    `negative`, `title` or `query_id`; dots go into objects. Without it the layout is detected. Memory does not grow
    with the data. Raises TdroError, or Problems naming up to 20 bad rows; `to` is whole or not there.
    """
    if to.exists():
        raise TdroError(f"{to} exists", remedy="name a file that is not there yet")
    if not any(str(to).endswith(end) for end in (".jsonl", ".jsonl.gz", ".jsonl.zst")):
        raise TdroError(f"can't write {to}", remedy="name it .jsonl, .jsonl.gz or .jsonl.zst")
    if unknown := sorted(set(columns or ()) - set(COLUMNS)):
        raise TdroError(
            f"no column {unknown[0]!r} can be given", where="--column", remedy=f"one of {', '.join(COLUMNS)}"
        )
    if columns is not None and not {"query", "positive"} <= set(columns):
        raise TdroError(
            "the columns of query and positive must both be given", where="--column", remedy="add the other"
        )
    folder = Path(source)
    skipped = _Skipped(source, skip_bad_rows)
    if all(_find(folder, name) for name in BEIR_FILES):
        kind, examples = "beir", _beir_examples(folder, split)
    else:
        kind, rows = _dataset_rows(source, split, config)
        examples = _dataset_examples(rows, columns, skipped)
    written = write_examples(to, _checked(_counted(examples, advance), skipped, source))
    return {"source": source, "kind": kind, "file": str(to), "rows": written, "skipped": skipped.count}


class _Skipped:
    """Bad rows: counted where they may be left out, else collected to be raised together."""

    def __init__(self, source: str, allowed: bool):
        self.source, self.allowed, self.count = source, allowed, 0
        self.errors: list[TdroError] = []

    def __call__(self, number: int, reason: str) -> None:
        self.count += 1
        if not self.allowed and self.count <= SHOWN_PROBLEMS:
            remedy = "mend the row, give other columns, or pass --skip-bad-rows"
            self.errors.append(TdroError(f"bad row: {reason}", where=f"{self.source}, row {number}", remedy=remedy))


def _checked(examples: Iterable[Example], skipped: _Skipped, source: str) -> Iterator[Example]:
    """The examples; raises at the end what would leave a file that is not whole, or empty."""
    written = 0
    for example in examples:
        written += 1
        yield example
    if skipped.errors:
        raise skipped.errors[0] if skipped.count == 1 else Problems(skipped.errors)
    if not written:
        raise TdroError("nothing to import: no row has a query and a positive", where=source, remedy="see the columns")


def _counted(examples: Iterable[Example], advance: Callable[[int], object]) -> Iterator[Example]:
    running = iter(examples)
    while chunk := list(islice(running, AT_ONCE)):
        yield from chunk
        advance(len(chunk))


# ---- Hugging Face datasets ----


def _dataset_rows(source: str, split: str, config: str | None) -> tuple[str, Iterator[Any]]:
    """What kind of place `source` is, and its rows, streamed."""
    try:
        import datasets
    except ImportError:
        remedy = "pip install 'tdro[datasets]'"
        raise TdroError("the package datasets is not installed", where=source, remedy=remedy) from None
    datasets.disable_progress_bars()
    path = Path(source)
    files = _files(path)
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        return "saved dataset", iter(_split_of(loaded, split, source))
    if (path.exists() or path.is_symlink()) and not files:
        remedy = "expected corpus.jsonl and queries.jsonl, a saved dataset, or Parquet or JSON-lines files"
        raise TdroError("nothing that can be imported is here", where=source, remedy=remedy)
    try:
        if files:
            kind = "parquet" if files[0].endswith(".parquet") else "json"
            loaded = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
            return f"{kind} files", iter(loaded)
        loaded = datasets.load_dataset(source, config, split=split, streaming=True)
        return "hub dataset", iter(loaded)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # of the hub client, of a name, of files that don't fit together
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TdroError(
            f"no dataset {source!r}, split {split!r}: it is not here, and the hub did not give it ({reason})",
            remedy="check the name, --split, --config and the network, or download the dataset and give its folder",
        ) from error


def _split_of(loaded: Any, split: str, source: str) -> Iterable[Any]:
    import datasets

    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise TdroError(f"no split {split!r}", where=source, remedy=f"give --split one of {', '.join(loaded)}")
    return loaded[split]


def _files(path: Path) -> list[str]:
    """The Parquet or else the JSON-lines files at `path`."""
    if path.is_file():
        return [str(path)]
    for pattern in ("*.parquet", "*.jsonl*"):
        if found := sorted(str(file) for file in path.rglob(pattern)):
            return found
    return []


def _dataset_examples(rows: Iterator[Any], columns: Mapping[str, str] | None, skipped: _Skipped) -> Iterator[Example]:
    for number, row in enumerate(rows, 1):
        try:
            value = row if columns is None else _mapped(row, columns)
        except KeyError as error:
            remedy = f"the columns are {', '.join(row)}"
            raise TdroError(
                f"no column {error.args[0]!r}", where=f"{skipped.source}, row {number}", remedy=remedy
            ) from None
        example = read_row(value, number)
        if isinstance(example, str):
            skipped(number, example)
        else:
            yield example


def _mapped(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row in the authors' layout."""
    title = _at(row, columns["title"]) if "title" in columns else ""
    mapped = {
        "query": _at(row, columns["query"]),
        "positive_passages": _as_passages(_at(row, columns["positive"]), title),
        "negative_passages": _as_passages(_at(row, columns["negative"]), "") if "negative" in columns else [],
    }
    if "query_id" in columns:
        mapped["query_id"] = _at(row, columns["query_id"])
    return mapped


def _at(row: Any, path: str) -> Any:
    """The value under a column, or under `column.key` of an object; of a list of objects, each one's."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    first, dot, rest = path.partition(".")
    if not dot or not isinstance(row, Mapping) or first not in row:
        raise KeyError(path)
    inner = row[first]
    return [_at(item, rest) for item in inner] if isinstance(inner, list) else _at(inner, rest)


def _as_passages(value: Any, title: str) -> list[Any]:
    items = value if isinstance(value, list) else [value] if value is not None else []
    return [{"title": title, "text": item} if isinstance(item, str) else item for item in items]


# ---- BEIR ----


def _beir_examples(folder: Path, split: str) -> Iterator[Example]:
    """Queries with the documents judged relevant; documents judged 0 are hard negatives.

    The join runs in a temporary database on disk: corpora of any size cost no memory.
    """
    qrels = _find(folder / "qrels", f"{split}.tsv")
    if qrels is None:
        found = ", ".join(sorted(path.name.split(".")[0] for path in (folder / "qrels").glob("*.tsv*")))
        remedy = f"give --split one of {found}" if found else "judgements are qrels/SPLIT.tsv"
        raise TdroError(f"no judgements for the split {split!r}", where=str(folder / "qrels"), remedy=remedy)
    with tempfile.TemporaryDirectory() as scratch, closing(sqlite3.connect(f"{scratch}/join.sqlite")) as database:
        database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE qrels (place INTEGER PRIMARY KEY, query TEXT, document TEXT, grade INTEGER);"
            "CREATE TABLE queries (id TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID;"
            "CREATE TABLE documents (id TEXT PRIMARY KEY, title TEXT, text TEXT);"
        )
        _fill(database, "INSERT INTO qrels (query, document, grade) VALUES (?, ?, ?)", _judgements(qrels))
        database.execute("CREATE INDEX by_document ON qrels (document)")
        judged_query = "INSERT OR IGNORE INTO queries SELECT ?1, ?2 WHERE ?1 IN (SELECT query FROM qrels)"
        database.execute("CREATE INDEX by_query ON qrels (query)")
        queries, corpus = (_find(folder, name) for name in ("queries.jsonl", "corpus.jsonl"))
        _fill(database, judged_query, ((q["_id"], q.get("text", "")) for q in _objects(queries)))
        judged = (
            "INSERT OR IGNORE INTO documents SELECT ?1, ?2, ?3 WHERE EXISTS (SELECT 1 FROM qrels WHERE document = ?1)"
        )
        texts = ((d["_id"], d.get("title") or "", d.get("text") or "") for d in _objects(corpus))
        _fill(database, judged, texts)
        _require_whole(database, folder, qrels)
        yield from _joined(database)


def _joined(database: sqlite3.Connection) -> Iterator[Example]:
    """In the order of the judgements' queries; queries without a relevant document are left out."""
    first = "SELECT query, MIN(place) AS place FROM qrels WHERE grade > 0 GROUP BY query ORDER BY place"
    documents = (
        "SELECT id, title, documents.text, MAX(grade) FROM qrels JOIN documents ON id = document "
        "WHERE query = ? GROUP BY document ORDER BY MIN(place)"
    )
    for query, text in database.execute(f"SELECT query, text FROM ({first}) JOIN queries ON id = query ORDER BY place"):
        found = [
            (Passage(docid, title, body), grade) for docid, title, body, grade in database.execute(documents, [query])
        ]
        positives = tuple(passage for passage, grade in found if grade > 0)
        yield Example(query, text, positives, tuple(passage for passage, grade in found if grade <= 0))


def _require_whole(database: sqlite3.Connection, folder: Path, qrels: Path) -> None:
    for table, column, file in (("queries", "query", "queries.jsonl"), ("documents", "document", "corpus.jsonl")):
        absent = f"FROM qrels WHERE {column} NOT IN (SELECT id FROM {table})"
        (count,) = database.execute(f"SELECT COUNT(DISTINCT {column}) {absent}").fetchone()
        if count:
            (name,) = database.execute(f"SELECT {column} {absent} ORDER BY place LIMIT 1").fetchone()
            more = f" and {count - 1:,} more" if count > 1 else ""
            remedy = f"the judgements are of another version of {file}: fetch both again"
            raise TdroError(f"{qrels.name} names {name!r}{more}, not in {file}", where=str(folder), remedy=remedy)


def _fill(database: sqlite3.Connection, statement: str, rows: Iterator[tuple[Any, ...]]) -> None:
    while chunk := list(islice(rows, AT_ONCE)):
        database.executemany(statement, chunk)
    database.commit()


def _judgements(path: Path) -> Iterator[tuple[str, str, int]]:
    """(query, document, grade) of a file with three columns and a header, or TREC's four without."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            parts = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
            if number == 1 and parts and not parts[-1].lstrip("-").isdigit():
                continue
            if not parts or parts == [""]:
                continue
            try:
                yield parts[0], parts[-2], int(parts[-1])
            except (IndexError, ValueError):
                remedy = "a judgement is query-id, corpus-id and score, separated by tabs"
                raise TdroError(f"bad judgement {line.strip()!r}", where=f"{path}:{number}", remedy=remedy) from None


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    value = json.loads(line)
                    value["_id"] = str(value["_id"])
                except (ValueError, KeyError, TypeError):
                    raise TdroError(
                        "bad line: no object with _id", where=f"{path}:{number}", remedy="mend it"
                    ) from None
                yield value


def _opened(path: Path) -> IO[str]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8", newline="\n")


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
