"""The cases of fisher.py: models, and the same models in plain modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdu import models

Losses = Callable[[Tensor, Tensor], Tensor]


class NotRun(Exception):
    """Why an arm does not run, in one line."""


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
