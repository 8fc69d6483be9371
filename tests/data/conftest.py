"""For the tests of `tdro import`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tdro_cli.data.imports import import_task
from tdro_cli.errors import TdroError


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is empty."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fault() -> Callable[..., TdroError]:
    """What an import that must fail tells, after which nothing is left: `fault(source, out, **options)`."""
    return _fault


def _fault(*args, **options) -> TdroError:
    with pytest.raises(TdroError) as caught:
        import_task(*args, **options)
    assert not Path(args[1]).exists() and not list(Path().glob(".*.jsonl*"))
    return caught.value
