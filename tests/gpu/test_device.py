"""What to run on a machine with a GPU: `python -m pytest -m gpu tests/gpu`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def learned(recipe: Path, runs: Path, accelerator: str | None) -> dict[str, float]:
    """Task weights of the tiny recipe, learned in a process of its own on the GPU, or on the CPU."""
    environment = {**os.environ, **({"DS_ACCELERATOR": accelerator} if accelerator else {})}
    command = [sys.executable, "-m", "tdro_cli", "learn-weights", str(recipe), "--runs", str(runs), "--quiet"]
    subprocess.run(command, check=True, env=environment)
    [weights] = runs.glob("*/learn-weights/out/weights.json")
    return {name: task["weight"] for name, task in json.loads(weights.read_text())["tasks"].items()}


@pytest.mark.gpu
def test_a_gpu_learns_the_weights_that_a_cpu_learns(tiny_recipe, tmp_path):
    """The whole of learn-weights (backbone, reference, proxy) on both devices: equal within 1e-3."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    on_gpu = learned(tiny_recipe, tmp_path / "gpu", None)
    assert on_gpu == pytest.approx(learned(tiny_recipe, tmp_path / "cpu", "cpu"), abs=1e-3)
