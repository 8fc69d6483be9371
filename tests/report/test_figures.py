from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from tdro_cli.report.figures import weight_figures

FILES = ("trajectory.png", "trajectory.svg", "weights.png", "weights.svg")


def run_of(num_tasks: int, steps: int, speed: float = 0.1) -> tuple[dict, list[dict]]:
    """weights.json and metrics of a run in which the later a task, the more it falls."""
    names = [f"task {number:02}" for number in range(num_tasks)]
    log_SG = -speed * np.outer(np.arange(1, steps + 1), np.arange(num_tasks))
    weight_SG = np.exp(log_SG) / np.exp(log_SG).sum(1, keepdims=True)
    metrics = [
        {"step": step, "tasks": {name: {"weight": weight} for name, weight in zip(names, row, strict=True)}}
        for step, row in enumerate(weight_SG.tolist())
    ]
    columns = zip(names, weight_SG[-1].tolist(), weight_SG.mean(0).tolist(), strict=True)
    return {"tasks": {name: {"weight": weight, "mean": mean} for name, weight, mean in columns}}, metrics


def texts(svg) -> list[str]:
    """What the figure says: matplotlib notes each text beside the outlines of its letters."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text())


def test_both_figures_are_written_as_png_and_svg_with_the_same_bytes_each_time(tmp_path):
    import matplotlib

    given = run_of(20, 30)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with matplotlib.rc_context({"font.size": 20 if name == "two" else 8}):  # a user's own settings
            weight_figures(tmp_path / name, *given)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == list(FILES)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_every_task_is_named_beside_its_bar_from_the_highest_to_the_lowest(tmp_path):
    weight_figures(tmp_path, *run_of(20, 10))
    said = [text for text in texts(tmp_path / "weights.svg") if text.startswith("task 0") or text.startswith("task 1")]
    assert said == [f"task {number:02}" for number in range(20)]
    assert "equal share, 0.05" in texts(tmp_path / "weights.svg")


def test_the_trajectory_names_the_four_highest_and_the_three_lowest(tmp_path):
    weight_figures(tmp_path, *run_of(20, 10))
    named = [text for text in texts(tmp_path / "trajectory.svg") if re.fullmatch(r"task \d\d", text)]
    assert named == ["task 00", "task 01", "task 02", "task 03", "task 17", "task 18", "task 19"]


@pytest.mark.parametrize(
    ("num_tasks", "steps", "speed"), [(1, 1, 0.1), (2, 1, 1e-6), (3, 5, 0.0), (4, 3, 0.01), (25, 40, 1.0), (60, 2, 0.1)]
)
def test_the_axis_of_weights_has_numbers_whatever_the_range(num_tasks, steps, speed, tmp_path):
    weight_figures(tmp_path, *run_of(num_tasks, steps, speed))
    numbers = [float(text) for text in texts(tmp_path / "trajectory.svg") if re.fullmatch(r"0?\.?\d+(\.\d+)?", text)]
    weights = [number for number in numbers if 0 < number <= 1]
    assert len(weights) >= 2
    assert all((tmp_path / name).stat().st_size > 3000 for name in FILES)


def test_long_names_are_cut_and_signs_of_mathematics_are_shown_as_they_are(tmp_path):
    weights, metrics = run_of(2, 2)
    names = {"task 00": "prices in $ and in $", "task 01": "x" * 50}
    weights["tasks"] = {names[name]: task for name, task in weights["tasks"].items()}
    metrics = [{**line, "tasks": {names[name]: task for name, task in line["tasks"].items()}} for line in metrics]
    weight_figures(tmp_path, weights, metrics)
    said = texts(tmp_path / "weights.svg")
    assert f"{'x' * 31}…" in said
    assert any(text.replace("\\", "") == "prices in $ and in $" for text in said)
