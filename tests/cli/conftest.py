"""What several commands are tested on: the demo's digits, and a small quantized run."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluate_command import CLASSES, FLAGS, IMAGES, SIZE
from PIL import Image
from safetensors.torch import save_file
from user_code import classifier

from metaaug_cli import demo
from metaaug_cli.cli.app import main


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with the demo's network, its weights and 40 images."""
    folder = tmp_path_factory.mktemp("digits")
    for name in (demo.MODEL, demo.WEIGHTS):
        shutil.copyfile(Path(demo.__file__).parent / "assets" / name, folder / name)
    train, _ = demo.load_digits_split()
    demo.write_image_folder(demo.Digits(train.images[:40], train.labels[:40]), folder / "calib")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A network, a labelled folder on which float is right four times in five, and a quantized run."""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "net.py").write_text(classifier(CLASSES))
    namespace = {}
    exec(classifier(CLASSES), namespace)
    torch.manual_seed(3)
    module = namespace["Net"]().eval()
    with torch.no_grad():
        module.head.weight.mul_(20)
    save_file(module.state_dict(), root / "net.safetensors")

    generator = np.random.default_rng(0)
    arrays = generator.integers(0, 256, (IMAGES, 1, 1, 3)) * 0.5 + generator.integers(
        0, 128, (IMAGES, SIZE, SIZE, 3)
    )
    images = arrays.astype(np.uint8)
    inputs = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        centred = module(inputs)
        module.head.bias -= centred.mean(0)
        save_file(module.state_dict(), root / "net.safetensors")
        answers = module(inputs).argmax(1)
    labels = answers.clone()
    labels[::5] = (labels[::5] + 1) % CLASSES
    for label in range(CLASSES):
        (root / "val" / f"class{label}").mkdir(parents=True)
    (root / "flat").mkdir()
    for index, label in enumerate(labels.tolist()):
        Image.fromarray(images[index]).save(root / "val" / f"class{label}" / f"{index:03d}.png")
        Image.fromarray(images[index]).save(root / "flat" / f"{index:03d}.png")

    model = [f"{root / 'net.py'}:net", "--weights", str(root / "net.safetensors"), *FLAGS]
    run = root / "run"
    arguments = ["quantize", *model, "--calib", str(root / "flat"), "--wbits", "8", "--abits", "8"]
    assert main([*arguments, "--method", "nearest", "--out", str(run), "--quiet"]) == 0
    return SimpleNamespace(
        root=root, run=run, val=root / "val", flat=root / "flat", inputs=inputs, labels=labels, model=model
    )
