"""The photos, holes and settings of the evaluation protocols."""

import io
import json
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffusers_moebius.pictures.random_mask import random_mask

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Protocol:
    """
    What a protocol fixes.

    Args:
        data (`str`): Photos that the paper takes, in words.
        resolution (`int`, *optional*): Side of the centre crop that photos are brought to; `None` leaves them whole.
        mask_preset (`str`, *optional*): Name in `MASK_PRESETS` of the holes to draw where no masks are given; `None`
            takes the masks that lie beside the photos.
        mask_area (`tuple[float, float]`): Share of the picture that a drawn hole may take.
        checkpoint (`str`, *optional*): Folder of the published repository.
        num_inference_steps (`int`, *optional*): Denoising steps; `None` leaves them to the pipeline.
        guidance_scale (`float`, *optional*): Guidance scale; `None` leaves it to the pipeline.
        strength (`float`, *optional*): Strength; `None` leaves it to the pipeline.
        count (`int`, *optional*): Number of photos, drawn by the seed 0 from those that are there; all by default.
        reported (`str`, *optional*): Scores that the paper gives for the published weights, where we know them.
    """

    data: str
    resolution: int | None = None
    mask_preset: str | None = None
    mask_area: tuple[float, float] = (0.0, 1.0)
    checkpoint: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    strength: float | None = None
    count: int | None = None
    reported: str | None = None


_SCENES = {"checkpoint": "ft_places2", "num_inference_steps": 20, "guidance_scale": 2.5, "strength": 0.99}
_PORTRAITS = {"num_inference_steps": 20, "guidance_scale": 2.0, "strength": 0.99}
# The paper's mask files are not published: where it names a kind of hole, the preset that comes nearest stands for it.
PROTOCOLS = {
    "places2-test": Protocol(
        "10,000 photos of Places2's test set", 512, "thick_512", (0.4, 0.5), **_SCENES, count=10_000
    ),
    "places2-large": Protocol("36,500 photos of Places2's validation set", 512, "thick_512", **_SCENES),
    "places2-small": Protocol(
        "36,500 photos of Places2's validation set", 512, "medium_512", **_SCENES, reported="FID 0.92, LPIPS 0.091"
    ),
    "places2-256": Protocol("photos of Places2's validation set", 256, "thick_256", **_SCENES),
    "celebahq-512": Protocol(
        "3,000 photos of CelebA-HQ",
        512,
        "thick_512",
        checkpoint="ft_celebahq",
        **_PORTRAITS,
        reported="FID 5.39, LPIPS 0.122",
    ),
    "ffhq-256": Protocol(
        "10,000 photos of FFHQ", 256, "thick_256", checkpoint="ft_ffhq", **_PORTRAITS, reported="FID 8.15, LPIPS 0.231"
    ),
    # The paper's Table 7, whose draws are not published.
    "lvis-512": Protocol("10,000 photos of LVIS", 512, "thick_512", (0.4, 0.5), **_SCENES, count=10_000),
    "deepfakeface-512": Protocol(
        "3,000 photos of the subset wiki of DeepFakeFace",
        512,
        "thick_512",
        checkpoint="ft_celebahq",
        **_PORTRAITS,
        count=3_000,
    ),
    "custom": Protocol("photos of your own, with masks beside them"),
}


@dataclass
class Sample:
    """
    A photo with its hole.

    Args:
        name (`str`): Name of the photo without its suffix.
        photo (`np.ndarray` of shape `[H, W, 3]`): RGB, `uint8`.
        mask (`np.ndarray` of shape `[H, W]`): `True` in the hole.
        kind (`str`): What sort of hole it is.
    """

    name: str
    photo: np.ndarray
    mask: np.ndarray
    kind: str


class Samples:
    """
    Photos with their holes, sorted by name and read one at a time.

    Args:
        data (`str` or `Path`): Folder or tar file of photos.
        masks (`str` or `Path`, *optional*): Folder or tar file of masks `NAME.png` or `NAME.mask.png` (white = hole),
            of the photo's size or of `resolution`. By default they are drawn if the protocol draws its holes, and
            lie beside the photos as `NAME.mask.png` otherwise.
        protocol ([`Protocol`], defaults to `PROTOCOLS["custom"]`): Crop, and the holes to draw.
        limit (`int`, *optional*): Number of photos to take, spread evenly over those of the protocol; all by default.
        resolution (`int`, *optional*): Without a protocol's crop, resizes each photo so that its shorter side has so
            many pixels.
        seed (`int`, defaults to 0): A drawn hole depends on the seed and the photo's number among all photos.

    Raises:
        ValueError: If there are no photos or a photo has no mask; and when a photo is read, if it is no picture, its
            mask has another size or the hole is empty or everything.
    """

    def __init__(
        self,
        data: str | Path,
        masks: str | Path | None = None,
        protocol: Protocol = PROTOCOLS["custom"],
        limit: int | None = None,
        resolution: int | None = None,
        seed: int = 0,
    ):
        self.protocol, self.resolution, self.seed = protocol, protocol.resolution or resolution, seed
        self.files = _list_files("data", data)
        photos = [name for name in self.files if _is_photo(name)]
        if not photos:
            raise ValueError(f"`data` must hold photos ({', '.join(PHOTO_SUFFIXES)}), but {str(data)!r} does not.")
        self.numbers = list(range(len(photos)))
        if protocol.count is not None and protocol.count < len(photos):
            self.numbers = sorted(random.Random(0).sample(self.numbers, protocol.count))
        if limit is not None:
            self.numbers = [self.numbers[i] for i in sorted({round(i) for i in np.linspace(0, len(self) - 1, limit)})]
        self.photos = [photos[i] for i in self.numbers]
        self.names = [name.rpartition(".")[0] for name in self.photos]

        self.draws = masks is None and protocol.mask_preset is not None
        self.mask_option = "data" if masks is None else "masks"
        self.mask_files = self.files if masks is None else _list_files("masks", masks)
        self.mask_names = []
        for name in () if self.draws else self.names:
            choices = [f"{name}.mask.png"] if masks is None else [f"{name}.png", f"{name}.mask.png"]
            found = [choice for choice in choices if choice in self.mask_files]
            if not found:
                wanted = " or ".join(choices)
                raise ValueError(f"`{self.mask_option}` must hold a mask for each photo, but there is no {wanted}.")
            self.mask_names.append(found[0])

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = self.names[index]
        photo = _open("data", self.files, self.photos[index]).convert("RGB")
        mask = None
        if not self.draws:
            mask = _open(self.mask_option, self.mask_files, self.mask_names[index]).convert("L")
        if self.protocol.resolution is not None:
            photo, mask = self._crop(name, photo, mask)
        else:
            self._check_size(name, mask.size, (photo.size,))
            if self.resolution is not None:
                scale = self.resolution / min(photo.size)
                size = tuple(round(scale * side) for side in photo.size)
                photo, mask = photo.resize(size, Image.Resampling.LANCZOS), mask.resize(size, Image.Resampling.NEAREST)
        if mask is None:
            hole, kind = self._draw(self.numbers[index]), self.protocol.mask_preset
        else:
            hole, kind = np.asarray(mask) >= 128, self._kind(name)
        if not hole.any() or hole.all():
            raise ValueError(
                f"`{self.mask_option}` must hold masks with a hole and something around it, but that of {name} "
                "does not."
            )
        return Sample(name, np.array(photo), hole, kind)

    def _kind(self, name: str) -> str:
        if self.mask_option == "masks" or f"{name}.json" not in self.files:
            return "any"
        return json.loads(self.files[f"{name}.json"]()).get("mask", "any")

    def _check_size(self, name: str, size: tuple[int, int], allowed: tuple[tuple[int, int], ...]) -> None:
        if size not in allowed:
            raise ValueError(
                f"`{self.mask_option}` must hold masks of the photos' sizes, but {name}: {size} for a photo of "
                f"{' or '.join(map(str, allowed))}."
            )

    def _crop(self, name: str, photo: Image.Image, mask: Image.Image | None) -> tuple[Image.Image, Image.Image | None]:
        """The largest centred square, resized; a mask that has the result's size already is taken as it is."""
        final, side = (self.protocol.resolution,) * 2, min(photo.size)
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        box = (left, top, left + side, top + side)
        if mask is not None and mask.size != final:
            self._check_size(name, mask.size, (photo.size, final))
            mask = mask.resize(final, Image.Resampling.NEAREST, box=box)
        return photo.resize(final, Image.Resampling.LANCZOS, box=box), mask

    def _draw(self, number: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, number))
        least, most = self.protocol.mask_area
        for _ in range(10_000):
            mask = random_mask(self.resolution, self.resolution, self.protocol.mask_preset, generator)
            if least <= mask.mean() <= most:
                return mask
        raise RuntimeError(f"no hole of {self.protocol.mask_preset} takes {least} to {most} of the picture")


def _is_photo(name: str) -> bool:
    return name.lower().endswith(PHOTO_SUFFIXES) and not name.endswith(".mask.png")


def _list_files(option: str, source: str | Path) -> dict:
    """Functions that read the files of a folder or a tar file, by name."""
    source = Path(source)
    if source.is_dir():
        return {path.relative_to(source).as_posix(): path.read_bytes for path in sorted(source.rglob("*.*"))}
    if source.is_file() and tarfile.is_tarfile(source):
        archive = tarfile.open(source)  # noqa: SIM115, read from until the last sample is out
        members = sorted((member for member in archive if member.isfile()), key=lambda member: member.name)
        return {member.name: lambda member=member: archive.extractfile(member).read() for member in members}
    raise ValueError(f"`{option}` must be a folder or a tar file, but {str(source)!r} is neither.")


def _open(option: str, files: dict, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(files[name]()))
        image.load()
        return image
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"`{option}` must hold readable pictures, but {name} is none: {error}") from error
