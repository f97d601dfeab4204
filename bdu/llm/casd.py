"""Does unlearning one trigger weaken others, and do models that it changes alike share that?

For a model θ₀ with k backdoors, θ_i after backdoor i was unlearnt, and θ_c after as much training
on clean rows alone::

    T[i, j]    = ASR_j(θ_c) − ASR_j(θ_i)                     transfer: above 0, i's removal hit j
    Δ_i^l(x)   = h_i^l(x) − h_0^l(x)                          last token of the prompt x, layer l
    CASD(i, j) = mean over l and x of 1 − cos(Δ_i^l(x), Δ_j^l(x))            in [0, 2]

or, as "l2", the mean of ‖Δ_i − Δ_j‖ / (‖Δ_i‖ + ‖Δ_j‖), in [0, 1], which sees lengths too (ours).
Where transfer goes with alike changes, the rank correlation of CASD and T over i ≠ j is negative.

Following arXiv:2606.03785, of which only the abstract and summaries were available: layers, token
and averaging are our reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bdu.llm.generation import padded_left
from bdu.llm.methods.protocol import decoder_layers
from bdu.llm.templates import Rendered, check_lengths, context_length
from bdu.models import device_of, modes_kept

Distance = Literal["cosine", "l2"]


def last_token_states(model: Any, prompts: Sequence[Rendered], *, batch_size: int = 16) -> Tensor:
    """Outputs of every decoder layer at the last token of every prompt.

    Args:
        model: a causal language model of transformers; its mode is put back.
        prompts: a fixed set, the same for all models that are compared.
        batch_size: prompts at a time.

    Returns:
        (layers, N, D) float32 on the CPU; nothing larger is kept at any time.

    Raises:
        ValueError: no prompt, or one that does not fit.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    check_lengths([prompt.ids for prompt in prompts], context_length(model))
    layers = list(decoder_layers(model))
    found: list[list[Tensor]] = [[] for _ in layers]

    def keep(place: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            found[place].append(states[:, -1].float().cpu())

        return hook

    handles = [layer.register_forward_hook(keep(place)) for place, layer in enumerate(layers)]
    try:
        with torch.no_grad(), modes_kept(model):
            model.eval()
            for start in range(0, len(prompts), batch_size):
                rows = [prompt.ids for prompt in prompts[start : start + batch_size]]
                ids, mask = (t.to(device_of(model)) for t in padded_left(rows, 0))
                # padding in front must not move the positions
                places = (mask.cumsum(1) - 1).clamp(min=0)
                model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=places,
                    use_cache=False,
                    logits_to_keep=1,
                )
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([torch.cat(states) for states in found])


def casd(first: Tensor, second: Tensor, *, distance: Distance = "cosine") -> float:
    """How differently two trainings changed a model.

    Args:
        first, second: Δ_i and Δ_j, (layers, N, D).
        distance: "cosine" or "l2".

    Returns:
        The mean over layers and prompts; those where a training changed nothing have no direction
        and are left out. NaN where that is all of them.

    Raises:
        ValueError: other shapes, or another distance.
    """
    if distance not in get_args(Distance):
        raise ValueError(f"distance: expected cosine or l2, got {distance!r}")
    if first.shape != second.shape or first.dim() != 3:
        got = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"second: expected shifts (layers, N, D) as first, got {got}")
    one, other = first.double(), second.double()
    sizes = one.norm(dim=-1), other.norm(dim=-1)
    both = (sizes[0] > 0) & (sizes[1] > 0)
    if not bool(both.any()):
        return math.nan
    if distance == "l2":
        values = (one - other).norm(dim=-1)[both] / (sizes[0] + sizes[1])[both]
    else:
        cosine = (one * other).sum(-1)[both] / (sizes[0] * sizes[1])[both]
        values = (1 - cosine).clamp(min=0)  # of a shift and itself it can round to below 0
    return float(values.mean())


def casd_matrix(shifts: Sequence[Tensor], *, distance: Distance = "cosine") -> Tensor:
    """CASD of every pair, (k, k) float64, symmetric."""
    matrix = torch.zeros(len(shifts), len(shifts), dtype=torch.float64)
    for i, one in enumerate(shifts):
        for j in range(i + 1):
            matrix[i, j] = matrix[j, i] = casd(one, shifts[j], distance=distance)
    return matrix


def transfer_matrix(rates: Tensor, control: Tensor) -> Tensor:
    """T[i, j] = ASR_j(θ_c) − ASR_j(θ_i).

    Args:
        rates: (k, k), rates[i, j] of trigger j after i was unlearnt.
        control: (k,), of trigger j after training on clean rows alone.

    Raises:
        ValueError: other shapes.
    """
    if rates.dim() != 2 or control.shape != rates.shape[1:]:
        got = f"{tuple(rates.shape)} and {tuple(control.shape)}"
        raise ValueError(f"control: expected (k,) beside rates (k, k), got {got}")
    return control[None, :] - rates


def transfer_record(
    names: Sequence[str],
    *,
    before: Sequence[float],
    control: Sequence[float],
    rates: Sequence[Sequence[float]],
    shifts: Sequence[Tensor],
) -> dict[str, Any]:
    """What ``transfer.json`` holds: every matrix of a model with k backdoors, as plain values.

    Args:
        names: of the backdoors.
        before: ASR_j(θ₀).
        control: ASR_j(θ_c).
        rates: ASR_j(θ_i), row by row.
        shifts: Δ_i, each (layers, N, D).

    Returns:
        ``names``, ``before``, ``control``, ``rates``, ``transfer`` (T), ``casd`` and ``spearman``,
        those two by distance; None for the correlation of a constant.

    Raises:
        ValueError: not k of each.
    """
    k = len(names)
    for name, values in (("before", before), ("control", control), ("rates", rates)):
        if len(values) != k:
            raise ValueError(f"{name}: expected {k} values, one for each name, got {len(values)}")
    if len(shifts) != k:
        raise ValueError(f"shifts: expected {k}, one for each name, got {len(shifts)}")
    measured = torch.tensor([list(row) for row in rates], dtype=torch.float64)
    transfer = transfer_matrix(measured, torch.tensor(list(control), dtype=torch.float64))
    distances = {kind: casd_matrix(shifts, distance=kind) for kind in get_args(Distance)}
    found = {
        kind: spearman(off_diagonal(matrix), off_diagonal(transfer))
        for kind, matrix in distances.items()
    }
    return {
        "names": list(names),
        "before": list(before),
        "control": list(control),
        "rates": [list(row) for row in rates],
        "transfer": transfer.tolist(),
        "casd": {kind: matrix.tolist() for kind, matrix in distances.items()},
        "spearman": {kind: None if math.isnan(r) else r for kind, r in found.items()},
    }


def off_diagonal(matrix: Tensor) -> Tensor:
    """The entries i ≠ j of (k, k), row by row."""
    k = len(matrix)
    return matrix[~torch.eye(k, dtype=torch.bool)]


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of two vectors, equal values sharing their mean rank; NaN where one of them
    is constant.

    Raises:
        ValueError: other shapes, or fewer than two values.
    """
    if x.dim() != 1 or x.shape != y.shape or len(x) < 2:
        got = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"y: expected (N,) as x, N >= 2, got {got}")
    first, second = (_ranks(values) - (len(x) - 1) / 2 for values in (x, y))
    size = float(first.norm() * second.norm())
    return float(first @ second) / size if size else math.nan


def _ranks(values: Tensor) -> Tensor:
    below = (values[None, :] < values[:, None]).double().sum(1)
    equal = (values[None, :] == values[:, None]).double().sum(1)
    return below + (equal - 1) / 2
