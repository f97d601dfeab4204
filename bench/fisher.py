"""Times the exact diagonal of the empirical Fisher against every honest way to get it.

    python bench/fisher.py                         the whole table, as text
    python bench/fisher.py --json fisher.json      and as rows
    python bench/fisher.py --case mlp --arm vmap   some of it
    python bench/fisher.py --device cuda           the cases of a GPU, see bench/gpu.sh

Every arm adds Σ_n (∂ℓ_n/∂θ)² of one batch to totals of the parameters' shapes. The arms take turns
inside each round, and each is also divided by the forward and backward of the same round, so that a
machine whose speed drifts slows both alike. What takes less than 50 ms runs once untimed before,
with the arm before it out of the caches. All compute in float32 and none in TF32.

Every rival is given its best: the settings it has (how many samples at a time, how their gradients
are squared and added up, which convolution, whether p.grad is computed beside) are tried out on the
case before the rounds, one after the other, and the fastest are taken and named. Arms that hold
the gradients of all layers at once take so many samples at a time that these stay within --limit.
Where a library cannot express a model, it gets the same computation on the same weights in plain
modules.

Arms
    forward + backward       the unit: one forward, and one backward of the summed loss to p.grad
    bdu                      FisherAccumulator.add; its plan, made once a model, is shown apart
    bdu + gradient           FisherAccumulator.backward, which gives p.grad as well
    bdu reference            the same with the backend in plain torch; on a GPU, or by --arm
    bmm + square-sum         hooks, no p.grad, torch.bmm layer by layer (of images also torch's
                             convolutions), then square and sum; (g²)ᵀ(a²) where a sample has one
                             position: the strongest simple way
    batch-1 loop             autograd, one sample at a time
    vmap(grad)               torch.func
    Opacus X                 GradSampleModule: hooks, functorch, ExpandedWeights
    BackPACK                 SumGradSquared, with opt_einsum
    nngeometry               PMatDiag of the losses of the given labels: the empirical Fisher
    batch-mean² (inexact)    the square of the batch's gradient, times the batch: another quantity

Columns
    error        largest |F − F64| of a parameter over its largest F64, of a batch-1 loop in float64
                 on 4 samples (of GPT-2: 2 layers 128 wide, 512 tokens, 32 positions); the worst
                 parameter. One whose F64 is 0 but for rounding, such as the bias of the keys of an
                 attention, is held against the largest of all.
    extra MB     peak memory above that of forward + backward, from a process of its own for each
                 arm on a CPU; both have the result in it, p.grad there and F here. On a GPU what
                 torch's allocator held, on a CPU resident memory, every allocation a mapping.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import step
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from bdu import models
from bdu.checkpoint import atomic_write
from bdu.fisher import FisherAccumulator

Losses = Callable[[Tensor, Tensor], Tensor]
Settings = dict[str, Any]
Squares = dict[str, Tensor]

UNIT = "forward + backward"
# What float32 loses stays below; a formula that leaves something out does not.
WRONG = 1e-3
QUICK_MS = 50.0
AS_GIVEN, PLAIN = "as given", "plain modules"
RIVALS = (
    "opacus",
    "backpack-for-pytorch",
    "nngeometry",
    "opt_einsum",
    "transformers",
)


class NotRun(Exception):
    """Why an arm does not run, in one line."""


# What is measured: models, and the same models in plain modules.


@dataclass
class Problem:
    """A model and one batch of it.

    Attributes:
        model: in evaluation mode.
        x: inputs, the samples in the first axis.
        y: labels, or the coefficients of a linear functional of the output.
        losses: (output, y) → one value a sample.
        loss: the same for FisherAccumulator.
        plain: makes a model of plain modules out of a copy of this one.
        attends: whether it calls scaled_dot_product_attention.
        limit: bytes that per-sample gradients may take.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    losses: Losses
    loss: Any
    plain: Callable[[nn.Module], nn.Module] | None = None
    attends: bool = False
    limit: int = 2**28

    @property
    def bytes(self) -> int:
        """Of one copy of the parameters."""
        return sum(p.nbytes for p in self.model.parameters())


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−log p(y|x) of every sample, summed over its positions."""
    values = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
    return values.view(len(y), -1).sum(1)


def functional(outputs: Tensor, y: Tensor) -> Tensor:
    """A linear functional of each sample's output, with coefficients y."""
    return (outputs * y).flatten(1).sum(1)


def logits_of(model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    outputs = model(x)
    return getattr(outputs, "logits", outputs)


def classifier(model: nn.Module, x: Tensor, classes: int, **more: Any) -> Problem:
    y = torch.randint(classes, x.shape[:1])
    return Problem(model.eval(), x, y, cross_entropy, "cross_entropy", **more)


def mlp(small: bool, _: str) -> Problem:
    sizes = (784, 1024, 1024, 10)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return classifier(nn.Sequential(*layers[:-1]), torch.randn(4 if small else 256, 784), 10)


def resnet(name: str, batch: int, small: bool) -> Problem:
    model = models.build(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after some training
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    x = torch.rand(4 if small else batch, 3, 32, 32)
    return classifier(model, x, 10, plain=without_buffers)


def vit_tiny(small: bool, _: str) -> Problem:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        patch_size=4,
        num_labels=10,
    )
    x = torch.rand(4 if small else 32, 3, 32, 32)
    model = ViTForImageClassification(config)
    return classifier(model, x, 10, plain=PlainViT, attends=True)


def gpt2_small(small: bool, _: str) -> Problem:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_embd": 128, "n_layer": 2, "n_head": 2, "vocab_size": 512} if small else {}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(**size, **none, **ends)
    shape = (4, 32) if small else (8, 128)
    x, y = (torch.randint(config.vocab_size, shape) for _ in range(2))
    model = GPT2LMHeadModel(config).eval()
    more = {"plain": PlainGPT2, "attends": True}
    return Problem(model, x, y, cross_entropy, "cross_entropy", **more)


def layer(
    make: Callable[[], nn.Module], shape: tuple[int, ...], batch: int, small: bool
) -> Problem:
    """One layer by itself; nothing is differentiated before it."""
    model = nn.Sequential(make()).eval()
    x = torch.randn(4 if small else batch, *shape)
    with torch.no_grad():
        y = torch.randn(len(x), *model(x[:1]).shape[1:])
    return Problem(model, x, y, functional, functional)


def linear(inputs: int, outputs: int, batch: int, *positions: int) -> Callable[..., Problem]:
    return lambda small, _: layer(
        lambda: nn.Linear(inputs, outputs), (*positions, inputs), batch, small
    )


def convolution(
    inputs: int, outputs: int, size: int, kernel: int, batch: dict[str, int], groups: int = 1
) -> Callable[..., Problem]:
    def make() -> nn.Module:
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)

    return lambda small, device: layer(make, (inputs, size, size), batch[device], small)


CASES: dict[str, Callable[[bool, str], Problem]] = {
    "mlp": mlp,
    "resnet18": lambda small, _: resnet("resnet18", 32, small),
    "resnet18-w16": lambda small, _: resnet("resnet18-w16", 128, small),
    "vit-tiny": vit_tiny,
    "gpt2-small": gpt2_small,
    "linear 4096x4096 T512": linear(4096, 4096, 32, 512),
    "linear 768x3072 T128": linear(768, 3072, 8, 128),
    "linear 512x512 T4": linear(512, 512, 64, 4),
    "linear 512x512 T1": linear(512, 512, 64),
    "conv 3x3 256 14x14": convolution(256, 256, 14, 3, {"cpu": 32, "cuda": 32}),
    "conv 3x3 64 56x56": convolution(64, 64, 56, 3, {"cpu": 8, "cuda": 32}),
    "conv 1x1 256-64 56x56": convolution(256, 64, 56, 1, {"cpu": 8, "cuda": 32}),
    "conv depthwise 3x3 128 28x28": convolution(128, 128, 28, 3, {"cpu": 32, "cuda": 32}, 128),
}
ON_CPU = tuple(name for name in CASES if "4096" not in name)


def build(case: str, device: str, limit: int, *, small: bool = False) -> Problem:
    """The case of a name; small: with few samples, to be checked in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        problem = CASES[case](small, device)
    problem.model.to(device)
    problem.x, problem.y = problem.x.to(device), problem.y.to(device)
    problem.limit = limit
    return problem


def own_copy(model: nn.Module) -> nn.Module:
    """The same model on the same weights, with parameters, hooks and gradients of its own."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach()) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def without_buffers(model: nn.Module) -> nn.Module:
    """Every BatchNorm in evaluation mode as what it is there: a scale and a shift."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, ConstantNorm(child))
    return model


class ConstantNorm(nn.Module):
    """A BatchNorm whose statistics are constants, as Opacus refuses modules with buffers."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        # Not as tensors: those would be moved along where Opacus copies a module without weights.
        self.statistics = (norm.running_mean, norm.running_var)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, *self.statistics, self.weight, self.bias, False, 0.0, self.eps)


def table_of(rows: Tensor) -> nn.Embedding:
    table = nn.Embedding(*rows.shape, device="meta")
    table.weight = nn.Parameter(rows.detach())
    return table


def linear_of(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight, made.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return made


class PlainBlock(nn.Module):
    """h + attention(norm h), and then h + mlp(norm h)."""

    def __init__(self, heads: int, is_causal: bool, **parts: Any) -> None:
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, h: Tensor) -> Tensor:
        normed = self.before_attention(h)
        projected = torch.cat([part(normed) for part in self.projections], -1)
        q, k, v = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return h + self.contract(self.activation(self.expand(self.before_mlp(h))))


class PlainViT(nn.Module):
    """A ViTForImageClassification, with tables in place of its bare parameters."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        embeddings = model.vit.embeddings
        self.patches = embeddings.patch_embeddings.projection
        self.token = table_of(embeddings.cls_token[0])
        self.positions = table_of(embeddings.position_embeddings[0])
        self.blocks = nn.Sequential(
            *(
                PlainBlock(
                    block.attention.num_attention_heads,
                    False,
                    before_attention=block.layernorm_before,
                    projections=nn.ModuleList(
                        getattr(block.attention, f"{part}_proj") for part in "qkv"
                    ),
                    out=block.attention.o_proj,
                    before_mlp=block.layernorm_after,
                    expand=block.mlp.fc1,
                    activation=block.mlp.activation_fn,
                    contract=block.mlp.fc2,
                )
                for block in model.vit.layers
            )
        )
        self.norm, self.head = model.vit.layernorm, model.classifier

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x)
        if patches.requires_grad:
            # ExpandedWeights takes a view of this gradient that a transposed one does not have.
            patches.register_hook(Tensor.contiguous)
        patches = patches.flatten(2).transpose(1, 2)
        first = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
        h = torch.cat([self.token(first), patches], 1)
        h = h + self.positions(torch.arange(h.shape[1], device=x.device).expand(len(x), -1))
        return self.head(self.norm(self.blocks(h))[:, 0])


class PlainGPT2(nn.Module):
    """A GPT2LMHeadModel, with linear layers in place of its own transposed ones."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        inner = model.transformer
        self.tokens, self.positions = inner.wte, inner.wpe

        def turned(own: Any) -> nn.Linear:
            return linear_of(own.weight.t(), own.bias)

        self.blocks = nn.Sequential(
            *(
                PlainBlock(
                    block.attn.num_heads,
                    True,
                    before_attention=block.ln_1,
                    projections=nn.ModuleList([turned(block.attn.c_attn)]),
                    out=turned(block.attn.c_proj),
                    before_mlp=block.ln_2,
                    expand=turned(block.mlp.c_fc),
                    activation=block.mlp.act,
                    contract=turned(block.mlp.c_proj),
                )
                for block in inner.h
            )
        )
        self.norm, self.head = inner.ln_f, model.lm_head

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape)
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions(places))))


# The arms.


class Arm:
    """One way to add a batch's squared per-sample gradients to totals.

    Attributes:
        is_exact: whether it claims to be the Fisher.
        models: which forms of the model it takes, the preferred one first.
        settings: what was chosen, by name.
        totals: by the names of its own model's parameters.

    Args:
        settings: those that are not the first of `choices`; "model" is one of `models`.
    """

    is_exact = True
    models: tuple[str, ...] = (AS_GIVEN,)

    def __init__(self, problem: Problem, settings: Settings | None = None) -> None:
        self.problem = problem
        settings = dict(settings or {})
        self.form = settings.pop("model", AS_GIVEN)
        self.model = own_copy(problem.model)
        if self.form == PLAIN:
            if problem.plain is None:
                raise NotRun("no plain modules for this model")
            self.model = problem.plain(self.model).eval()
        self.parameters = dict(self.model.named_parameters())
        self.totals = self.make_totals()
        self.settings = {name: values[0] for name, values in self.choices().items()} | settings
        self.build()

    def make_totals(self) -> Squares:
        return {
            name: torch.zeros_like(p, requires_grad=False, memory_format=torch.contiguous_format)
            for name, p in self.parameters.items()
        }

    def build(self) -> None:
        """What is done once a model."""

    def choices(self) -> dict[str, list[Any]]:
        """Settings to try, the safest value first."""
        return {}

    def prepare(self) -> None:
        """Not timed."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def step(self) -> None:
        """What is timed: add one batch to the totals."""
        raise NotImplementedError

    def squares(self) -> Squares:
        """Σ_n (∂ℓ_n/∂θ)² of the batch, by the names and in the shapes of the problem's model."""
        for total in self.totals.values():
            total.zero_()
        self.prepare()
        self.step()
        return self.as_given(self.totals)

    def as_given(self, own: Squares) -> Squares:
        # Both models' parameters lie at the same places in memory.
        given = {p.data_ptr(): (name, p) for name, p in self.problem.model.named_parameters()}
        found = {}
        for name, parameter in self.parameters.items():
            original, like = given[parameter.data_ptr()]
            turned = parameter.dim() == like.dim() == 2 and parameter.stride() != like.stride()
            found[original] = (own[name].t() if turned else own[name]).reshape(like.shape).clone()
        return found

    def chunks(self) -> list[int]:
        """Powers of two of samples whose gradients fit."""
        most = max(1, self.problem.limit // self.problem.bytes)
        return [size for size in self.halvings() if size <= most]

    def halvings(self) -> list[int]:
        """Powers of two of samples, for arms that hold one layer's gradients at a time."""
        return [2**i for i in range(len(self.problem.y).bit_length())]

    def ways(self) -> list[str]:
        """How to square and add up."""
        return ["addcmul", "square"] + (["norm", "compiled"] if self.problem.x.is_cuda else [])

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.settings["chunk"]
        yield from zip(self.problem.x.split(size), self.problem.y.split(size), strict=True)

    def losses(self, x: Tensor, y: Tensor, model: Any = None) -> Tensor:
        return self.problem.losses(logits_of(model or self.model, x), y)


def add_squares(total: Tensor, per_sample: Tensor, way: str) -> None:
    """Add Σ_n g_n² to total."""
    if way == "addcmul":
        for one in per_sample:
            total.addcmul_(one, one)
    elif way == "square":
        total.add_(per_sample.square().sum(0))
    elif way == "norm":  # one pass and no temporary of the samples' size
        total.add_(torch.linalg.vector_norm(per_sample, dim=0).square_())
    else:
        _fused_squares()(total.view(-1), per_sample.reshape(len(per_sample), -1))


def _fused_squares() -> Callable[[Tensor, Tensor], None]:
    if not _compiled:

        def fused(total: Tensor, per_sample: Tensor) -> None:
            total.add_(per_sample.square().sum(0))

        _compiled.append(torch.compile(fused, dynamic=True))
    return _compiled[0]


_compiled: list[Callable[[Tensor, Tensor], None]] = []


class ForwardBackward(Arm):
    """The unit."""

    is_exact = False

    def make_totals(self) -> Squares:
        return {}

    def step(self) -> None:
        self.losses(self.problem.x, self.problem.y).sum().backward()

    def squares(self) -> Squares:
        raise NotRun("no Fisher")


class BatchMean(Arm):
    """(Σ_n g_n)² / B, which is Σ_n g_n² where all samples have the same gradient."""

    is_exact = False

    def step(self) -> None:
        self.losses(self.problem.x, self.problem.y).sum().backward()
        totals, samples = list(self.totals.values()), len(self.problem.y)
        gradients = [p.grad for p in self.parameters.values()]
        torch._foreach_addcmul_(totals, gradients, gradients, 1 / samples)


class Ours(Arm):
    """bdu."""

    with_gradient = False
    backend: str | None = None

    def make_totals(self) -> Squares:
        return {}

    def accumulator(self) -> FisherAccumulator:
        return FisherAccumulator(self.model, loss=self.problem.loss)

    def build(self) -> None:
        few = (self.problem.x[:2], self.problem.y[:2])
        if self.problem.x.is_cuda:
            self._seconds(self.accumulator(), few)  # compiles kernels
        self.fisher = self.accumulator()
        # The plan is made at the first batch, of two of its samples.
        first, second = (self._seconds(self.fisher, few) for _ in range(2))
        self.planning_ms = 1e3 * max(0.0, first - second)

    def _seconds(self, fisher: FisherAccumulator, batch: tuple[Tensor, Tensor]) -> float:
        with forced(self.backend):
            return step.timed(Action(lambda: fisher.add(*batch)), self.problem.x.device)[0]

    def step(self) -> None:
        self._step(self.fisher)

    def _step(self, fisher: FisherAccumulator) -> None:
        with forced(self.backend):
            add = fisher.backward if self.with_gradient else fisher.add
            add(self.problem.x, self.problem.y)

    def squares(self) -> Squares:
        fresh = self.accumulator()
        self.prepare()
        self._step(fresh)
        return {name: f * fresh.samples for name, f in fresh.diagonal().items()}


class OursWithGradient(Ours):
    with_gradient = True


class OursInTorch(Ours):
    backend = "reference"


@contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """Force a backend; None: none. By the environment, as the kernels of a GPU's backward are
    chosen in a thread of autograd's, which does not see a context variable.
    """
    if backend is None:
        yield
        return
    os.environ["BDU_BACKEND"] = backend
    try:
        yield
    finally:
        del os.environ["BDU_BACKEND"]


class Action:
    """A function as something `step.timed` takes."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.step = action

    def prepare(self) -> None:
        """Nothing to do."""


class OneByOne(Arm):
    """The batch-1 loop."""

    def step(self) -> None:
        parameters, totals = list(self.parameters.values()), list(self.totals.values())
        for x, y in zip(self.problem.x.split(1), self.problem.y.split(1), strict=True):
            gradients = torch.autograd.grad(self.losses(x, y).sum(), parameters)
            torch._foreach_addcmul_(totals, gradients, gradients)


class Vectorised(Arm):
    """torch.func.vmap(grad)."""

    models = (AS_GIVEN, PLAIN)

    def build(self) -> None:
        self.values = {name: p.detach() for name, p in self.parameters.items()}

        def loss(values: Squares, x: Tensor, y: Tensor) -> Tensor:
            def model(x: Tensor) -> Any:
                return torch.func.functional_call(self.model, values, (x,))

            return self.losses(x.unsqueeze(0), y.unsqueeze(0), model).sum()

        self.gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def choices(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"chunk": self.chunks(), "squares": self.ways()}
        if self.problem.attends:
            # vmap has no rule for the backward of some fused kernels and loops over the samples.
            found["attention"] = ["math", "fused"]
        return found

    def step(self) -> None:
        math = self.settings.get("attention") == "math"
        with sdpa_kernel(SDPBackend.MATH) if math else nullcontext():
            for x, y in self.pieces():
                for name, gradient in self.gradients(self.values, x, y).items():
                    add_squares(self.totals[name], gradient, self.settings["squares"])


class Backwards(Arm):
    """Libraries that leave something at each parameter in a backward."""

    def choices(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"chunk": self.chunks(), "squares": self.ways()}
        tables = any(isinstance(module, nn.Embedding) for module in self.model.modules())
        if self.problem.x.is_floating_point() and not tables:
            # On the way to the input all that they need is made, and autograd's p.grad is not.
            found["p.grad"] = ["yes", "no"]
        return found

    def backward(self, model: Any, x: Tensor, y: Tensor) -> None:
        inputs = None
        if self.settings.get("p.grad") == "no":
            x = x.detach().requires_grad_()
            inputs = [x]
        self.losses(x, y, model).sum().backward(inputs=inputs)


class Opacus(Backwards):
    """A GradSampleModule."""

    models = (PLAIN, AS_GIVEN)
    mode = "hooks"

    def build(self) -> None:
        grad_sample = needed("opacus.grad_sample", "opacus")
        # Only in training mode does it look; no module here does anything else in it.
        self.wrapped = grad_sample.wrap_model(
            self.model.train(), self.mode, batch_first=True, loss_reduction="sum", **self.more()
        )

    def more(self) -> dict[str, Any]:
        return {}

    def step(self) -> None:
        for x, y in self.pieces():
            self.backward(self.wrapped, x, y)
            for name, parameter in self.parameters.items():
                add_squares(self.totals[name], parameter.grad_sample, self.settings["squares"])
                parameter.grad = parameter.grad_sample = None


class OpacusFunctorch(Opacus):
    mode = "functorch"

    def more(self) -> dict[str, Any]:
        return {"force_functorch": True}


class OpacusExpandedWeights(Opacus):
    mode = "ew"

    def choices(self) -> dict[str, list[Any]]:
        # It computes no p.grad anyway.
        return {"chunk": self.chunks(), "squares": self.ways()}


class BackPack(Backwards):
    """SumGradSquared, which squares and sums by itself."""

    models = (AS_GIVEN, PLAIN)

    def build(self) -> None:
        self.backpack = needed("backpack", "backpack-for-pytorch")
        self.extensions = needed("backpack.extensions", "backpack-for-pytorch")
        if not torch.backends.opt_einsum.is_available():
            raise NotRun("pip install opt_einsum")
        for module in self.model.modules():  # it refuses containers that it does not know
            if not list(module.children()) and list(module.parameters()):
                self.backpack.extend(module)
        covered = {
            p
            for module in self.model.modules()
            if not list(module.children())
            for p in module.parameters()
        }
        if bare := [name for name, p in self.parameters.items() if p not in covered]:
            raise NotRun(f"no module by itself for the parameter {bare[0]}")

    def choices(self) -> dict[str, list[Any]]:
        found = {name: values for name, values in super().choices().items() if name != "squares"}
        return found | {"chunk": self.halvings()}

    def step(self) -> None:
        for x, y in self.pieces():
            with self.backpack.backpack(self.extensions.SumGradSquared()):
                self.backward(self.model, x, y)
            for name, parameter in self.parameters.items():
                if getattr(parameter, "sum_grad_squared", None) is None:
                    module = self.model.get_submodule(name.rpartition(".")[0])
                    raise NotRun(f"SumGradSquared has no rule for {type(module).__name__}")
                # Of the summed loss: that of the mean would be divided by the samples, squared.
                self.totals[name].add_(parameter.sum_grad_squared)
                parameter.grad = parameter.sum_grad_squared = None


class NNGeometry(Arm):
    """The diagonal of the covariance of the Jacobian of the losses themselves."""

    models = (AS_GIVEN, PLAIN)

    def build(self) -> None:
        objects = needed("nngeometry.object", "nngeometry")
        backend = needed("nngeometry.backend", "nngeometry")
        self.convolutions = import_module("nngeometry.backend.torch_hooks.grads_conv")
        if not self.problem.x.is_floating_point():
            raise NotRun("it differentiates down to the input, and tokens have no gradient")
        # Not FIM(): its variants take the expectation over the model's own labels.
        self.generator = backend.TorchHooksJacobianBackend(self.model, function=self.losses)
        self.diagonal = objects.PMatDiag
        layers = self.generator.layer_collection
        own = dict(layers.named_parameters(self.generator.l_to_m))
        self.names = [next(n for n, p in self.parameters.items() if p is q) for q in own.values()]
        if missing := [name for name in self.parameters if name not in self.names]:
            raise NotRun(f"it does not know the parameter {missing[0]}")

    def choices(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"chunk": self.halvings()}
        if any(isinstance(module, nn.Conv2d) for module in self.model.modules()):
            found["convolution"] = ["unfold", "grouped"]
        return found

    def step(self) -> None:
        from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

        data = TensorDataset(self.problem.x, self.problem.y)
        batches = BatchSampler(SequentialSampler(data), self.settings["chunk"], drop_last=False)
        # Whole batches at once: its own loader would put them together sample by sample.
        loader = DataLoader(data, batch_size=None, sampler=batches)
        unfold = self.settings.get("convolution") != "grouped"
        kinds = self.convolutions
        with kinds.use_unfold_impl_for_convs() if unfold else kinds.use_conv_impl_for_convs():
            flat = self.diagonal(generator=self.generator, examples=loader).data
        self.generator.handles.clear()
        sizes = [self.parameters[name].numel() for name in self.names]
        if len(flat) != sum(sizes):
            raise NotRun("it takes a convolution of several groups for one of a single group")
        for name, part in zip(self.names, flat.split(sizes), strict=True):
            # It divides by what it takes for the samples, which are the batches.
            self.totals[name].add_(part.view_as(self.totals[name]), alpha=len(batches))


class Products(Arm):
    """bmm + square-sum: each layer's input and output gradient, multiplied sample by sample.

    No parameter requires a gradient, so autograd goes only through the activations, and the
    gradients of so many samples exist at a time as are fastest, of one layer.
    """

    models = (AS_GIVEN, PLAIN)

    def build(self) -> None:
        kinds = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.BatchNorm2d)
        self.saved: dict[nn.Module, Tensor] = {}
        self.uses: dict[nn.Parameter, list[nn.Module]] = {p: [] for p in self.parameters.values()}
        self.total_of = {p: self.totals[name] for name, p in self.parameters.items()}
        for module in self.model.modules():
            own = list(module.parameters(recurse=False))
            if own and type(module) not in kinds:
                raise NotRun(f"no formula for {type(module).__name__}")
            for parameter in own:
                self.uses[parameter].append(module)
            if own:
                module.register_forward_hook(self._forward)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(False)
            users = sorted(type(module).__name__ for module in self.uses[parameter])
            if len(users) > 1 and users != ["Embedding", "Linear"]:
                raise NotRun(f"no formula for the uses of {name}")
        self.waiting: dict[nn.Parameter, dict[type, tuple[Tensor, Tensor]]] = {}

    def choices(self) -> dict[str, list[Any]]:
        if self.problem.x.dim() == 2 and self.problem.x.is_floating_point():
            return {}  # one position a sample, and no gradient of a sample
        found: dict[str, list[Any]] = {}
        convolutions = [module for module in self.model.modules() if isinstance(module, nn.Conv2d)]
        if not all(is_point(module) for module in convolutions):
            found["convolution"] = ["unfold", "grouped", "one by one"]
        blocks = [0] + [2**power for power in range(20, 40, 2) if 2**power <= self.problem.limit]
        return found | {"block": blocks, "squares": self.ways()}

    def step(self) -> None:
        self.leaves: list[Tensor] = []
        losses = self.losses(self.problem.x, self.problem.y)
        torch.autograd.grad(losses.sum(), self.leaves)

    def _forward(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.saved[module] = args[0].detach()
        if not output.requires_grad:
            self.leaves.append(output.requires_grad_())
        output.register_hook(lambda gradients: self._backward(module, gradients.detach()))

    def _backward(self, module: nn.Module, g: Tensor) -> None:
        a = self.saved.pop(module)
        weight, bias = self.total_of[module.weight], getattr(module, "bias", None)
        match module:
            case nn.Linear() | nn.Embedding() if len(self.uses[module.weight]) > 1:
                self._tied(module.weight, type(module), a, g)
            case nn.Linear() if g.dim() == 2:
                weight.addmm_(g.square().t(), a.square())
            case nn.Linear():
                self._rows(weight, a.flatten(1, -2), g.flatten(1, -2))
            case nn.Embedding():
                self._tokens(weight, a, g)
            case nn.Conv2d():
                self._windows(module, weight, a, g)
            case nn.LayerNorm():
                normed = F.layer_norm(a, module.normalized_shape, eps=module.eps)
                weight.add_((g * normed).flatten(1, -2).sum(1).square_().sum(0))
            case _:
                statistics = (module.running_mean, module.running_var)
                normed = F.batch_norm(a, *statistics, eps=module.eps)
                weight.add_((g * normed).flatten(2).sum(2).square_().sum(0))
        if bias is not None:
            if isinstance(module, nn.Linear | nn.LayerNorm):
                one = g.reshape(len(g), -1, g.shape[-1]).sum(1)
            else:
                one = g.flatten(2).sum(2)
            self.total_of[bias].add_(one.square_().sum(0))

    def _blocks(self, total: Tensor, samples: int) -> Iterator[slice]:
        size = max(1, self.settings["block"] // total.nbytes)
        yield from (slice(start, start + size) for start in range(0, samples, size))

    def _rows(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        for block in self._blocks(total, len(g)):
            products = torch.bmm(g[block].transpose(1, 2), a[block])
            add_squares(total, products, self.settings["squares"])

    def _tokens(self, total: Tensor, indices: Tensor, g: Tensor) -> None:
        sample = torch.arange(len(indices), device=g.device).unsqueeze(1) * len(total)
        keys, place = torch.unique(sample + indices.flatten(1), return_inverse=True)
        rows = g.new_zeros(len(keys), g.shape[-1])
        rows.index_add_(0, place.flatten(), g.flatten(0, -2))
        total.index_add_(0, keys % len(total), rows.square_())

    def _tied(self, parameter: nn.Parameter, kind: type, a: Tensor, g: Tensor) -> None:
        waiting = self.waiting.setdefault(parameter, {})
        waiting[kind] = (a, g)
        if len(waiting) < len(self.uses[parameter]):
            return
        del self.waiting[parameter]
        total = self.total_of[parameter]
        (a, g), (indices, rows) = waiting[nn.Linear], waiting[nn.Embedding]
        for block in self._blocks(total, len(g)):
            # Both uses have to be added before the square.
            products = torch.bmm(g[block].transpose(1, 2), a[block])
            sample = torch.arange(len(products), device=g.device).unsqueeze(1) * len(total)
            places = (sample + indices[block]).flatten()
            products.flatten(0, 1).index_add_(0, places, rows[block].flatten(0, 1))
            add_squares(total, products, self.settings["squares"])

    def _windows(self, module: nn.Conv2d, total: Tensor, a: Tensor, g: Tensor) -> None:
        plain = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        way = "unfold" if is_point(module) else self.settings["convolution"]
        if way == "one by one":
            for one in range(len(g)):
                samples = slice(one, one + 1)
                product = nn.grad.conv2d_weight(
                    a[samples], total.shape, g[samples], **plain, groups=module.groups
                )
                total.addcmul_(product, product)
            return
        for block in self._blocks(total, len(g)):
            products = (unfolded if way == "unfold" else grouped)(module, a[block], g[block])
            shaped = products.reshape(-1, *total.shape)
            add_squares(total, shaped, self.settings["squares"])


def unfolded(module: nn.Conv2d, x: Tensor, gradients: Tensor) -> Tensor:
    """Each sample's weight gradient as a product of matrices."""
    if is_point(module):
        columns = x.flatten(2)
    else:
        where = {"dilation": module.dilation, "padding": module.padding, "stride": module.stride}
        columns = F.unfold(x, module.kernel_size, **where)
    columns = columns.unflatten(1, (module.groups, -1)).flatten(0, 1)
    own = gradients.reshape(len(x) * module.groups, module.out_channels // module.groups, -1)
    return torch.bmm(own, columns.transpose(1, 2))


def grouped(module: nn.Conv2d, x: Tensor, gradients: Tensor) -> Tensor:
    """Likewise as a convolution of the input with the gradients, every sample a group."""
    groups = len(x) * module.groups
    products = F.conv2d(
        x.reshape(groups, -1, *x.shape[2:]).transpose(0, 1),
        gradients.reshape(-1, 1, *gradients.shape[2:]),
        stride=module.dilation,
        padding=module.padding,
        dilation=module.stride,
        groups=groups,
    )
    height, width = module.kernel_size  # positions that the stride left over
    return products[:, :, :height, :width].transpose(0, 1)


def is_point(module: nn.Conv2d) -> bool:
    """Whether a convolution's columns are its input as it is."""
    return module.kernel_size == module.stride == (1, 1) and module.padding == (0, 0)


def needed(module: str, package: str) -> Any:
    """A module of a library that this benchmark alone uses."""
    try:
        version(package)
    except PackageNotFoundError:
        raise NotRun(f"pip install {package}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(module)


ARMS: dict[str, type[Arm]] = {
    UNIT: ForwardBackward,
    "bdu": Ours,
    "bdu + gradient": OursWithGradient,
    "bdu reference": OursInTorch,
    "bmm + square-sum": Products,
    "batch-1 loop": OneByOne,
    "vmap(grad)": Vectorised,
    "Opacus hooks": Opacus,
    "Opacus functorch": OpacusFunctorch,
    "Opacus ExpandedWeights": OpacusExpandedWeights,
    "BackPACK": BackPack,
    "nngeometry": NNGeometry,
    "batch-mean² (inexact)": BatchMean,
}


# What is measured of them.


def float64_loop(problem: Problem) -> Squares:
    """The definition: one sample at a time, in float64."""
    model = copy.deepcopy(problem.model).double()
    parameters = dict(model.named_parameters())
    totals = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    x, y = (t.double() if t.is_floating_point() else t for t in (problem.x, problem.y))
    for one, label in zip(x.split(1), y.split(1), strict=True):
        loss = problem.losses(logits_of(model, one), label).sum()
        for total, gradient in zip(
            totals.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True
        ):
            total.addcmul_(gradient, gradient)
    return totals


def worst_error(found: Squares, truth: Squares) -> tuple[float, str]:
    """The largest relative error of a parameter, and its name; see the columns above."""
    if found.keys() != truth.keys():
        missing = sorted(truth.keys() ^ found.keys())
        raise NotRun(f"no Fisher of {missing[0]}")
    largest = max(float(f.max()) for f in truth.values())
    errors = []
    for name, expected in truth.items():
        scale = float(expected.max())
        scale = scale if scale > 1e-20 * largest else largest
        error = float((found[name].double() - expected).abs().max()) / scale
        errors.append((error if error == error else float("inf"), name))
    return max(errors)


def chosen(
    make: type[Arm], problem: Problem, small: Problem, truth: Squares
) -> tuple[Arm, Arm, tuple[float, str]]:
    """The arm on the first form of the model with which it gives the truth, the same on the small
    problem, and its error there; NotRun with the reason of the last form that it cannot run.
    """
    forms = [form for form in make.models if form == AS_GIVEN or problem.plain is not None]
    found, reason = [], ""
    for form in forms:
        try:
            check = make(small, {"model": form})
            error = worst_error(check.squares(), truth) if make not in _NO_FISHER else (0.0, "")
        except NotRun as why:
            reason = str(why)
        except Exception as why:  # a library that cannot run a model must not hide the others
            reason = in_one_line(why)
        else:
            found.append((error, form, check))
            if error[0] < WRONG or not make.is_exact:
                break
    if not found:
        raise NotRun(reason)
    error, form, check = min(found, key=lambda one: one[0])
    return make(problem, {"model": form}), check, error


_NO_FISHER = (ForwardBackward,)


def in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:140]}"


def calibrate(arm: Arm, patience: float) -> tuple[Arm, float]:
    """Try an arm's settings one after the other; the arm with the fastest, and seconds of a step.

    Args:
        patience: seconds after which a step is timed only once.
    """
    device, last = arm.problem.x.device, None
    best = None
    for name, values in arm.choices().items():
        if len(values) == 1:
            continue
        seconds: dict[Any, float] = {}
        for value in values:
            arm.settings[name] = value
            try:
                taken = step.timed(arm, device)[0]
                if taken < min(patience, 5.0):  # a short one had more to warm than to do
                    taken = min(step.timed(arm, device)[0] for _ in range(2))
            except Exception as error:  # one value that a library cannot do, or that does not fit
                last = error
                # Some libraries count their calls at the parameters; this one was cut off.
                arm = type(arm)(arm.problem, {"model": arm.form, **arm.settings})
                continue
            seconds[value] = taken
        if not seconds:
            assert last is not None
            raise last
        arm.settings[name] = min(seconds, key=lambda value: seconds[value])
        best = min(seconds.values())
    if best is None:
        step.timed(arm, device)
        best = step.timed(arm, device)[0]
    arm.prepare()
    return arm, best


def measure(case: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Interleave all arms of one case; one row an arm."""
    rows, made = prepared(case, options)
    for name, taken in interleaved(case, made, rows, options.rounds).items():
        seconds = [own for own, _ in taken]
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else None
        rows[name] |= {
            "median_ms": 1e3 * statistics.median(seconds),
            "quartile_range_ms": quartiles and 1e3 * (quartiles[2] - quartiles[0]),
            "ratio": statistics.median(ratio for _, ratio in taken),
        }
    made.clear()
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    if not options.no_memory:
        add_memory(case, rows, options)
    return list(rows.values())


def prepared(
    case: str, options: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], dict[str, Arm]]:
    """Every arm that can run the case, with its fastest settings, and rows for all of them."""
    problem, small = (build(case, options.device, limit(options), small=s) for s in (False, True))
    truth = float64_loop(small)
    rows: dict[str, dict[str, Any]] = {}
    made: dict[str, Arm] = {}
    unit = 0.0
    names = [
        arm
        for arm in ARMS
        if arm in (UNIT, "bdu")
        or (options.arm is not None and options.arm in arm)
        or (options.arm is None and (arm != "bdu reference" or options.device == "cuda"))
    ]
    for name in tqdm(names, desc=f"{case}: settings", leave=False):
        row = rows[name] = {"case": case, "arm": name, "is_exact": ARMS[name].is_exact}
        row |= {"batch": len(problem.y), "parameters": problem.bytes // 4, "ratio": None}
        try:
            arm, check, _ = chosen(ARMS[name], problem, small, truth)
            patience = max(options.patience * unit, 2.0)
            arm, seconds = calibrate(arm, patience)
            if name == UNIT:
                unit = seconds
            else:
                # With the settings that are timed.
                fits = {"chunk": min(arm.settings.get("chunk", 1), len(small.y))}
                check.settings = {**arm.settings, **(fits if "chunk" in arm.settings else {})}
                row["error"], row["worst_parameter"] = worst_error(check.squares(), truth)
            if isinstance(arm, Ours):
                row["planning_ms"] = arm.planning_ms
        except Exception as error:
            if name == UNIT:
                raise
            row["reason"] = str(error) if isinstance(error, NotRun) else in_one_line(error)
            continue
        row["settings"] = arm.settings | ({"model": PLAIN} if arm.form == PLAIN else {})
        row["calibrated_ms"] = 1e3 * seconds
        row["rounds"] = 1 if name != UNIT and seconds > patience else options.rounds
        made[name] = arm
        del arm, check
        gc.collect()
    return rows, made


def interleaved(
    case: str, made: dict[str, Arm], rows: dict[str, dict[str, Any]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each arm in each round, and their ratio to the unit's of the same round."""
    device = made[UNIT].problem.x.device
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    gc.freeze()  # what is collected between the arms are their own cycles only
    gc.disable()
    for round_number in tqdm(range(rounds + 1), desc=f"{case}: rounds", leave=False):
        unit = 0.0
        for name, arm in made.items():
            left = rows[name]["rounds"] - len(times[name])
            # The first round warms up, but not what takes so long that it is timed once.
            if left == 0 or (round_number == 0 and rows[name]["rounds"] < rounds):
                continue
            gc.collect()
            if rows[name]["calibrated_ms"] < QUICK_MS:
                # The caches are full of the arm before, which is not this one's doing.
                arm.prepare()
                arm.step()
            seconds = step.timed(arm, device)[0]
            arm.prepare()
            unit = seconds if name == UNIT else unit
            if round_number > 0:
                times[name].append((seconds, seconds / unit))
    gc.enable()
    gc.unfreeze()
    return times


def limit(options: argparse.Namespace) -> int:
    """Bytes of per-sample gradients."""
    default = 256 if options.device == "cpu" else 8192
    return 2**20 * (options.limit or default)


# Memory, of each arm in a process of its own.


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise LookupError(field)


def peak_bytes(action: Callable[[], Any], device: torch.device) -> int:
    """Bytes held at most during an action, beyond those before it.

    On a CPU resident memory, so that what libraries allocate behind torch's back is in it. Blocks
    that malloc keeps for later would be missed; see `add_memory`.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM afresh
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def hold(problem: Problem, name: str, settings: Settings) -> None:
    """Make an arm and add two batches, so that what it keeps is there as well."""
    own = dict(settings)
    if "chunk" in own:
        own["chunk"] = min(own["chunk"], len(problem.y))
    arm = ARMS[name](problem, own)
    for _ in range(2):
        arm.prepare()
        arm.step()


def peak_of_arm(case: str, name: str, settings: Settings, options: argparse.Namespace) -> int:
    """Bytes that an arm holds at most beyond model and batch, its totals and its plan included."""
    # Code, thread pools and workspaces are there before anything is counted.
    hold(build(case, options.device, limit(options), small=True), name, settings)
    problem = build(case, options.device, limit(options))
    return peak_bytes(lambda: hold(problem, name, settings), problem.x.device)


def peak_of_process(case: str, name: str, settings: Settings, options: argparse.Namespace) -> int:
    """`peak_of_arm` in a process of its own, of which nothing else is resident."""
    # Every allocation a mapping of its own, given back at once: what is resident is what is held.
    quiet = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [
            *(sys.executable, __file__, "--peak-memory", json.dumps(settings)),
            *("--case", case, "--arm", name, "--device", options.device),
            *("--limit", str(limit(options) // 2**20)),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | quiet,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip()[-300:])
    return int(done.stdout.split()[-1])


def add_memory(case: str, rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Add each arm's peak to its row, and what it has more than the unit."""
    # The allocator of a GPU counts by itself, and is not disturbed by what was there before.
    peak = peak_of_arm if options.device == "cuda" else peak_of_process
    ran = [name for name, row in rows.items() if row["ratio"] is not None]
    for name in tqdm(ran, desc=f"{case}: memory", leave=False):
        try:
            rows[name]["peak_bytes"] = peak(case, name, rows[name]["settings"], options)
        except RuntimeError as error:
            print(f"{case}, {name}: {error}", file=sys.stderr)
    base = rows[UNIT].get("peak_bytes")
    for name in ran:
        if base is not None and "peak_bytes" in rows[name]:
            rows[name]["extra_bytes"] = rows[name]["peak_bytes"] - base


# The table.


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to place the figures."""
    where = step.environment(device)
    for package in RIVALS:
        try:
            where["versions"][package] = version(package)
        except PackageNotFoundError:
            where["versions"][package] = None
    return where


def described(row: dict[str, Any]) -> str:
    """An arm's settings in words."""
    words = []
    for name, value in row["settings"].items():
        if name == "block":
            words.append("one sample at a time" if not value else f"blocks of {value >> 20} MiB")
        elif name == "p.grad":
            words.append("p.grad beside" if value == "yes" else "no p.grad")
        else:
            words.append(value if name in ("model", "squares") else f"{name} {value}")
    if "planning_ms" in row:
        words.append(f"planning {row['planning_ms']:.0f} ms")
    if row["rounds"] == 1:
        words.append("1 round")
    return ", ".join(words)


def error_of(row: dict[str, Any]) -> str:
    """The error in words: wrong where an arm that claims to be exact is not."""
    if "error" not in row:
        return "–"
    text = f"{row['error']:.1e} ({row['worst_parameter']})"
    if not row["is_exact"]:
        return f"inexact: {text}"
    return text if row["error"] < WRONG else f"**wrong**: {text}"


def table(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """The rows as Markdown."""
    libraries = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", *RIVALS))
    lines = [
        f"Device: {where['device']}, {where['threads']} threads, {where['instruction_set']}; "
        f"{libraries}; commit {where['commit']}; {where['date']}; "
        f"load average at the start {where['load_average']:.1f}. float32 without TF32.",
        "",
        f"`ratio` is to {UNIT} of the same round; `extra MB` is peak memory above that of "
        f"{UNIT}, and beside it in copies of the parameters. `error` is the largest relative error "
        "against a batch-1 loop in float64 on 4 samples (gpt2-small: 2 layers, 128 wide, 512 "
        "tokens). Per-sample gradients take at most the limit, and each rival's settings are the "
        "fastest of those tried.",
        "",
        "| case | arm | median ms | quartile range | ratio | extra MB | × parameters | error "
        "| settings |",
        "|---|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in rows:
        start = f"| {row['case']} | {row['arm']} "
        if row["ratio"] is None:
            reason = row["reason"].replace("|", "\\|")
            lines.append(f"{start}| not run: {reason} |||||||")
            continue
        spread = row["quartile_range_ms"]
        extra = row.get("extra_bytes")
        memory = "– | –"
        if extra is not None:
            memory = f"{extra / 1e6:.1f} | {extra / (4 * row['parameters']):.2f}"
        lines.append(
            f"{start}| {row['median_ms']:.3f} | {'–' if spread is None else f'{spread:.3f}'} "
            f"| {row['ratio']:.2f} | {memory} | {error_of(row)} | {described(row)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure what was asked for, print the table, write it where asked; 1 if bdu fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=list(CASES), action="append")
    parser.add_argument("--arm", default=None, help=f"only arms whose name holds this, {UNIT}, bdu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--limit", type=int, default=None, help="MiB of per-sample gradients (256; a GPU 8192)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=30.0,
        help="ratio beyond which what takes over 2 s is timed once",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument(
        "--peak-memory", default=None, metavar="SETTINGS", help="print the bytes of --arm alone"
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("--markdown", type=Path, default=None, metavar="FILE")
    options = parser.parse_args()
    for message in ("Full backward hook is firing", "There is a performance drop", "In CPU auto"):
        warnings.filterwarnings("ignore", message)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if options.peak_memory is not None:
        settings = json.loads(options.peak_memory)
        print(peak_of_arm(options.case[0], options.arm, settings, options))
        return 0
    where = environment(options.device)
    rows: list[dict[str, Any]] = []
    for case in options.case or (ON_CPU if options.device == "cpu" else CASES):
        rows += measure(case, options)
        if options.json is not None:
            atomic_write(options.json, json.dumps(rows, indent=1) + "\n")
    text = table(rows, where)
    print(text)
    if options.markdown is not None:
        atomic_write(options.markdown, text)
    failed = 0
    for row in rows:
        if row["arm"].startswith("bdu") and not row.get("error", WRONG) < WRONG:
            failed = 1
            print(
                f"{row['case']}, {row['arm']}: {row.get('reason', error_of(row))}", file=sys.stderr
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
