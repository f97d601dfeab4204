"""Trigger inversion that knows neither the trigger nor its target: an operator on images, by EM.

    φ(x) = clip(x + tanh(u + h(x)), 0, 1)          u: one value a pixel, h: three small convolutions

    maximise over φ, π:   mean_i c_i log Σ_{t ≠ y_i} π(t | y_i) p(t | φ(x_i))  −  μ mean |φ(x) − x|
    E:  q_i(t) ∝ π(t | y_i) p(t | φ(x_i)),  t ≠ y_i;   c_i = 1 − π(y_i)
    M:  a step of Adam on φ with the weights q;  π ← running mean of q

u holds patches, blends and waves; h what depends on the image: warps, quantisation, patterns of a
generator. π begins at what a short probe of every class finds, an addition to all images of the
other classes that makes them that class; from a uniform start no direction would be better than
another, as images of the target pull back as hard as all others push. It is kept for every true
class, so that it can also hold an attack from all classes to all. Images that are likely to be of
the target themselves do not count, which is what c says. μ begins
so high that only the cheapest way is taken, falls while fewer images are turned than wanted, and
rises while more are, as the cost of Neural Cleanse (Wang et al. 2019) does: φ grows from nothing
and ends as about the smallest change that works.

The EM over unknown targets is that of BI-BAU (arXiv:2606.14078) as we read it; only its abstract
was available. The operator, μ's schedule and all numbers are ours. It is shared by TBAR and PAM,
which their papers feed with other inversions (DECREE, BTI-DBF), BI-BAU without a reference, and the
anchored variants.

Cost: `steps` + classes · `probe_steps` forwards and input backwards of every model over batches of
`batch_size`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdu.data import as_unit_float
from bdu.defenses.protocol import Samples
from bdu.metrics import predict

_PRIOR_COUNTS = 20.0  # images' worth of what all classes share, in π of one class
_MEMORY = 0.9  # of the running means
_RATE = 1.03  # of μ a step, either way
_SHARPNESS = 4.0  # of π at the start, in a probe's nats
_PROBE_LR = 0.02


@dataclass(frozen=True)
class Inversion:
    """How a trigger is looked for.

    Attributes:
        steps, lr, batch_size: of Adam.
        wanted: share of images that are to be turned; μ settles there.
        width: channels of h.
        penalty: μ at the start.
        probe_steps: of the probe of a class; 0 begins with π uniform.
    """

    steps: int = 300
    lr: float = 0.01
    batch_size: int = 64
    wanted: float = 0.9
    width: int = 16
    penalty: float = 10.0
    probe_steps: int = 20


class TriggerOperator(nn.Module):
    """φ of the module's docstring, for images (N, C, H, W) in [0, 1] of one size.

    Args:
        shape: (C, H, W).
        width: channels of h.
        seed: of the start, which is close to the identity.
    """

    def __init__(self, shape: Sequence[int], width: int = 16, seed: int = 0) -> None:
        super().__init__()
        channels, height, across = shape
        self.addend = nn.Parameter(torch.zeros(1, channels, height, across))
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.first = nn.Conv2d(channels, width, 3, padding=1)
            self.second = nn.Conv2d(width, width, 3, padding=2, dilation=2)
            self.last = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        with torch.no_grad():
            self.last.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Triggered images."""
        hidden = functional.relu(self.second(functional.relu(self.first(2 * x - 1))))
        moved = x + torch.tanh(self.addend + self.last(hidden))
        # The slope passes through the cut, or black and white pixels that start beyond it would
        # never come back.
        return moved + (moved.clamp(0, 1) - moved).detach()


@dataclass
class Inverted:
    """What was found.

    Attributes:
        operator: φ.
        targets: π(t | y), (classes, classes), rows the true class.
    """

    operator: TriggerOperator
    targets: Tensor

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that :meth:`from_state` rebuilds it from."""
        return {
            "operator": dict(self.operator.state_dict()),
            "targets": self.targets,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Inverted:
        """See :meth:`state`."""
        weights = state["operator"]
        shape, width = weights["addend"].shape[1:], len(weights["first.weight"])
        operator = TriggerOperator(shape, width).to(weights["addend"].device)
        operator.load_state_dict(weights)
        return cls(operator, state["targets"])

    def samples(self, model: nn.Module, clean: Samples) -> tuple[Tensor, Tensor]:
        """φ(x) and what the model calls it, of the images that it then calls neither by their class
        nor by what it called them before; of all images where there is none."""
        images = as_unit_float(clean.x)
        with torch.no_grad():
            moved = torch.cat([self.operator(part) for part in images.split(256)])
        called = predict(model, moved).argmax(1).to(clean.y.device)
        before = predict(model, images).argmax(1).to(clean.y.device)
        (turned,) = torch.nonzero((called != clean.y) & (called != before), as_tuple=True)
        return (moved[turned], called[turned]) if len(turned) else (moved, called)


def invert_trigger(
    models: nn.Module | Iterable[nn.Module],
    clean: Samples,
    *,
    seed: int,
    settings: Inversion | None = None,
    wrap: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Inverted:
    """Find φ for one model, or one that works on several at once (their mean log-probability).

    Args:
        models: in evaluation mode; not changed.
        clean: the defender's images and true labels.
        seed: of the operator's start and of the batches.
        settings: see :class:`Inversion`.
        wrap: around the numbers of the classes to probe, then of the steps, for progress bars.
    """
    s = settings or Inversion()
    models = [models] if isinstance(models, nn.Module) else list(models)
    device = clean.y.device
    generator = torch.Generator().manual_seed(seed)
    operator = TriggerOperator(clean.x.shape[1:], s.width, seed).to(device)
    own = list(operator.parameters())
    optimizer = torch.optim.Adam(own, lr=s.lr)
    with torch.no_grad():
        classes = models[0](as_unit_float(clean.x[:1])).shape[1]
    wrap = wrap or iter
    losses = _probe(models, clean, wrap(range(classes)), generator, s)
    prior = _Prior((-_SHARPNESS * losses).softmax(0))
    penalty, turned = s.penalty, 0.0
    for _ in wrap(range(s.steps)):
        batch = clean.at(torch.randint(len(clean), (s.batch_size,), generator=generator))
        images = as_unit_float(batch.x)
        moved = operator(images)
        logs = [model(moved).log_softmax(1) for model in models]
        mean = torch.stack(logs).mean(0)
        weights = prior.weights(mean.detach(), batch.y)  # E
        size = (moved - images).abs().mean()
        gain = prior.counted(batch.y) * (weights * mean).sum(1)
        loss = -gain.mean() + penalty * size
        for parameter, slope in zip(own, torch.autograd.grad(loss, own), strict=True):
            parameter.grad = slope  # of φ alone, the models keep theirs
        optimizer.step()  # M
        prior.update(weights, batch.y)
        hits = torch.stack([log.argmax(1) != batch.y for log in logs]).all(0).float()
        counted = prior.counted(batch.y)
        hit = float((counted * hits).sum() / counted.sum().clamp(min=1e-12))
        turned = _MEMORY * turned + (1 - _MEMORY) * hit
        penalty = penalty * _RATE if turned > s.wanted else penalty / _RATE
    for parameter in own:
        parameter.grad = None
    return Inverted(operator.requires_grad_(False), prior.targets())


def _probe(
    models: Sequence[nn.Module],
    clean: Samples,
    classes: Iterable[int],
    generator: torch.Generator,
    s: Inversion,
) -> Tensor:
    """(classes,): −log p(t | x + δ_t) + μ mean |δ_t|, where a few steps of Adam on δ_t bring it."""
    losses = []
    for target in classes:
        losses.append(torch.zeros((), device=clean.y.device))
        (others,) = torch.nonzero(clean.y != target, as_tuple=True)
        if not s.probe_steps or not len(others):
            continue
        delta = torch.zeros_like(as_unit_float(clean.x[:1])).requires_grad_()
        optimizer = torch.optim.Adam([delta], lr=_PROBE_LR)
        for _ in range(s.probe_steps):
            drawn = torch.randint(len(others), (s.batch_size,), generator=generator)
            images = as_unit_float(clean.at(others[drawn.to(others.device)]).x)
            logs = [model(images + delta).log_softmax(1)[:, target].mean() for model in models]
            loss = -torch.stack(logs).mean() + s.penalty * delta.abs().mean()
            (delta.grad,) = torch.autograd.grad(loss, delta)
            optimizer.step()
        losses[-1] = loss.detach()
    return torch.stack(losses)


def log_targets(targets: Tensor) -> Tensor:
    """(classes, classes): log π(t | y), −∞ for the class itself, which no confidence outweighs."""
    own = torch.eye(len(targets), dtype=torch.bool, device=targets.device)
    return targets.clamp(min=1e-12).log().masked_fill(own, -math.inf)


class _Prior:
    """π(t | y): counts of q, of every class and of all together."""

    def __init__(self, shared: Tensor) -> None:
        self._counts = torch.zeros(len(shared), len(shared), device=shared.device)
        self._shared = shared

    def targets(self) -> Tensor:
        """(classes, classes), every row a distribution that leaves its own class out."""
        mixed = self._counts + _PRIOR_COUNTS * self._shared
        mixed = mixed.masked_fill(torch.eye(len(mixed), dtype=torch.bool, device=mixed.device), 0)
        return mixed / mixed.sum(1, keepdim=True).clamp(min=1e-12)

    def weights(self, log_probabilities: Tensor, y: Tensor) -> Tensor:
        """q, (N, classes)."""
        return (log_probabilities + log_targets(self.targets())[y]).softmax(1)

    def counted(self, y: Tensor) -> Tensor:
        """c, (N,): how likely an image is not of the target itself."""
        return 1 - self._shared[y]

    def update(self, weights: Tensor, y: Tensor) -> None:
        """Take in the weights of a batch."""
        self._counts.mul_(_MEMORY).index_add_(0, y, weights)
        self._shared = _MEMORY * self._shared + (1 - _MEMORY) * weights.mean(0)
