"""Commands in this process on input that hypothesis makes up, and what every answer to it must be."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

QUICK = int(os.environ.get("TDRO_FUZZ", "100"))  # cases of each default test; the slow ones make 5,000
MANY = int(os.environ.get("TDRO_FUZZ_SLOW", "5000"))
HANGS = 60.0  # seconds of the processor, of which a case takes milliseconds; one that waits for ever stops the test


def cases(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)


def command(*arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command, as the console script runs it."""
    from tdro_cli import cli

    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["tdro", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def check_answer(runs: Path, *arguments: str) -> tuple[int, str, str]:
    """Runs a command on doubtful input: it works, or says in our words what is wrong, and leaves nothing half done."""
    began = time.process_time()
    code, out, err = command(*arguments)
    told = f"{' '.join(arguments)}\n{err}"
    assert time.process_time() - began < HANGS, told
    assert code in (0, 2), f"exit code {code}: {told}"
    assert "Traceback" not in out + err and "this is a fault of tdro" not in err, told
    if code == 2:
        faults = [line for line in err.splitlines() if line.startswith("error: ")]
        assert faults and all(len(fault) > len("error: x") for fault in faults), told
        assert sum(line.startswith("  ") for line in err.splitlines()) >= len(faults), f"no place or remedy: {told}"
    assert not list(runs.rglob(".*.partial")), told
    for folder in [*runs.glob("*/*/out"), *(runs / ".cache" / "tasks").glob("[0-9a-f]*")]:
        assert (folder / "manifest.json").is_file(), f"half an artifact in {folder}: {told}"
    return code, out, err


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# ---- what people and machines write ----

words = st.one_of(
    st.sampled_from(
        ["", " ", "~", "null", "true", "1e-4", "nan", ".inf", "../../x", "/dev/null", "/dev/full", "a" * 1000, "\0",
         "\ud800", "\u202e", "é", "日本", "${HOME}", "${NOT_SET}", "{", "*a", "&a", "!!python/object:os.system", "-1",
         "msmarco", "relative", "uniform", "train_ref", "0x10", "1_000", "2026-01-01", "=", "<b>", "%s", "{0}"]
    ),
    st.text(max_size=20),
)  # fmt: skip
numbers = st.one_of(
    st.sampled_from([0, -1, 1, 2, 10**30, -(10**30), 2**63, 0.0, -0.0, 1e-320, 1e308, 0.5, 1.5]),
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, words)
values: st.SearchStrategy[Any] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4), max_leaves=8
)


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in items for path in [(*above, key), *places(item, (*above, key))]]


def mutated(value: Any, draw: Any) -> Any:
    """The value with one place changed, removed, renamed or given twice."""
    path = draw(st.sampled_from(places(value)))
    target = value
    for key in path[:-1]:
        target = target[key]
    last, how = path[-1], draw(st.sampled_from(["change", "change", "nudge", "remove", "rename", "copy"]))
    if how == "change":
        target[last] = draw(values)
    elif how == "nudge":
        target[last] = draw(scalars)
    elif how == "remove":
        del target[last]
    elif isinstance(target, list):
        target.append(target[last])
    else:
        target[draw(words)] = target.pop(last) if how == "rename" else target[last]
    return value


def bent(data: bytes, draw: Any) -> bytes:
    """The bytes with some of them changed, lost, repeated or added."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        span = draw(st.integers(0, 12))
        new = draw(st.binary(max_size=6) | st.sampled_from([b"\n", b"\t", b": ", b"- ", b"{", b"]", b'"', b"&a "]))
        data = draw(
            st.sampled_from(
                [
                    data[:at] + new + data[at + span :],
                    data[:at] + new + data[at:],
                    data[:at],
                    data + data[at : at + span],
                ]
            )
        )
    return data
