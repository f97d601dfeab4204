"""The exact diagonal of the empirical Fisher, and what is made of it.

For N samples and the log-likelihood log p of a model with parameters θ

    F_i = 1/N Σ_n (∂ log p(y_n | x_n) / ∂θ_i)²

The square is taken per sample, before the mean: squaring a batch's mean gradient is another and
smaller quantity. One forward and one backward serve a whole batch. The backward of the summed loss
hands every layer the output gradients g of all samples at once; with the layer's own input a they
give each sample's parameter gradient, which is squared and summed there and never kept. So
autograd computes no parameter gradient at all, and nothing before the first selected layer is
differentiated.

`fisher_linear`, `fisher_conv`, `fisher_embedding` and `fisher_affine` are those layer formulas.
Every other parameter (of custom modules, tied, of a layer called twice or without the batch in
front) takes `torch.func.vmap(grad)`: as exact, slower, and named in a warning.

Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks";
Kunstner et al. 2019, "Limitations of the empirical Fisher approximation".
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from tqdm import tqdm

from bdu.checkpoint import atomic_path

IGNORED_LABEL = -100
FILE_FORMAT = "bdu-fisher-1"

# Per-sample gradients exist only in blocks of at most this many elements.
_LAYER_BLOCK = 2**20
_FALLBACK_BLOCK = 2**25

# What torch says when vmap cannot express a model, as opposed to the model being at fault.
_VMAP_LIMITS = ("vmap", "functorch", "Batching rule", "During a grad")

Loss = Callable[[Tensor, Tensor], Tensor]


def fisher_diagonal(
    model: nn.Module,
    loader: Iterable[Any] | tuple[Any, Tensor],
    *,
    samples: int | None = None,
    labels: Literal["empirical", "model"] = "empirical",
    loss: Literal["cross_entropy"] | Loss = "cross_entropy",
    parameters: Iterable[str] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Return F_i = mean over samples of (∂ log p(y|x) / ∂θ_i)², exact whatever the batch size.

    Args:
        model: in the mode it is to be measured in; nothing may couple or randomise its samples.
            Returns logits (B, C) or (B, T, C), or an object with such `.logits`.
        loader: yields (x, y, ...), further fields ignored, or is a pair (x, y) of all samples,
            cut into batches of `batch_size`. x is a tensor or a mapping of keyword arguments, every
            tensor with the batch in its first axis; it is moved to the model's device. y holds
            integer labels (B,) or (B, T), with -100 where a token of a sequence has none; they
            stand opposite the logits as given, so a causal language model's are shifted already.
        samples: use only the first so many, to the sample; None is all of them.
        labels: "empirical" takes y; "model" draws it from the model's own distribution, one uniform
            number a label in the order of the samples (one draw a sample of the true Fisher).
        loss: "cross_entropy" is −log p(y|x), summed over a sequence's labelled tokens; or a
            callable from (logits, y) to one value a sample, shape (B,), each of its sample alone.
        parameters: names from `model.named_parameters()`; None is all that require a gradient.
        seed: for labels="model".
        progress: show a progress bar.

    Returns: name → tensor of the parameter's shape, on its device, ≥ 0; float64 for a float64
        parameter, else float32, in which bf16 and fp16 models are accumulated too.

    The model comes back as it was: gradients, flags, buffers, hooks, and the random state.

    Raises:
        ValueError: a setting, a label or a shape out of range, no sample, an unknown parameter, a
            model whose samples are coupled or random (BatchNorm or dropout in training mode).
        FloatingPointError: a gradient is not finite; the parameter is named.
        RuntimeError: the way the model uses a layer changed between batches.
    """
    if labels not in ("empirical", "model"):
        raise ValueError(f'labels: expected "empirical" or "model", got {labels!r}')
    if not (loss == "cross_entropy" or callable(loss)):
        raise ValueError(f'loss: expected "cross_entropy" or a callable, got {loss!r}')
    for name, count in (("samples", samples), ("batch_size", batch_size)):
        if count is not None and (not isinstance(count, int) or count <= 0):
            raise ValueError(f"{name}: expected a positive integer, got {count!r}")
    selected = _selected(model, parameters)
    _refuse_coupled_samples(model)

    totals = {
        name: torch.zeros_like(p, dtype=_wide(p.dtype), requires_grad=False)
        for name, p in selected.items()
    }
    device = next(iter(selected.values())).device
    by_name = not callable(loss)
    losses = partial(_losses, loss if callable(loss) else _cross_entropy)
    generator = torch.Generator().manual_seed(seed)
    capture, done = None, 0
    bar = tqdm(total=samples, desc="Fisher", unit="sample", disable=not progress)
    with bar, _untouched(model):
        for x, y in _batches(loader, samples, batch_size, device):
            if capture is None:
                draw = by_name or labels == "model"
                layers, classes = _plan(model, selected, losses, x, y, draw)
                capture = _Capture(layers, totals)
                hooked = {name for names in layers.values() for name in names.values()}
                rest = {name: p.detach() for name, p in selected.items() if name not in hooked}
                fallback = _PerSample(model, rest, losses)
            if by_name and labels == "empirical":
                _check_labels(y, classes)
            if layers or labels == "model":
                with capture.forward(len(y)):
                    logits = _run(model, x)
                    if labels == "model":
                        y = _drawn(logits.detach(), y, generator)
                    capture.backward(losses(logits, y).sum())
            fallback.add(x, y, totals)
            if done == 0:
                _check_finite(totals)
            done += len(y)
            bar.update(len(y))
    if not done:
        raise ValueError("loader: expected at least one sample, got none")
    _check_finite(totals)
    return {name: total.div_(done) for name, total in totals.items()}


# One function a kind of layer. Activations and gradients of any floating type are widened to
# float32 (float64 stays); every sum over time is inside the square, every sum over samples outside.


def fisher_linear(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return Σ_b (Σ_t g_bt a_btᵀ)² of y = a Wᵀ, elementwise.

    Args: activations a (B, T, I), the layer's input; gradients g (B, T, O), of its output.
    Returns: (O, I). With T = 1 nothing is summed inside the square: it is (g∘g)ᵀ(a∘a).
    """
    activations, gradients = _widened(activations), _widened(gradients)
    if activations.shape[1] == 1:
        return gradients.squeeze(1).square().T @ activations.squeeze(1).square()
    total = activations.new_zeros(gradients.shape[2], activations.shape[2])
    block = max(1, _LAYER_BLOCK // max(1, total.numel()))
    for a, g in zip(activations.split(block), gradients.split(block), strict=True):
        for one in torch.bmm(g.transpose(1, 2), a):
            total.addcmul_(one, one)
    return total


def fisher_conv(
    activations: Tensor,
    gradients: Tensor,
    kernel_size: tuple[int, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Return Σ_b (∂ Σ_s g_bs · y_bs / ∂W)² of y = conv(a, W), elementwise; s is a position.

    Args: activations a (B, I, L) or (B, I, H, W); gradients g (B, O, ...) of the output; the rest
        as in `torch.nn.Conv1d` and `Conv2d`, the padding with zeros and given as numbers.
    Returns: (O, I / groups, *kernel_size).
    """
    activations, gradients = _widened(activations), _widened(gradients)
    weight_gradient = {1: conv1d_weight, 2: conv2d_weight}[len(kernel_size)]
    shape = (gradients.shape[1], activations.shape[1] // groups, *kernel_size)
    total = activations.new_zeros(shape)
    # cuDNN rounds float32 convolutions to TF32 unless told not to
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for a, g in zip(activations.split(1), gradients.split(1), strict=True):
            one = weight_gradient(a, shape, g, stride, padding, dilation, groups)
            total.addcmul_(one, one)
    return total


def fisher_embedding(
    indices: Tensor, gradients: Tensor, num_embeddings: int, padding_idx: int | None = None
) -> Tensor:
    """Return Σ_b (Σ_{t: index_bt = v} g_bt)² for every row v of an embedding table.

    Args: indices (B, T), integers in [0, V); gradients g (B, T, D); num_embeddings V;
        padding_idx: the row that takes no gradient.
    Returns: (V, D). Equal tokens of one sample are added before the square; the work is that of
        the tokens present, and no (B, V, D) tensor is made.
    """
    gradients = _widened(gradients)
    sample = torch.arange(len(indices), device=indices.device).unsqueeze(1)
    present, position = torch.unique(sample * num_embeddings + indices, return_inverse=True)
    rows = gradients.new_zeros(len(present), gradients.shape[2])
    rows.index_add_(0, position.flatten(), gradients.flatten(0, 1))
    total = gradients.new_zeros(num_embeddings, gradients.shape[2])
    total.index_add_(0, present % num_embeddings, rows.square_())
    if padding_idx is not None:
        total[padding_idx] = 0
    return total


def fisher_affine(activations: Tensor | None, gradients: Tensor) -> Tensor:
    """Return Σ_b (Σ_t g_bt ∘ x̂_bt)² of y = x̂ ∘ γ + β: of γ, or of β where x̂ is None.

    Args: activations x̂ (B, T, C), normalised, before scale and shift; None stands for ones, which
        is a bias of any layer; gradients g (B, T, C).
    Returns: (C,).
    """
    products = _widened(gradients)
    if activations is not None:
        products = products * _widened(activations)
    return products.sum(1).square_().sum(0)


# Matched by exact type: a subclass may compute something else.
_TOKEN_LAYERS = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
_CHANNEL_LAYERS = (nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)
_LAYERS = _TOKEN_LAYERS + _CHANNEL_LAYERS


def _layer_fisher(layer: nn.Module, own: str, a: Tensor, g: Tensor) -> Tensor:
    """Hand a layer's input a and output gradient g, as plain tensors, to the formula of `own`."""
    shape = getattr(layer, own).shape

    def flat(tensor: Tensor, channels: int) -> Tensor:
        """(B, ..., C) or (B, C, ...) → (B, T, C)."""
        if isinstance(layer, _TOKEN_LAYERS):
            return tensor.reshape(len(tensor), -1, channels)
        return tensor.reshape(len(tensor), channels, -1).transpose(1, 2)

    if own == "bias":
        return fisher_affine(None, flat(g, shape.numel())).view(shape)
    if isinstance(layer, nn.Linear):
        return fisher_linear(flat(a, layer.in_features), flat(g, layer.out_features))
    if isinstance(layer, nn.Embedding):
        indices, gradients = flat(a, 1).squeeze(2), flat(g, layer.embedding_dim)
        return fisher_embedding(indices, gradients, layer.num_embeddings, layer.padding_idx)
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        padding = layer.padding
        if isinstance(padding, str) or layer.padding_mode != "zeros":
            mode = layer.padding_mode.replace("zeros", "constant")
            a = F.pad(a, layer._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(layer.kernel_size)
        stride, dilation, groups = layer.stride, layer.dilation, layer.groups
        return fisher_conv(
            a,
            g,
            layer.kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
    normalised = flat(_normalised(layer, _widened(a)), shape.numel())
    return fisher_affine(normalised, flat(g, shape.numel())).view(shape)


def _normalised(layer: nn.Module, a: Tensor) -> Tensor:
    """x̂, as `layer` computes it before scale and shift."""
    match layer:
        case nn.LayerNorm():
            return F.layer_norm(a, layer.normalized_shape, eps=layer.eps)
        case nn.RMSNorm():
            return F.rms_norm(a, layer.normalized_shape, eps=layer.eps)
        case nn.GroupNorm():
            return F.group_norm(a, layer.num_groups, eps=layer.eps)
        case _BatchNorm(running_mean=Tensor() as mean, running_var=Tensor() as variance):
            return F.batch_norm(a, _widened(mean), _widened(variance), eps=layer.eps)
    raise AssertionError(f"no layer formula for {type(layer).__name__}")


# A hooked module's parameters: own name ("weight") → name in the model ("head.weight").
_Layers = dict[nn.Module, dict[str, str]]


def _plan(
    model: nn.Module,
    selected: Mapping[str, nn.Parameter],
    losses: Loss,
    x: Any,
    y: Tensor,
    draw: bool,
) -> tuple[_Layers, int]:
    """Choose the parameters that a layer formula gives exactly; return them and the class count.

    Two trial runs, on one sample and on that sample twice, show which layers are called once with
    the batch in front: sizes 1 and 2 together exclude a time axis of the same length. The graph
    shows that the weight has no other use, such as F.linear(h, embedding.weight).
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {id(p): [] for p in selected.values()}
    for module in model.modules():
        for own, parameter in module._parameters.items():
            owners.get(id(parameter), []).append((module, own))
    candidates = {name: owners[id(p)][0] for name, p in selected.items()}
    sizes: dict[nn.Module, list[tuple[int, ...]]] = {
        module: []
        for module, _ in candidates.values()
        # a replaced forward (offloading, adapters) need not be the layer's formula
        if type(module) in _LAYERS and "forward" not in vars(module)
    }

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        sizes[module].append((*args, *kwargs.values())[0].shape[:1])

    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    before = _random_states(model)
    with _hooked(sizes, note):
        for size in (1, 2):
            x_trial, y_trial = _rows(x, [0] * size), y[[0] * size]
            logits = _run(model, x_trial)
            if draw:
                y_trial = _drawn(logits.detach(), y_trial, torch.Generator())
            total = losses(logits, y_trial).sum()
    if not all(map(torch.equal, before, _random_states(model))):
        raise ValueError("model: expected no random numbers in its forward, got some drawn")
    if total.grad_fn is None:
        raise ValueError("loss: expected a function of the model's parameters, got one detached")
    uses = _uses(total.grad_fn)
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    layers: _Layers = {}
    for name, (module, own) in candidates.items():
        once = sizes.get(module) == [(1,), (2,)] and uses[id(selected[name])] == 1
        # a pruned or adapted layer keeps its type, but not the names of its parameters
        if once and len(owners[id(selected[name])]) == 1 and own in ("weight", "bias"):
            layers.setdefault(module, {})[own] = name
    return layers, logits.shape[-1]


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            # first among the hooks: a later one may change the output
            handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _uses(root: Any) -> Counter[int]:
    """Count the edges that lead into every leaf tensor of an autograd graph, by id."""
    uses: Counter[int] = Counter()
    seen, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if hasattr(node, "variable"):
                uses[id(node.variable)] += 1
            elif node is not None and node not in seen:
                seen.add(node)
                stack.append(node)
    return uses


class _Capture:
    """Hooks that add each layer's squared per-sample gradients to `totals` during a backward."""

    def __init__(self, layers: _Layers, totals: Mapping[str, Tensor]) -> None:
        self.layers, self.totals = layers, totals

    @contextmanager
    def forward(self, size: int) -> Iterator[None]:
        """Hook the layers for one forward and backward of `size` samples."""
        self.size = size
        self.called: set[nn.Module] = set()
        self.roots: list[Tensor] = []
        with _hooked(self.layers, self._called):
            yield

    def backward(self, total: Tensor) -> None:
        """Differentiate down to the first hooked layers; the hooks do the work."""
        if self.roots:
            torch.autograd.grad(total, self.roots, allow_unused=True)

    def _called(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        names = ", ".join(self.layers[module].values())
        activations = (*args, *kwargs.values())[0].detach()
        if module in self.called or activations.shape[:1] != (self.size,):
            raise RuntimeError(
                f"{names}: expected one call with {self.size} samples in front, as in the first "
                f"batch, got {'another' if module in self.called else tuple(activations.shape)}"
            )
        self.called.add(module)
        if not torch.is_grad_enabled():
            return None
        if not output.requires_grad:
            # no parameter requires a gradient here, so the graph has to start somewhere; a sum and
            # not a leaf in its place, because an in-place activation may follow
            self.roots.append(output.new_zeros((), requires_grad=True))
            output = output + self.roots[-1]
        output.register_hook(partial(self._add, module, activations, activations._version))
        return output

    def _add(self, module: nn.Module, activations: Tensor, version: int, gradients: Tensor) -> None:
        for own, name in self.layers[module].items():
            if activations._version != version:
                raise RuntimeError(f"{name}: the layer's input was changed in place afterwards")
            with torch.autocast(gradients.device.type, enabled=False):
                self.totals[name].add_(_layer_fisher(module, own, activations, gradients))


class _PerSample:
    """Per-sample gradients of any parameters by `torch.func`, or one by one where vmap cannot."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor], losses: Loss) -> None:
        self.model, self.parameters, self.losses = model, parameters, losses
        self.vectorised = True
        self.warned = ""

    def add(self, x: Any, y: Tensor, totals: Mapping[str, Tensor]) -> None:
        """Add the squared gradients of these samples to `totals`."""
        if not self.parameters:
            return
        block = max(1, _FALLBACK_BLOCK // max(1, sum(p.numel() for p in self.parameters.values())))
        for start in range(0, len(y), block):
            rows = slice(start, start + block)
            for gradients in self._gradients(_rows(x, rows), y[rows]):
                for name, gradient in gradients.items():
                    totals[name].add_(_widened(gradient).square().sum(0))

    def _gradients(self, x: Any, y: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield gradients with one or more samples in front, until all samples have come."""
        if self.vectorised:
            axes = _mapped(x, lambda _: 0, lambda _: None)
            try:
                per_sample = torch.func.vmap(torch.func.grad(self._loss), (None, axes, 0))
                gradients = per_sample(self.parameters, x, y)
            except RuntimeError as error:
                if not any(limit in str(error) for limit in _VMAP_LIMITS):
                    raise
                self.vectorised = False
                self._warn(f"one sample at a time, since vmap cannot: {str(error).strip()[:200]}")
            else:
                self._warn("by vmap over per-sample gradients")
                yield gradients
                return
        for i in range(len(y)):
            leaves = {name: p.detach().requires_grad_() for name, p in self.parameters.items()}
            value = self._loss(leaves, _rows(x, i), y[i])
            if not value.requires_grad:
                continue  # this sample uses none of the parameters
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            pairs = zip(leaves, found, strict=True)
            yield {name: g.unsqueeze(0) for name, g in pairs if g is not None}

    def _loss(self, parameters: dict[str, Tensor], x: Any, y: Tensor) -> Tensor:
        return self.losses(_run(self.model, _rows(x, None), parameters), y.unsqueeze(0)).sum()

    def _warn(self, how: str) -> None:
        if self.warned != how:
            names = ", ".join(self.parameters)
            message = f"fisher_diagonal: no layer formula fits {names}; exact but slower, {how}"
            warnings.warn(message, stacklevel=5)
            self.warned = how


def _selected(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    known = dict(model.named_parameters())
    chosen = [name for name, p in known.items() if p.requires_grad] if names is None else names
    if isinstance(chosen, str):
        raise ValueError(f"parameters: expected several names, got the string {chosen!r}")
    chosen = list(chosen)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"parameters: expected names from named_parameters(), got {unknown}")
    if other := [name for name in chosen if not known[name].is_floating_point()]:
        raise ValueError(f"parameters: expected real floating-point parameters, got {other}")
    if not chosen:
        raise ValueError("parameters: expected at least one that requires a gradient, got none")
    return {name: known[name] for name in chosen}


def _refuse_coupled_samples(model: nn.Module) -> None:
    for name, module in model.named_modules():
        match module:
            case _BatchNorm() if module.training or module.running_mean is None:
                why = "takes its batch's statistics, so no sample has a gradient of its own"
            case _NormBase(training=True, track_running_stats=True):
                why = "changes its running statistics"
            case _DropoutNd(training=True) if module.p > 0:
                why = "is active, so the gradients are random"
            case nn.Embedding() if module.max_norm is not None or module.scale_grad_by_freq:
                why = "has max_norm or scale_grad_by_freq, which change weight or gradient"
            case _:
                continue
        hint = "; call model.eval() first" if module.training else ""
        raise ValueError(f"model: {type(module).__name__} {name!r} {why}{hint}")


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.is_cuda}, key=str)


def _random_states(model: nn.Module) -> list[Tensor]:
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, _cuda_devices(model))]


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Give back the model's flags and buffers and torch's own state as they were."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    buffers = [
        (module._buffers, own, b, b._version, b.clone())
        for module in model.modules()
        for own, b in module._buffers.items()
        if b is not None
    ]
    fastpath, cache = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
    with torch.random.fork_rng(_cuda_devices(model)), torch.enable_grad():
        try:
            # the fast path of attention skips modules; a cached cast hides a weight's second use
            torch.backends.mha.set_fastpath_enabled(False)
            torch.set_autocast_cache_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch.set_autocast_cache_enabled(cache)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for buffers_of, own, buffer, version, value in buffers:
                buffers_of[own] = buffer
                if buffer._version != version:
                    buffer.detach().copy_(value)


def _batches(
    loader: Iterable[Any] | tuple[Any, Tensor], left: int | None, size: int, device: torch.device
) -> Iterator[tuple[Any, Tensor]]:
    """Yield (x, y) on `device`, `left` samples in all."""
    if isinstance(loader, tuple) and len(loader) == 2 and isinstance(loader[1], Tensor):
        _check_batch(*loader)
        all_x, all_y = loader
        pieces = [slice(i, i + size) for i in range(0, len(all_y), size)]
        loader = ((_rows(all_x, piece), all_y[piece]) for piece in pieces)
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise ValueError(f"loader: expected batches (x, y, ...), got {type(batch).__name__}")
        x, y = batch[:2]
        _check_batch(x, y)
        y = y[:left].to(device)
        if len(y):
            yield _mapped(_rows(x, slice(len(y))), lambda t: t.detach().to(device)), y
        if left is not None:
            left -= len(y)
            if left == 0:
                return


def _check_batch(x: Any, y: Any) -> None:
    tensors = [v for v in x.values() if isinstance(v, Tensor)] if isinstance(x, Mapping) else [x]
    for tensor in (*tensors, y):
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != y.shape[:1] or not y.dim():
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"loader: expected tensors x, y of one length in front, got {got}")


def _mapped(x: Any, f: Callable[[Tensor], Any], other: Callable[[Any], Any] = lambda v: v) -> Any:
    """Apply f to x, or to every tensor of a mapping x and `other` to what else is in it."""
    if isinstance(x, Mapping):
        return {k: f(v) if isinstance(v, Tensor) else other(v) for k, v in x.items()}
    return f(x)


def _rows(x: Any, index: Any) -> Any:
    """Index the first axis of x; None puts an axis in front."""
    return _mapped(x, lambda tensor: tensor[index])


def _run(model: nn.Module, x: Any, parameters: dict[str, Tensor] | None = None) -> Tensor:
    args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else ((x,), {})
    outputs = torch.func.functional_call(model, parameters or {}, args, kwargs)
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise ValueError(f"model: expected a tensor or .logits, got {type(outputs).__name__}")
    return logits


def _losses(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    values = loss(logits, y)
    if not isinstance(values, Tensor) or values.shape != (len(y),):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"loss: expected one value a sample, shape ({len(y)},), got {got}")
    return values


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−log p(y|x) of logits (B, C), or (B, T, C) summed over labelled tokens → (B,)."""
    _check_shapes(logits, y)
    flat = _widened(logits).flatten(0, -2)
    values = F.cross_entropy(flat, y.long().flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    return values.view(len(y), -1).sum(1)


def _check_shapes(logits: Tensor, y: Tensor) -> None:
    if logits.dim() not in (2, 3) or y.shape != logits.shape[:-1]:
        raise ValueError(
            "loader: expected y (B,) for logits (B, C), or (B, T) for (B, T, C), "
            f"got {tuple(y.shape)} for {tuple(logits.shape)}"
        )


def _check_labels(y: Tensor, classes: int) -> None:
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"loader: expected integer labels y, got {y.dtype}")
    wrong = (y < 0) | (y >= classes)
    if y.dim() == 2:
        wrong &= y != IGNORED_LABEL
    if wrong.any():
        raise ValueError(f"loader: expected labels in [0, {classes}), got {int(y[wrong][0])}")


def _drawn(logits: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Draw labels from softmax(logits) by inverting its distribution; y tells which tokens."""
    _check_shapes(logits, y)
    mask = y != IGNORED_LABEL if logits.dim() == 3 else torch.ones_like(y, dtype=torch.bool)
    rows = logits[mask]
    # one number a label, on the CPU: the same for every batch size, padding and device
    uniform = torch.rand(len(rows), 1, generator=generator, dtype=torch.float64).to(rows.device)
    drawn = torch.full(mask.shape, IGNORED_LABEL, device=rows.device)
    picks = []
    for block, u in zip(rows.split(1024), uniform.split(1024), strict=True):
        cumulative = block.double().softmax(-1).cumsum(-1)
        picks.append(torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True))
    drawn[mask] = torch.cat(picks).squeeze(1).clamp_(max=logits.shape[-1] - 1)
    return drawn


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(_wide(tensor.dtype))


def target_log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """Return ℓ = z_t − logsumexp_{j≠t} z_j = log(p_t / (1 − p_t)), stable for every z.

    As `loss` of `fisher_diagonal` it gives the Fisher of a trigger's target.

    Args: logits z (B, C), C ≥ 2; target t (B,), integers in [0, C).
    Returns: (B,), float32 or float64.
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits: expected (B, C) with C >= 2, got {tuple(logits.shape)}")
    if target.shape != logits.shape[:1] or target.is_floating_point():
        got = f"{target.dtype} {tuple(target.shape)}"
        raise ValueError(f"target: expected ({len(logits)},) integers, got {got}")
    logits, index = _widened(logits), target.long().unsqueeze(1)
    others = logits.scatter(1, index, -math.inf).logsumexp(1)
    return logits.gather(1, index).squeeze(1) - others


def scale_to_unit_mean(fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return F times one factor, so that its mean over all entries of all tensors is 1.

    A penalty weight λ then means the same for every model. Raises ValueError if F is all zero.
    """
    _check_fisher(fisher, "fisher")
    total = sum(float(f.sum(dtype=torch.float64)) for f in fisher.values())
    if total == 0:
        raise ValueError("fisher: expected a positive entry, got all zero")
    factor = sum(f.numel() for f in fisher.values()) / total
    return {name: (f.double() * factor).to(f.dtype) for name, f in fisher.items()}


def contrastive(
    fisher_clean: Mapping[str, Tensor], fisher_trigger: Mapping[str, Tensor], gamma: float
) -> dict[str, Tensor]:
    """Return F_c · F_c / (F_c + γ F_t), 0 where F_c = 0: high where only clean data needs θ.

    Args: two Fishers of the same names and shapes, each scaled to unit mean by the caller, or γ ≥ 0
        would carry their scales; the result is not rescaled.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma: expected a finite number >= 0, got {gamma}")
    shapes = [{n: tuple(f.shape) for n, f in x.items()} for x in (fisher_clean, fisher_trigger)]
    if different := sorted(n for n, _ in shapes[0].items() ^ shapes[1].items()):
        raise ValueError(f"fisher_trigger: expected fisher_clean's shapes, got others: {different}")
    result = {}
    for name, clean in fisher_clean.items():
        # the ratio first: F_c · F_c can leave the range of float32
        share = clean / (clean + gamma * fisher_trigger[name])
        result[name] = torch.where(clean > 0, clean * share, torch.zeros_like(clean))
    return result


def save_fisher(
    path: str | os.PathLike[str],
    fisher: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a Fisher as safetensors, whole or not at all: a temporary file takes the path's place.

    Args: metadata: what it was made from, such as samples, labels and loss; kept as strings beside
        the format's version. A Fisher that is not finite and ≥ 0 raises ValueError.
    """
    _check_fisher(fisher, "fisher")
    header = {key: str(value) for key, value in (metadata or {}).items()} | {"format": FILE_FORMAT}
    with atomic_path(path) as temporary:
        save_file({name: f.cpu().contiguous() for name, f in fisher.items()}, temporary, header)


def load_fisher(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what `save_fisher` wrote, onto the CPU; ValueError names the file and what is wrong."""
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format")
            if found != FILE_FORMAT:
                raise ValueError(f"{path}: expected a Fisher of format {FILE_FORMAT}, got {found}")
            fisher = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error
    _check_fisher(fisher, str(path))
    return fisher


def _check_fisher(fisher: Mapping[str, Tensor], where: str) -> None:
    for name, f in fisher.items():
        if not (f.is_floating_point() and bool(torch.isfinite(f).all()) and bool((f >= 0).all())):
            raise ValueError(f"{where}: expected {name} finite and >= 0, got other values")


def _check_finite(totals: Mapping[str, Tensor]) -> None:
    for name, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            raise FloatingPointError(f"{name}: expected finite squared gradients, got inf or nan")
