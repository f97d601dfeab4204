"""The arms of fisher.py: every way to add a batch's squared per-sample gradients to totals."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import step
import torch
import torch.nn.functional as F
from fisher_problems import NotRun, Problem, logits_of, own_copy
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bdu.fisher import FisherAccumulator

Settings = dict[str, Any]
Squares = dict[str, Tensor]

UNIT = "forward + backward"
AS_GIVEN, PLAIN = "as given", "plain modules"


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
