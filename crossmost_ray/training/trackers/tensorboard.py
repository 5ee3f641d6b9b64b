"""Curves to TensorBoard's event files, in the folder `tensorboard` of the run."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from crossmost_ray.storage import Store
from crossmost_ray.training.trackers.tracker import Enrolment

FOLDER = "tensorboard"


class TensorBoard:
    """One event file. A run that goes on writes a further one beside it, which TensorBoard joins.

    tensorboardX's `SummaryWriter` writes from a thread of its own, and its `flush` does not wait
    for that one; a row that was logged would be lost with the process. So the file beneath it is
    used, which writes at once.
    """

    def __init__(self, run: Store, enrolment: Enrolment) -> None:
        self.store = run.child(FOLDER)
        self._aside: tempfile.TemporaryDirectory[str] | None = None
        if self.store.local is None:
            self._aside = tempfile.TemporaryDirectory()
            self.folder = Path(self._aside.name)
        else:
            self.folder = self.store.local
            self.folder.mkdir(parents=True, exist_ok=True)
        # The name begins with the second; two processes may open a file within the same one.
        suffix = f".{os.getpid()}.{enrolment.step:08d}"
        self._writer = EventsWriter(str(self.folder / "events"), suffix)
        if enrolment.step > 0:
            # Hides what a killed process had written beyond the step that counts.
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=enrolment.step + 1, session_log=start))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(Event(step=step, summary=Summary(value=values)))
        self._writer.flush()
        if self._aside is not None:
            for file in self.folder.iterdir():
                self.store.upload(file, file.name)

    def summarize(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds curves of one point."""
        self.log(step, numbers)

    def finish(self) -> None:
        """Closes the file."""
        self._writer.close()
        if self._aside is not None:
            self._aside.cleanup()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
