"""Input that nobody would write on purpose: what it is answered, and that nothing hangs, grows or is obeyed."""

from __future__ import annotations

import gzip
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tdro_cli import artifacts
from tdro_cli.errors import RunFailed, TdroError, known_fault

ROW = '{"query": "what is it", "pos": ["it is"], "neg": ["no"]}\n'
RECIPE = "tasks: [{name: a, path: a.jsonl}]\ntransfer: {strategy: uniform}\n"


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A folder with a good recipe; what hangs in it fails."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(ROW)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(300)  # others may be at work on this machine
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


ENDLESS = ["pipe", "/dev/zero"]


@pytest.mark.parametrize("file", ENDLESS)
@pytest.mark.parametrize(
    "arguments",
    [
        ("recipe", "check", "FILE"),
        ("transfer", "--hostfile", "FILE", "--dry-run"),
        ("transfer", "--set", "transfer={weights_from: FILE}"),
        ("transfer", "--set", "tasks=FILE"),
        ("transfer", "--set", "tasks.a.path=FILE"),
        ("report", "FILE"),
        ("show", "FILE"),
    ],
)
def test_a_pipe_or_a_device_in_place_of_a_file_is_refused(tdro, arguments, file):
    code, _, err = tdro(*[word.replace("FILE", file) for word in arguments])
    assert code == 2 and file in err and err.count("\n") >= 2


@pytest.mark.parametrize("file", ENDLESS)
def test_a_pipe_or_a_device_is_no_json_and_has_no_digest(file):
    for read in (artifacts.read_json, artifacts.digest_file):
        with pytest.raises(OSError, match="pipe or a device"):
            read(Path(file))


@pytest.mark.parametrize("runs", ["recipe.yaml", "/dev/null", "loop", "x" * 5000])
def test_a_folder_of_runs_that_can_not_be_one_is_bad_input(tdro, runs):
    code, out, err = tdro("transfer", "--runs", runs, "--json")
    assert code == 2 and err.count("error: ") == 1 and json.loads(out)["errors"][0]["message"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("seed: 0x" + "f" * 5000, "more than 64 bits"),
        ("finetune: {steps: 1000000000000000000}", "less than or equal to 1000000000"),
        ("finetune: {batch: {queries: 1000000000000000000}}", "less than or equal to 1000000"),
        ("finetune: {optimizer: {betas: [0.9, 1.0]}}", "less than 1"),
        ("finetune: {optimizer: {betas: [-0.1, 0.9]}}", "greater than or equal to 0"),
        ("encoder: {temperature: 1e-320}", "greater than or equal to 0.000001"),
        ("encoder: {query_length: 1000000000000}", "less than or equal to 1000000"),
        ("lora: {r: 1000000000000}", "less than or equal to 1000000"),
        ("mine: {rank_window: [1, 1000000000000]}", "<= 1000000"),
        ("backbone: {name: scratch, options: {hidden_size: 1000000000000}}", "between 1 and 1,000,000"),
        ("backbone: {name: scratch, options: {heads: 0}}", "between 1 and 1,000,000"),
        ("backbone: {name: scratch, options: {layers: -1}}", "between 1 and 1,000,000"),
        ("name: " + "日" * 100, "300 bytes"),
    ],
)
def test_sizes_that_no_machine_has_are_refused_before_anything_is_read(tdro, project, lines, words):
    (project / "recipe.yaml").write_text(f"{RECIPE}{lines}\n")
    code, _, err = tdro("recipe", "check")
    assert code == 2 and words in err and "recipe.yaml:3" in err and not (project / "runs").exists()


def test_a_variable_that_is_named_like_a_secret_does_not_get_into_a_plan(tdro, project, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TOKENIZERS", "fine")
    (project / "recipe.yaml").write_text(RECIPE.replace("name: a,", "name: a, prompt: 'say ${HF_TOKEN}',"))
    code, out, err = tdro("transfer")
    assert code == 2 and "HF_TOKEN is named like a secret" in err and "hf_secret" not in out + err
    assert not [path for path in project.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    (project / "recipe.yaml").write_text(RECIPE.replace("name: a,", "name: a, prompt: 'say ${TOKENIZERS}',"))
    assert tdro("transfer")[0] == 0


def test_a_variable_that_is_no_text_is_named(tdro, project, monkeypatch):
    monkeypatch.setitem(os.environ, "BYTES", "\udcff")
    (project / "recipe.yaml").write_text(RECIPE.replace("name: a,", "name: a, prompt: '${BYTES}',"))
    code, _, err = tdro("recipe", "check")
    assert code == 2 and "BYTES is not text" in err


def test_what_a_terminal_would_obey_is_shown(tdro, project):
    (project / "a.jsonl").write_text('{"\\u001b[31mred\\nerror: no": 1}\n')
    code, _, err = tdro("recipe", "check")
    assert code == 2 and "\x1b" not in err and "\\x1b[31mred\\nerror: no" in err and err.count("error: ") == 2
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b'{"query": "a", "pos": ["b"], "neg": ["c"], "x": 1e999}', "beyond a number of 64 bits"),
        (b'{"query": "a", "pos": ["b"], "neg": ["c"], "x": ' + b"[" * 100_000 + b"}", "nested too deeply"),
        (b'{"query": "a", "pos": ["b"], "neg": ["c"], "x": NaN}', "NaN is not JSON"),
    ],
)
def test_rows_that_could_not_be_written_again_are_bad_rows(tdro, project, row, words):
    (project / "a.jsonl").write_bytes(row + b"\n")
    code, _, err = tdro("recipe", "check")
    assert code == 2 and words in err and "a.jsonl:1" in err


def test_a_file_without_line_ends_is_not_read_into_memory(tdro, project, monkeypatch):
    from tdro_cli.data import formats

    monkeypatch.setattr(formats, "MOST_LINE_BYTES", 1000)
    for name, data in {"a.jsonl": b" " * 5000, "a.jsonl.gz": gzip.compress(b" " * 5000)}.items():
        (project / name).write_bytes(data)
        code, _, err = tdro("recipe", "check", "--set", f"tasks.a.path={name}")
        assert code == 2 and "a line of more than" in err and f"{name}:1" in err


def collection(folder: Path, **files: bytes) -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    whole = {
        "corpus.jsonl": b'{"_id": "d", "text": "it is"}\n',
        "queries.jsonl": b'{"_id": "q", "text": "what"}\n',
        "qrels/test.tsv": b"query-id\tcorpus-id\tscore\nq\td\t1\n",
    }
    for name, data in (whole | files).items():
        (folder / name).write_bytes(data)
    return folder


def test_a_collection_with_byte_order_marks_and_windows_line_ends_is_read(project):
    from tdro_cli import registry

    mark = b"\xef\xbb\xbf"
    folder = collection(
        project / "test",
        **{
            "corpus.jsonl": mark + b'{"_id": "d", "text": "it is"}\r\n',
            "queries.jsonl": mark + b'{"_id": "q", "text": "what"}\r\n',
            "qrels/test.tsv": mark + b"query-id\tcorpus-id\tscore\r\nq\td\t1\r\n",
        },
    )
    loaded = registry.resolve("benchmarks", "folder", {"path": str(folder)}).load("test")
    assert loaded.qrels == {"q": {"d": 1}} and [text.text for text in loaded.queries] == ["what"]
    assert [text.text for text in loaded.corpus()] == ["it is"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("corpus.jsonl", b'{"_id": "d", "text": ' + b"[" * 100_000),
        ("corpus.jsonl", b'{"_id": "d", "text": "\\ud800"}'),
        ("corpus.jsonl", b'{"_id": "d", "text": "\xff"}'),
        ("corpus.jsonl", b""),
        ("queries.jsonl", b'{"_id": "q", "text": NaN}'),
        ("qrels/test.tsv", b"q\td\t" + b"9" * 5000),
        ("qrels/test.tsv", b"q\td\t" + b"9" * 30),
    ],
)
def test_a_damaged_collection_names_file_and_line(project, name, data):
    from tdro_cli import registry

    benchmark = registry.resolve("benchmarks", "folder", {"path": str(collection(project / "test", **{name: data}))})
    with pytest.raises(TdroError) as fault:
        list(benchmark.load("test").corpus())
    assert name in fault.value.where and fault.value.remedy


@pytest.mark.parametrize("at", [3, 40, -12, -3])
def test_a_packed_collection_with_a_flipped_byte_is_refused_or_whole(project, at):
    from tdro_cli import registry

    lines = b"".join(b'{"_id": "d%d", "text": "it is %d"}\n' % (n, n) for n in range(200))
    packed = bytearray(gzip.compress(lines))
    packed[at] ^= 0x55
    folder = collection(project / "test")
    (folder / "corpus.jsonl").unlink()
    (folder / "corpus.jsonl.gz").write_bytes(packed)
    loaded = registry.resolve("benchmarks", "folder", {"path": str(folder)}).load("test")
    try:
        assert len(list(loaded.corpus())) == 200
    except TdroError as fault:
        assert "corpus.jsonl.gz" in fault.where and fault.remedy


@pytest.mark.parametrize(
    "content", ['{"tasks": ' + "[" * 100_000, "\ufeff{}", "[]", "null", '{"domain_weights": {"a": "x"}}']
)
def test_weights_that_are_none_are_refused(tdro, project, content):
    (project / "w.json").write_text(content)
    code, _, err = tdro("transfer", "--set", "transfer={weights_from: w.json}")
    assert code == 2 and "w.json" in err


def test_what_fills_the_memory_is_told_as_such():
    torch = pytest.importorskip("torch")
    with pytest.raises(Exception) as error:
        torch.empty(2**62, dtype=torch.uint8)
    fault = known_fault(error.value)
    assert isinstance(fault, RunFailed) and "not enough memory" in str(fault) and "--dry-run" in fault.remedy
    assert isinstance(known_fault(MemoryError()), RunFailed)
    assert known_fault(RuntimeError("anything else")) is None


def test_no_name_of_a_task_reaches_beyond_a_file_name(tdro, project):
    (project / "recipe.yaml").write_text(RECIPE.replace("name: a,", f"name: {'é' * 100},"))
    assert tdro("transfer")[0] == 0  # 200 bytes
    (project / "recipe.yaml").write_text(RECIPE.replace("name: a,", f"name: {'é' * 101},"))
    code, _, err = tdro("transfer")
    assert code == 2 and "202 bytes" in err
    (project / "recipe.yaml").write_text(RECIPE.replace("name: a,", f"name: {'x' * 1000},"))
    code, _, err = tdro("transfer")
    assert code == 2 and "at most 200 characters" in err and sys.getsizeof(err) < 2000
