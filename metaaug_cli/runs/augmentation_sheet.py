"""The sheet of images that shows what the augmenter does: originals above, T(x) below (MetaAug, figure 1)."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metaaug_cli.networks.preprocessing import Preprocessing

_TILE, _GAP, _MARGIN, _CAPTION, _FONT = 112, 6, 72, 20, 13


def sheet_png(originals: Tensor, changed: Tensor, preprocessing: Preprocessing, variance: float) -> bytes:
    """PNG with ``x`` in the first row, ``T(x)`` in the second and the distance of each under it.

    Args:
        originals: (S, C, H, W), normalised.
        changed: T of them, same shape.
        preprocessing: What normalised them.
        variance: Of the images; the unit of the distances.
    """
    rows = [_pixels(images, preprocessing) for images in (originals, changed)]
    distances = ((changed - originals).square().flatten(1).mean(1) / variance).tolist()
    height, width = originals.shape[2:]
    factor = max(1, round(_TILE / max(height, width)))
    height, width = height * factor, width * factor
    step = max(width, 44) + _GAP  # room for the distance under a narrow image
    size = (_MARGIN + len(distances) * step, 2 * (height + _GAP) + _CAPTION)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    for row, (label, images) in enumerate(zip(("x", "T(x)"), rows, strict=True)):
        top = row * (height + _GAP)
        draw.text((_GAP, top + height // 2), label, "black", font, anchor="lm")
        for column, image in enumerate(images):
            tile = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (_MARGIN + column * step, top))
    under = 2 * (height + _GAP)
    draw.text((_GAP, under), "distance", "black", font)
    for column, distance in enumerate(distances):
        draw.text((_MARGIN + column * step, under), f"{distance:.3f}", "black", font)
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()


def _pixels(images: Tensor, preprocessing: Preprocessing) -> list[Image.Image]:
    """RGB images of normalised ones, clipped to what a pixel can be."""
    arrays = preprocessing.to_pixels(images.float()).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]
