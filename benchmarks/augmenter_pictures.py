"""What T makes of images, with and without its validation term: ``python benchmarks/augmenter_pictures.py``.

Draws docs/images/augmenter-digits.png from the demo's digits and network, which come with the package: 32
images, W2A2, 300 iterations, T as the last block that teaches it leaves it. About two minutes.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from common import ROOT
from PIL import Image, ImageDraw, ImageFont

from metaaug_cli.calibration.data import load_calibration_set
from metaaug_cli.demo import MEAN, MODEL, STD, WEIGHTS, prepare_demo
from metaaug_cli.files import write_atomically
from metaaug_cli.networks.models import LoadedModel, load_model
from metaaug_cli.pipeline import quantize
from metaaug_cli.recipe.config import Recipe

PICTURE = ROOT / "docs/images/augmenter-digits.png"
_LABEL, _FONT = 24, 14
_COMMON = [
    *(
        "quantization.weight_bits=2",
        "quantization.act_bits=2",
        "augmentation.kind=metaaug",
        "metaaug.steps=50",
    ),
    "reconstruction.iterations=300",
]
_OFF = "metaaug.val_weight=0"
_RELEASED = ["metaaug.distance=published", "metaaug.inner=adam-fresh", "metaaug.balance=false"]
VARIANTS = {
    "policy (the default)": [],
    "policy, validation off": [_OFF],
    "residual": ["metaaug.form=residual"],
    "residual, validation off": ["metaaug.form=residual", _OFF],
    "unet": ["metaaug.form=unet"],
    "unet, fresh Adam step, published weights and distance": ["metaaug.form=unet", *_RELEASED],
}


def sheet(model: LoadedModel, calib: Path, settings: list[str]) -> tuple[Image.Image, float, float]:
    """Originals above T(x), as a run draws them after its last taught block; distance and similarity."""
    recipe = Recipe().override([*_COMMON, *settings])
    calibration = load_calibration_set(calib, preprocessing=model.preprocessing, num=32, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        result = quantize(model, calibration, recipe=recipe, run_dir=run, device="cpu")
        drawn = Image.open(sorted((run / "augmentation").glob("*.png"))[-1]).convert("RGB")
        drawn.load()
    last = [h.augmentation for h in result.histories if h.augmentation][-1]
    return drawn, last["distance"], last["similarity"]


def compose(sheets: dict[str, tuple[Image.Image, float, float]]) -> Image.Image:
    """The originals once, and under them T(x) of every variant."""
    first = next(iter(sheets.values()))[0]
    row = (first.height - _LABEL) // 2
    height = row + sum(_LABEL + drawn.height - row for drawn, _, _ in sheets.values())
    picture = Image.new("RGB", (first.width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT)
    picture.paste(first.crop((0, 0, first.width, row)), (0, 0))
    top = row
    for name, (drawn, distance, similarity) in sheets.items():
        text = f"{name}: distance {distance:.2f}, recognised {similarity:.2f}"
        draw.text((6, top + _LABEL // 2), text, "black", font, anchor="lm")
        picture.paste(drawn.crop((0, row, drawn.width, drawn.height)), (0, top + _LABEL))
        top += _LABEL + drawn.height - row
    return picture


def main() -> None:
    """Run every variant and draw the picture."""
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "demo"
        prepare_demo(demo)
        model = load_model(
            f"{demo / MODEL}:digits_cnn", weights=demo / WEIGHTS, size=8, mean=(MEAN,), std=(STD,)
        )
        sheets = {}
        for name, settings in VARIANTS.items():
            sheets[name] = sheet(model, demo / "calib", settings)
            print(name, *(f"{value:.3f}" for value in sheets[name][1:]), flush=True)
    content = io.BytesIO()
    compose(sheets).save(content, "PNG", optimize=True)
    write_atomically(PICTURE, content.getvalue())


if __name__ == "__main__":
    main()
