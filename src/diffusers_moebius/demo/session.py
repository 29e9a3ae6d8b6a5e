"""What the demo keeps of one visitor, and for how long."""

import contextlib
import os
import tempfile
import threading
import time
import weakref
from pathlib import Path

import numpy as np
from PIL import Image

from .photos import Photo, scale_mask

# An upload is kept for so long after its use, since gradio keeps equal files of equal names at one place: another
# visitor may have sent the same, and wait for their turn.
UPLOAD_SECONDS = 60
REDRAW_SECONDS = 4  # a slow machine takes so long to draw the editor anew


class Session:
    """One visitor's photo, mask and results. It is compared and hashed by identity, as gradio does with states."""

    def __init__(self):
        self.photo: Photo | None = None
        self.view: Image.Image | None = None
        self.mask: np.ndarray | None = None  # in the size of the view
        # Whether the editor holds the mask: while it is out of sight it takes no layer, and this mask counts.
        self.in_editor = True
        self.shown: np.ndarray | None = None  # what the editor holds, as far as is known
        self.outdated: list[tuple[float, np.ndarray]] = []  # what it held, until when it may still send it
        self.embeddings = None
        self.result: Photo | None = None
        self.result_view: Image.Image | None = None
        self.result_mask: np.ndarray | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="moebius-demo-"))
        self._remove_folder = weakref.finalize(self, remove_folder, self.folder)
        self.stop_flag = self.folder / "stop"

    def open(self, photo: Photo, mask: np.ndarray | None = None) -> None:
        """Begins with a photo, and forgets the one before."""
        self.stop()
        self.photo, self.view = photo, photo.view()
        size = self.view.size
        self.mask = np.zeros((size[1], size[0]), bool) if mask is None else scale_mask(mask, size)
        self.embeddings = self.result = self.result_view = self.result_mask = None
        for path in self.folder.iterdir():
            if path != self.stop_flag:
                path.unlink(missing_ok=True)

    def to_editor(self) -> np.ndarray:
        """The mask for the editor; until that has drawn it, it goes on to send what it held before."""
        now = time.monotonic()
        self.outdated = [(until, mask) for until, mask in self.outdated if until > now]
        if self.shown is not None:
            self.outdated.append((now + REDRAW_SECONDS, self.shown))
        self.in_editor, self.shown = True, self.mask
        return self.mask

    def from_editor(self, painted: np.ndarray) -> None:
        """Takes the mask that the editor sends, unless it has not drawn yet what it was given."""
        now = time.monotonic()
        if not any(until > now and np.array_equal(painted, mask) for until, mask in self.outdated):
            self.mask = self.shown = painted

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
