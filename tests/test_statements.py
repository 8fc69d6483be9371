"""What docs/determinism.md, security.md and training.md promise is held by tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HEADS = ("| what | test |", "| what happens | test |", "| promise | test |")
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("page", ["determinism.md", "security.md", "training.md"])
def test_every_test_that_a_statement_names_exists(page):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / page).read_text())
    assert len(named) >= 12
    for file, test in named:
        functions = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}
        assert test in functions, f"{page} names {file}::{test}"


@pytest.mark.parametrize(
    ("page", "section"),
    [("determinism.md", "# "), ("security.md", "# "), ("training.md", "## Faults known of other trainers")],
)
def test_every_promise_in_a_table_names_its_test(page, section):
    lines = (ROOT / "docs" / page).read_text().partition(section)[2].splitlines()
    rows = [line for line in lines if line.startswith("| ") and line not in HEADS]
    assert rows and all("::test_" in row for row in rows)
