import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tdro_cli import cli

RECIPE = """\
name: roads
tasks:
  - {name: bridges, path: data/bridges.jsonl}
  - {name: tunnels, path: data/tunnels.jsonl}
  - {name: fords, path: data/fords.jsonl}
backbone: {name: scratch}
transfer: {weights_from: weights.json}
finetune: {steps: 10, batch: {queries: 8}}
"""
WEIGHTS = {"bridges": 0.5, "tunnels": 0.375, "fords": 0.125}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for number, name in enumerate(WEIGHTS):
        write_task(name, [row(f"{name} {i}") for i in range(4 * (number + 1))])
    Path("weights.json").write_text(json.dumps({"domain_weights": WEIGHTS}))
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def row(query, positives=("a passage",)):
    return {"query_id": query, "query": query, "pos": list(positives), "neg": ["another"]}


def write_task(name, rows):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    Path(f"data/{name}.jsonl").write_text("\n".join(lines) + "\n")


def files():
    """All files but the cache of training files."""
    return sorted(str(p) for p in Path().rglob("*") if p.is_file() and ".cache" not in p.parts)


# ---- transfer, the shortest whole stage ----


def test_transfer_runs_in_a_folder_with_a_recipe(tdro):
    code, out, _ = tdro("transfer", "--json")
    assert code == 0
    told = json.loads(out)
    sampling = told["results"]["transfer"]
    assert {name: task["probability"] for name, task in sampling["tasks"].items()} == pytest.approx(WEIGHTS)
    assert [task["draws"] for task in sampling["tasks"].values()] == pytest.approx([40, 30, 10])
    assert sampling["tasks"]["tunnels"]["epochs"] == pytest.approx(30 / 8)
    (stage,) = told["stages"]
    assert stage["status"] == "done"
    assert json.loads((Path(stage["folder"]) / "out" / "sampling.json").read_text()) == sampling
    assert Path("runs/roads/transfer/out/sampling.json").is_file()


def test_the_same_command_again_says_complete_and_changes_nothing(tdro):
    tdro("transfer")
    before = {path: Path(path).stat().st_mtime_ns for path in files()}
    code, out, _ = tdro("transfer", "--json")
    assert code == 0 and json.loads(out)["stages"][0]["status"] == "complete"
    assert {path: Path(path).stat().st_mtime_ns for path in files()} == before


def test_strategy_and_its_options_come_from_the_command_line(tdro):
    code, out, _ = tdro("transfer", "--strategy", "reweight")
    assert code == 0 and "bridges" in out and "fords" in out
    percent = ("--strategy", "top_percent", "--set", "transfer.strategy.options.percent=70")
    code, out, _ = tdro("transfer", *percent, "--json")
    assert code == 0
    tasks = json.loads(out)["results"]["transfer"]["tasks"]  # floor(3 x 0.7) = 2
    assert {name: task["probability"] for name, task in tasks.items()} == {"bridges": 0.5, "tunnels": 0.5}


def test_the_table_shows_tasks_weights_and_epochs(tdro):
    code, out, _ = tdro("transfer")
    line = next(line for line in out.splitlines() if "tunnels" in line)
    assert code == 0 and line.split() == ["tunnels", "8", "0.3750", "0.3750", "30", "3.75"]


def test_a_folder_that_looks_like_markup_is_shown_as_it_is(tdro):
    for folder in ("a[bold]b", "a[/x]b"):
        code, out, _ = tdro("transfer", "--runs", folder)
        assert code == 0 and f"{folder}/roads/transfer-" in out


def test_quiet_says_nothing_but_the_result(tdro):
    assert tdro("transfer", "--quiet")[2] == ""


def test_a_task_without_a_weight_is_named_and_nothing_is_published(tdro):
    Path("weights.json").write_text(json.dumps({"domain_weights": {"bridge": 0.5, "tunnels": 0.5, "fords": 0}}))
    code, _, err = tdro("transfer")
    assert code == 2 and "'bridges'" in err and "did you mean 'bridge'?" in err
    assert not list(Path("runs").rglob("sampling.json"))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tasks": 1}', '{"domain_weights": {"a": "x"}}', "5"])
def test_a_file_that_holds_no_weights_is_told(tdro, content):
    Path("weights.json").write_text(content)
    code, _, err = tdro("transfer")
    assert code == 2 and "weights.json" in err


# ---- a dry run ----


@pytest.mark.parametrize("command", ["transfer", "run", "finetune"])
def test_dry_run_tells_the_plan_and_writes_nothing_but_the_cache(tdro, command):
    before = files()
    code, out, _ = tdro(command, "--dry-run")
    assert code == 0 and "bridges" in out and "to do" in out
    assert files() == before
    code, out, _ = tdro(command, "--dry-run", "--json")
    told = json.loads(out)
    assert code == 0 and {name: task["rows"] for name, task in told["tasks"].items()} == {
        "bridges": 4,
        "tunnels": 8,
        "fords": 12,
    }
    assert all(stage["status"] == "to do" for stage in told["stages"].values())
    assert files() == before


def test_dry_run_of_an_evaluation_tells_its_stages(tdro):
    sections = ["--set", "eval={held_out: {queries: 2}}", "--set", "finetune.rows=held_in"]
    code, out, err = tdro("run", "--dry-run", "--json", *sections)
    assert (code, err) == (0, "")
    assert json.loads(out)["stages"]["eval"]["status"] == "to do"


def test_dry_run_tells_the_real_epochs_once_the_sampling_is_known(tdro):
    tdro("transfer")
    told = json.loads(tdro("finetune", "--dry-run", "--json")[1])
    assert told["stages"]["finetune"]["epochs"] == pytest.approx({"bridges": 10, "tunnels": 3.75, "fords": 10 / 12})


# ---- faults of the recipe ----


def test_faults_of_a_recipe_come_together_with_exit_code_2(tdro):
    Path("recipe.yaml").write_text(
        RECIPE.replace("data/fords", "data/frods").replace("steps: 10", "steps: ten").replace("scratch", "scrtch")
    )
    code, out, err = tdro("transfer")
    assert code == 2 and out == ""
    assert err.count("error: ") == 3 and err.rstrip().endswith("3 errors")
    for place in ("recipe.yaml:5, tasks.2.path", "recipe.yaml:6, backbone.name", "recipe.yaml:8, finetune.steps"):
        assert place in err


def test_json_tells_faults_as_json(tdro):
    code, out, _ = tdro("transfer", "--json", "--set", "sead=1")
    (fault,) = json.loads(out)["errors"]
    assert code == 2 and fault["message"] == "unknown key 'sead'"
    assert fault["where"] == "--set sead=1, sead" and "did you mean 'seed'?" in fault["remedy"]


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tdro", "transfer", "--debug", "--set", "sead=1"])
    with pytest.raises(Exception, match="unknown key"):
        cli.main()


@pytest.mark.parametrize("arguments", [["mine"], ["eval"], ["dedup"]])
def test_a_stage_that_the_recipe_lacks_is_told(tdro, arguments):
    code, _, err = tdro(*arguments)
    assert code == 2 and f"no section '{arguments[0]}'" in err


def test_no_recipe_in_the_folder_is_told(tdro):
    Path("recipe.yaml").unlink()
    code, _, err = tdro("transfer")
    assert code == 2 and "there is no recipe recipe.yaml" in err and "tdro recipe list" in err


@pytest.mark.parametrize("arguments", [["nonsense"], ["transfer", "--nonsense"], ["transfer", "--set"]])
def test_an_unknown_command_or_option_exits_with_2(tdro, arguments):
    assert tdro(*arguments)[0] == 2


# ---- faults of the data ----


@pytest.mark.parametrize(
    "bad, words",
    [
        ('{"query": "q", "pos": ["p"', "JSON"),
        (row("q", positives=()), "positive"),
        (row("  "), "query"),
        ("[1, 2]", "object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_and_nothing_is_published(tdro, bad, words):
    write_task("tunnels", [row("a"), row("b"), bad, row("c")])
    for command in (["transfer"], ["recipe", "check"], ["run", "--dry-run"]):
        code, _, err = tdro(*command)
        assert code == 2 and "data/tunnels.jsonl:3" in err and words in err
    assert not [path for path in files() if path.startswith("runs")]
    assert not [path for path in Path("runs").rglob("manifest.json") if "tunnels" in path.read_text()]


def test_bad_rows_of_several_files_come_together(tdro):
    write_task("tunnels", [row("a"), row("b", ())])
    write_task("fords", ["{"])
    code, out, _ = tdro("transfer", "--json")
    places = [fault["where"] for fault in json.loads(out)["errors"]]
    assert code == 2 and [place.split(",")[0] for place in places] == ["data/tunnels.jsonl:2", "data/fords.jsonl:1"]


def test_bad_rows_may_be_skipped_and_are_counted(tdro):
    write_task("tunnels", [row("a"), row("b", ()), row("c")])
    code, out, _ = tdro("transfer", "--json", "--set", "skip_bad_rows=true")
    assert code == 0 and json.loads(out)["results"]["transfer"]["tasks"]["tunnels"]["size"] == 2


def test_a_folder_that_cannot_be_written_is_told(tdro):
    Path("full").write_text("a file")
    code, _, err = tdro("transfer", "--runs", "full")
    assert code in (1, 2) and "full" in err and "fault of tdro" not in err


# ---- recipes and plugins ----


def test_recipe_check_counts_the_rows(tdro):
    assert tdro("recipe", "check")[:2] == (0, "recipe.yaml is valid: 3 tasks, 24 rows\n")
    assert json.loads(tdro("recipe", "check", "--json")[1])["tasks"] == {"bridges": 4, "tunnels": 8, "fords": 12}


def test_recipe_schema_is_a_json_schema_that_knows_every_section(tdro):
    schema = json.loads(tdro("recipe", "schema")[1])
    assert set(yaml.safe_load(RECIPE)) <= set(schema["properties"])
    assert "required" not in schema  # tasks may be absent where models are evaluated as they are
    assert schema["properties"]["seed"]["description"]


def test_shipped_recipes_are_listed_and_copied_but_never_over_a_file(tdro):
    code, out, _ = tdro("recipe", "list")
    assert code == 0 and "quickstart" in out
    assert tdro("recipe", "copy", "quickstart", "mine.yaml")[0] == 0
    assert "tasks" in yaml.safe_load(Path("mine.yaml").read_text())
    code, _, err = tdro("recipe", "copy", "quickstart", "mine.yaml")
    assert code == 2 and "mine.yaml exists" in err
    code, _, err = tdro("recipe", "copy", "quikstart")
    assert code == 2 and "did you mean 'quickstart'?" in err


def test_plugins_are_listed_with_their_options(tdro):
    code, out, _ = tdro("plugins")
    assert code == 0 and "top_percent" in out and "70.0" in out
    listed = {row["name"]: row for row in json.loads(tdro("plugins", "list", "--json")[1])}
    assert {"relative", "exponentiated_gradient", "bm25"} <= listed.keys()
    assert listed["top_percent"]["options"]["percent"] == "70.0"


# ---- as a process ----


def test_the_console_script_ends_with_the_code_and_without_a_traceback():
    script = Path(sys.executable).with_name("tdro")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "tdro_cli"]
    environment = {**os.environ, "COLUMNS": "100"}
    for arguments, code in ((["recipe", "check"], 0), (["recipe", "check", "--set", "sead=1"], 2)):
        ended = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)
        assert ended.returncode == code and "Traceback" not in ended.stderr


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(tmp_path):
    from tdro_cli.data.tasks import open_task

    cache = Path("runs/.cache/tasks")
    cache.mkdir(parents=True)
    made = open_task("tunnels", "data/tunnels.jsonl", cache=tmp_path / "cache")
    command = [sys.executable, "-m", "tdro_cli", "recipe", "check"]
    # a suite that runs in a shell's background hands its ignored Ctrl-C down
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with open(cache / f".{made.folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
            opened = Path(f"/proc/{process.pid}/fd")
            while not any(os.path.realpath(one) == os.path.realpath(lock.name) for one in opened.iterdir()):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)  # until it waits for the file that we are importing
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in err and "Traceback" not in err


@pytest.mark.parametrize("encoding, shown", [("ascii", "\\u6a4b"), ("latin-1", "\\u6a4b"), ("utf-8", "橋")])
def test_any_name_can_be_printed_wherever_output_goes(encoding, shown):
    Path("recipe.yaml").write_text(RECIPE.replace("name: bridges", "name: 橋"), encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for more in ((), ("--json",)):
        command = [sys.executable, "-m", "tdro_cli", "transfer", "--set", "transfer.strategy=uniform", *more]
        ended = subprocess.run([*command], capture_output=True, env=environment, check=False)
        assert ended.returncode == 0, ended.stderr
        if more:
            assert "橋" in json.loads(ended.stdout.decode("utf-8"))["results"]["transfer"]["tasks"]
        else:
            assert shown in ended.stdout.decode(encoding)


@pytest.mark.parametrize("width", ["0", "-5", "wide", "²"])
def test_a_terminal_without_a_size_is_as_wide_as_any(width, tdro):
    tdro("transfer")
    command = [sys.executable, "-m", "tdro_cli", "runs"]
    environment = {**os.environ, "COLUMNS": width, "PYTHONIOENCODING": "utf-8"}
    told = subprocess.run(command, capture_output=True, env=environment, check=True).stdout.decode()
    assert "roads/transfer" in told and "complete" in told


RUDE = """
import time
class Rude:
    def __call__(self, *given, **named):
        open("begun", "w").close()
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            raise RuntimeError("an error of the library's own") from None
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_library_that_answers_ctrl_c_with_an_error_is_stopped_all_the_same(tmp_path, number):
    info = tmp_path / "site" / "tdro_rude-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tdro-rude\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[tdro.transfer_strategies]\nrude = tdro_rude:Rude\n")
    (tmp_path / "site" / "tdro_rude.py").write_text(RUDE)
    search = os.pathsep.join([str(info.parent), *sys.path])
    command = [sys.executable, "-m", "tdro_cli", "transfer", "--set", "transfer.strategy=rude"]
    heard = functools.partial(signal.signal, number, signal.SIG_DFL)
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": search}, preexec_fn=heard
    ) as process:
        while process.poll() is None and not Path("begun").exists():
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.splitlines()[-1].startswith("stopped; the same command goes on"), err


def test_a_reader_that_leaves_early_makes_no_noise():
    command = f"{sys.executable} -m tdro_cli recipe schema | head -c 10"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in ended.stderr and "fault of tdro" not in ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="/sys takes no folder, not even from root")
def test_a_folder_that_cannot_be_written_is_named(tdro, tiny_recipe):
    code, _, err = tdro("train-ref", str(tiny_recipe), "--runs", "/sys/tdro-runs", "-q")
    assert code == 2 and "/sys/tdro-runs" in err
