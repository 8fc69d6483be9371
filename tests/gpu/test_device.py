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


@pytest.mark.gpu
def test_a_gpu_finds_the_documents_that_a_cpu_finds():
    """Exact search over whole numbers, whose products are exact: equal documents and scores on both devices."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    import numpy as np

    from tdro_cli.retrieve.search import search

    rng = np.random.default_rng(1)
    query, passage = (rng.integers(-3, 4, (n, 32)).astype(np.float32) for n in (300, 5000))
    chunks = [(start, passage[start : start + 512]) for start in range(0, 5000, 512)]
    on_cpu, on_gpu = (search(query, chunks, 40, device=device) for device in ("cpu", "cuda"))
    assert (on_cpu[0] == on_gpu[0]).all() and (on_cpu[1] == on_gpu[1]).all()


@pytest.mark.gpu
def test_a_gpu_computes_the_losses_masks_and_measurements_that_a_cpu_computes():
    """Each function on tensors that lie on the GPU: nothing may be made on the CPU beside them. Equal within 1e-5."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    on_cpu, on_gpu = (arithmetic(torch, device) for device in ("cpu", "cuda"))
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert torch.allclose(one.double(), other.double(), atol=1e-5)


def arithmetic(torch, device: str) -> list:
    """What the functions of learning give on `device`, brought back to the CPU."""
    from tdro_cli.builtin.loss_measurements import Absolute, Excess, Relative, RelativeOfficial
    from tdro_cli.learn.contrastive import candidate_mask, cosine, in_batch_infonce, per_query_infonce
    from tdro_cli.learn.dro import robust_loss, standard_error
    from tdro_cli.protocols import TaskLosses

    generator = torch.Generator().manual_seed(1)
    query_BD, passage_BND = (torch.randn(*shape, generator=generator).to(device) for shape in ((6, 8), (6, 3, 8)))
    reference_B, task_B = torch.rand(6, generator=generator).to(device), torch.tensor([0, 0, 1, 1, 2, 2], device=device)
    text_M, row_M = (torch.arange(18, device=device) // divisor for divisor in (2, 3))
    ids = (torch.arange(6, device=device) // 2, text_M[::3, None], text_M, row_M)
    allowed_BM = candidate_mask(*ids, in_batch=True)
    mask_BN = torch.ones(6, 3, dtype=torch.bool, device=device)
    mask_BN[0, 2] = False
    loss_B = per_query_infonce(query_BD, passage_BND, 0.5, mask_BN=mask_BN)
    in_batch_B = in_batch_infonce(query_BD, passage_BND, 0.5, mask_BN=mask_BN, mask_BM=allowed_BM)
    losses = TaskLosses(loss_B, reference_B, task_B, 4, row_M[:6])
    measured = [kind()(losses) for kind in (Relative, RelativeOfficial, Excess, Absolute)]
    _, averaged_G = Relative(ema=0.5).measure(Relative().start(4), losses)
    found = [loss_B, in_batch_B, allowed_BM, cosine(query_BD, passage_BND[0]), *measured, averaged_G]
    found += [robust_loss(loss_B, task_B, torch.tensor([0.4, 0.3, 0.2, 0.1])), standard_error(Absolute(), losses)[:3]]
    return [value.cpu() for value in found]
