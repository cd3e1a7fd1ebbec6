"""What a calibration set looks like: per-channel statistics, a contact sheet, one HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from string import Template
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metaaug_cli.calibration import check_page
from metaaug_cli.calibration.check import Check
from metaaug_cli.calibration.data import CalibrationSet
from metaaug_cli.calibration.png_folder import to_picture
from metaaug_cli.files import not_written, write_atomically

BINS = 64
_TILE = 96
_GAP = 4
_COLUMNS = 10
_BACKGROUND = (232, 232, 232)
_CHUNK = 64
_PLOT = (640, 160)
_INKS = {"red": "#d6453d", "green": "#2f9e4f", "blue": "#3b74d8", "grey": "#888"}
_NAMES = {1: ("grey",), 3: ("red", "green", "blue")}


@dataclass(frozen=True)
class ChannelStatistics:
    """One channel of all images of a set.

    Args:
        name: ``red``, ``green``, ``blue`` or ``grey``.
        mean: Mean pixel on the 0 to 255 scale.
        std: Standard deviation on the 0 to 255 scale.
        low: Smallest pixel on the 0 to 255 scale; below 0 only in a set that holds no 8-bit images.
        high: Largest pixel on the 0 to 255 scale.
        black: Fraction of pixels at 0 or below.
        white: Fraction of pixels at 255 or above.
        normalised_mean: Mean of what the network is given.
        normalised_std: Standard deviation of what the network is given.
        histogram: Pixel counts in equal bins from 0 to 255; the end bins also hold what lies outside.
    """

    name: str
    mean: float
    std: float
    low: float
    high: float
    black: float
    white: float
    normalised_mean: float
    normalised_std: float
    histogram: tuple[int, ...]


def channel_statistics(calibration: CalibrationSet) -> tuple[ChannelStatistics, ...]:
    """Statistics of each channel, over all pixels of all images."""
    preprocessing = calibration.preprocessing
    gathered = [_ChannelSums() for _ in range(preprocessing.channels)]
    for chunk in calibration.images.split(_CHUNK):
        pixels = preprocessing.denormalise(chunk).mul(255)
        for channel, sums in enumerate(gathered):
            sums.add(pixels[:, channel])
    names = _NAMES[preprocessing.channels]
    found = []
    for name, sums, mean, std in zip(names, gathered, preprocessing.mean, preprocessing.std, strict=True):
        found.append(sums.finish(name, mean, std))
    return tuple(found)


class _ChannelSums:
    """Running sums of one channel, so that a large set needs one chunk of extra memory."""

    def __init__(self) -> None:
        self.count, self.black, self.white = 0, 0, 0
        self.sum, self.squares = 0.0, 0.0
        self.low, self.high = float("inf"), float("-inf")
        self.histogram = torch.zeros(BINS, dtype=torch.int64)

    def add(self, pixels: Tensor) -> None:
        exact = pixels.double()
        self.count += pixels.numel()
        self.sum += exact.sum().item()
        self.squares += exact.square().sum().item()
        self.low = min(self.low, pixels.min().item())
        self.high = max(self.high, pixels.max().item())
        # Half an 8-bit step absorbs the rounding of normalising and back, here and at the bins' edges.
        self.black += int((pixels < 0.5).sum())
        self.white += int((pixels > 254.5).sum())
        bins = ((pixels + 0.5) * (BINS / 256)).floor().clamp(0, BINS - 1).to(torch.int64)
        self.histogram += torch.bincount(bins.flatten(), minlength=BINS)

    def finish(self, name: str, mean: float, std: float) -> ChannelStatistics:
        average = self.sum / self.count
        spread = max(self.squares / self.count - average**2, 0.0) ** 0.5
        return ChannelStatistics(
            name,
            mean=average,
            std=spread,
            low=self.low,
            high=self.high,
            black=self.black / self.count,
            white=self.white / self.count,
            normalised_mean=(average / 255 - mean) / std,
            normalised_std=spread / 255 / std,
            histogram=tuple(self.histogram.tolist()),
        )


def class_counts(calibration: CalibrationSet) -> dict[str, int]:
    """Images per class folder, by name; empty for images that come without folders."""
    parts = [PurePosixPath(source).parts for source in calibration.sources]
    if any(len(part) < 2 for part in parts):
        return {}
    return dict(sorted(Counter(part[0] for part in parts).items()))


def contact_sheet(calibration: CalibrationSet, *, max_images: int = 100) -> Image.Image:
    """A grid of the images as the network sees them: after resize and crop, colours undone.

    Args:
        calibration: The set; if it is larger than ``max_images``, evenly spaced images stand for it.
        max_images: Most tiles to draw.
    """
    total = len(calibration.images)
    shown = min(total, max_images)
    height, width = calibration.preprocessing.size
    scale = _TILE / max(height, width)
    tile = max(round(height * scale), 1), max(round(width * scale), 1)
    columns = min(_COLUMNS, shown)
    rows = -(-shown // columns)
    sheet_size = columns * (tile[1] + _GAP) + _GAP, rows * (tile[0] + _GAP) + _GAP
    sheet = Image.new("RGB", sheet_size, _BACKGROUND)
    for place in range(shown):
        picture = to_picture(calibration, place * total // shown)
        # Enlarging by whole pixels shows what the network gets; a smooth filter would flatter it.
        filter_ = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        picture = picture.convert("RGB").resize((tile[1], tile[0]), filter_)
        row, column = divmod(place, columns)
        sheet.paste(picture, (_GAP + column * (tile[1] + _GAP), _GAP + row * (tile[0] + _GAP)))
    return sheet


def summary(calibration: CalibrationSet, channels: Sequence[ChannelStatistics]) -> dict[str, Any]:
    """Everything ``inspect`` reports, in plain JSON types; ``channels`` from ``channel_statistics``."""
    return {
        "num": len(calibration.images),
        "origin": calibration.origin,
        "sha256": calibration.sha256,
        "preprocessing": calibration.preprocessing.to_dict(),
        "channels": [asdict(channel) for channel in channels],
        "classes": class_counts(calibration),
        "skipped": list(calibration.skipped),
        "duplicates": list(calibration.duplicates),
        "outliers": list(calibration.outliers),
    }


def write_contact_sheet(calibration: CalibrationSet, path: Path) -> None:
    """Write the contact sheet as PNG, atomically.

    Raises:
        InputError: The file cannot be written.
    """
    _write(path, _png(contact_sheet(calibration)))


def write_page(
    calibration: CalibrationSet,
    channels: Sequence[ChannelStatistics],
    path: Path,
    *,
    title: str,
    check: Check | None = None,
) -> None:
    """Write one self-contained HTML page with the sheet and the statistics, atomically.

    Args:
        calibration: The set.
        channels: From ``channel_statistics``.
        path: Where to write.
        title: Heading, usually the set's file name.
        check: Whether the set suits a model; left out of the page without one.

    Raises:
        InputError: The file cannot be written.
    """
    _write(path, page(calibration, channels, title=title, check=check))


def page(
    calibration: CalibrationSet,
    channels: Sequence[ChannelStatistics],
    *,
    title: str,
    check: Check | None = None,
) -> str:
    """The HTML page of ``write_page``; needs nothing outside itself."""
    counts = class_counts(calibration)
    total = len(calibration.images)
    return _PAGE.substitute(
        title=html.escape(title),
        verdict=check_page.verdict(check) if check is not None else "",
        distances=check_page.distances(check) if check is not None else "",
        facts=_facts(calibration, counts),
        channel_rows="".join(_channel_row(channel) for channel in channels),
        plot=_plot(channels),
        shown=f"{min(total, 100)} of {total}" if total > 100 else f"All {total}",
        sheet=base64.b64encode(_png(contact_sheet(calibration))).decode(),
        classes=_details(f"{len(counts)} classes", [f"{n} × {name}" for name, n in counts.items()]),
        skipped=_details(f"{len(calibration.skipped)} files skipped", calibration.skipped)
        + _details(f"{len(calibration.duplicates)} copies left out", calibration.duplicates)
        + _details(f"{len(calibration.outliers)} images stand out", calibration.outliers),
    )


def _facts(calibration: CalibrationSet, counts: dict[str, int]) -> str:
    spread = f"{len(counts)}, {min(counts.values())} to {max(counts.values())} images each" if counts else "-"
    rows = {
        "Images": f"{len(calibration.images)} from {calibration.origin}",
        "Preprocessing": calibration.preprocessing.describe(),
        "Class folders": spread,
        "Skipped files": str(len(calibration.skipped)),
        "SHA-256": calibration.sha256,
    }
    return "".join(f"<tr><th>{key}</th><td>{html.escape(value)}</td></tr>" for key, value in rows.items())


def _channel_row(channel: ChannelStatistics) -> str:
    cells = (
        f"{channel.mean:.1f}",
        f"{channel.std:.1f}",
        f"{channel.low:.0f} to {channel.high:.0f}",
        f"{channel.black:.2%}",
        f"{channel.white:.2%}",
        f"{channel.normalised_mean:+.3f}",
        f"{channel.normalised_std:.3f}",
    )
    return f"<tr><th>{channel.name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _plot(channels: Sequence[ChannelStatistics]) -> str:
    """Histograms as one inline SVG, a line per channel on a common scale."""
    width, height = _PLOT
    # The end bins of photographs are clipping spikes that would flatten everything else.
    top = max(max(c.histogram[1:-1], default=1) for c in channels) or max(max(c.histogram) for c in channels)
    lines = []
    for channel in channels:
        points = " ".join(
            f"{(i + 0.5) * width / BINS:.1f},{height - min(count / top, 1) * height:.1f}"
            for i, count in enumerate(channel.histogram)
        )
        lines.append(f'<polyline fill="none" stroke="{_INKS[channel.name]}" points="{points}"/>')
    axis = f'<line x1="0" y1="{height}" x2="{width}" y2="{height}" stroke="#888"/>'
    labels = "".join(
        f'<text x="{value * width / 256:.0f}" y="{height + 16}" text-anchor="{anchor}">{value}</text>'
        for value, anchor in ((0, "start"), (64, "middle"), (128, "middle"), (192, "middle"), (255, "end"))
    )
    label = "Histogram of pixel values per channel"
    return (
        f'<svg viewBox="-4 -4 {width + 8} {height + 26}" role="img" aria-label="{label}"'
        f' font-size="11" fill="#888" stroke-width="1.6">'
        f"{axis}{''.join(lines)}{labels}</svg>"
    )


def _details(heading: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    listed = "".join(f"<li>{html.escape(item)}</li>" for item in items)
    return f"<details><summary>{heading}</summary><ul>{listed}</ul></details>"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _write(path: Path, data: bytes | str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise not_written(path, exc) from exc
    write_atomically(path, data)


_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  :root { color-scheme: light dark; --line: #8886; --ink: light-dark(#1c1e21, #e6e6e6); }
  body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 64rem; margin: 2rem auto;
         padding: 0 1rem; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
  table { border-collapse: collapse; } th { text-align: left; font-weight: 600; }
  th, td { padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
  th, .numbers td { white-space: nowrap; } .facts td { overflow-wrap: anywhere; }
  .numbers td, .numbers thead th + th { text-align: right; font-variant-numeric: tabular-nums; }
  .scroll { overflow-x: auto; }
  img { max-width: 100%; image-rendering: pixelated; border-radius: 4px; }
  svg { width: 100%; max-width: 44rem; }
  ul { columns: 14rem; padding-left: 1.2rem; } ul.findings { columns: auto; margin: .5rem 0 0; }
  .verdict { border-left: 4px solid; padding: .6rem 1rem; margin: 1rem 0; background: #8881; }
  .good { border-color: #2f9e4f; } .bad { border-color: #d6453d; }
</style>
</head>
<body>
<h1>$title</h1>
$verdict
<table class="facts">$facts</table>
<h2>Pixels per channel</h2>
<div class="scroll"><table class="numbers">
<thead><tr><th></th><th>mean</th><th>std</th><th>range</th><th>black</th><th>white</th>
<th>mean, normalised</th><th>std, normalised</th></tr></thead>
<tbody>$channel_rows</tbody>
</table></div>
<p>Pixels on the 0 to 255 scale; the normalised columns are what the network is given.</p>
$plot
$distances
<h2>Contact sheet</h2>
<p>$shown images, as the network sees them.</p>
<img alt="Contact sheet of the calibration images" src="data:image/png;base64,$sheet">
$classes
$skipped
</body>
</html>
""")
