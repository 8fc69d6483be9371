"""The report of real, small runs: whole ones are in test_end_to_end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

for needed in ("torch", "deepspeed", "matplotlib"):
    pytest.importorskip(needed)

from tdro_cli.errors import TdroError  # noqa: E402
from tdro_cli.report.chapters import report, write_report  # noqa: E402
from tdro_cli.report.page import Drawing, Notes, Table, html  # noqa: E402
from tdro_cli.run.history import experiment as experiment_of  # noqa: E402
from tdro_cli.run.history import planned_experiment  # noqa: E402
from tdro_cli.run.launch import Machines, run_plan  # noqa: E402
from tdro_cli.run.progress import Silent  # noqa: E402


@pytest.fixture(scope="module")
def transferred(referenced, tmp_path_factory):
    """The tiny experiment with weights and a sampling plan; the model is not fine-tuned yet."""
    folder = tmp_path_factory.mktemp("transferred")
    shutil.copytree(referenced.runs, folder / "runs", symlinks=True)
    experiment = type(referenced)(referenced.recipe, folder / "runs")
    experiment.run(stage="transfer")
    return experiment


@pytest.fixture
def learned(transferred, tmp_path, monkeypatch):
    """A copy of one's own, in the working directory."""
    shutil.copytree(transferred.runs, tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return type(transferred)(transferred.recipe, Path("runs"))


def written(target, to="report.html", overrides=(), runs=Path("runs"), force=False):
    made = write_report(Path(target), list(overrides), runs, Path(to), Silent(), force=force)
    return made, Path(to).read_text(encoding="utf-8")


def chapter(document, title):
    return next(c for c in document.chapters if c.title == title)


def test_a_report_of_part_of_the_line_tells_what_is_missing(learned):
    made, page = written("runs/tiny")
    assert made["stages"] == {
        "backbone": "complete",
        "train-ref": "complete",
        "learn-weights": "complete",
        "transfer": "complete",
        "finetune": "absent",
    }
    assert "not complete" in page and "finetune: not begun" in page
    assert "Task weights" in page and "Sampling" in page and ">Measures<" not in page
    assert "Lengths in tokens" in page  # of the experiment's own tokenizer


def test_the_same_is_found_from_the_folder_a_stage_a_file_and_the_recipe(learned):
    places = ("runs/tiny", "runs/tiny/learn-weights", "runs/tiny/train-ref/out", "runs/tiny/transfer/out/sampling.json")
    found = [experiment_of(Path(place)) for place in places] + [planned_experiment(learned.plans())]
    digests = [{stage: run.digest for stage, run in experiment.stages.items()} for experiment in found]
    assert len(digests[0]) == 5 and all(other == digests[0] for other in digests)
    assert written(learned.recipe)[0]["stages"] == {stage: run.status for stage, run in found[0].stages.items()}


def test_every_task_stands_in_every_table_of_tasks(learned):
    document = report(experiment_of(Path("runs/tiny")), "not looked at")
    for title in ("Data", "Task weights", "Sampling"):
        table = next(b for b in chapter(document, title).blocks if isinstance(b, Table))
        assert {row[0] for row in table.rows} == {"shell", "numbers", "network", "words"}


def test_the_numbers_are_those_of_the_files(learned):
    weights = json.loads(Path("runs/tiny/learn-weights/out/weights.json").read_text())["tasks"]
    document = report(experiment_of(Path("runs/tiny")), "not looked at")
    table = next(b for b in chapter(document, "Task weights").blocks if isinstance(b, Table))
    for row in table.rows:
        assert row[1] == f"{weights[row[0]]['weight']:.4f}"
        assert row[2] == f"{4 * weights[row[0]]['weight']:.2f} ×"


def test_a_run_that_was_stopped_shows_how_far_it_came(learned):
    folder = Path("runs/tiny/learn-weights").resolve()
    shutil.rmtree(folder / "out")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # cut in the middle of a line
    made, page = written(folder)
    assert made["stages"]["learn-weights"] == "partial"
    assert "learn-weights: begun and stopped, 3 of 6 steps" in page
    document = report(experiment_of(folder), "not looked at")
    assert [b.name for b in chapter(document, "Task weights").blocks if isinstance(b, Drawing)] == ["trajectory"]


def test_what_the_command_line_changed_is_told_with_the_recipe_as_it_was_run(learned):
    plans = learned.plans("transfer.strategy.name=uniform", stage="transfer")
    for plan in plans.values():
        run_plan(plan, Machines(), Silent(), quiet=True)
    document = report(experiment_of(Path(plans["transfer"].folder)), "not looked at")
    words = " ".join(getattr(b, "text", "") for b in chapter(document, "Recipe").blocks)
    assert "The command line changed: transfer.strategy.name=uniform" in words
    assert "name: uniform" in words
    others = [b for b in chapter(document, "Where it comes from").blocks if getattr(b, "title", "").startswith("Other")]
    assert "transfer" in {row[0] for row in others[0].rows}


def test_two_experiments_in_one_folder_are_not_mixed(learned):
    plans = learned.plans("seed=8", stage="backbone")
    for plan in plans.values():
        run_plan(plan, Machines(), Silent(), quiet=True)
    newest = experiment_of(Path("runs/tiny"))
    assert newest.recipe["seed"] == 8
    assert {stage: run.status for stage, run in newest.stages.items()}["train-ref"] == "absent"
    older = experiment_of(Path("runs/tiny/train-ref"))
    assert older.recipe["seed"] == 7 and older.complete("transfer")


def test_text_of_recipes_and_data_is_inert(learned):
    path = Path("runs/tiny/transfer/plan.json")
    plan = json.loads(path.read_text())
    plan["recipe"]["tasks"][0]["prompt"] = "</table><script>alert(1)</script>"
    plan["recipe_text"] = "# <img src=x onerror=alert(1)>"
    path.write_text(json.dumps(plan))
    page = html(report(experiment_of(Path("runs/tiny")), "<script>alert(2)</script>"))
    assert "<script" not in page and "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_files_that_have_changed_since_are_not_looked_at(learned):
    for path in {path.resolve() for path in Path("runs").glob("tiny/*/plan.json")}:
        other = json.loads(path.read_text())
        assert all(len(task["data"]) == 64 for task in other["numbers"]["tasks"].values())
        for task in other["numbers"]["tasks"].values():
            task["data"] = "0" * 64
        path.write_text(json.dumps(other))
    _, page = written("runs/tiny")
    assert "the data could not be looked at: changed since it was read: shell, numbers, network, words" in page


def test_a_file_is_not_replaced_unless_it_is_asked_for(learned):
    assert written("runs/tiny")[0]["replaced"] is False
    with pytest.raises(TdroError, match="exists"):
        written("runs/tiny")
    assert written("runs/tiny", force=True)[0]["replaced"] is True


def test_what_is_no_run_is_told(learned, tdro):
    Path("empty").mkdir()
    for target, words in (("empty", "there are no runs"), ("runs", "there are no runs"), ("nowhere.yaml", "no recipe")):
        code, _, err = tdro("report", target)
        assert code == 2 and words in err
    code, _, err = tdro("report", "runs/tiny", "--set", "seed=1")
    assert code == 2 and "--set goes with a recipe" in err
    assert not list(Path().glob("*.html"))


def test_the_command_writes_beside_the_work_and_says_so(learned, tdro):
    code, out, _ = tdro("report", "runs/tiny")
    assert (code, out) == (0, "wrote tiny-report.html\n")
    code, out, _ = tdro("report", "runs/tiny", "--to", "notes.md", "--json")
    told = json.loads(out)
    assert code == 0 and told["files"][0] == "notes.md" and "notes-figures/weights.svg" in told["files"]
    assert Path("notes.md").read_text().startswith("# tiny\n")


@pytest.mark.parametrize(
    "name, words", [("weights.json", "is not the file that was written"), ("manifest.json", "can't")]
)
def test_a_stage_whose_output_was_changed_is_left_out_and_named(learned, tdro, name, words):
    path = Path("runs/tiny/learn-weights/out") / name
    path.write_text("{")
    code, _, err = tdro("report", str(learned.recipe))
    assert code == 0 and err.startswith("warning: learn-weights is left out, as it is damaged: ") and words in err
    page = Path("tiny-report.html").read_text()
    assert "learn-weights: damaged: " in page and "Task weights" not in page and "Sampling" in page
    assert path.read_text() == "{"


def test_warnings_of_the_weights_are_on_the_page(learned):
    summary = json.loads(Path("runs/tiny/learn-weights/out/summary.json").read_text())
    document = report(experiment_of(Path("runs/tiny")), "not looked at")
    notes = [b for b in chapter(document, "Task weights").blocks if isinstance(b, Notes)]
    assert [text for n in notes for text, _ in n.items] == summary["warnings"]
