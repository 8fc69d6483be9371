import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tdro_cli import artifacts, cli, recipe
from tdro_cli.errors import TdroError
from tdro_cli.run.history import list_runs, provenance
from tdro_cli.run.launch import Machines, run_plan
from tdro_cli.run.plan import make_plans
from tdro_cli.run.progress import Silent

RECIPE = """\
name: roads
tasks:
  - {name: bridges, path: data/bridges.jsonl}
  - {name: tunnels, path: data/tunnels.jsonl}
backbone: {name: scratch}
dedup: {deduplicator: exact, within: task}
transfer: {weights_from: weights.json}
finetune: {steps: 10, batch: {queries: 8}}
"""


@pytest.fixture
def plans(tmp_path, monkeypatch):
    """dedup and transfer, both complete, of two tasks of which one repeats a query."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name, queries in {"bridges": ["a", "b", "b"], "tunnels": ["c", "d"]}.items():
        rows = [{"query_id": f"{i}", "query": q, "pos": [f"on {q}"], "neg": ["no"]} for i, q in enumerate(queries)]
        Path(f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("weights.json").write_text(json.dumps({"domain_weights": {"bridges": 0.5, "tunnels": 0.5}}))
    Path("recipe.yaml").write_text(RECIPE)
    made = make_plans(recipe.load("recipe.yaml"), Path("runs"), needed=["transfer"])
    for plan in made.values():
        run_plan(plan, Machines(), Silent(), quiet=True)
    return made


def test_the_chain_leads_from_a_file_to_the_raw_files(plans):
    chain = provenance(plans["transfer"].out / "sampling.json", verify=True)
    assert [stage["stage"] for stage in chain["stages"]] == ["transfer", "dedup"]
    assert chain["stages"][0]["inputs"] == {"dedup": plans["dedup"].digest}
    assert chain["missing"] == [] and chain["faults"] == []
    raw = {file["name"]: file for file in chain["raw"]}
    assert raw["bridges"]["path"] == "data/bridges.jsonl" and raw["bridges"]["read_by"] == ["dedup"]
    assert raw["weights_from"]["digest"] == artifacts.digest_file(Path("weights.json"))
    assert {plugin["name"] for stage in chain["stages"] for plugin in stage["plugins"]} >= {"exact", "reweight"}


@pytest.mark.parametrize("place", ["runs/roads/transfer", "runs/roads/transfer/out", "{folder}", "{folder}/out"])
def test_a_run_is_found_by_its_folder_its_output_and_its_link(plans, place):
    chain = provenance(Path(place.format(folder=plans["transfer"].folder)))
    assert chain["out"] == str(plans["transfer"].out)
    assert chain["faults"] is None


def test_changed_missing_and_added_files_are_named(plans):
    out = plans["dedup"].out
    (out / "tasks" / "bridges.jsonl.gz").write_bytes(b"changed")
    (out / "tasks" / "tunnels.jsonl.gz").unlink()
    (out / "notes.txt").write_text("mine")
    assert provenance(plans["transfer"].out, verify=True)["faults"] == [
        f"{out}/tasks/bridges.jsonl.gz is not the file that was written",
        f"{out}/tasks/tunnels.jsonl.gz is missing",
        f"{out}/notes.txt was added later",
    ]


def test_changed_and_missing_raw_files_are_named(plans):
    with open("data/bridges.jsonl", "a") as file:
        file.write('{"query": "new", "pos": ["p"]}\n')
    Path("weights.json").unlink()
    bridges, weights = sorted(provenance(plans["transfer"].out, verify=True)["faults"])
    assert "data/bridges.jsonl has changed" in bridges
    assert "weights.json is gone" in weights


def test_a_manifest_whose_numbers_were_edited_is_found_out(plans):
    manifest = artifacts.manifest_of(plans["transfer"].out)
    manifest["numbers"]["draws"] += 1
    artifacts.write_json(plans["transfer"].out / "manifest.json", manifest)
    assert "not that of the numbers" in provenance(plans["transfer"].out, verify=True)["faults"][0]


def test_runs_moved_together_keep_their_chain_and_a_lost_stage_is_told(plans):
    shutil.move("runs", "elsewhere")
    moved = Path(plans["transfer"].folder.replace("runs", "elsewhere", 1))
    assert [stage["stage"] for stage in provenance(moved)["stages"]] == ["transfer", "dedup"]
    shutil.rmtree(plans["dedup"].folder.replace("runs", "elsewhere", 1))
    chain = provenance(moved, verify=True)
    assert [gap["stage"] for gap in chain["missing"]] == ["dedup"]
    assert any("dedup" in fault and "is gone" in fault for fault in chain["faults"])


def test_what_is_no_artifact_is_refused(plans):
    with pytest.raises(TdroError, match=r"there is no nowhere"):
        provenance(Path("nowhere"))
    with pytest.raises(TdroError, match="no output of a stage"):
        provenance(Path("data"))
    shutil.rmtree(plans["transfer"].out)
    with pytest.raises(TdroError, match="not complete"):
        provenance(Path(plans["transfer"].folder))


# ---- all runs ----


def test_runs_are_listed_once_each_with_their_state(plans):
    listed = list_runs(Path("runs"))
    assert {(run["stage"], run["status"]) for run in listed} == {("dedup", "complete"), ("transfer", "complete")}
    published = artifacts.manifest_of(plans["dedup"].out)["published"]
    assert next(run for run in listed if run["stage"] == "dedup")["when"] == published
    total = sum(p.lstat().st_size for p in Path(plans["dedup"].folder).rglob("*") if p.is_file())
    assert next(run for run in listed if run["stage"] == "dedup")["bytes"] == total


def begun(plans) -> Path:
    """A fine-tuning that wrote checkpoints 4 and 8, and half of 10."""
    folder = Path("runs/roads/finetune-0123456789ab")
    for name in ("step-000004", "step-000008"):
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / "manifest.json").write_text("{}")
    (folder / "checkpoints" / "step-000010").mkdir()
    plan = artifacts.read_json(Path(plans["transfer"].folder) / "plan.json")
    artifacts.write_json(folder / "plan.json", {**plan, "stage": "finetune"})
    (folder / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n{"step": 8, "loss": 0.9}\n{"step": 9, "lo')
    return folder


def test_a_partial_run_names_its_newest_whole_checkpoint_and_logged_steps(plans):
    begun(plans)
    (run,) = (run for run in list_runs(Path("runs")) if run["stage"] == "finetune")
    assert (run["status"], run["checkpoint"], run["steps_done"], run["steps"]) == ("partial", 8, 9, 10)


def test_a_run_is_running_while_its_lock_is_held(plans):
    lock = begun(plans) / "lock"
    with open(lock, "w") as file:
        file.write(str(os.getpid()))
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert [r["status"] for r in list_runs(Path("runs")) if r["stage"] == "finetune"] == ["running"]
    assert [r["status"] for r in list_runs(Path("runs")) if r["stage"] == "finetune"] == ["partial"]


def test_a_manifest_that_cannot_be_read_makes_a_damaged_run(plans):
    (plans["transfer"].out / "manifest.json").write_text("{")
    assert [r["status"] for r in list_runs(Path("runs")) if r["stage"] == "transfer"] == ["damaged"]


def test_no_folder_of_runs_is_told(tmp_path):
    with pytest.raises(TdroError, match="there is no folder"):
        list_runs(tmp_path / "runs")


# ---- the commands ----


def run_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["tdro", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0, capsys.readouterr().out


def test_show_and_runs_speak_to_people_and_machines(plans, monkeypatch, capsys):
    code, out = run_command(monkeypatch, capsys, "show", str(plans["transfer"].out), "--verify")
    assert code == 0 and "data/tunnels.jsonl" in out and "verified: " in out
    code, out = run_command(monkeypatch, capsys, "runs", "--json")
    assert code == 0 and len(json.loads(out)) == 2
    code, out = run_command(monkeypatch, capsys, "runs")
    assert code == 0 and "roads/transfer" in out
    (plans["transfer"].out / "sampling.json").write_text("{}")
    code, out = run_command(monkeypatch, capsys, "show", str(plans["transfer"].out), "--verify", "--json")
    assert code == 1 and "sampling.json is not the file" in json.loads(out)["faults"][0]
