"""Calibration sets: drawn from a folder, stored with their preprocessing, and hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from metaaug_cli.calibration.duplicates import DuplicateFinder
from metaaug_cli.calibration.image_folder import (
    ImageFolder,
    Progress,
    balanced_order,
    check_class_count,
    decode_in_order,
    iter_labelled_batches,
    require_some,
    scan_folder,
)
from metaaug_cli.calibration.outliers import find_outliers
from metaaug_cli.errors import InputError, UsageError
from metaaug_cli.files import replaced_atomically
from metaaug_cli.networks.preprocessing import Preprocessing

__all__ = [
    "CalibrationSet",
    "ImageFolder",
    "Progress",
    "build_calibration_set",
    "check_class_count",
    "iter_labelled_batches",
    "load_calibration_set",
    "make_calibration_set",
    "save_calibration_set",
    "scan_folder",
]

METADATA_KEY = "metaaug"
_FORMAT = "calibration-set"
_VERSION = 1
SYNTHETIC_ORIGIN = "data-free from"
SYNTHETIC_SOURCE = "synthetic-"
_CHUNK = 64


@dataclass(frozen=True)
class CalibrationSet:
    """The images that quantizers are fitted on.

    Args:
        images: Normalised float32 (N, C, H, W).
        preprocessing: What made them.
        sources: Where each image came from, relative to the folder.
        skipped: ``path: reason`` for every folder and file that could not be used.
        sha256: Hash of the image bytes and the preprocessing, hex.
        origin: Short description, e.g. ``folder calib``.
        duplicates: ``path: duplicate of path`` for every copy that was left out.
        outliers: ``path: what is unusual`` for images that stand out; they are part of the set.
    """

    images: Tensor
    preprocessing: Preprocessing
    sources: tuple[str, ...]
    skipped: tuple[str, ...]
    sha256: str
    origin: str
    duplicates: tuple[str, ...] = ()
    outliers: tuple[str, ...] = ()

    @property
    def holds_synthetic(self) -> bool:
        """Whether some of the images were made from a network."""
        return not bool(self.is_real.all())

    @property
    def is_real(self) -> Tensor:
        """Which of the images (N,) were not made from a network."""
        if SYNTHETIC_ORIGIN not in self.origin:
            return torch.ones(len(self.images), dtype=torch.bool)
        return torch.tensor([not source.startswith(SYNTHETIC_SOURCE) for source in self.sources])


def build_calibration_set(
    folder: ImageFolder,
    preprocessing: Preprocessing,
    *,
    num: int = 1024,
    seed: int = 0,
    keep_duplicates: bool = False,
    progress: Progress | None = None,
) -> CalibrationSet:
    """Draw images, balanced over the classes, and prepare them for the network.

    An unreadable file, and a copy of an image drawn before, is replaced by another of the same folder and
    named. Images that stand out by exposure, colour or size are named too, and kept.

    Args:
        folder: Where to draw from.
        preprocessing: The network's own.
        num: How many; fewer if fewer can be read.
        seed: The same seed, folder and preprocessing give the same set.
        keep_duplicates: Whether copies may stay in the set.
        progress: Called with (images prepared, images wanted).

    Raises:
        InputError: Not one image can be read.
        UsageError: ``num`` is below 1.
    """
    if num < 1:
        raise UsageError(f"the number of calibration images must be at least 1, got {num}")
    order = balanced_order(folder, seed=seed)
    wanted = min(num, len(order))
    images = torch.empty(wanted, preprocessing.channels, *preprocessing.size)
    sources: list[str] = []
    skipped = list(folder.unread)
    duplicates: list[str] = []
    finder = None if keep_duplicates else DuplicateFinder()
    for index, decoded in decode_in_order(folder, preprocessing, order):
        name = folder.paths[index].relative_to(folder.root).as_posix()
        if isinstance(decoded, str):
            skipped.append(f"{name}: {decoded}")
            continue
        twin = None if finder is None else finder.add(name, preprocessing.denormalise(decoded))
        if twin is not None:
            duplicates.append(f"{name}: {twin}")
            continue
        images[len(sources)] = decoded
        sources.append(name)
        if progress is not None:
            progress(len(sources), wanted)
        if len(sources) == wanted:
            break
    require_some(len(sources), skipped, folder.root)
    origin = f"folder {folder.root.resolve().name}"
    made = make_calibration_set(images[: len(sources)], preprocessing, sources, skipped, origin)
    outliers = find_outliers(made.images, preprocessing, sources, folder.root)
    return replace(made, duplicates=tuple(duplicates), outliers=outliers)


def make_calibration_set(
    images: Tensor,
    preprocessing: Preprocessing,
    sources: Sequence[str],
    skipped: Sequence[str] = (),
    origin: str = "memory",
) -> CalibrationSet:
    """A calibration set of images that are prepared already, with its hash worked out."""
    digest = _hash_images(images, preprocessing)
    return CalibrationSet(images, preprocessing, tuple(sources), tuple(skipped), digest, origin)


def join_calibration_sets(first: CalibrationSet, second: CalibrationSet) -> CalibrationSet:
    """One set with the images of both, those of ``first`` in front.

    Raises:
        InputError: They were prepared in different ways.
    """
    differences = second.preprocessing.differences(first.preprocessing)
    if differences:
        raise InputError(f"sets of different preprocessing cannot be joined ({'; '.join(differences)})")
    made = make_calibration_set(
        torch.cat([first.images, second.images]),
        first.preprocessing,
        first.sources + second.sources,
        first.skipped + second.skipped,
        f"{first.origin} and {second.origin}",
    )
    duplicates, outliers = first.duplicates + second.duplicates, first.outliers + second.outliers
    return replace(made, duplicates=duplicates, outliers=outliers)


def load_calibration_set(
    path: Path | str,
    *,
    preprocessing: Preprocessing | None = None,
    num: int = 1024,
    seed: int = 0,
    progress: Progress | None = None,
) -> CalibrationSet:
    """Calibration images from a folder, or from a file that ``save_calibration_set`` wrote.

    Args:
        path: A folder or a ``.safetensors`` file.
        preprocessing: The network's; needed for a folder, compared with the file's own otherwise.
        num: At most so many images; of a file the first ones, which are balanced over the classes too.
        seed: Seed of the draw from a folder.
        progress: Called with (done, total).

    Raises:
        InputError: Nothing usable there, or a file made for another preprocessing.
        UsageError: A folder without a preprocessing, or ``num`` below 1.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() == ".safetensors":
        stored = _read_stored(path)
        if preprocessing is not None:
            _require_same(preprocessing, stored.preprocessing, path)
        if num < 1:
            raise UsageError(f"the number of calibration images must be at least 1, got {num}")
        if num >= len(stored.images):
            return stored
        first, sources = stored.images[:num].clone(), stored.sources[:num]
        made = make_calibration_set(first, stored.preprocessing, sources, stored.skipped, stored.origin)
        outliers = tuple(o for o in stored.outliers if o.startswith(tuple(f"{s}: " for s in sources)))
        return replace(made, duplicates=stored.duplicates, outliers=outliers)
    if preprocessing is None and path.is_dir():
        raise UsageError(f"{path} is a folder, so the model's preprocessing is needed to read it")
    if path.is_file() or preprocessing is None:
        problem = "is not a calibration set" if path.exists() else "does not exist"
        raise InputError(
            f"{path} {problem}", hint="pass a folder of images or a set built by metaaug calibrate"
        )
    return build_calibration_set(scan_folder(path), preprocessing, num=num, seed=seed, progress=progress)


def save_calibration_set(calibration: CalibrationSet, path: Path | str) -> None:
    """Write a calibration set as one safetensors file, atomically.

    Images on the 8-bit pixel grid are stored as bytes, others as float32; either way they read back
    bit for bit. Equal sets give equal files.

    Raises:
        InputError: The file cannot be written.
    """
    path = Path(path)
    pixels = _as_pixels(calibration)
    tensors = {"pixels": pixels} if pixels is not None else {"images": calibration.images.contiguous()}
    meta = {
        "format": _FORMAT,
        "version": _VERSION,
        "preprocessing": calibration.preprocessing.to_dict(),
        "sources": list(calibration.sources),
        "skipped": list(calibration.skipped),
        "sha256": calibration.sha256,
        "origin": calibration.origin,
        "duplicates": list(calibration.duplicates),
        "outliers": list(calibration.outliers),
    }
    with replaced_atomically(path) as partial:
        save_file(tensors, partial, metadata={METADATA_KEY: json.dumps(meta, sort_keys=True)})


def _hash_images(images: Tensor, preprocessing: Preprocessing) -> str:
    digest = hashlib.sha256(json.dumps(preprocessing.to_dict(), sort_keys=True).encode())
    digest.update(str(tuple(images.shape)).encode())
    for chunk in images.split(_CHUNK):
        digest.update(chunk.contiguous().numpy().data)
    return digest.hexdigest()


def _as_pixels(calibration: CalibrationSet) -> Tensor | None:
    """The 8-bit pixels that normalise to exactly these images, if there are such."""
    preprocessing = calibration.preprocessing
    chunks = []
    for chunk in calibration.images.split(_CHUNK):
        pixels = preprocessing.to_pixels(chunk)
        if not torch.equal(preprocessing.normalise(pixels), chunk):
            return None
        chunks.append(pixels)
    return torch.cat(chunks)


def _read_stored(path: Path) -> CalibrationSet:
    try:
        with safe_open(path, framework="pt") as file:
            meta: Any = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
                raise InputError(
                    f"{path} is not a calibration set",
                    hint="build one: metaaug calibrate MODEL --images DIR --out calib.safetensors",
                )
            if meta.get("version") != _VERSION:
                raise InputError(
                    f"{path} is a calibration set of version {meta.get('version')}, not {_VERSION}"
                )
            preprocessing = Preprocessing.from_dict(meta["preprocessing"])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        images = stored["images"] if "images" in stored else preprocessing.normalise(stored["pixels"])
        lists = tuple(meta["sources"]), tuple(meta["skipped"])
        # Absent in the files of earlier releases.
        notes = tuple(meta.get("duplicates", ())), tuple(meta.get("outliers", ()))
        calibration = CalibrationSet(images, preprocessing, *lists, meta["sha256"], meta["origin"], *notes)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as exc:
        raise InputError(f"{path} is not a readable calibration set: {exc}") from exc
    _require_intact(calibration, path)
    return calibration


def _require_intact(calibration: CalibrationSet, path: Path) -> None:
    images, preprocessing = calibration.images, calibration.preprocessing
    names = (*calibration.sources, *calibration.skipped, *calibration.duplicates, *calibration.outliers)
    fits = images.dim() == 4 and images.shape[1] == preprocessing.channels and images.dtype == torch.float32
    if not fits or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} is not a readable calibration set: its entries do not fit together")
    if _hash_images(images, preprocessing) != calibration.sha256 or len(calibration.sources) != len(images):
        raise InputError(
            f"{path} was changed after it was built: its hash does not match", hint="build it again"
        )
    if not len(images):
        raise InputError(f"{path} holds no images", hint="build it again")
    if not all(bool(chunk.isfinite().all()) for chunk in images.split(_CHUNK)):
        raise InputError(f"{path} holds images with NaN or infinite values", hint="build it again")


def _require_same(wanted: Preprocessing, stored: Preprocessing, path: Path) -> None:
    differences = stored.differences(wanted)
    if differences:
        raise InputError(
            f"{path} was built for another preprocessing ({'; '.join(differences)})",
            hint="build the set again for this model, or pass the flags it was built with",
        )
