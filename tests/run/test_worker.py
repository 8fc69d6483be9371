from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
from tdro_cli import __version__, artifacts
from tdro_cli.run import worker
from tdro_cli.run.plan import STAGES


def run_worker(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tdro_cli.run.worker", str(path), "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_every_stage_has_its_worker():
    assert tuple(worker.STAGES) == STAGES


def test_a_manifest_says_what_an_output_was_made_from_and_with(experiment):
    plans = experiment.plans(stage="train-ref")
    plan = plans["train-ref"]
    manifest = artifacts.manifest_of(plan.out)
    assert (manifest["stage"], manifest["digest"], manifest["recipe"]) == ("train-ref", plan.digest, "tiny")
    assert manifest["inputs"] == {"backbone": plans["backbone"].digest}
    assert manifest["versions"]["tdro"] == __version__ and "torch" in manifest["versions"]
    assert manifest["devices"] and manifest["published_from"] <= manifest["published"]
    assert manifest["numbers"]["train_ref"]["steps"] == 6
    assert manifest["files"]["training.json"] == artifacts.digest_file(plan.out / "training.json")


def test_an_output_whose_making_fails_is_not_there(experiment):
    plan = experiment.plans("transfer.strategy=uniform", stage="transfer")["transfer"]
    with pytest.raises(ZeroDivisionError), worker.publishing(plan) as folder:
        (folder / "sampling.json").write_text("{}")
        raise ZeroDivisionError
    assert not plan.out.exists() and list(Path(plan.folder).iterdir()) == []


def test_the_program_does_what_the_plan_says(experiment):
    plan = experiment.plans("transfer.strategy=uniform", stage="transfer")["transfer"]
    done = run_worker(plan.save())
    assert done.returncode == 0, done.stderr
    sampling = artifacts.read_json(plan.out / "sampling.json")
    assert [task["probability"] for task in sampling["tasks"].values()] == [0.25] * 4


def test_the_program_ends_with_a_faults_own_code_and_no_traceback(experiment, tmp_path):
    plan = experiment.plans("transfer.strategy=uniform", stage="transfer")["transfer"]
    (tmp_path / "shell.jsonl").write_text("{\n")
    broken = replace(plan, tasks={**plan.tasks, "shell": str(tmp_path / "shell.jsonl")})
    done = run_worker(broken.save())
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not plan.out.exists()


def test_the_backbone_stage_gives_the_same_model_each_time_and_another_for_another_seed(another_experiment):
    files = []
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        out = another_experiment(name).run(f"seed={seed}", stage="backbone")
        files.append((out / "model" / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
