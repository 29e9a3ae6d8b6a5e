"""What the user sees of a run over many photos, and how it is stopped."""

import json
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TextIO

from ..batch.photo import Item
from ..batch.run import Outcome
from ..batch.sinks import FileSink, ShardSink
from ..batch.sources import Source
from .messages import note, one_line

GO_ON_HINT = "the same command goes on with those that are left"


class Progress:
    """
    Counts what becomes of photos, and tells the user and the report.

    Args:
        source (`Source`): The photos.
        report_file (`TextIO`, *optional*): File for a line of JSON a photo.
    """

    def __init__(self, source: Source, report_file: TextIO | None):
        self.source, self.report_file = source, report_file
        self.done = self.failed = self.existing = 0
        self.is_running = False
        self._said: set[str] = set()
        self._bar = None

    @contextmanager
    def bar(self) -> Iterator[None]:
        """Shows a progress bar, if standard error is a terminal."""
        from tqdm import tqdm

        with tqdm(total=self.source.total, unit="photo", disable=None) as self._bar:
            yield
        self._bar = None

    def without_finished(self, items: Iterable[Item], sink: FileSink | ShardSink) -> Iterator[Item]:
        """The photos whose results are not there yet."""
        for item in items:
            if not sink.holds(item):
                yield item
                continue
            self.existing += 1
            if not self._bar.disable:
                self._bar.initial += 1  # so that rate and time left are those of the others
            self._bar.update()

    def add(self, outcome: Outcome) -> None:
        """Tells what became of a photo."""
        for remark in outcome.remarks:
            if remark not in self._said:  # one mask may be that of many photos
                self._said.add(remark)
                note(f"warning: {remark}")
        if outcome.error is None:
            self.done += 1
            self.show_paths(outcome.paths)
        else:
            self.failed += 1
            note(f"error: {one_line(outcome.error)}")
        self.write_report(outcome)
        if self._bar is not None:
            self._bar.update()

    def show_paths(self, paths: list[Path]) -> None:
        """Prints the paths of written files."""
        for path in paths:
            if self._bar is None:
                print(path, flush=True)
            else:
                self._bar.write(str(path), file=sys.stdout)
                sys.stdout.flush()

    def write_report(self, outcome: Outcome) -> None:
        """Adds a photo to the report."""
        if self.report_file is None:
            return
        line = {
            "photo": outcome.item.name,
            "output": str(outcome.paths[0]) if outcome.paths else None,
            "status": "failed" if outcome.error else "done",
            "seconds": round(outcome.seconds, 3),
            "error": one_line(outcome.error) if outcome.error else None,
        }
        print(json.dumps(line, ensure_ascii=False), file=self.report_file, flush=True)

    def say_how_to_go_on(self) -> None:
        """Says how far it came."""
        total = "" if self.source.total is None else f" of {self.source.total}"
        note(f"stopped after {self.existing + self.done + self.failed}{total} photos; {GO_ON_HINT}")

    def close(self, is_stopped: bool) -> int:
        """Says what is left; returns the exit code."""
        if self.existing:
            exist = "output exists" if self.existing == 1 else "outputs exist"
            note(f"{self.existing} {exist} already, and nothing is done for them (`--overwrite` replaces them)")
        if self.source.left_out:
            more = len(self.source.left_out) - 10
            names = ", ".join(self.source.left_out[:10]) + (f" and {more} more" if more > 0 else "")
            note(f"left out, since they are no pictures: {names}")
        if self.failed:
            note(f"{self.failed} of the photos could not be done")
        if is_stopped:
            self.say_how_to_go_on()
            return 130
        return 1 if self.failed or self.source.left_out else 0


@contextmanager
def finish_what_runs(progress: Progress) -> Iterator[Event]:
    """Lets the first Ctrl-C only set the event, so that the photo at hand is finished; the second ends at once."""
    stopped = Event()

    def stop(*_) -> None:
        if stopped.is_set() or not progress.is_running:
            raise KeyboardInterrupt
        stopped.set()
        note("the photo at hand is finished and written; Ctrl-C once more ends at once")

    try:
        previous = signal.signal(signal.SIGINT, stop)
    except ValueError:  # not in the main thread, where no Ctrl-C arrives
        yield stopped
        return
    try:
        yield stopped
    except KeyboardInterrupt:
        progress.say_how_to_go_on()
        raise
    finally:
        signal.signal(signal.SIGINT, previous)
