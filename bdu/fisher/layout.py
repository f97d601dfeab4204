"""Where in a tensor the samples are.

Layers see the batch in front, in the middle (sequence-first attention), or folded together with the
positions (`x.view(-1, width)`, windows). It is found from two runs of one and two samples, and
checked against the gradients of one sample's loss, which must stay within that sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Order = Literal["alone", "sample first", "position first", "repeated"]


@dataclass(frozen=True)
class Layout:
    """`axis` holds the samples.

    order: "alone": nothing else; "sample first" and "position first": axis 0 holds samples and
    positions, the positions of one sample together or not; "repeated": the function was called
    without samples and its output repeated for each, in front, instead of an axis of one that leads
    it or as a new axis.
    """

    axis: int
    order: Order = "alone"
    leads: bool = False

    @property
    def is_repeated(self) -> bool:
        """Whether the input knows no samples."""
        return self.order == "repeated"

    @property
    def is_folded(self) -> bool:
        """Whether the axis holds positions, too."""
        return self.order in ("sample first", "position first")

    def by_sample(self, tensor: Tensor, samples: int, channels: tuple[int, ...]) -> Tensor:
        """(B, T, *channels) of a tensor with leading axes and these channels; a view if it can."""
        if self.order == "position first":
            tensor = tensor.unflatten(0, (-1, samples)).transpose(0, 1)
        elif not self.is_folded:
            tensor = tensor.movedim(self.axis, 0)
        count = tensor.numel() // max(1, samples)
        for size in channels:
            count = count // max(1, size)
        return tensor.reshape(samples, count, *channels)

    def one_sample(self, tensor: Tensor, samples: int, sample: int) -> Tensor:
        """What of a tensor belongs to one sample, with the axis that held the samples."""
        places = torch.arange(tensor.shape[self.axis])
        each = len(places) // samples
        if self.order == "sample first":
            places = places // max(1, each)
        elif self.order == "position first":
            places = places % samples
        own = torch.nonzero(places == sample).flatten()
        return tensor.index_select(self.axis, own.to(tensor.device))

    def fits(self, shape: torch.Size, axes: int, samples: int, positions: set[int]) -> bool:
        """Whether a tensor of this shape, with so many axes of positions, can be laid out so.

        positions: the counts a sample is known to have; a folded axis has to match one, or it could
        be any selection of rows.
        """
        if self.axis >= len(shape):
            return False
        if not self.is_folded:
            return shape[self.axis] == samples
        each, rest = divmod(shape[0], max(1, samples))
        return rest == 0 and (each in positions or each * math.prod(shape[1:axes]) in positions)


def candidates(one: torch.Size, two: torch.Size, axes: int) -> list[Layout]:
    """Layouts that fit shapes with one and with two samples, the first `axes` being positions."""
    if len(one) != len(two):
        return []
    varying = [axis for axis in range(len(one)) if one[axis] != two[axis]]
    if len(varying) != 1 or varying[0] >= axes:
        return []
    (axis,) = varying
    if (one[axis], two[axis]) == (1, 2):
        return [Layout(axis)]
    if axis == 0 and two[0] == 2 * one[0]:
        return [Layout(0, "sample first"), Layout(0, "position first")]
    return []
