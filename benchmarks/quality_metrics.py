"""The scores of one filled picture, and the Fréchet distance between many."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from skimage.metrics import structural_similarity

from diffusers_moebius.evaluation.lpips import LPIPS, distance_map

# Takes pictures `[B, 3, H, W]` in `uint8`, returns features `[B, features]`.
FeatureExtractor = Callable[[torch.Tensor], torch.Tensor]


def psnr(picture: np.ndarray, photo: np.ndarray) -> float:
    """
    Peak signal-to-noise ratio of 8-bit values.

    Args:
        picture (`np.ndarray`): `uint8`.
        photo (`np.ndarray`): `uint8`, of the same shape.

    Returns:
        `float`: dB; infinite if they are equal.
    """
    error = np.square(picture.astype(np.float64) - photo).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim_map(picture: np.ndarray, photo: np.ndarray) -> np.ndarray:
    """
    Structural similarity at each pixel and channel.

    Args:
        picture (`np.ndarray` of shape `[H, W, 3]`): `uint8`.
        photo (`np.ndarray` of shape `[H, W, 3]`): `uint8`.

    Returns:
        `np.ndarray` of shape `[H, W, 3]`: From -1 to 1; 1 where the pictures are equal.

    Formula: Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004), with its
    window, a Gaussian of deviation 1.5 px.
    """
    _, similarity = structural_similarity(
        picture,
        photo,
        channel_axis=-1,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return similarity


@torch.no_grad()
def lpips_in_hole_and_picture(
    lpips: LPIPS, picture: np.ndarray, photo: np.ndarray, mask: np.ndarray
) -> tuple[float, float]:
    """
    LPIPS averaged over the hole, and LPIPS of the picture as a whole.

    Args:
        lpips ([`LPIPS`]): The network.
        picture (`np.ndarray` of shape `[H, W, 3]`): `uint8`.
        photo (`np.ndarray` of shape `[H, W, 3]`): `uint8`.
        mask (`np.ndarray` of shape `[H, W]`): `True` in the hole.

    Returns:
        `tuple[float, float]`: Both are 0 if the pictures are equal.
    """
    device = lpips.shift.device
    to_tensor = lambda array: torch.tensor(array, device=device).permute(2, 0, 1)[None].float() / 127.5 - 1  # noqa: E731
    distances = lpips.distances(to_tensor(picture), to_tensor(photo))
    in_hole = distance_map(distances, mask.shape)[0, torch.from_numpy(mask).to(device)]
    return in_hole.mean().item(), sum(layer.mean().item() for layer in distances)


def score_picture(picture: np.ndarray, photo: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """
    The scores of one picture that need no network.

    Args:
        picture (`np.ndarray` of shape `[H, W, 3]`): `uint8`.
        photo (`np.ndarray` of shape `[H, W, 3]`): `uint8`.
        mask (`np.ndarray` of shape `[H, W]`): `True` in the hole.

    Returns:
        `dict[str, float]`: Names of `METRICS` in `quality_report`.
    """
    similarity = ssim_map(picture, photo)
    return {
        "psnr": psnr(picture[mask], photo[mask]),
        "ssim": float(similarity[mask].mean()),
        "psnr_picture": psnr(picture, photo),
        "ssim_picture": float(similarity.mean()),
    }


def load_inception(path: str | Path | None, device: str | torch.device = "cpu") -> FeatureExtractor:
    """
    Loads the Inception network whose features the FID compares.

    Args:
        path (`str` or `Path`, *optional*): A TorchScript file that takes `[B, 3, H, W]` pictures in `uint8` and
            `return_features=True` (`inception-2015-12-05.pt` of StyleGAN's metrics; needs no package), or the weights
            of torch-fidelity (`weights-inception-2015-12-05-6726825d.pth`). By default torch-fidelity downloads its
            own.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where it runs.

    Returns:
        Callable that takes pictures `[B, 3, H, W]` in `uint8` and returns features `[B, 2048]`.

    Raises:
        ValueError: If `path` is no file or holds no such network.
        ImportError: If torch-fidelity is needed and cannot be imported.
    """
    if path is not None and not Path(path).is_file():
        raise ValueError(f"`fid_weights` must be a file with the Inception network, but {str(path)!r} is none.")
    if path is not None and Path(path).suffix == ".pt":
        try:
            network = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"`fid_weights` must be TorchScript if it ends in .pt, but {path} is not.") from error
        return lambda pictures: network(pictures.to(device), return_features=True)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(
            "the FID needs the Inception network: name its TorchScript file with `--fid_weights`, or install "
            "`torch-fidelity` (extra `fid`)."
        ) from error
    file = None if path is None else str(path)
    if file is not None:
        # torch-fidelity would read any pickle; this refuses one that holds more than tensors.
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"`fid_weights` must hold a state dict, or TorchScript and end in .pt: {file}") from error
    extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=file)
    extractor = extractor.to(device).eval()
    return lambda pictures: extractor(pictures.to(device))[0]


@torch.no_grad()
def picture_features(extractor: FeatureExtractor, picture: np.ndarray) -> np.ndarray:
    """The features of one picture `[H, W, 3]`, as `[features]` in float32."""
    features = extractor(torch.tensor(picture).permute(2, 0, 1)[None])
    return features.flatten().float().cpu().numpy()


def frechet_distance(features: np.ndarray, other: np.ndarray) -> float:
    """
    Fréchet distance between the Gaussians that fit two sets of features.

    Args:
        features (`np.ndarray` of shape `[N, features]`): At least two rows.
        other (`np.ndarray` of shape `[M, features]`): At least two rows.

    Returns:
        `float`: 0 for sets of the same mean and covariance; infinite or undefined values raise instead.

    Raises:
        ValueError: If a set has fewer than two rows, the widths differ or a feature is not finite.

    Formula: |μ₁ − μ₂|² + tr(C₁ + C₂ − 2 (C₁ C₂)^½), Heusel et al. (arXiv 1706.08500), equation 6, in float64. The
    square root has the trace of (C₁^½ C₂ C₁^½)^½, which is symmetric, so that covariances of few pictures, which are
    singular, do no harm.
    """
    features, other = np.asarray(features, np.float64), np.asarray(other, np.float64)
    if (
        features.ndim != 2
        or other.ndim != 2
        or features.shape[1] != other.shape[1]
        or min(map(len, (features, other))) < 2
    ):
        raise ValueError(
            "`features` and `other` must be of shape [N, features] with N of at least 2, but are of "
            f"{features.shape} and {other.shape}."
        )
    if not (np.isfinite(features).all() and np.isfinite(other).all()):
        raise ValueError("`features` and `other` must be finite, but hold NaN or infinite values.")
    difference = features.mean(0) - other.mean(0)
    covariances = [np.atleast_2d(np.cov(values, rowvar=False)) for values in (features, other)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ covariances[1] @ root)
    traces = sum(np.trace(covariance) for covariance in covariances)
    return float(difference @ difference + traces - 2 * np.sqrt(eigenvalues.clip(0)).sum())
