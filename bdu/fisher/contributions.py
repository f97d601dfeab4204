"""What one use of a parameter adds to the gradient of each sample, and how uses are added up.

A parameter's gradient of one sample is the sum over its uses, and only that sum is squared. So a
lone use goes straight into a kernel, and several are joined first, still without a tensor of all
samples' gradients wherever one of the parameter's size would be needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdu import fisher_ops


@dataclass
class Rows:
    """Σ_t g_bt a_btᵀ of a matrix: gradients (B, T, O), activations (B, T, I)."""

    activations: Tensor
    gradients: Tensor


@dataclass
class Window:
    """Of the kernel of a convolution: activations (B, I, ...), gradients (B, O, ...)."""

    activations: Tensor
    gradients: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass
class Tokens:
    """Of a table whose rows `indices` (B, T) were taken: gradients (B, T, D)."""

    indices: Tensor
    gradients: Tensor | None
    padding_idx: int | None


@dataclass
class Scaled:
    """Σ_t g_bt x̂_bt of a vector, (B, T, C) both; activations None stands for x̂ = 1."""

    activations: Tensor | None
    gradients: Tensor
    mean: Tensor | None = None
    inverse_deviation: Tensor | None = None

    def per_sample(self) -> Tensor:
        """(B, C)"""
        products = _wide(self.gradients)
        if self.activations is not None:
            normalised = _wide(self.activations)
            if self.mean is not None:
                normalised = normalised - self.mean
            if self.inverse_deviation is not None:
                normalised = normalised * self.inverse_deviation
            products = products * normalised
        return products.sum(1)


@dataclass
class Whole:
    """The gradient of each sample itself, (B, *shape), where a use leaves nothing to sum."""

    gradients: Tensor


Contribution = Rows | Window | Tokens | Scaled | Whole


class Unjoinable(Exception):
    """Uses of one parameter that have no common form."""


def check_joinable(kinds: Sequence[type[Contribution]], groups: int = 1) -> None:
    """Raise Unjoinable unless `add_squares` can join uses of these kinds."""
    distinct = set(kinds)
    if distinct == {Window}:
        joinable = len(kinds) == 1 or groups == 1
    else:
        joinable = distinct <= {Scaled, Whole} or distinct <= {Rows, Tokens}
    if not joinable:
        raise Unjoinable


def add_squares(total: Tensor, gradient: Tensor | None, uses: Sequence[Contribution]) -> None:
    """Add Σ_b (Σ_use gradient of sample b)² to total, and the same without the square to gradient.

    Args: total, gradient: of the parameter's shape. uses: of one parameter, Tokens not among Rows.
    """
    first = uses[0]
    if len(uses) == 1 and not isinstance(first, Whole | Window):
        _add_one(total, gradient, first)
    elif isinstance(first, Window):
        _add_windows(total, gradient, uses)
    elif all(isinstance(use, Rows) for use in uses):
        _add_one(total, gradient, joined_rows([use for use in uses if isinstance(use, Rows)]))
    elif all(isinstance(use, Tokens) for use in uses):
        tokens = [_unpadded(use) for use in uses if isinstance(use, Tokens)]
        indices = torch.cat([use.indices for use in tokens], 1)
        gradients = torch.cat([use.gradients for use in tokens if use.gradients is not None], 1)
        _add_one(total, gradient, Tokens(indices, gradients, None))
    else:
        whole = sum(_per_sample(use, total.shape) for use in uses)
        assert isinstance(whole, Tensor)
        for one in _wide(whole):
            total.addcmul_(one, one)
        if gradient is not None:
            gradient.add_(whole.sum(0))


def _unpadded(use: Tokens) -> Tokens:
    """The same without a padding_idx, which another use of the table need not have."""
    if use.padding_idx is None or use.gradients is None:
        return use
    padding = (use.indices == use.padding_idx).unsqueeze(2)
    return Tokens(use.indices, use.gradients.masked_fill(padding, 0), None)


def joined_rows(uses: Sequence[Rows]) -> Rows:
    """Several uses as one with more positions."""
    if len(uses) == 1:
        return uses[0]
    activations = torch.cat([use.activations for use in uses], 1)
    return Rows(activations, torch.cat([use.gradients for use in uses], 1))


def _per_sample(use: Contribution, shape: torch.Size) -> Tensor:
    assert isinstance(use, Scaled | Whole)
    gradients = use.per_sample() if isinstance(use, Scaled) else _wide(use.gradients)
    return gradients.reshape(len(gradients), *shape)


def _add_one(total: Tensor, gradient: Tensor | None, use: Contribution) -> None:
    if isinstance(use, Rows):
        fisher_ops.fisher_linear(total, use.activations, use.gradients, weight_gradient=gradient)
    elif isinstance(use, Tokens):
        assert use.gradients is not None
        fisher_ops.fisher_embedding(
            total,
            use.indices,
            use.gradients,
            padding_idx=use.padding_idx,
            weight_gradient=gradient,
        )
    elif isinstance(use, Scaled):
        if not total.is_contiguous():  # a total that is laid out as images are
            dense = torch.zeros_like(total, memory_format=torch.contiguous_format)
            plain = None if gradient is None else torch.zeros_like(dense)
            _add_one(dense, plain, use)
            total.add_(dense)
            if gradient is not None and plain is not None:
                gradient.add_(plain)
            return
        flat = total.view(-1)
        own = None if gradient is None else gradient.view(-1)
        if use.activations is None:
            fisher_ops.fisher_affine(None, flat, None, use.gradients, bias_gradient=own)
        else:
            fisher_ops.fisher_affine(
                flat,
                None,
                use.activations,
                use.gradients,
                mean=use.mean,
                inverse_deviation=use.inverse_deviation,
                weight_gradient=own,
            )
    else:
        raise AssertionError(use)


def add_weight_and_bias(
    totals: tuple[Tensor, Tensor], gradients: tuple[Tensor | None, Tensor | None], use: Contribution
) -> None:
    """As `add_squares` for the weight and the bias of one call, `use` being the weight's."""
    total, bias_total = totals
    options = {"weight_gradient": gradients[0], "bias_gradient": gradients[1]}
    if isinstance(use, Rows):
        fisher_ops.fisher_linear(
            total, use.activations, use.gradients, bias_total=bias_total, **options
        )
    elif isinstance(use, Window):
        _add_window(total, use, bias_total=bias_total, **options)
    else:
        assert isinstance(use, Scaled)
        fisher_ops.fisher_affine(
            total.view(-1),
            bias_total.view(-1),
            use.activations,
            use.gradients,
            mean=use.mean,
            inverse_deviation=use.inverse_deviation,
            **{name: None if t is None else t.view(-1) for name, t in options.items()},
        )


def _add_window(total: Tensor, use: Window, **options: Tensor | None) -> None:
    fisher_ops.fisher_conv(
        total,
        use.activations,
        use.gradients,
        stride=use.stride,
        padding=use.padding,
        dilation=use.dilation,
        groups=use.groups,
        **options,
    )


def _add_windows(total: Tensor, gradient: Tensor | None, uses: Sequence[Contribution]) -> None:
    windows = [use for use in uses if isinstance(use, Window)]
    if len(windows) == 1:
        _add_window(total, windows[0], weight_gradient=gradient)
        return
    # Images of different sizes have only their unfolded rows in common: sample by sample.
    for b in range(len(windows[0].gradients)):
        rows = [_unfolded(use, b, total.shape[2:]) for use in windows]
        activations = torch.cat([a for a, _ in rows], 1)
        gradients = torch.cat([g for _, g in rows], 1)
        one = torch.zeros_like(total, memory_format=torch.contiguous_format)
        plain = None if gradient is None else torch.zeros_like(one)
        flat = None if plain is None else plain.view(len(total), -1)
        fisher_ops.fisher_linear(
            one.view(len(total), -1), activations, gradients, weight_gradient=flat
        )
        total.add_(one)
        if gradient is not None and plain is not None:
            gradient.add_(plain)


def _unfolded(use: Window, b: int, kernel: torch.Size) -> tuple[Tensor, Tensor]:
    a, g = use.activations[b : b + 1], use.gradients[b : b + 1]
    settings = [(kernel, 1), (use.dilation, 1), (use.padding, 0), (use.stride, 1)]
    if len(kernel) == 1:
        a = a.unsqueeze(2)
        size, dilation, padding, stride = ((filler, *given) for given, filler in settings)
    else:
        size, dilation, padding, stride = (tuple(given) for given, _ in settings)
    columns = F.unfold(a, size, dilation, padding, stride)
    return columns.transpose(1, 2), g.flatten(2).transpose(1, 2)


class TiedTable:
    """A matrix that is a layer's weight and an embedding's table, in one batch.

    The rows of a sample's gradient that its tokens touch are kept until all uses have come; the
    others have no second part and are squared at once, so that the gradients of the logits, the
    largest tensor of a language model, are let go as soon as they have been used.
    """

    def __init__(self, tokens: Sequence[Tokens], outputs: int, inputs: int, like: Tensor) -> None:
        indices = torch.cat([use.indices for use in tokens], 1)
        sample = torch.arange(len(indices), device=indices.device).unsqueeze(1)
        self._outputs = outputs
        self._keys = torch.unique(sample * outputs + indices)
        self.index = torch.full(
            (len(indices), outputs), -1, dtype=torch.int32, device=indices.device
        )
        numbers = torch.arange(len(self._keys), dtype=torch.int32, device=indices.device)
        self.index.view(-1)[self._keys] = numbers
        self.kept = like.new_zeros(len(self._keys), inputs)

    def add_rows(self, total: Tensor, gradient: Tensor | None, use: Rows) -> None:
        """The layer's part."""
        fisher_ops.fisher_linear(
            total,
            use.activations,
            use.gradients,
            weight_gradient=gradient,
            kept=self.kept,
            kept_index=self.index,
        )

    def add_tokens(self, gradient: Tensor | None, use: Tokens) -> None:
        """The embedding's part."""
        assert use.gradients is not None
        sample = torch.arange(len(use.indices), device=use.indices.device).unsqueeze(1)
        number = self.index[sample, use.indices].long()
        values = _wide(use.gradients).to(self.kept.dtype)
        if use.padding_idx is not None:
            values = values.masked_fill((use.indices == use.padding_idx).unsqueeze(2), 0)
        flat = values.reshape(-1, values.shape[2])
        # sorted inside, unlike index_add_, and so the same bits on every run on any device
        self.kept.index_put_((number.flatten(),), flat, accumulate=True)
        if gradient is not None:
            gradient.index_put_((use.indices.flatten(),), flat, accumulate=True)

    def finish(self, total: Tensor) -> None:
        """Square what was kept."""
        rows = (self._keys % self._outputs).unsqueeze(1)
        fisher_ops.fisher_embedding(total, rows, self.kept.unsqueeze(1))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
