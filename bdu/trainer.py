"""The front door: :func:`unlearn` takes a model and the defender's data to a cleaned copy."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bdu import auto
from bdu.data import as_unit_float, check_seed
from bdu.defenses import balanced, bi_bau, finetuning, fst, i_bau, pam, sau, tbar, tsbd, ulrl
from bdu.defenses.course import logit_scale
from bdu.defenses.head import head_of
from bdu.defenses.protocol import Callback, DefenderData, Line, Result
from bdu.metrics import predict
from bdu.models import device_of, left_untouched, logits_of, random_state_kept, usable_device

_TRIGGER_FREE = (auto, finetuning, ulrl, fst, tsbd, i_bau, sau, pam, tbar, bi_bau)

METHODS: dict[str, Callable[..., Result]] = {
    "balanced": balanced.run,
    **{module.NAME: module.run for module in _TRIGGER_FREE},
}

SETTINGS: dict[str, Callable[..., Any]] = {
    "balanced": balanced.Settings,
    **{module.NAME: module.Settings for module in _TRIGGER_FREE},
}

NEEDS_TRIGGERED = frozenset({"balanced"})

OURS: dict[str, dict[str, Any]] = {
    "fst": {"distillation": 0.9, "fresh_bias": False, "epochs": 25},
    "ulrl": {**ulrl.WITH_LENGTH_KEPT, "relearn_epochs": 60},
    "bi-bau": {**bi_bau.AGAINST_A_REFERENCE, "reference_epochs": 25, "epochs": 20},
    "tsbd": {"distillation": 0.9},
    "i-bau": {"distillation": 0.9},
    "sau": {"epochs": 20, "lr": 5e-4, "distillation": 0.9},
    "pam": {"epochs": 10, "distillation": 0.9, "rho": 0.1, "triggered_share": 0.05},
}
"""Method → settings of our variant of it, "<method>, ours" in docs/methods.md and the tables; the
defaults are those published. Chosen on the models TUNING of bench/defenses.py."""

_MAKES_THE_HEAD_AFRESH = frozenset({"auto", "fst", "ulrl"})


def unlearn(
    model: nn.Module,
    *,
    method: str = "balanced",
    clean: Any,
    triggered: Any | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    callbacks: Iterable[Callback] = (),
    progress: bool = True,
    state_file: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **settings: Any,
) -> Result:
    """Remove a backdoor from a copy of ``model``.

    Nothing but ``clean`` and ``triggered`` is looked at; a fifth of each is set aside as the
    defender's validation split.

    Args:
        model: takes float images in [0, 1], (N, C, H, W), returns logits (N, classes), or an output
            that has them, as Hugging Face's do (:func:`bdu.models.logits_of`). Untouched.
        method: one of ``bdu.trainer.METHODS``.
        clean: Dataset, DataLoader or (x, y): a few hundred samples with their true labels.
        triggered: likewise, with the trigger on them and the label the attacker wants; or
            (x, y_target, y_true). Only for methods that need it.
        seed: of the split, the order and the augmentation.
        device: where to work; None is the model's own device.
        callbacks: each is called with (line, model) at every look at the validation split.
        progress: show a progress bar.
        state_file: where the state of the run is kept, to be resumed from.
        resume: continue from ``state_file`` where it exists.
        settings: the method's own, see its ``Settings``.

    Returns:
        The cleaned model on the device worked on, the history, and the settings.

    Raises:
        ValueError: an unknown method, data that do not fit the model, or a setting out of range;
            before any work is done.
        FileExistsError: there is something at ``state_file``, and ``resume`` is False.
        FloatingPointError: a gradient is not finite; names the parameter.
    """
    target_device = device_of(model) if device is None else usable_device(device)
    # NumPy's numbers could not be read back from a state file.
    settings = {n: v.item() if isinstance(v, np.generic) else v for n, v in settings.items()}
    data = prepare(
        model,
        method=method,
        clean=clean,
        triggered=triggered,
        seed=seed,
        device=target_device,
        settings=settings,
    )
    if device_of(model) != target_device:
        model = copy.deepcopy(model).to(target_device)
    _warn_of_absent_classes(model, data)
    _warn_of_unused(method, triggered, settings)
    seed = int(seed)
    is_bare = _returns_a_tensor(model, data)
    given = model if is_bare else _with_logits_alone(model)
    with random_state_kept(given):
        result = METHODS[method](
            given,
            data,
            seed=seed,
            callbacks=callbacks if is_bare else [_given_the_whole(each) for each in callbacks],
            progress=progress,
            state_file=state_file,
            resume=resume,
            **settings,
        )
    _make_whole(result.model)
    return result


class _Logits:
    """A forward hook: methods see the logits alone of a model that returns more."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor:
        return logits_of(output)


def _returns_a_tensor(model: nn.Module, data: DefenderData) -> bool:
    with torch.no_grad(), left_untouched(model):
        model.eval()
        return isinstance(model(as_unit_float(data.clean.x[:1])), Tensor)


def _with_logits_alone(model: nn.Module) -> nn.Module:
    """A shell of the model, of the same class and with the very same tensors, that has the hook."""
    tensors = (*model.parameters(), *model.buffers())
    shell = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    shell.register_forward_hook(_Logits())
    return shell


def _make_whole(model: nn.Module) -> None:
    for key, hook in list(model._forward_hooks.items()):
        if isinstance(hook, _Logits):
            del model._forward_hooks[key]


def _given_the_whole(callback: Callback) -> Callback:
    """The callback, which sees the model return what the one passed in returns."""

    def told(line: Line, model: nn.Module) -> Mapping[str, Any] | None:
        _make_whole(model)
        try:
            return callback(line, model)
        finally:
            model.register_forward_hook(_Logits())

    return told


def prepare(
    model: nn.Module,
    *,
    method: str,
    clean: Any,
    triggered: Any | None,
    seed: int,
    device: torch.device,
    settings: Mapping[str, Any],
) -> DefenderData:
    """Check everything :func:`unlearn` is given, and cut the validation split from the data.

    Raises:
        ValueError: as :func:`unlearn`.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(sorted(METHODS))}, got {method!r}")
    seed = check_seed(seed, bits=62)  # a method may add to it
    _check_settings(method, settings)
    _check_trainable(model)
    if method in NEEDS_TRIGGERED and triggered is None:
        raise ValueError(
            f"triggered: expected samples, as method {method!r} needs them, got None; others, "
            "'auto' for one, need none"
        )
    data = DefenderData.split(clean, triggered, seed=seed, device=device)
    with left_untouched(model):
        _check_fits(model, data)
        _check_layers(model, method, SETTINGS[method](**settings), data)
    return data


def _check_layers(model: nn.Module, method: str, settings: Any, data: DefenderData) -> None:
    """Raise ValueError for what the method would refuse once it runs."""
    if method == "balanced":
        balanced.fitting(settings, data)
        return
    if method == tsbd.NAME:
        tsbd.prunable_layers(model, data)
    afresh = method in _MAKES_THE_HEAD_AFRESH or getattr(settings, "reference_epochs", False)
    if not afresh and logit_scale(model, data.clean, settings.logit_spread) == 1:
        return
    head = head_of(model, as_unit_float(data.clean.x[:1]).to(device_of(model)))
    if afresh and not model.get_parameter(f"{head}.weight").requires_grad:
        raise ValueError(
            f"model: expected a final layer to train, as {method} makes its rows afresh, got "
            f"{head}.weight frozen"
        )


def _check_trainable(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model: expected a plain nn.Module, got a ScriptModule")
    lazy = next((n for n, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise ValueError(f"model: expected weights, got {lazy} uninitialised; call the model once")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model: expected parameters to train, got all of them frozen, or none")
    other = next((n for n, v in model.state_dict().items() if not isinstance(v, Tensor)), None)
    if other is not None:
        kind = type(model.state_dict()[other]).__name__
        raise ValueError(f"model: expected tensors alone in its state dict, got {other}, a {kind}")


def _check_settings(method: str, settings: Mapping[str, Any]) -> None:
    known: Any = SETTINGS[method]
    types = {field.name: str(field.type) for field in fields(known)}
    for name, value in settings.items():
        if name not in types:
            raise ValueError(f"{name}: expected one of {', '.join(sorted(types))}")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if types[name] == "bool" and not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {value!r}")
        if types[name] == "bool | None" and not (isinstance(value, bool) or value is None):
            raise ValueError(f"{name}: expected true, false or None, got {value!r}")
        if types[name] in ("int", "float") and not is_number:
            raise ValueError(f"{name}: expected a number, got {value!r}")
        if types[name] == "float | None" and not (is_number or value is None):
            raise ValueError(f"{name}: expected a number or None, got {value!r}")
    known(**settings)
    for name, value in settings.items():
        if types[name] == "int" and not isinstance(value, int):
            raise ValueError(f"{name}: expected a whole number, got {value!r}")


def _check_fits(model: nn.Module, data: DefenderData) -> None:
    other = next((n for n, p in model.named_parameters() if p.dtype != torch.float32), None)
    if other is not None:
        dtype = model.get_parameter(other).dtype
        raise ValueError(f"model: expected float32 parameters, got {other} in {dtype}")
    try:
        classes = predict(model, data.clean.x[:2]).shape[1]
    except RuntimeError as error:
        raise ValueError(
            f"clean: expected images that the model takes, got {tuple(data.clean.x.shape[1:])}: "
            f"{error}"
        ) from error
    if classes < 2:
        raise ValueError(f"model: expected logits of at least 2 classes, got {classes}")
    parts = {"clean": (data.clean, data.clean_validation)}
    if data.triggered is not None and data.triggered_validation is not None:
        parts["triggered"] = (data.triggered, data.triggered_validation)
    for name, samples in parts.items():
        for part in samples:
            labels = [part.y] if part.y_true is None else [part.y, part.y_true]
            highest = max(int(y.max()) for y in labels)
            if highest >= classes:
                raise ValueError(
                    f"{name}: expected labels below {classes} (the model's outputs), got {highest}"
                )


def _warn_of_unused(method: str, triggered: Any | None, settings: Mapping[str, Any]) -> None:
    if method in NEEDS_TRIGGERED:
        return
    if triggered is not None:
        warnings.warn(f"triggered: not looked at by method {method}", stacklevel=3)
    if not settings.get("anchored"):
        for name in ("ewc_lambda", "gamma", "fisher_samples"):
            if name in settings:
                warnings.warn(f"{name}: not used by method {method} but anchored", stacklevel=3)


_NAMED = 8  # classes, in a warning


def _warn_of_absent_classes(model: nn.Module, data: DefenderData) -> None:
    with left_untouched(model):
        classes = predict(model, data.clean.x[:1]).shape[1]
    y = torch.cat([part.y for part in (data.clean, data.clean_validation)])
    absent = torch.nonzero(torch.bincount(y, minlength=classes) == 0).flatten().tolist()
    if absent:
        some = ", ".join(map(str, absent[:_NAMED])) + (", ..." if len(absent) > _NAMED else "")
        warnings.warn(
            f"clean: has no sample of {len(absent)} of the model's {classes} classes ({some}); "
            "what the model knows of them may be lost",
            stacklevel=3,
        )
