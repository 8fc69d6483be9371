"""Queries per second of `simhash` against a plain loop over the `simhash` package's index: same decisions, one core.

    python benchmarks/dedup.py [--rows 10000 100000 1000000] [--held-out 10000] [--plain-rows 20000] [--data FOLDER]

Queries come from FOLDER/train/*.jsonl.gz (../shared/data or $TDRO_REAL_DATA), else from the docstrings of the standard
library. More than there are: words of one query are put into another of the same file, so that the vocabulary is real.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

from simhash import Simhash, SimhashIndex

from tdro_cli.builtin import deduplicators
from tdro_cli.protocols import Text

GOAL = 20


class Seconds(NamedTuple):
    """Processor time: of the held-out texts' index, and of the queries."""

    index: float
    queries: float


def real_queries(folder: Path) -> list[list[str]]:
    files = sorted((folder / "train").glob("*.jsonl.gz"))
    return [[json.loads(line)["query"] for line in gzip.open(path, "rt", encoding="utf-8")] for path in files]


def sentences_of_the_standard_library() -> list[list[str]]:
    import ast

    sentences = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                sentences += [" ".join(part.split()) for part in text.split(".") if len(part) > 20]
    return [sentences]


def queries(sources: list[list[str]], count: int, seed: int) -> Iterator[str]:
    """The real ones in random order, then crossings of two."""
    random_source = random.Random(seed)
    real = [query for source in sources for query in source]
    random_source.shuffle(real)
    yield from real[:count]
    weights = [len(source) for source in sources]
    for _ in range(count - len(real)):
        one, other = random_source.choices(random_source.choices(sources, weights)[0], k=2)
        words, others = one.split(" "), other.split(" ")
        cut = random_source.randint(0, len(words))
        yield " ".join(words[:cut] + others[min(cut, len(others) - 1) :])


def plain_loop(train: list[str], held_out: list[str]) -> tuple[set[tuple[int, int]], Seconds]:
    """The release's way: an object a text, an index lookup a query."""
    logging.getLogger("simhash").setLevel(logging.ERROR)
    began = time.process_time()
    index = SimhashIndex([(str(i), Simhash(text.replace("_", ""))) for i, text in enumerate(held_out)], k=2)
    ready = time.process_time()
    pairs = {(i, int(h)) for i, q in enumerate(train) for h in index.get_near_dups(Simhash(q.replace("_", "")))}
    return pairs, Seconds(ready - began, time.process_time() - ready)


def ours(train: list[Text], held_out: list[str], name: str = "SimHash") -> tuple[set[tuple[int, int]], Seconds]:
    deduplicator = getattr(deduplicators, name)(processes=1)
    held = [Text(str(i), text) for i, text in enumerate(held_out)]
    began = time.process_time()
    found = deduplicator.duplicates(train, held)
    ready = time.process_time()
    pairs = {(int(pair.train_id), int(pair.held_out_id)) for pair in found}
    return pairs, Seconds(ready - began, time.process_time() - ready)


def clock_of_processes(train: list[Text], held_out: list[str], processes: int) -> float:
    """Seconds by the clock, starting the processes included."""
    held = [Text(str(i), text) for i, text in enumerate(held_out)]
    began = time.perf_counter()
    sum(1 for _ in deduplicators.SimHash(processes=processes).duplicates(train, held))
    return time.perf_counter() - began


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--held-out", type=int, default=10_000)
    parser.add_argument("--plain-rows", type=int, default=20_000, help="rows given to the plain loop")
    parser.add_argument(
        "--processes", type=int, nargs="*", default=[1, 2], help="by the clock, the last number of rows"
    )
    default = os.environ.get("TDRO_REAL_DATA", Path(__file__).resolve().parents[2] / "shared/data")
    parser.add_argument("--data", type=Path, default=default)
    given = parser.parse_args()
    sources = real_queries(given.data) or sentences_of_the_standard_library()
    print(f"{sum(map(len, sources)):,} real queries; {given.held_out:,} held-out texts; one core")

    held_out = list(queries(sources, given.held_out, seed=1))
    sample = list(queries(sources, given.plain_rows, seed=2))
    texts = [Text(str(i), text) for i, text in enumerate(sample)]
    (expected, plain), (found, _) = plain_loop(sample, held_out), ours(texts, held_out)
    print(f"plain loop: {len(sample) / plain.queries:,.0f} queries/s, its index {plain.index:.2f} s")
    if found != expected:
        print(f"the decisions differ: {len(found ^ expected)} pairs")
        return 1
    print(f"decisions identical ({len(found)} pairs)")
    for rows in given.rows:
        train = [Text(str(i), text) for i, text in enumerate(queries(sources, rows, seed=2))]  # before the clock starts
        before = peak_megabytes()
        pairs, taken = ours(train, held_out)
        grown = peak_megabytes() - before
        later = plain_loop(sample, held_out)[1]  # before and after ours, as a busy machine changes its speed
        each, index = (plain.queries + later.queries) / 2 / len(sample), (plain.index + later.index) / 2
        plain, ratio = later, rows * each / taken.queries
        whole = (index + rows * each) / sum(taken)
        print(
            f"simhash {rows:>9,} rows {rows / taken.queries:9,.0f} queries/s {ratio:5.1f} x, "
            f"with the index {whole:5.1f} x ({taken.index:.2f} + {taken.queries:.2f} s)  {len(pairs)} pairs  "
            f"+{grown:,.0f} MB"
        )
    for processes in given.processes:
        seconds = clock_of_processes(train, held_out, processes)
        print(f"simhash {rows:>9,} rows {rows / seconds:9,.0f} queries/s by the clock, {processes} processes")
    for name in ("Exact", "MinHash"):
        taken = ours(texts, held_out, name)[1]
        print(f"{name.lower():7} {len(sample):>9,} rows {len(sample) / taken.queries:9,.0f} queries/s")
    print(f"ratio {ratio:.1f} (goal {GOAL})")
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
