"""What the demo keeps of one visitor, and for how long."""

import contextlib
import ctypes
import itertools
import os
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .inpainting import Settings
from .photos import Photo, VisitorError

# An upload is kept for so long after its use, since gradio keeps equal files of equal names at one place: another
# visitor may have sent the same, and wait for their turn.
UPLOAD_SECONDS = 60
MAX_KEPT_MEGAPIXELS = 150


@dataclass(frozen=True)
class Version:
    """A visitor's photo as it came, or after a removal: of which mask, before it was grown, and by which settings."""

    photo: Photo
    mask: np.ndarray | None = None
    settings: Settings | None = None


class Session:
    """One visitor's versions of a photo, by ids; that of the photo as it came is 1."""

    def __init__(self, photo: Photo):
        self.versions: dict[int, Version] = {}
        self._ids = itertools.count(1)
        self.embeddings: tuple[int, list] | None = None  # of which version, for clicks
        self._directory = tempfile.TemporaryDirectory(prefix="moebius-demo-", ignore_cleanup_errors=True)
        self.folder = Path(self._directory.name)
        self.begin_run()
        self.keep(Version(photo))

    def keep(self, version: Version) -> int:
        """Keeps a version, and lets go of the oldest removals if all together are too large; returns its id."""
        version_id = next(self._ids)
        self.versions[version_id] = version
        width, height = version.photo.image.size  # which all of them have
        while len(self.versions) > max(2, MAX_KEPT_MEGAPIXELS * 1e6 / (width * height)):
            del self.versions[list(self.versions)[1]]
        return version_id

    def version(self, version_id: int) -> Version:
        if version_id not in self.versions:
            raise VisitorError(
                "This version of the photo is no longer kept. Please go on from a newer one, or open the photo again."
            )
        return self.versions[version_id]

    def begin_run(self) -> None:
        """Gives the next run a stop flag: a file that is not there."""
        self.stop_flag = self.folder / f"stop-{uuid.uuid4().hex}"

    def stop(self) -> None:
        """Stops the run that goes on, if any."""
        raise_flag(self.stop_flag)

    def close(self) -> None:
        """Stops, and forgets all."""
        self.stop()
        self.versions.clear()
        self.embeddings = None
        self._directory.cleanup()
        call_glibc("malloc_trim", 0)


def call_glibc(function: str, *values: int) -> None:
    """Tells glibc how to keep freed memory, of which it else keeps hundreds of megabytes; others need no word."""
    with contextlib.suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), function)(*values)


def raise_flag(path: Path) -> None:
    """Makes a stop flag, unless its session has been closed, which has stopped the run already."""
    with contextlib.suppress(FileNotFoundError):
        path.touch()


def delete_upload(path: str) -> None:
    """Deletes a file that was used, a little later and if it has not been sent again since."""
    used = time.time()

    def delete() -> None:
        with contextlib.suppress(OSError):
            if os.path.getmtime(path) <= used:
                os.unlink(path)

    timer = threading.Timer(UPLOAD_SECONDS, delete)
    timer.daemon = True  # a server that ends deletes all uploads
    timer.start()
