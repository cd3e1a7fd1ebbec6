"""The demo: scikit-learn's bundled digits as image folders, a small network, and the commands to run.

Everything comes with the installed packages, so the demo needs no network and no data of the user.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from metaaug_cli.errors import UsageError

MEAN, STD = 0.3054, 0.3758
"""Statistics of the training images on the [0, 1] pixel scale."""

NUM_TEST = 600
NUM_CALIBRATION = 512
SPLIT_SEED = 0
MODEL, WEIGHTS = "digits_cnn.py", "digits_cnn.safetensors"

_ASSETS = Path(__file__).resolve().parent / "assets"
_MARKER = ".metaaug-demo"
_RUN = "run-w4a4"


@dataclass(frozen=True)
class Digits:
    """8x8 grey images as uint8 (N, 8, 8) with their labels 0 to 9 as (N,)."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


def load_digits_split() -> tuple[Digits, Digits]:
    """The bundled digits as (training, test) sets; the same split everywhere, balanced over classes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bundle = load_digits()
    # The files hold 17 grey levels, 0 to 16.
    images = np.round(bundle.images * (255 / 16)).astype(np.uint8)
    labels = bundle.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=NUM_TEST, random_state=SPLIT_SEED, stratify=labels
    )
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def write_image_folder(digits: Digits, folder: Path) -> None:
    """Write one PNG per image into one folder per class, as ``metaaug`` reads them."""
    for label in sorted(set(digits.labels.tolist())):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
    for index, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
        Image.fromarray(image).save(folder / str(label) / f"{index:04d}.png")


def prepare_demo(folder: Path) -> None:
    """Fill a folder with the demo's model, weights and images, replacing those of an earlier demo.

    Raises:
        UsageError: The folder holds files that are not an earlier demo's.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", hint="give the demo a new folder: metaaug demo DIR")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MARKER).exists():
        raise UsageError(
            f"{folder} already holds files that are not a demo's",
            hint="give the demo a new folder: metaaug demo DIR",
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).touch()
    for name in ("calib", "test", _RUN):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (MODEL, WEIGHTS):
        shutil.copyfile(_ASSETS / name, folder / name)
    train, test = load_digits_split()
    calibration = Digits(train.images[:NUM_CALIBRATION], train.labels[:NUM_CALIBRATION])
    write_image_folder(calibration, folder / "calib")
    write_image_folder(test, folder / "test")


def demo_commands(folder: Path) -> list[list[str]]:
    """The ``metaaug`` commands of the demo in order, as a user would type them, without the program name."""
    run = str(folder / _RUN)
    quantize = ["quantize", f"{folder / MODEL}:digits_cnn", "--weights", str(folder / WEIGHTS)]
    quantize += ["--calib", str(folder / "calib"), "--size", "8", "--mean", str(MEAN), "--std", str(STD)]
    quantize += ["--wbits", "4", "--abits", "4", "--iterations", "300", "--out", run]
    export = ["export", run, "-o", str(folder / "digits-w4a4.onnx")]
    evaluate = ["evaluate", run, "--data", str(folder / "test"), "--parity"]
    return [quantize, export, evaluate]
