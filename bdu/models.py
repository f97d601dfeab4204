"""Built-in image classifiers, models from an import path, and input normalisation.

Every model takes images of shape (N, C, H, W), float, in [0, 1], and returns logits of shape
(N, num_classes). A normalisation is part of the model and never adds a key to its state_dict.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Normalize:
    """Forward pre-hook that computes x ← (x − mean) / std for each channel.

    A hook and not a module, so that a checkpoint loads with and without it.

    Args:
        mean: one number a channel, in units of images in [0, 1].
        std: one positive number a channel, same length as mean.

    Raises:
        ValueError: lengths differ, are zero, a std is not positive, or a value is not finite.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                "std: expected one value for each channel of mean "
                f"({len(self.mean)}), got {len(self.std)}"
            )
        if not all(math.isfinite(value) for value in self.mean):
            raise ValueError(f"mean: expected finite values, got {self.mean}")
        if not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"std: expected positive, finite values, got {self.std}")
        self._tensors: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Normalise args[0], (N, C, H, W) float, on its own device and in its own dtype."""
        x = args[0]
        if x.dim() != 4 or x.shape[1] != len(self.mean):
            raise ValueError(f"x: expected (N, {len(self.mean)}, H, W), got {tuple(x.shape)}")
        mean, std = self._on(x.device, x.dtype)
        return ((x - mean) / std, *args[1:])

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = (device, dtype)
        if key not in self._tensors:
            # an inference tensor kept here could never take part in a later backward
            with torch.inference_mode(False):
                self._tensors[key] = (
                    torch.tensor(self.mean, device=device, dtype=dtype).view(1, -1, 1, 1),
                    torch.tensor(self.std, device=device, dtype=dtype).view(1, -1, 1, 1),
                )
        return self._tensors[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.mean, self.std = state["mean"], state["std"]
        self._tensors = {}

    def __repr__(self) -> str:
        return f"Normalize(mean={self.mean}, std={self.std})"


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1 x)))) + shortcut(x)), a 3x3 pair (He 2016, figure 2)."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Sequential()
        if stride != 1 or in_width != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H / stride, W / stride) from (N, in_width, H, W)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class ResNet18(nn.Module):
    """ResNet-18 with the CIFAR stem (3x3, stride 1, no pooling): 4 stages of 2 basic blocks.

    Args:
        num_classes: width of the output.
        in_channels: channels of the images.
        width: channels of the first stage; the stages have width x (1, 2, 4, 8).

    Source: He et al. 2016, with the stem used for 32x32 images. Keys are torchvision's.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, 1)
        self.layer2 = self._stage(width, 2 * width, 2)
        self.layer3 = self._stage(2 * width, 4 * width, 2)
        self.layer4 = self._stage(4 * width, 8 * width, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)

    @staticmethod
    def _stage(in_width: int, width: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(in_width, width, stride), BasicBlock(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.pool(x).flatten(1))


class PreActivationBlock(nn.Module):
    """conv2(relu(bn2(conv1(a)))) + shortcut, a = relu(bn1 x).

    The shortcut is x itself where the width stays, a 1x1 convolution of a where it changes.
    `convShortcut` is spelt as in the published checkpoints that load into this class.
    """

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.convShortcut = (
            None if in_width == width else nn.Conv2d(in_width, width, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H / stride, W / stride) from (N, in_width, H, W)."""
        active = functional.relu(self.bn1(x))
        out = self.conv2(functional.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class WideStage(nn.Module):
    """Two pre-activation blocks under the attribute `layer`, as the published keys have it."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            PreActivationBlock(in_width, width, stride), PreActivationBlock(width, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H / stride, W / stride) from (N, in_width, H, W)."""
        return self.layer(x)


class WideResNet16(nn.Module):
    """WRN-16-1: 3 stages of 2 pre-activation blocks, 16/32/64 channels, strides 1/2/2.

    Loads the checkpoints published with NAD (Li et al. 2021), which take RGB in [0, 1] and no
    normalisation. Source: Zagoruyko and Komodakis 2016.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.block1 = WideStage(16, 16, 1)
        self.block2 = WideStage(16, 32, 2)
        self.block3 = WideStage(32, 64, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.pool(functional.relu(self.bn1(x))).flatten(1))


class SmallCNN(nn.Module):
    """Four 3x3 conv-BN-ReLU layers (16, 32, 32, 64 channels, strides 1/2/1/2), mean, fc.

    About 33,000 parameters; for grey or colour images of 8x8 to 32x32.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_channels
        for width, stride in ((16, 1), (32, 2), (32, 1), (64, 2)):
            layers += [
                nn.Conv2d(before, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            before = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W)."""
        return self.fc(self.pool(self.features(x)).flatten(1))


BUILT_IN: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet18": ResNet18,
    "wrn16-1": WideResNet16,
    "smallcnn": SmallCNN,
}


def build(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Build a model with fresh weights.

    Args:
        name: "resnet18", "resnet18-w<N>" (first stage N wide), "wrn16-1", "smallcnn", or
            "package.module:factory": a callable that returns an nn.Module; it is called with
            num_classes and in_channels where its signature takes them.
        num_classes: width of the output, at least 1.
        in_channels: channels of the images, at least 1.
        mean: one number a channel to subtract, or None for no normalisation.
        std: one positive number a channel to divide by; given exactly when mean is.
        seed: seeds the initial weights without touching the global random state; None draws
            from the global state, as torch itself does.

    Returns:
        The model, on the device of its maker (the CPU for built-ins), in training mode.

    Raises:
        ValueError: unknown name, bad counts, or mean and std that do not fit in_channels.
        ImportError: the module of "package.module:factory" or the factory is not there.
        TypeError: the factory is not callable or returned something else than a module.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    if in_channels < 1:
        raise ValueError(f"in_channels: expected at least 1, got {in_channels}")
    normalize = None
    if (mean is None) != (std is None):
        missing = "mean" if mean is None else "std"
        raise ValueError(f"{missing}: expected {in_channels} values, as mean and std go together")
    if mean is not None and std is not None:
        normalize = Normalize(mean, std)
        if len(normalize.mean) != in_channels:
            raise ValueError(
                f"mean: expected {in_channels} values (in_channels), got {len(normalize.mean)}"
            )
    make = _maker(name, num_classes, in_channels)
    if seed is None:
        model = make()
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = make()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"name: expected {name!r} to return a torch.nn.Module, got {type(model).__name__}"
        )
    if normalize is not None:
        model.register_forward_pre_hook(normalize)
    return model


def _maker(name: str, num_classes: int, in_channels: int) -> Callable[[], Any]:
    if name in BUILT_IN:
        built_in = BUILT_IN[name]
        return lambda: built_in(num_classes, in_channels)
    wide = re.fullmatch(r"resnet18-w([1-9]\d*)", name)
    if wide:
        width = int(wide.group(1))
        return lambda: ResNet18(num_classes, in_channels, width)
    if ":" in name:
        return _imported(name, num_classes, in_channels)
    raise ValueError(
        "name: expected one of "
        + ", ".join(sorted([*BUILT_IN, "resnet18-w<N>"]))
        + f", or package.module:factory, got {name!r}"
    )


def _imported(name: str, num_classes: int, in_channels: int) -> Callable[[], Any]:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does; an installed command does not
    try:
        factory: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"name: expected {module_name!r} of {name!r} to import: {error}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise ImportError(f"name: expected {module_name!r} to have {attribute!r}, it has not")
        factory = getattr(factory, part)
    if not callable(factory):
        raise TypeError(f"name: expected {name!r} to be callable, got {type(factory).__name__}")
    parameters = inspect.signature(factory).parameters
    # torchvision's factories take num_classes through **kwargs, but never in_channels
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    options: dict[str, int] = {}
    if takes_any or "num_classes" in parameters:
        options["num_classes"] = num_classes
    if "in_channels" in parameters:
        options["in_channels"] = in_channels
    return lambda: factory(**options)


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def usable_device(device: torch.device | str, name: str = "device") -> torch.device:
    """The CPU or a CUDA device of this machine.

    Raises:
        ValueError: it is not here, or bdu was never tried on it.
    """
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{name}: expected cpu or cuda, got {device!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: expected cpu or cuda, got {device} (untested)")
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        here = f"cuda:0 to cuda:{count - 1}" if count else "cpu, as there is no CUDA device"
        raise ValueError(f"{name}: expected {here}, got {device}")
    return chosen


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, or its ``logits`` as an attribute or a key.

    Hugging Face's classifiers return an object with such an attribute.

    Raises:
        ValueError: it is neither; a tuple, for example.
    """
    found = output
    if not isinstance(output, Tensor):
        is_mapping = isinstance(output, Mapping)
        found = output.get("logits") if is_mapping else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"model: expected a tensor of logits or an output with .logits, got "
            f"{type(output).__name__}"
        )
    return found


def random_state_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Put the global random state back at exit, of the CPU and of the model's devices: a model may
    draw even in evaluation mode."""
    devices = sorted({str(tensor.device) for tensor in model.parameters() if tensor.is_cuda})
    return torch.random.fork_rng(devices)


@contextmanager
def left_untouched(model: nn.Module) -> Iterator[None]:
    """Put training flags, buffers and the global random state back at exit: a module may count its
    calls even in evaluation mode, or draw."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with random_state_kept(model), modes_kept(model):
        try:
            yield
        finally:
            for module, name, buffer, before in kept:
                if not torch.equal(buffer, before):
                    buffer.data.copy_(before)
                module._buffers[name] = buffer


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module's training flag back at exit, so that frozen batch norms stay frozen."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
