"""Coefficients that are zero outside a small window of an image: backward bound propagation through convolutions.

A unit of a convolution sees a few pixels, so its coefficients on an earlier image are kept as one small window for each
unit, with the place where it lies, instead of a whole image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Rows of coefficients on an image [B, C, H, W], one for each of K channels at each of L places.

    Args:
        rows: [L, B, K, C, h, w]; L or B is 1 where all are equal. Zero where a window hangs over the image's edge.
        top: row of the image where each window begins [L]; may be negative.
        left: column where it begins [L].
        size: (H, W).
    """

    rows: Tensor
    top: Tensor
    left: Tensor
    size: tuple[int, int]

    @classmethod
    def identity(cls, channels: Tensor, shape: torch.Size, like: Tensor) -> Windows:
        """One row for each of some ``channels`` at each pixel of an image [B, C, H, W]."""
        _, count, height, width = shape
        place = torch.arange(height * width, device=like.device)
        rows = torch.eye(count, dtype=like.dtype, device=like.device)[channels]
        return cls(rows.view(1, 1, len(channels), count, 1, 1), place // width, place % width, (height, width))

    def _index(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image rows [L, h, 1] and columns [L, 1, w] under each window, and which of them exist [L, h, w]."""
        device = self.top.device
        down = self.top[:, None] + torch.arange(self.rows.shape[-2], device=device)
        across = self.left[:, None] + torch.arange(self.rows.shape[-1], device=device)
        inside_down, inside_across = (
            (at >= 0) & (at < limit) for at, limit in zip((down, across), self.size, strict=True)
        )
        inside = inside_down[:, :, None] & inside_across[:, None, :]
        return down.clamp(0, self.size[0] - 1)[:, :, None], across.clamp(0, self.size[1] - 1)[:, None, :], inside

    def under(self, image: Tensor) -> Tensor:
        """What of ``image`` [B or 1, C, H, W] lies under each window: [L, B, 1, C, h, w], zero beyond the edge."""
        down, across, inside = self._index()
        found = image[:, :, down, across] * inside.to(image.dtype)
        return found.permute(2, 0, 1, 3, 4).unsqueeze(2)

    def replaced(self, rows: Tensor) -> Windows:
        """The same places with other coefficients."""
        return Windows(rows, self.top, self.left, self.size)

    def plus(self, other: Windows) -> Windows | Tensor:
        """The sum with as many other rows, in windows that hold both, if their places keep their distance."""
        if other.top is self.top and other.left is self.left and other.rows.shape[-2:] == self.rows.shape[-2:]:
            return self.replaced(self.rows + other.rows)
        down, across = other.top - self.top, other.left - self.left
        if bool((down != down[0]).any() or (across != across[0]).any()):
            return self.dense() + other.dense()
        first = [self._padded(other, int(down[0]), int(across[0])), other._padded(self, -int(down[0]), -int(across[0]))]
        top, left = torch.minimum(self.top, other.top), torch.minimum(self.left, other.left)
        return Windows(first[0] + first[1], top, left, self.size).settled()

    def _padded(self, other: Windows, down: int, across: int) -> Tensor:
        """Rows with zeros round them, so far that those of ``other`` fit in, which begin lower by ``down``."""
        (height, width), (h, w) = self.rows.shape[-2:], other.rows.shape[-2:]
        bottom, right = max(0, down + h - height), max(0, across + w - width)
        return F.pad(self.rows, (max(0, -across), right, max(0, -down), bottom))

    def trimmed(self) -> Windows:
        """With zeros where windows hang over the edge."""
        _, _, inside = self._index()
        return (
            self if bool(inside.all()) else self.replaced(self.rows * inside[:, None, None, None].to(self.rows.dtype))
        )

    def dot(self, image: Tensor) -> Tensor:
        """The product of each row with ``image`` [B or 1, C, H, W]: [B, K * L]."""
        return self._flat(self.rows.flatten(3) @ self.under(image).flatten(3).transpose(2, 3))

    def norm(self, q: float) -> Tensor:
        """The q-norm of each row: [B, K * L]."""
        return self._flat(self.trimmed().rows.flatten(3).norm(q, dim=-1, keepdim=True))

    def _flat(self, values: Tensor) -> Tensor:
        values = values.squeeze(-1).permute(1, 2, 0)
        return values.expand(*values.shape[:2], len(self.top)).flatten(1)

    def before_conv(
        self,
        weight: Tensor,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        size: tuple[int, int],
    ) -> Windows | Tensor:
        """The coefficients on a convolution's input, of ``size``; dense once a window is as large as that."""
        rows = self.trimmed().rows
        wider = F.conv_transpose2d(rows.flatten(0, 2), weight, None, stride, 0, 0, groups, dilation)
        return Windows(
            wider.view(*rows.shape[:3], *wider.shape[1:]),
            self.top * stride[0] - padding[0],
            self.left * stride[1] - padding[1],
            size,
        ).settled()

    def settled(self) -> Windows | Tensor:
        """Dense if a window is as large as the image."""
        height, width = self.rows.shape[-2:]
        return self.dense() if height * width >= self.size[0] * self.size[1] else self

    def dense(self) -> Tensor:
        """As coefficients of whole images [B, K * L, C, H, W]."""
        down, across, inside = self._index()
        area, places = self.size[0] * self.size[1], len(self.top)
        at = torch.where(inside, down * self.size[1] + across, area).flatten(1)  # what hangs over goes to a spare pixel
        rows = self.rows.expand(places, *self.rows.shape[1:]).flatten(4)
        whole = rows.new_zeros(*rows.shape[:4], area + 1)
        whole = whole.scatter(4, at.view(places, 1, 1, 1, -1).expand_as(rows), rows)[..., :area]
        _, batch, _, channels = whole.shape[:4]
        return whole.permute(1, 2, 0, 3, 4).reshape(batch, -1, channels, *self.size)
