"""Which functions of torch use a parameter in a way that gives each sample's gradient.

A model is seen as the functions it calls, not as modules: the same rule finds `nn.Linear`, a layer
of Hugging Face, an adapter, a head written as `F.linear(h, embedding.weight)` and the projections
inside `nn.MultiheadAttention`. A function that is not in the table is left alone; the parameters it
uses take the per-sample path (plan.py counts the edges of autograd's graph to be sure).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bdu.fisher.contributions import Contribution, Rows, Scaled, Tokens, Whole, Window
from bdu.fisher.layout import Layout

Known = Mapping[int, str]  # id of a parameter → its name
Arguments = dict[str, Any]


@dataclass
class Call:
    """A function called with parameters.

    Attributes:
        kind: names the rule.
        names: role ("weight", "bias") → the parameter's name in the model.
        activations: the input as it was, or None where the gradient does not need it.
        settings: what else the rule needs.
        positions: leading axes of the output, of which one holds the samples; 1 where a channel
            comes next, as in images.
    """

    kind: str
    names: dict[str, str]
    activations: Tensor | None
    positions: int
    settings: Arguments = field(default_factory=dict)

    @property
    def is_pair(self) -> bool:
        """Whether one pass gives weight and bias; a bias that is added to x @ W comes apart."""
        return len(self.names) == 2 and self.kind != "matmul"

    def kinds(self) -> dict[str, type[Contribution]]:
        """Role → what the call will contribute to it."""
        own = _FORMS[self.kind]
        return {role: Scaled if role == "bias" else own for role in self.names}

    def contributions(
        self, activations: Tensor | None, gradients: Tensor, layout: Layout, samples: int
    ) -> dict[str, Contribution]:
        """Role → contribution, from the output's gradients."""
        return _FORMULAS[self.kind](self, activations, gradients, layout, samples)


class Watch(TorchFunctionMode):
    """Hands every call that a rule knows to `seen(call, output)` and returns what that returns.

    Any other function that makes a tensor of a known parameter is told to `other(name, function)`.
    """

    def __init__(
        self,
        known: Known,
        seen: Callable[[Call, Tensor], Tensor],
        other: Callable[[str, Any], None],
    ) -> None:
        super().__init__()
        self._known, self._seen, self._other = known, seen, other

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _attention(*args, **kwargs)
        call = self._call(func, args, kwargs)
        output = func(*args, **kwargs)
        if call is not None:
            return self._seen(call, output)
        if isinstance(output, Tensor | tuple | list):
            for name in self._named(args) | self._named(kwargs.values()):
                self._other(name, func)
        return output

    def _call(self, func: Any, args: Any, kwargs: Any) -> Call | None:
        rule = _RULES.get(func)
        if rule is None:
            return None
        try:
            return rule(self._known, *args, **kwargs)
        except TypeError:  # one of torch's older forms, with its arguments in another order
            return None

    def _named(self, args: Any) -> set[str]:
        found = set()
        for arg in args:
            if isinstance(arg, tuple | list):
                found |= self._named(arg)
            elif id(arg) in self._known:
                found.add(self._known[id(arg)])
        return found


def _undispatched(function: Any) -> Any:
    """A function of torch, in Python, that modes see the inside of and not the whole."""
    own = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = FunctionType(function.__code__, own, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_attention = _undispatched(F.multi_head_attention_forward)
# What a checkpoint recomputes in a backward has to be watched, too.
backward = _undispatched(torch.autograd.backward)


def _names(known: Known, **roles: Any) -> dict[str, str]:
    return {role: known[id(p)] for role, p in roles.items() if id(p) in known}


def _linear(known: Known, input: Tensor, weight: Tensor, bias: Any = None) -> Call | None:
    if not (names := _names(known, weight=weight, bias=bias)) or id(input) in known:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    needed = input if "weight" in names else None
    return Call("linear", names, needed, input.dim() - 1)


def _matmul(known: Known, input: Any, other: Any, *, out: Any = None) -> Call | None:
    if not (names := _names(known, weight=other)) or id(input) in known or other.dim() != 2:
        return None
    return Call("matmul", names, input, input.dim() - 1)


def _addmm(
    known: Known,
    input: Any,
    mat1: Any,
    mat2: Any,
    *,
    beta: Any = 1,
    alpha: Any = 1,
    out: Any = None,
) -> Call | None:
    names = _names(known, weight=mat2, bias=input)
    if not names or id(mat1) in known or beta != 1 or alpha != 1:
        return None
    if "bias" in names and input.dim() != 1:
        return None
    return Call("matmul", names, mat1 if "weight" in names else None, 1)


def _convolution(
    axes: int,
    known: Known,
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Call | None:
    names = _names(known, weight=weight, bias=bias)
    if not names or id(input) in known or input.dim() != axes + 2:
        return None

    def numbers(given: Any) -> tuple[int, ...]:
        given = (given,) if isinstance(given, int) else tuple(given)
        return given * axes if len(given) == 1 else given

    stride, dilation = numbers(stride), numbers(dilation)
    settings: Arguments = {"stride": stride, "dilation": dilation, "groups": groups}
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        # an odd rest goes to the end, as in torch
        settings["before"] = [span // 2 for span in spans]
        settings["after"] = [span - span // 2 for span in spans]
        padding = 0
    settings["padding"] = (0,) * axes if padding == "valid" else numbers(padding)
    return Call("conv", names, input if "weight" in names else None, 1, settings)


def _embedding(
    known: Known,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: Any = None,
    norm_type: Any = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call | None:
    names = _names(known, weight=weight)
    if not names or max_norm is not None or scale_grad_by_freq:
        return None
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    settings = {"padding_idx": padding_idx}
    return Call("embedding", names, input, input.dim(), settings)


def _layer_norm(
    known: Known,
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Call | None:
    return _normalisation(
        known, "layer_norm", input, weight, bias, input.dim() - len(normalized_shape), eps=eps
    )


def _rms_norm(
    known: Known, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> Call | None:
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    positions = input.dim() - len(normalized_shape)
    return _normalisation(known, "rms_norm", input, weight, None, positions, eps=eps)


def _group_norm(
    known: Known,
    input: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Call | None:
    return _normalisation(known, "group_norm", input, weight, bias, 1, groups=num_groups, eps=eps)


def _batch_norm(
    known: Known,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Call | None:
    if training or running_mean is None:
        return None
    return _normalisation(
        known,
        "batch_norm",
        input,
        weight,
        bias,
        1,
        mean=running_mean,
        variance=running_var,
        eps=eps,
    )


def _normalisation(
    known: Known,
    kind: str,
    input: Tensor,
    weight: Any,
    bias: Any,
    positions: int,
    **settings: Any,
) -> Call | None:
    names = _names(known, weight=weight, bias=bias)
    if not names or id(input) in known:
        return None
    return Call(kind, names, input if "weight" in names else None, positions, settings)


def _product(known: Known, input: Any, other: Any, *, out: Any = None) -> Call | None:
    pair = _parameter_and_input(known, input, other)
    if pair is None:
        return None
    parameter, input = pair
    settings = {"shape": parameter.shape}
    return Call("product", _names(known, weight=parameter), input, input.dim(), settings)


def _sum(known: Known, input: Any, other: Any, *, alpha: Any = 1, out: Any = None) -> Call | None:
    pair = _parameter_and_input(known, input, other)
    if pair is None or alpha != 1:
        return None
    parameter, input = pair
    settings = {"shape": parameter.shape}
    return Call("sum", _names(known, weight=parameter), None, input.dim(), settings)


def _sum_in_place(known: Known, input: Any, other: Any, *, alpha: Any = 1) -> Call | None:
    # Through a view it changes another tensor, which goes on without a tap on it.
    if isinstance(input, Tensor) and input._is_view():
        return None
    return _sum(known, input, other, alpha=alpha)


def _parameter_and_input(known: Known, one: Any, other: Any) -> tuple[Tensor, Tensor] | None:
    if id(one) in known:
        one, other = other, one
    if id(other) not in known or id(one) in known or not isinstance(one, Tensor):
        return None
    # the parameter may be repeated along the input, never the input along the parameter
    if not one.is_floating_point() or one.dim() < max(1, other.dim()):
        return None
    if torch.broadcast_shapes(one.shape, other.shape) != one.shape:
        return None
    return other, one


def _expand(known: Known, input: Tensor, *sizes: Any, implicit: bool = False) -> Call | None:
    names = _names(known, weight=input)
    flat = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    # copies a sample: everything after the first axis as it is
    own = tuple(input.shape)
    if len(own) not in (len(flat), len(flat) - 1):
        return None
    pairs = zip(flat[1:], own[len(own) - len(flat) + 1 :], strict=True)
    rest = tuple(n if size == -1 else size for size, n in pairs)
    if not names or not flat or (own != rest and own != (1, *rest)):
        return None
    return Call("copies", names, None, 1)


def _expand_as(known: Known, input: Tensor, other: Tensor) -> Call | None:
    return _expand(known, input, *other.shape)


def _repeat(known: Known, input: Tensor, *repeats: Any) -> Call | None:
    names = _names(known, weight=input)
    flat = tuple(repeats[0]) if len(repeats) == 1 and not isinstance(repeats[0], int) else repeats
    own = tuple(input.shape)
    leads = len(flat) == len(own) + 1 or (len(flat) == len(own) and own[:1] == (1,))
    if not names or not leads or any(n != 1 for n in flat[1:]):
        return None
    return Call("copies", names, None, 1)


_RULES: dict[Any, Callable[..., Call | None]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    F.conv1d: partial(_convolution, 1),
    F.conv2d: partial(_convolution, 2),
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    torch.mul: _product,
    Tensor.mul: _product,
    Tensor.__mul__: _product,
    Tensor.__rmul__: _product,
    torch.add: _sum,
    Tensor.add: _sum,
    Tensor.add_: _sum_in_place,
    Tensor.__add__: _sum,
    Tensor.__radd__: _sum,
    Tensor.__iadd__: _sum_in_place,
    Tensor.expand: _expand,
    Tensor.expand_as: _expand_as,
    Tensor.repeat: _repeat,
}


# What a call contributes, from the gradients g of its output.


def _of_linear(
    call: Call, a: Tensor | None, g: Tensor, layout: Layout, samples: int
) -> dict[str, Contribution]:
    found: dict[str, Contribution] = {}
    g = layout.by_sample(g, samples, g.shape[-1:])
    if "weight" in call.names:
        assert a is not None
        a = layout.by_sample(a, samples, a.shape[-1:])
        # x @ W has the axes of W the other way round
        found["weight"] = Rows(a, g) if call.kind == "linear" else Rows(g, a)
    if "bias" in call.names:
        found["bias"] = Scaled(None, g)
    return found


def _of_conv(
    call: Call, a: Tensor | None, g: Tensor, layout: Layout, samples: int
) -> dict[str, Contribution]:
    found: dict[str, Contribution] = {}
    if "weight" in call.names:
        assert a is not None
        s = call.settings
        if "before" in s:
            pads = zip(reversed(s["before"]), reversed(s["after"]), strict=True)
            a = F.pad(a, [n for pair in pads for n in pair])
        found["weight"] = Window(a, g, s["stride"], s["padding"], s["dilation"], s["groups"])
    if "bias" in call.names:
        found["bias"] = Scaled(None, g.flatten(2).transpose(1, 2))
    return found


def _of_embedding(
    call: Call, a: Tensor | None, g: Tensor, layout: Layout, samples: int
) -> dict[str, Contribution]:
    assert a is not None
    g = layout.by_sample(g, samples, g.shape[-1:])
    if layout.is_repeated:
        indices = a.reshape(1, -1).expand(samples, -1)
    else:
        indices = layout.by_sample(a, samples, ())
    return {"weight": Tokens(indices, g, call.settings["padding_idx"])}


def _of_token_norm(
    call: Call, a: Tensor | None, g: Tensor, layout: Layout, samples: int
) -> dict[str, Contribution]:
    channels = g.shape[call.positions :]
    g = layout.by_sample(g, samples, channels).flatten(2)
    mean = inverse = None
    if a is not None:
        a = layout.by_sample(a, samples, channels).flatten(2)
        wide = a if a.dtype == torch.float64 else a.float()
        if call.kind == "layer_norm":
            # its statistics are what is wanted, and it is several times faster than var_mean
            _, mean, inverse = torch.native_layer_norm(
                wide, wide.shape[2:], None, None, call.settings["eps"]
            )
        else:
            inverse = (wide.square().mean(2, keepdim=True) + call.settings["eps"]).rsqrt()
    use = Scaled(a, g, mean, inverse)
    return {role: use if role == "weight" else Scaled(None, g) for role in call.names}


def _of_channel_norm(
    call: Call, a: Tensor | None, g: Tensor, layout: Layout, samples: int
) -> dict[str, Contribution]:
    channels = g.shape[1]
    g = g.reshape(samples, channels, -1).transpose(1, 2)
    mean = inverse = None
    if a is not None:
        a = a.reshape(samples, channels, -1).transpose(1, 2)
        dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
        if call.kind == "batch_norm":
            mean, variance = (
                call.settings[name].to(dtype).view(1, 1, -1) for name in ("mean", "variance")
            )
        else:
            groups = call.settings["groups"]
            grouped = a.to(dtype).transpose(1, 2).reshape(samples, groups, -1)
            variance, mean = (
                s.repeat_interleave(channels // groups, 1).unsqueeze(1)
                for s in torch.var_mean(grouped, 2, correction=0)
            )
        inverse = (variance + call.settings["eps"]).rsqrt()
    use = Scaled(a, g, mean, inverse)
    return {role: use if role == "weight" else Scaled(None, g) for role in call.names}


def _of_product(
    call: Call, a: Tensor | None, g: Tensor, layout: Layout, samples: int
) -> dict[str, Contribution]:
    shape = call.settings["shape"]
    missing = g.dim() - len(shape)
    padded = (1,) * missing + tuple(shape)
    kept = [axis for axis, size in enumerate(padded) if size != 1]
    last = list(range(g.dim() - len(kept), g.dim()))
    channels = math.prod(shape)

    def by_sample(tensor: Tensor) -> Tensor:
        moved = tensor.movedim(kept, last)
        # the axis of the samples keeps its place among those that are not the parameter's
        axis = layout.axis - sum(k < layout.axis for k in kept)
        own = Layout(axis, layout.order)
        return own.by_sample(moved, samples, moved.shape[g.dim() - len(kept) :]).reshape(
            samples, -1, channels
        )

    return {"weight": Scaled(None if a is None else by_sample(a), by_sample(g))}


def _of_copies(
    call: Call, a: Tensor | None, g: Tensor, layout: Layout, samples: int
) -> dict[str, Contribution]:
    return {"weight": Whole(g)}


_FORMS: dict[str, type[Contribution]] = {
    "linear": Rows,
    "matmul": Rows,
    "conv": Window,
    "embedding": Tokens,
    "layer_norm": Scaled,
    "rms_norm": Scaled,
    "group_norm": Scaled,
    "batch_norm": Scaled,
    "product": Scaled,
    "sum": Scaled,
    "copies": Whole,
}
_FORMULAS: dict[str, Callable[..., dict[str, Contribution]]] = {
    "linear": _of_linear,
    "matmul": _of_linear,
    "conv": _of_conv,
    "embedding": _of_embedding,
    "layer_norm": _of_token_norm,
    "rms_norm": _of_token_norm,
    "group_norm": _of_channel_norm,
    "batch_norm": _of_channel_norm,
    "product": _of_product,
    "sum": _of_product,
    "copies": _of_copies,
}
