"""Copies of the same picture in a set: found by a perceptual hash, confirmed by comparing thumbnails.

The hash is the sign pattern of the lowest cosine coefficients of a 32x32 grey thumbnail (the "pHash" of
Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010). Alone it confuses plain
backgrounds; a second look at the colours of a 16x16 thumbnail removes those.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

MIN_SIDE = 24
"""Pixels below which only exact copies count: different digits of 8x8 pixels already look alike."""

_HASH_SIDE, _KEPT, _THUMBNAIL = 32, 8, 16
_MAX_BITS = 8
_MIN_CORRELATION = 0.9
_FLAT = 1.0 / 255
_FIRST_ROOM = 1024

_FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Fingerprint:
    """What two pictures are compared by.

    Args:
        digest: Hash of the pixels; equal only for exact copies.
        bits: (63,) +1 or -1, the perceptual hash; ``None`` for a picture too small or too plain for one.
        thumbnail: (C * 16 * 16,) centred and of unit length.
    """

    digest: bytes
    bits: _FloatArray | None = None
    thumbnail: _FloatArray | None = None


def fingerprint(pixels: Tensor) -> Fingerprint:
    """The fingerprint of one picture.

    Args:
        pixels: (C, H, W) on the [0, 1] scale.
    """
    steps = pixels.mul(255).round().clamp(0, 255).to(torch.uint8)
    digest = hashlib.sha256(str(tuple(steps.shape)).encode() + steps.contiguous().numpy().tobytes()).digest()
    if min(pixels.shape[1:]) < MIN_SIDE:
        return Fingerprint(digest)
    thumbnail = _shrunk(pixels, _THUMBNAIL).numpy().astype(np.float32).ravel()
    thumbnail -= thumbnail.mean()
    if thumbnail.std() < _FLAT:
        return Fingerprint(digest)
    grey = _shrunk(pixels.mean(0, keepdim=True), _HASH_SIDE)[0].double().numpy()
    low = (_COSINES @ grey @ _COSINES.T).ravel()[1:]
    bits = np.where(low > np.median(low), 1.0, -1.0).astype(np.float32)
    return Fingerprint(digest, bits, thumbnail / np.linalg.norm(thumbnail))


@dataclass
class DuplicateFinder:
    """Remembers the pictures of a set and recognises a copy of one of them."""

    _exact: dict[bytes, str] = field(default_factory=dict)
    _names: list[str] = field(default_factory=list)
    _bits: _FloatArray = field(default_factory=lambda: np.empty((_FIRST_ROOM, _KEPT**2 - 1), np.float32))
    _thumbnails: list[_FloatArray] = field(default_factory=list)

    def add(self, name: str, pixels: Tensor) -> str | None:
        """Remember a picture, or say which remembered one it repeats (and do not remember it then).

        Args:
            name: What to call it.
            pixels: (C, H, W) on the [0, 1] scale.

        Returns:
            ``duplicate of NAME`` or ``near-duplicate of NAME``; ``None`` for a new picture.
        """
        new = fingerprint(pixels)
        if new.digest in self._exact:
            return f"duplicate of {self._exact[new.digest]}"
        twin = self._twin(new)
        if twin is not None:
            return f"near-duplicate of {twin}"
        self._exact[new.digest] = name
        if new.bits is not None and new.thumbnail is not None:
            if len(self._names) == len(self._bits):
                # Doubled: copying the set for each picture takes a time that grows with its square.
                self._bits = np.concatenate([self._bits, np.empty_like(self._bits)])
            self._bits[len(self._names)] = new.bits
            self._names.append(name)
            self._thumbnails.append(new.thumbnail)
        return None

    def _twin(self, new: Fingerprint) -> str | None:
        if new.bits is None or new.thumbnail is None or not self._names:
            return None
        different = (len(new.bits) - self._bits[: len(self._names)] @ new.bits) / 2
        near = np.flatnonzero(different <= _MAX_BITS)
        for index in near[np.argsort(different[near], kind="stable")]:
            if float(np.dot(self._thumbnails[index], new.thumbnail)) >= _MIN_CORRELATION:
                return self._names[index]
        return None


def _shrunk(pixels: Tensor, side: int) -> Tensor:
    size = (side, side)
    return interpolate(pixels[None].float(), size, mode="bilinear", antialias=True, align_corners=False)[0]


def _cosines() -> npt.NDArray[np.float64]:
    """The first rows of the orthogonal cosine transform (DCT-II), up to their scale."""
    order = np.arange(_KEPT)[:, None]
    place = np.arange(_HASH_SIDE)[None]
    return np.cos(np.pi * order * (2 * place + 1) / (2 * _HASH_SIDE))


_COSINES = _cosines()
