"""Metrics as TensorBoard event files: `tensorboard --logdir runs`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PATTERN = "events.out.tfevents.*"


class EventLog:
    """One event file below `folder`, an event a step; it stands for the whole run, the steps before a resume included.

    TensorBoard's own writer would put the host's name into the file's, and keep steps that a killed run does again.
    """

    def __init__(self, folder: Path, before: Iterable[Mapping[str, Any]] = ()):
        """Replaces what an earlier process left by the metrics `before` this one begins."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        old = list(folder.glob(PATTERN))
        self._path, now = folder / f"events.out.tfevents.{time.time_ns()}", time.time()
        self._append(
            Event(wall_time=now, file_version="brain.Event:2"),
            # a TensorBoard that watches the folder forgets what it has read from the file before
            Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START)),
            *map(_event, before),
        )
        for path in old:
            path.unlink(missing_ok=True)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """The numbers of a step, those of a task as `NAME/TASK`; a reader sees them at once."""
        self._append(_event(metrics))

    def _append(self, *events: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        with open(self._path, "ab") as file:
            writer = RecordWriter(file)
            for event in events:
                writer.write(event.SerializeToString())


def _event(metrics: Mapping[str, Any]) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _numbers(metrics)]
    return Event(wall_time=time.time(), step=metrics["step"], summary=Summary(value=values))


def _numbers(metrics: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    for name, value in metrics.items():
        if name == "tasks":
            for task, columns in value.items():
                yield from ((f"{column}/{task}", number) for column, number in _numbers(columns))
        elif name != "step" and isinstance(value, int | float) and value == value:
            yield name, value
