"""The retune attack: does a backdoor come back from a handful of poisoned samples?"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bdu.attacks.trigger import own_generator
from bdu.data import as_unit_float, check_images, check_labels
from bdu.metrics import predict
from bdu.training import fit


def retune(
    model: nn.Module,
    x_clean: Tensor,
    y_clean: Tensor,
    x_poisoned: Tensor,
    y_target: Tensor,
    *,
    epochs: int = 5,
    lr: float = 0.01,
    momentum: float = 0.9,
    batch_size: int = 128,
    seed: int,
) -> nn.Module:
    """Fine-tune a copy of `model` on clean samples of which a few are replaced by poisoned ones.

    Plain SGD at a constant learning rate, batch norm in training mode, all parameters, no weight
    decay, no augmentation. A backdoor that was only hidden comes back; measure the copy's
    attack success rate. PAM uses 2 % of the training set with 5 samples replaced. The samples
    must be disjoint from the defender's and the evaluator's.

    Args:
        model: classifier, left untouched.
        x_clean: (N, C, H, W), uint8 or float in [0, 1].
        y_clean: (N,) true classes, integer.
        x_poisoned: (M, C, H, W), M at most N, triggered images; uint8 or float in [0, 1]. They
            replace M clean samples drawn with `seed`.
        y_target: (M,) the attacker's labels, integer.
        epochs, lr, momentum, batch_size: of SGD.
        seed: of the draw and of the order.

    Returns:
        The retuned copy, on the model's device, with the model's training flags.

    Raises:
        ValueError: shapes or values that do not fit, or more poisoned samples than clean ones.

    Source: PAM (arXiv 2410.09838), the settings of its retuning attack.
    """
    x, y = check_images(x_clean, "x_clean"), check_labels(y_clean, None, "y_clean")
    bad_x = check_images(x_poisoned, "x_poisoned")
    bad_y = check_labels(y_target, None, "y_target")
    for name, given, expected in (("y_clean", y, x), ("y_target", bad_y, bad_x)):
        if len(given) != len(expected):
            raise ValueError(f"{name}: expected {len(expected)} labels, got {len(given)}")
    if bad_x.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"x_poisoned: expected images {tuple(x.shape[1:])} (as x_clean), "
            f"got {tuple(bad_x.shape[1:])}"
        )
    if len(x):
        classes = predict(model, x[:1]).shape[1]
        for name, labels in (("y_clean", y), ("y_target", bad_y)):
            check_labels(labels, classes, name)
    if len(bad_x) > len(x):
        raise ValueError(f"x_poisoned: expected at most {len(x)} (x_clean), got {len(bad_x)}")
    replaced = torch.randperm(len(x), generator=own_generator(seed))[: len(bad_x)]
    if x.dtype != bad_x.dtype:
        x, bad_x = as_unit_float(x), as_unit_float(bad_x)
    images, labels = x.clone(), y.clone()
    images[replaced.to(images.device)] = bad_x.to(images.device)
    labels[replaced.to(labels.device)] = bad_y.to(labels.device)
    attacked = copy.deepcopy(model)
    # a defence may have frozen parameters; the attacker is not bound by that
    for parameter in attacked.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    fit(
        attacked,
        images,
        labels,
        epochs=epochs,
        lr=lr,
        momentum=momentum,
        batch_size=batch_size,
        weight_decay=0.0,
        schedule="constant",
        augment=False,
        channels_last=False,
        seed=seed,
        progress=False,
    )
    for before, after in zip(model.parameters(), attacked.parameters(), strict=True):
        after.requires_grad_(before.requires_grad)
        after.grad = None
    return attacked
