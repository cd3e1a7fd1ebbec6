"""Train the network of ``metaaug demo`` and write its weights into the package (about a minute on a CPU).

    python scripts/train_demo_model.py

The result depends on the versions of torch and scikit-learn in its last digits only; seeds are fixed.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from metaaug_cli.assets.digits_cnn import digits_cnn
from metaaug_cli.demo import MEAN, STD, WEIGHTS, Digits, load_digits_split

OUTPUT = Path(__file__).resolve().parent.parent / "metaaug_cli" / "assets" / WEIGHTS


def tensors(digits: Digits) -> tuple[Tensor, Tensor]:
    """Normalised float32 images (N, 1, 8, 8) and labels (N,)."""
    images = torch.from_numpy(digits.images).float().div(255).sub(MEAN).div(STD)
    return images.unsqueeze(1), torch.from_numpy(digits.labels)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by at most one pixel in each direction, black filling the border."""
    padded = pad(images, (1, 1, 1, 1), value=(0 - MEAN) / STD)
    offsets = torch.randint(0, 3, (len(images), 2), generator=generator)
    rows = offsets[:, :1] + torch.arange(8)
    columns = offsets[:, 1:] + torch.arange(8)
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None]].unsqueeze(
        1
    )


def train(epochs: int, batch_size: int, seed: int) -> nn.Module:
    """SGD with momentum, one cosine cycle, label smoothing."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = tensors(load_digits_split()[0])
    model = digits_cnn()
    steps = epochs * math.ceil(len(images) / batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(batch_size):
            optimizer.zero_grad()
            logits = model(shifted(images[batch], generator))
            cross_entropy(logits, labels[batch], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    """Train, measure on the test images, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    options = parser.parse_args()

    train_pixels = load_digits_split()[0].images / 255
    print(f"training pixels: mean {np.mean(train_pixels):.4f}, std {np.std(train_pixels):.4f}")
    model = train(options.epochs, options.batch, options.seed)
    images, labels = tensors(load_digits_split()[1])
    with torch.inference_mode():
        correct = (model(images).argmax(1) == labels).sum().item()
    options.out.write_bytes(save({name: value.contiguous() for name, value in model.state_dict().items()}))
    print(f"test: {correct} of {len(labels)} images right ({correct / len(labels):.2%})")
    print(f"{options.out}: {options.out.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
