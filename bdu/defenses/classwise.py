"""Trigger inversion for every class at once, against a copy: what fools one and not the other.

    pattern   φ_t(x) = x + tanh(u_t + h_t(x))     u_t: one value a pixel, h_t: three small layers
    patch     φ_t(x) = (1 − m_t) x + m_t c_t      m_t: a share of every place, c_t: a colour there
    warp      φ_t(x) at p = x at p + s_t(p)       s_t: 8 x 8 shifts, interpolated

    maximise over φ:  mean_i  log f_t(φ_t(x_i)) + log r_y(φ_t(x_i)) − μ_t size(φ_t),   t ≠ y_i
    J(φ_t) = share of the images that f and r call right for which f calls φ_t(x) t and r still y

f is the suspect model and r a copy that has been cleaned, perhaps at a price in accuracy. Every
model has perturbations that turn its images, but those spoil the images for its copies, too; the
trigger of a backdoor leaves them as clear as they were to a model that does not know it. A copy of
few samples errs on images with the trigger, too, but does not call them t: where `strict` is off,
log r_y becomes log (1 − r_t), and r need not call φ_t(x) y but anything other than t. Warps, which
spoil images soonest, stay strict. Beside one operator for every class t there is one with
t = y + 1, for attacks from all classes to all; one by another permutation is not found. μ_t falls
while fewer than `wanted` of a target's images are turned and rises while more are, so that what is
found is about the smallest that works.

Ours. That one perturbation a class finds a backdoor is Neural Cleanse (Wang et al. 2019), that a
trigger is what the benign features do not see is BTI-DBF (Xu et al., ICLR 2024), and that warps are
triggers is WaNet (arXiv:2102.10369).

Cost: 3 · `steps` forwards and input backwards of both models over `batch_size` images, and for
T targets, one more than the classes or than `most_targets`, 3 T forwards of both over `judged_on`
images; where there are more classes than that, a backward a class and model over one batch besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdu.data import as_unit_float
from bdu.defenses.protocol import Samples
from bdu.metrics import predict

NEXT = -1
"""In place of a target: the class after the true one, as attacks from all classes have it."""
_SHARPNESS = 8  # of the draw: one that stands out is drawn most, of many alike each as often
_MEMORY = 0.8  # of the running share that is turned
_RATE = 1.06  # of μ a step, either way


@dataclass(frozen=True)
class Search:
    """How triggers are looked for.

    Attributes:
        steps: of Adam for each kind of operator.
        batch_size: images a step, shared by all targets.
        wanted: share of a target's images that are to be turned; μ settles there.
        most_targets: classes at most that have an operator; of more, those towards which a small
            perturbation of all images leads f more than r, the ones that `clean` shows first.
        judged_on: clean images at most that J is measured on; 0 measures none.
        strict: whether the reference is to call moved images right, or only not what f does.
    """

    steps: int = 200
    batch_size: int = 64
    wanted: float = 0.85
    most_targets: int = 50
    judged_on: int = 512
    strict: bool = True


# Of an operator: lr is Adam's, penalty is μ at first; least_spread is what auto.py takes at least
# for the spread of log(J / size) over the classes, for they may happen to be alike; always_strict
# is for what spoils an image for every model.


class Pattern(nn.Module):
    """What is added: the same for every image, and by small layers what depends on the image.

    The layers are shared by all targets, but for the scales of their hidden channels.
    """

    lr, penalty = 0.01, 10.0
    least_spread = 0.25
    always_strict = False
    width = 16

    def __init__(self, shape: Sequence[int], targets: int) -> None:
        super().__init__()
        self.addend = nn.Parameter(torch.zeros(targets, *shape))
        self.first = nn.Conv2d(shape[0], self.width, 3, padding=1)
        self.second = nn.Conv2d(self.width, self.width, 3, padding=2, dilation=2)
        self.last = nn.Conv2d(self.width, shape[0], 3, padding=1, bias=False)
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(targets, self.width, 1, 1))
        self.shift = nn.Parameter(0.1 * torch.randn(targets, self.width, 1, 1))
        with torch.no_grad():
            self.last.weight.mul_(0.1)

    def forward(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Moved images, and the size of each move, (N,)."""
        hidden = self.second(functional.relu(self.first(2 * x - 1)))
        hidden = functional.relu(hidden * self.scale[rows] + self.shift[rows])
        moved = x + torch.tanh(self.addend[rows] + self.last(hidden))
        # The slope passes through the cut, or pixels that start beyond it would never come back.
        moved = moved + (moved.clamp(0, 1) - moved).detach()
        return moved, (moved - x).abs().flatten(1).mean(1)


class Patch(nn.Module):
    """What covers a few places, the same for every image; the size is the mean of the mask."""

    lr, penalty = 0.1, 10.0
    least_spread = 0.4
    always_strict = False
    start = -2.0  # of the mask's logits: an eighth is covered everywhere

    def __init__(self, shape: Sequence[int], targets: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.full((targets, 1, *shape[1:]), self.start))
        self.colour = nn.Parameter(0.1 * torch.randn(targets, *shape))

    def forward(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Moved images, and the size of each mask, (N,)."""
        mask = self.mask[rows].sigmoid()
        return torch.lerp(x, self.colour[rows].sigmoid(), mask), mask.flatten(1).mean(1)


class Warp(nn.Module):
    """Smooth shifts of pixels, measured in pixels."""

    lr, penalty = 0.05, 1.0
    least_spread = 0.25
    always_strict = True
    points = 8

    def __init__(self, shape: Sequence[int], targets: int) -> None:
        super().__init__()
        # Between pixels, as interpolation has no slope where nothing is moved.
        self.shifts = nn.Parameter(0.2 * torch.randn(targets, 2, self.points, self.points))
        height, width = shape[1:]
        rows, columns = (torch.linspace(-1, 1, n) for n in (height, width))
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
        self.grid: Tensor
        self.pixel: Tensor
        self.register_buffer("grid", grid, persistent=False)
        pixel = 2 / torch.tensor([width - 1, height - 1]).clamp(min=1)
        self.register_buffer("pixel", pixel, persistent=False)

    def forward(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Moved images, and the size of each move, (N,)."""
        shifts = functional.interpolate(
            self.shifts, size=x.shape[2:], mode="bicubic", align_corners=True
        )
        places = self.grid + shifts[rows].permute(0, 2, 3, 1) * self.pixel
        moved = functional.grid_sample(x, places, padding_mode="border", align_corners=True)
        # the slope of a square root is infinite at 0
        lengths = self.shifts.square().sum(1).add(1e-6).sqrt().flatten(1).mean(1)
        return moved, lengths[rows]


KINDS: dict[str, type[Pattern] | type[Patch] | type[Warp]] = {
    "pattern": Pattern,
    "patch": Patch,
    "warp": Warp,
}


@dataclass
class Found:
    """What was found.

    Attributes:
        operators: a kind's module, from images and rows of `targets` to moved images and sizes.
        targets: (T,) int64, classes and, last, `NEXT`.
        fooled: (kinds, T), J of every operator on clean samples.
        sizes: (kinds, T), in pixels' values or, of warps, in pixels; NaN where none was judged.
        strict: see :class:`Search`.
    """

    operators: dict[str, nn.Module]
    targets: Tensor
    fooled: Tensor
    sizes: Tensor
    strict: bool = True

    def state(self) -> dict[str, Any]:
        """Tensors and names that :meth:`from_state` rebuilds it from."""
        weights = {kind: dict(module.state_dict()) for kind, module in self.operators.items()}
        return {
            "operators": weights,
            "targets": self.targets,
            "fooled": self.fooled,
            "sizes": self.sizes,
            "strict": self.strict,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], shape: Sequence[int]) -> Found:
        """See :meth:`state`; for images of this shape, (C, H, W)."""
        targets = state["targets"]
        with torch.random.fork_rng([]):
            operators = _operators(shape, len(targets), targets.device)
        for kind, module in operators.items():
            module.load_state_dict(state["operators"][kind])
        return cls(operators, targets, state["fooled"], state["sizes"], state["strict"])

    def drawing(self, rows: Tensor) -> Found:
        """A copy that draws the operators of `rows`, (T,) bool, as though they always worked.

        Warps are left out: what spoils images for every model has nothing to say of a class.
        """
        fooled = self.fooled.clone()
        for kind, operator in enumerate(self.operators.values()):
            if not operator.always_strict:
                fooled[kind, rows] = 1.0
        return replace(self, fooled=fooled)

    def move(self, images: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Images, each under an operator that is drawn by J⁸ and not that of its own class."""
        weights = self.fooled**_SHARPNESS + 1e-12  # all alike where nothing was found
        odds = weights.flatten().repeat(len(y), 1).view(len(y), *weights.shape)
        odds = odds.masked_fill((self.targets == y[:, None])[:, None], 0).flatten(1)
        drawn = torch.multinomial(odds.cpu(), 1, generator=generator)[:, 0].to(y.device)
        kinds, rows = drawn // weights.shape[1], drawn % weights.shape[1]
        moved = images.clone()
        with torch.no_grad():
            for number, module in enumerate(self.operators.values()):
                (own,) = torch.nonzero(kinds == number, as_tuple=True)
                if len(own):
                    moved[own] = module(images[own], rows[own])[0]
        return moved


def _operators(shape: Sequence[int], targets: int, device: torch.device) -> dict[str, nn.Module]:
    made = {kind: make(shape, targets) for kind, make in KINDS.items()}
    return {kind: module.to(device).requires_grad_(False) for kind, module in made.items()}


def invert_every_class(
    model: nn.Module,
    reference: nn.Module,
    clean: Samples,
    *,
    seed: int,
    settings: Search | None = None,
    wrap: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Found:
    """Find the operators.

    Args:
        model, reference: f and r, in evaluation mode; not changed.
        clean: the defender's images and true labels.
        seed: of the operators' start and of the batches.
        settings: see :class:`Search`.
        wrap: around the numbers of all steps, for a progress bar.
    """
    s = settings or Search()
    generator = torch.Generator().manual_seed(seed)
    targets = _targets(model, reference, clean, generator, s)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        operators = _operators(clean.x.shape[1:], len(targets), clean.y.device)
    all_steps: Iterable[int] = range(s.steps * len(operators))
    steps = iter(all_steps if wrap is None else wrap(all_steps))
    for operator in operators.values():
        own = (step for _, step in zip(range(s.steps), steps, strict=False))
        _search(operator, model, reference, clean, targets, generator, s, own)
    next(steps, None)  # closes the bar
    found = Found(operators, targets, torch.zeros(0), torch.zeros(0), s.strict)
    found.fooled, found.sizes = judge(
        found, model, reference, clean.at(torch.arange(min(s.judged_on, len(clean))))
    )
    return found


def _search(
    operator: Any,
    model: nn.Module,
    reference: nn.Module,
    clean: Samples,
    targets: Tensor,
    generator: torch.Generator,
    s: Search,
    steps: Iterable[int],
) -> None:
    optimizer = torch.optim.Adam(operator.requires_grad_().parameters(), lr=operator.lr)
    penalty = torch.full(targets.shape, operator.penalty, device=targets.device)
    turned = torch.zeros_like(penalty)
    strict = s.strict or operator.always_strict
    for _ in steps:
        batch = clean.at(torch.randint(len(clean), (s.batch_size,), generator=generator))
        rows = torch.randint(len(targets), (s.batch_size,), generator=generator)
        rows = rows.to(targets.device)
        rows = torch.where(targets[rows] == batch.y, (rows + 1) % len(targets), rows)
        moved, sizes = operator(as_unit_float(batch.x), rows)
        logits = model(moved)
        wanted = _wanted(targets[rows], batch.y, logits.shape[1])
        gains = logits.log_softmax(1).gather(1, wanted[:, None])[:, 0]
        hits = (logits.argmax(1) == wanted).to(gains.dtype)
        known = reference(moved)
        if strict:
            kept = known.log_softmax(1).gather(1, batch.y[:, None])[:, 0]
        else:
            others = known.scatter(1, wanted[:, None], -torch.inf)
            kept = others.logsumexp(1) - known.logsumexp(1)
        loss = (penalty[rows] * sizes - gains - kept).mean()
        gradients = torch.autograd.grad(loss, list(operator.parameters()))
        for parameter, gradient in zip(operator.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        count = torch.bincount(rows, minlength=len(targets))
        share = torch.bincount(rows, hits, minlength=len(targets)) / count.clamp(min=1)
        turned = torch.where(count > 0, _MEMORY * turned + (1 - _MEMORY) * share, turned)
        change = torch.where(turned > s.wanted, _RATE, 1 / _RATE)
        penalty = torch.where(count > 0, penalty * change, penalty)
    for parameter in operator.requires_grad_(False).parameters():
        parameter.grad = None


def _wanted(targets: Tensor, y: Tensor, classes: int) -> Tensor:
    return torch.where(targets == NEXT, (y + 1) % classes, targets)


def judge(
    found: Found,
    model: nn.Module,
    reference: nn.Module | None,
    samples: Samples,
    only: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """J and size of every operator on samples, each (kinds, T); 0 and NaN where none counts.

    Without a reference, J is the share of the images that the model calls right of which it calls
    φ_t(x) t. `only`, (kinds, T) bool, names the operators to look at.
    """
    images, y = as_unit_float(samples.x), samples.y
    right = called_right(model, images, y)
    if reference is not None:
        right &= called_right(reference, images, y)
    images, y = images[right], y[right]
    fooled = torch.zeros(len(found.operators), len(found.targets), device=y.device)
    sizes = torch.full_like(fooled, torch.nan)
    for kind, operator in enumerate(found.operators.values()):
        for row, target in enumerate(found.targets.tolist()):
            others = y != target
            if not others.any() or not (only is None or only[kind, row]):
                continue
            rows = torch.full((int(others.sum()),), row, device=y.device)
            with torch.no_grad():
                moved, size = operator(images[others], rows)
            logits = predict(model, moved).to(y.device)
            wanted = _wanted(found.targets[row], y[others], logits.shape[1])
            hit = logits.argmax(1) == wanted
            if reference is not None and (found.strict or operator.always_strict):
                hit &= called_right(reference, moved, y[others])
            elif reference is not None:
                hit &= ~called_right(reference, moved, wanted)
            fooled[kind, row], sizes[kind, row] = hit.float().mean(), size.mean()
    return fooled, sizes


def called_right(model: nn.Module, images: Tensor, y: Tensor) -> Tensor:
    """Which images in [0, 1] the model calls y, (N,) bool."""
    if not len(y):
        return torch.zeros(0, dtype=torch.bool, device=y.device)
    return predict(model, images).argmax(1).to(y.device) == y


def _targets(
    model: nn.Module, reference: nn.Module, clean: Samples, generator: torch.Generator, s: Search
) -> Tensor:
    device = clean.y.device
    batch = clean.at(torch.randint(len(clean), (s.batch_size,), generator=generator))
    images = as_unit_float(batch.x)
    with torch.no_grad():
        classes = torch.arange(model(images[:1]).shape[1], device=device)
    if len(classes) > s.most_targets:
        ratio = _pull(model, images, classes) / _pull(reference, images, classes).clamp(min=1e-12)
        ratio[~torch.isin(classes, clean.y)] = -1.0  # only after all that the samples show
        classes = ratio.topk(s.most_targets).indices.sort().values
    return torch.cat([classes, torch.tensor([NEXT], device=device)])


def _pull(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """‖mean_i ∇_x log p(t | x_i)‖₁ for every t: how far one small perturbation leads there."""
    delta = torch.zeros_like(images[:1]).requires_grad_()
    logs = model(images + delta).log_softmax(1).mean(0)
    pulls = [torch.autograd.grad(logs[t], delta, retain_graph=True)[0] for t in classes.tolist()]
    return torch.stack([pull.abs().sum() for pull in pulls])
