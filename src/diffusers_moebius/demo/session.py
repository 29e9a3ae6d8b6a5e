"""What the demo keeps of one visitor, and for how long."""

import contextlib
import os
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .photos import Photo, VisitorError

# An upload is kept for so long after its use, since gradio keeps equal files of equal names at one place: another
# visitor may have sent the same, and wait for their turn.
UPLOAD_SECONDS = 60
MAX_KEPT_MEGAPIXELS = 250


@dataclass(frozen=True)
class Version:
    """
    A visitor's photo as it came, or after a removal.

    Args:
        photo (`Photo`): The photo.
        mask (`np.ndarray` of shape `[H, W]`, *optional*): What was filled to make it, before the mask was grown.
        command (`str`): The command line that makes it from the photo before it.
    """

    photo: Photo
    mask: np.ndarray | None = None
    command: str = ""


class Session:
    """One visitor's versions of a photo. It is compared and hashed by identity, as gradio does with states."""

    def __init__(self):
        self.versions: dict[int, Version] = {}
        self._next_id = 0
        self.embeddings: tuple[int, list] | None = None  # of which version, for clicks
        self.folder = Path(tempfile.mkdtemp(prefix="moebius-demo-"))
        self._remove_folder = weakref.finalize(self, remove_folder, self.folder)
        self.stop_flag = self.folder / "stop"

    def open(self, photo: Photo) -> int:
        """Begins with a photo, and forgets the one before; returns its id."""
        self.stop()
        self.versions.clear()
        self.embeddings = None
        for path in self.folder.iterdir():
            if path != self.stop_flag:
                path.unlink(missing_ok=True)
        return self.keep(Version(photo))

    def keep(self, version: Version) -> int:
        """Keeps a version, and lets go of the oldest removals if all together are too large; returns its id."""
        self._next_id += 1
        self.versions[self._next_id] = version
        while len(self.versions) > 2 and self._megapixels() > MAX_KEPT_MEGAPIXELS:
            del self.versions[list(self.versions)[1]]
        return self._next_id

    def _megapixels(self) -> float:
        return sum(v.photo.image.width * v.photo.image.height for v in self.versions.values()) / 1e6

    def version(self, version_id: int | None) -> Version:
        if version_id not in self.versions:
            raise VisitorError(
                "This version of the photo is no longer kept. Please go on from a newer one, or open the photo again."
                if self.versions
                else "Choose a photo first."
            )
        return self.versions[version_id]

    def begin_run(self) -> Path:
        """A flag for a new run; the one before, if it still goes on, is told to stop."""
        self.stop()
        handle, path = tempfile.mkstemp(prefix="stop-", dir=self.folder)
        os.close(handle)
        self.stop_flag = Path(path)
        self.stop_flag.unlink()
        return self.stop_flag

    def stop(self) -> None:
        """Stops the run that goes on, if any."""
        if self.folder.exists():
            self.stop_flag.touch()

    def close(self) -> None:
        """Stops, and deletes what is on the disk."""
        self.stop()
        self.versions.clear()
        self._remove_folder()


def remove_folder(folder: Path) -> None:
    """Deletes a folder and the files in it; it may be gone already."""
    if folder.exists():
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
        folder.rmdir()


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
