"""What a data-free network is shown of a synthetic image while it is learned, and the image that is kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from metaaug_cli.networks.preprocessing import Preprocessing

_LARGEST_MARGIN = 32
_MARGIN_SHARE = 4
_SIGMA = 1.25


class Views:
    """Views of stored images, made as training pipelines make theirs (DGH, arXiv 2410.22110).

    Stored images are larger than the network's input. Each view is flipped at random, smoothed (3x3
    Gaussian), cropped at random and clipped to valid pixels; the final image is smoothed, cropped in the
    middle and clipped. The crop's place is one for the batch, which costs less than one for each image.

    Args:
        preprocessing: The network's; gives size, normalisation and the range of valid pixels.
        enabled: False shows the stored image as it is, which then has the input's own size.
        device: Where the images are.
    """

    def __init__(self, preprocessing: Preprocessing, *, enabled: bool, device: torch.device) -> None:
        self.size, self.enabled = preprocessing.size, enabled
        self.margin = margin(preprocessing.size) if enabled else 0
        self.low, self.high = (b.view(1, -1, 1, 1).to(device) for b in preprocessing.pixel_bounds())
        self.kernel = gaussian_kernel(_SIGMA).to(device).expand(preprocessing.channels, 1, 3, 3)

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width of the images to store."""
        return self.size[0] + self.margin, self.size[1] + self.margin

    def drawn(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """One random view of each stored image.

        Args:
            images: (N, C, *stored_size), normalised.
            generator: A CPU generator.
        """
        if not self.enabled:
            return self._clip(images)
        flipped = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
        top, left = (int(v) for v in torch.randint(0, self.margin + 1, (2,), generator=generator))
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
        return self._clip(self._crop(self._smooth(images), top, left))

    def final(self, images: Tensor) -> Tensor:
        """The images to keep: (N, C, H, W), normalised, all pixels valid."""
        if not self.enabled:
            return self._clip(images)
        return self._clip(self._crop(self._smooth(images), self.margin // 2, self.margin // 2))

    def _smooth(self, images: Tensor) -> Tensor:
        return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), self.kernel, groups=images.shape[1])

    def _crop(self, images: Tensor, top: int, left: int) -> Tensor:
        return images[:, :, top : top + self.size[0], left : left + self.size[1]]

    def _clip(self, images: Tensor) -> Tensor:
        """Valid pixels, with the identity as gradient: a clipped pixel can find its way back."""
        clipped = torch.minimum(torch.maximum(images.detach(), self.low), self.high)
        return images + (clipped - images.detach())


def margin(size: tuple[int, int]) -> int:
    """Pixels by which stored images exceed (height, width): 32 as published, less below 128 px.

    A quarter of the shorter side and even, which for 32 px is the usual training crop: 4 px on each side.
    """
    return max(2, min(_LARGEST_MARGIN, min(size) // _MARGIN_SHARE) // 2 * 2)


def gaussian_kernel(sigma: float) -> Tensor:
    """A 3x3 Gaussian of sum 1, (1, 1, 3, 3)."""
    line = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * sigma**2))
    return torch.outer(line, line)[None, None] / line.sum().square()
