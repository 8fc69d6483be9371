"""A small experiment on real text, for tests that run the product: seconds a stage, one core."""

from __future__ import annotations

import ast
import gzip
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# tiny models are fastest on one thread; several that share cores with other work spin and wait: 20 times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # as in the Makefile: a hub that is not there is tried for half a minute
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before anything imports DeepSpeed, which would look for a device

import pytest
from hypothesis import Phase, settings

# no example has to be done within a time: on a busy machine none can promise it
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# `make mutants`: as many examples as ever, but a failing one is neither made smaller nor kept
settings.register_profile("mutants", phases=(Phase.explicit, Phase.generate), database=None)

MODULES = {  # task: standard library modules whose docstrings are its text, and how many rows it has
    "shell": (("argparse", "shutil", "optparse"), 90),
    "numbers": (("statistics", "fractions", "decimal", "random"), 60),
    "network": (("email.message", "http.client", "urllib.request", "smtplib"), 40),
    "words": (("textwrap", "difflib", "string", "gettext"), 24),
}

RECIPE = """
name: tiny
seed: 7
tasks:
  - {{name: shell, path: {folder}/shell.jsonl.gz, prompt: find the function that does it}}
  - {{name: numbers, path: {folder}/numbers.jsonl.gz, prompt: find the function that computes it}}
  - {{name: network, path: {folder}/network.jsonl.gz, in_batch_negatives: false}}
  - {{name: words, path: {folder}/words.jsonl.gz, symmetric: true, prompt: find what is alike}}
backbone: {{name: scratch, options: {{hidden_size: 32, layers: 1, heads: 2, vocab_size: 600}}}}
encoder: {{pooling: mean, query_length: 32, passage_length: 48, temperature: 0.05, micro_batch_tokens: 1024}}
train_ref:
  steps: 6
  batch: {{queries: 8, passages_per_query: 3}}
  optimizer: {{learning_rate: 3e-3}}
  checkpoint: {{every_steps: 2}}
learn_weights:
  steps: 6
  batch: {{queries: 12, passages_per_query: 4}}
  optimizer: {{learning_rate: 3e-3}}
  weight_updater: {{name: exponentiated_gradient, options: {{learning_rate: 0.1}}}}
  checkpoint: {{every_steps: 2}}
transfer: {{strategy: reweight}}
finetune:
  steps: 6
  batch: {{queries: 8, passages_per_query: 3}}
  optimizer: {{learning_rate: 3e-3}}
  checkpoint: {{every_steps: 2}}
"""


def _documented(module: str) -> Iterator[tuple[str, str, str]]:
    """(name, first sentence, source) of a module's functions that say what they do."""
    source = inspect.getsource(__import__(module, fromlist=["_"]))
    for node in ast.walk(ast.parse(source)):
        said = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if said and len(said) > 20:
            yield node.name, said.split("\n\n")[0].replace("\n", " ")[:200], ast.unparse(node)[:400]


def _write_task(path: Path, modules: tuple[str, ...], rows: int) -> None:
    found = [item for module in modules for item in _documented(module)]
    assert len(found) > 8, f"{modules} document too little"
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        for number in range(rows):
            name, said, code = found[number % len(found)]
            others = [found[(number + 1 + 3 * i) % len(found)] for i in range(1 + number % 5)]
            row = {
                "query_id": f"q{number}",
                "query": said if number < len(found) else f"{said} ({number})",
                "positive_passages": [{"docid": f"p{number}", "title": name, "text": code}],
                "negative_passages": [
                    {"docid": f"n{number}.{i}", "title": other[0], "text": other[2]}
                    for i, other in enumerate(others)
                    if other[2] != code
                ],
            }
            file.write((json.dumps(row) + "\n").encode())


class Experiment:
    """A recipe with its folder of runs."""

    def __init__(self, recipe: Path, runs: Path):
        self.recipe, self.runs = recipe, runs

    def plans(self, *overrides: str, stage: str = "finetune") -> dict:
        """The plans of `stage` and of what it needs, with `key.path=value` overrides."""
        from tdro_cli import recipe
        from tdro_cli.run.plan import make_plans

        return make_plans(recipe.load(self.recipe, overrides), self.runs, needed=[stage])

    def run(self, *overrides: str, stage: str = "finetune", num_gpus: int | None = None) -> Path:
        """Runs `stage` and what it needs; the folder of its output."""
        from tdro_cli.run.launch import Machines, run_plan
        from tdro_cli.run.progress import Silent

        plans = self.plans(*overrides, stage=stage)
        for plan in plans.values():
            run_plan(plan, Machines(num_gpus), Silent(), quiet=True)
        return plans[stage].out


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of four tasks with hard negatives and a scratch backbone."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, (modules, rows) in MODULES.items():
        _write_task(folder / f"{name}.jsonl.gz", modules, rows)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder / "recipe.yaml"


@pytest.fixture(scope="session")
def referenced(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The tiny experiment with its backbone and its reference trained: to be copied, not to be changed."""
    experiment = Experiment(tiny_recipe, tmp_path_factory.mktemp("referenced"))
    experiment.run(stage="train-ref")
    return experiment


@pytest.fixture
def experiment(referenced: Experiment, tmp_path: Path) -> Experiment:
    """A copy of the tiny experiment of one's own, as far as the reference."""
    shutil.copytree(referenced.runs, tmp_path / "runs", symlinks=True)
    return Experiment(referenced.recipe, tmp_path / "runs")


@pytest.fixture
def another_experiment(referenced: Experiment, tmp_path: Path) -> Callable[[str], Experiment]:
    """Further copies, by name."""

    def copy(name: str) -> Experiment:
        shutil.copytree(referenced.runs, tmp_path / name, symlinks=True)
        return Experiment(referenced.recipe, tmp_path / name)

    return copy


@pytest.fixture
def tdro(monkeypatch, capsys):
    """Runs a command in this process, as the console script does: (exit code, stdout, stderr)."""

    from tdro_cli import cli

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tdro", *arguments])
        try:
            code = cli.main() or 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


@pytest.fixture
def made_up() -> Callable[..., dict]:
    """nDCG@10 by collection and query of a model that there isn't: `made_up(seed, gain)`."""
    return _made_up


def _made_up(seed, gain=0.0, names=("a", "b"), queries=60):
    import numpy as np

    rng = np.random.default_rng(seed)
    return {
        name: {
            "nDCG@10": {f"q{i}": float(v) for i, v in enumerate(np.clip(rng.normal(0.4 + gain, 0.1, queries), 0, 1))}
        }
        for name in names
    }
