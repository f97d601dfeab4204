"""What both optimizers share: anchor and Fisher, clipping, loss scaling, tables, saved state.

A step has two halves. The first reads: it finds the rows, checks all of them in all groups, and
makes the tables that are missing, all without touching a parameter or the state. The second writes,
and has nothing left that can fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, repeat
from operator import attrgetter, is_
from typing import Any, ClassVar, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from bdu import native, ops, quantization, reference
from bdu.optim.checks import (
    check_anchor,
    check_at_least_zero,
    check_capture,
    check_decay,
    check_entry,
    check_fisher,
    check_fisher_dtype,
    check_mode,
    check_scale,
    check_seed,
)
from bdu.rounding import Rounding

Named = Mapping[str, Tensor] | Mapping[Tensor, Tensor]
Group = dict[str, Any]
State = dict[str, Any]

SHARED_DEFAULTS: Mapping[str, Any] = {
    "weight_decay": 0.0,
    "maximize": False,
    "ewc_lambda": 0.0,
    "mode": "proximal",
    "batch_fisher_decay": None,
    "stochastic_rounding": None,
    "rounding_steps": 0,
    "capturable": False,
}

_EWC_STATE = ("fisher", "anchor", "fisher_scale", "fisher_strides")
# What an F in 8 bits has beside its codes. Its blocks follow the memory, and some ways to save a
# tensor do not keep the strides.
_BESIDE_CODES = ("fisher_scale", "fisher_strides")

FisherDtype = torch.dtype | Literal["8bit", "8bit_logarithmic"]
_MAPS: Mapping[Any, quantization.Map] = {
    "8bit": "square_root",
    "8bit_logarithmic": "logarithmic",
}
_END = object()
_GRAD = attrgetter("grad")


class Launch:
    """The rows of one group that one call steps, with their table.

    Args:
        rows: the parameters.
        needs: the settings of the group that decide which state there is.
        states: a row's state as the table has it; written to the optimizer by :meth:`commit`.
        table: rows and columns, checked.
        steps: t of each row, shape (rows,); the rows' ``step`` are views of it. Or None.
        is_first: whether no row has been stepped before.
    """

    def __init__(
        self,
        rows: list[Tensor],
        needs: object,
        states: list[State],
        table: ops.ParameterTable,
        steps: Tensor | None,
        is_first: bool,
    ) -> None:
        self.rows, self.needs, self.table = rows, needs, table
        self.steps, self.is_first = steps, is_first
        self._uncommitted: list[State] | None = states

    def fits(self, rows: Sequence[Tensor], needs: object) -> bool:
        """Whether these rows are the launch's, and it has what they need."""
        return (
            len(rows) == len(self.rows) and all(map(is_, rows, self.rows)) and needs == self.needs
        )

    def commit(self, state: Mapping[Tensor, State]) -> bool:
        """Put what the table was made of into the optimizer's state; whether there was anything."""
        if self._uncommitted is None:
            return False
        for param, own in zip(self.rows, self._uncommitted, strict=True):
            state[param].update(own)
        self._uncommitted = None
        return True


class Work(NamedTuple):
    """One call to a backend, checked."""

    launch: Launch
    grads: ops.CheckedGrads
    settings: dict[str, Any]


class Factors(NamedTuple):
    """What the gradients of a step are multiplied with, on the device of the launch."""

    clip: float | Tensor
    grad_scale: float | Tensor
    found_inf: Tensor | None  # not 0: the step must not write anything


class EWCOptimizer(Optimizer):
    """The base of :class:`bdu.optim.EWCSGD` and :class:`bdu.optim.EWCAdamW`.

    Args:
        params: as ``torch.optim`` takes them.
        defaults: of the groups.
        fisher, anchor: see :meth:`set_anchor`.
        fisher_dtype, anchor_dtype, max_grad_norm, error_if_nonfinite: see
            :class:`bdu.optim.EWCSGD`.
    """

    # GradScaler then hands over grad_scale and found_inf instead of unscaling in a pass of its own.
    _step_supports_amp_scaling = True

    _operation: ClassVar[str]
    _columns: ClassVar[tuple[str, ...]]
    _counts_steps: ClassVar[bool]
    _group_defaults: ClassVar[Mapping[str, Any]]

    penalty: Tensor
    """½ λ Σ F (θ − θ*)² of the parameters stepped last, at θ before that step; 0-dim."""

    _tables: list[list[Launch]]
    _known_entries: list[Any]

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        fisher: Named | None,
        anchor: Named | None,
        fisher_dtype: FisherDtype | None,
        anchor_dtype: torch.dtype | None,
        max_grad_norm: float | None,
        error_if_nonfinite: bool,
    ) -> None:
        check_fisher_dtype(fisher_dtype, anchor_dtype, _MAPS)
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected a number > 0, got {max_grad_norm}")
        if anchor is not None and fisher is None:
            raise ValueError("anchor: expected a fisher to go with it, got None")
        self._check_new_group(defaults)
        self.max_grad_norm = max_grad_norm
        self.error_if_nonfinite = error_if_nonfinite
        self.fisher_dtype, self.anchor_dtype = fisher_dtype, anchor_dtype
        self.penalty = torch.zeros(())
        self._forget_tables()
        # F of others, by parameter: read where it lies, but not to be written.
        self._borrowed: dict[Tensor, Tensor] = {}
        super().__init__(params, defaults)
        if fisher is not None:
            self.set_anchor(fisher=fisher, anchor=anchor)

    # What the two optimizers differ in

    def _settings(self, group: Group) -> dict[str, Any]:
        """The operation's keyword arguments, or a ValueError where one is out of range."""
        lr, ewc_lambda = group["lr"], group["ewc_lambda"]
        if not _stays_on_device(lr, group):
            lr = check_at_least_zero("lr", lr)
        if not _stays_on_device(ewc_lambda, group):
            ewc_lambda = check_at_least_zero("ewc_lambda", ewc_lambda)
        seed = check_seed(group["stochastic_rounding"])
        return {
            "rounding": None if seed is None else Rounding(seed, group["rounding_steps"]),
            "lr": lr,
            "weight_decay": check_at_least_zero("weight_decay", group["weight_decay"]),
            "maximize": bool(group["maximize"]),
            "ewc_lambda": ewc_lambda,
            "mode": check_mode(group["mode"]),
            "batch_fisher_decay": check_decay(group["batch_fisher_decay"]),
        }

    def _needs(self, group: Group) -> object:
        """What decides which state a row has; where it changes, the tables are made anew."""
        return group["batch_fisher_decay"] is not None

    def _start(self, state: State, param: Tensor, group: Group) -> None:
        """Add the moments that a row's state lacks."""
        raise NotImplementedError

    def _is_first(self, state: State, group: Group) -> bool:
        """Whether a row has to be told apart because it was never stepped."""
        return False

    def _launch(self, work: Work, factors: Factors) -> Tensor:
        raise NotImplementedError

    # Anchor and Fisher

    def set_anchor(self, *, fisher: Named | None = None, anchor: Named | None = None) -> None:
        """Anchor the parameters anew.

        Args:
            fisher: F, by name (the names of ``named_parameters()``) or by parameter; every entry
                finite and ≥ 0, of its parameter's shape. It may have entries for other parameters;
                of those with ``ewc_lambda`` > 0, all that require a gradient must be there. Kept in
                its own dtype, but float64 only for float64 parameters. Not copied where it already
                lies right: do not write to it afterwards. None keeps the F attached.
            anchor: θ*, likewise. None: a copy of the parameters as they are.

        Raises:
            ValueError: an entry is missing, misshapen, negative or not finite, or names were given
                for parameters that have none. Nothing has been changed then.
        """
        new = {
            param: self._stored(entry)
            for param, entry in self._entries("fisher", fisher, required=True).items()
        }
        if fisher is None:
            for _, _, param in self._all_params():
                attached = self.state.get(param, {})
                if attached.get("fisher") is not None:
                    new[param] = {
                        key: attached[key] for key in ("fisher", *_BESIDE_CODES) if key in attached
                    }
            if not new:
                raise ValueError("fisher: expected one, as none is attached, got None")
        anchors = self._entries("anchor", anchor, required=False)
        for _, name, param in self._all_params():
            if param not in new:
                continue
            if anchor is None:
                # The table's order, gaps closed.
                new[param]["anchor"] = torch.empty_like(
                    param, dtype=self.anchor_dtype, requires_grad=False
                )
            elif param not in anchors:
                raise ValueError(f"anchor: expected an entry for {name}, got none")
            else:
                new[param]["anchor"] = anchors[param]
        if anchor is None:
            for param, state in new.items():
                state["anchor"].copy_(param.detach())
            names = {param: name for _, name, param in self._all_params()}
            if self.anchor_dtype is not None:
                check_anchor((names[param], state["anchor"]) for param, state in new.items())
        for param, state in new.items():
            for key in _BESIDE_CODES:
                self.state[param].pop(key, None)
            self.state[param].update(state)
            if fisher is not None:
                self._borrowed[param] = state["fisher"]
        self._forget_tables()

    def _entries(
        self, argument: str, given: Named | None, *, required: bool
    ) -> dict[Tensor, Tensor]:
        """The entries of a mapping by parameter, checked and laid out like the parameters."""
        if given is None:
            return {}
        mapping = cast(Mapping[Any, Tensor], given)
        by_name = any(isinstance(key, str) for key in mapping)
        found: dict[Tensor, tuple[str, Tensor]] = {}
        for group, name, param in self._all_params():
            if by_name and "param_names" not in group:
                raise ValueError(
                    f"{argument}: given by name, but the optimizer was made without names; pass "
                    f"model.named_parameters() to it, or key {argument} by parameter"
                )
            entry = mapping.get(name if by_name else param)
            if entry is not None:
                check_entry(argument, entry, param, name)
                found[param] = name, entry
            elif required and group["ewc_lambda"] > 0 and param.requires_grad:
                raise ValueError(f"{argument}: expected an entry for {name}, got none")
        if not found:
            raise ValueError(
                f"{argument}: expected entries for parameters of this optimizer, got none among "
                f"{len(mapping)}"
            )
        check = check_fisher if argument == "fisher" else check_anchor
        check(found.values())
        own = {param.untyped_storage().data_ptr() for _, _, param in self._all_params()}
        dtype = self.fisher_dtype if argument == "fisher" else self.anchor_dtype
        if dtype in _MAPS:
            dtype = None  # _stored() takes care of it
        entries = {
            param: _attach(entry, param, cast("torch.dtype | None", dtype), own)
            for param, (_, entry) in found.items()
        }
        # Another dtype may not reach as far.
        cast_names = ((found[p][0], e) for p, e in entries.items() if e.dtype != found[p][1].dtype)
        check(cast_names)
        return entries

    def _stored(self, fisher: Tensor) -> State:
        """F as the state keeps it."""
        if self.fisher_dtype not in _MAPS or fisher.numel() < quantization.SMALLEST:
            return {"fisher": fisher}
        codes, scale = quantization.quantize(fisher, _MAPS[self.fisher_dtype])
        return {
            "fisher": codes,
            "fisher_scale": scale,
            "fisher_strides": torch.tensor(codes.stride()),
        }

    # The step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # Under torch.compile a break in the graph; see bdu.library for operators that are none.
    # torch.compiler.disable does the same, but imports the compiler at once, which takes a second.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; parameters whose gradient is None are left alone and add no penalty.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: a setting out of range, a gradient that is sparse or does not fit, a Fisher
                that ``ewc_lambda`` asks for and a parameter lacks.
            FloatingPointError: a gradient is not finite and ``error_if_nonfinite`` is set.

            Neither a parameter nor the state of any group has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu":
            if bool(found_inf):
                return loss
            found_inf = None
        scale = getattr(self, "grad_scale", None)
        grad_scale: float | Tensor = 1.0 if scale is None else scale
        try:
            work = self._work()
            check_capture(self.param_groups)
            clip = self._clip(work, grad_scale)
            if found_inf is not None and any(one.launch.is_first for one in work):
                # Whether it is the first is known to the host alone.
                if bool(found_inf):
                    return loss
                found_inf = None
        except BaseException:
            self._forget_tables()
            self._drop_grad_scale()
            raise
        if any([launch.commit(self.state) for launch, _, _ in work]):
            self._known_entries = [*self._entries_of_state()]
        penalties = []
        for one in work:
            device = one.launch.table.device
            found = None if found_inf is None else found_inf.to(device).reshape(())
            factors = Factors(_on(clip, device), _on(grad_scale, device), found)
            penalties.append(self._launch(one, factors))
            one.launch.is_first = False
        for group in self.param_groups:
            self._count_rounding(group)
        self.penalty = _sum(penalties)
        return loss

    def _count_rounding(self, group: Group) -> None:
        if group["stochastic_rounding"] is None:
            return
        if group["capturable"] and not isinstance(group["rounding_steps"], Tensor):
            # A replay has to find another number there than the capture did.
            device = group["params"][0].device
            group["rounding_steps"] = torch.tensor(group["rounding_steps"], device=device)
        group["rounding_steps"] += 1

    def _drop_grad_scale(self) -> None:
        # GradScaler removes them only after a step that returns; left here, its next scale would be
        # multiplied by this one.
        if self.__dict__.pop("found_inf", None) is not None:
            self.__dict__.pop("grad_scale", None)

    def _work(self) -> list[Work]:
        """The rows of every group that have a gradient, checked; nothing is written."""
        # Others replace, clear and offload state between steps: then everything is looked at anew.
        if len(self._tables) != len(self.param_groups) or not native.same_entries(
            self.state, self._known_entries
        ):
            self._tables = [[] for _ in self.param_groups]
        work: list[Work] = []
        for group, launches in zip(self.param_groups, self._tables, strict=True):
            settings = self._settings(group)
            rows: list[Tensor] = group["params"]
            grads = list(map(_GRAD, rows))
            if any(map(is_, grads, repeat(None))):
                rows = [p for p, g in zip(rows, grads, strict=True) if g is not None]
                grads = [g for g in grads if g is not None]
            needs = self._needs(group)
            if not (len(launches) == 1 and launches[0].fits(rows, needs)):
                parts = self._split(group, rows)
                if len(parts) != len(launches) or not all(
                    launch.fits(part, needs) for launch, part in zip(launches, parts, strict=True)
                ):
                    launches[:] = [self._tabulate(group, part) for part in parts]
            checked = self._check(launches, rows, grads)
            if checked is None:
                launches[:] = [self._tabulate(group, part) for part in self._split(group, rows)]
                checked = self._check(launches, rows, grads)
                assert checked is not None  # just made
            for launch, own in zip(launches, checked, strict=True):
                self._require(launch, settings)
                work.append(Work(launch, own, settings))
        return work

    @staticmethod
    def _require(launch: Launch, settings: dict[str, Any]) -> None:
        """Raise where a row lacks what the settings need."""
        ewc_lambda = settings["ewc_lambda"]
        if isinstance(ewc_lambda, Tensor) or ewc_lambda > 0:
            given = "a tensor" if isinstance(ewc_lambda, Tensor) else f"{ewc_lambda:g}"
            launch.table.require("fisher", f"with ewc_lambda={given} (attach it with set_anchor)")
            launch.table.require_anchors()
        if settings["batch_fisher_decay"] is not None and not settings["maximize"]:
            launch.table.require_floating_fisher()

    def _entries_of_state(self) -> Iterator[Any]:
        states: Iterable[Any] = self.state.values()
        if not all(map(isinstance, states, repeat(dict))):
            # torch keeps what a loaded dictionary holds for no parameter, whatever it is.
            states = [state for state in states if isinstance(state, dict)]
        return chain.from_iterable(map(dict.values, states))

    def _check(
        self, launches: list[Launch], rows: list[Tensor], grads: list[Tensor]
    ) -> list[ops.CheckedGrads] | None:
        """The gradients of every launch, checked, or None where a table is out of date."""
        checked = []
        for launch in launches:
            own = grads if len(launches) == 1 else list(map(_GRAD, launch.rows))
            one = launch.table.check(self._operation, own)
            if one is None:
                return None
            checked.append(one)
        return checked

    def _clip(self, work: list[Work], grad_scale: float | Tensor) -> float | Tensor:
        if not work or (self.max_grad_norm is None and not self.error_if_nonfinite):
            return 1.0
        norms = [ops.grad_norm(one.grads) for one in work]
        norm = norms[0] if len(norms) == 1 else reference.grad_norm([n.to(norms[0]) for n in norms])
        norm = norm / _on(grad_scale, norm.device)
        if self.error_if_nonfinite and not bool(torch.isfinite(norm)):
            raise FloatingPointError(_nonfinite(work))
        if self.max_grad_norm is None:
            return 1.0
        return reference.clip_factor(norm, self.max_grad_norm)

    # Tables: one a group, device and precision, kept as long as nothing moved

    def _forget_tables(self) -> None:
        self._tables = []
        self._known_entries = [_END]

    def _split(self, group: Group, rows: list[Tensor]) -> list[list[Tensor]]:
        """Apart by device, by whether kernels serve them, and (SGD) first steps from later ones."""
        parts: dict[tuple[torch.device, bool, bool], list[Tensor]] = {}
        for param in rows:
            first = self._is_first(self.state.get(param, {}), group)
            key = (param.device, param.dtype == torch.float64, first)
            parts.setdefault(key, []).append(param)
        return list(parts.values())

    def _tabulate(self, group: Group, rows: list[Tensor]) -> Launch:
        """A launch for these rows; the state is read, completed and laid out, but not written."""
        names = {id(p): name for own, name, p in self._all_params() if own is group}
        is_first = self._is_first(self.state.get(rows[0], {}), group)
        states = [
            self._complete(dict(self.state.get(param, {})), param, names[id(param)], group)
            for param in rows
        ]
        columns = {key: [state.get(key) for state in states] for key in self._columns}
        steps, views = self._count_together(states, rows[0].device)
        everything = [param for _, _, param in self._all_params()]
        ends = accumulate((param.numel() for param in everything), initial=0)
        firsts = dict(zip(map(id, everything), ends, strict=False))
        table = ops.ParameterTable(
            rows,
            columns,
            [names[id(p)] for p in rows],
            watched=views,
            first_elements=[firsts[id(p)] for p in rows],
        )
        return Launch(rows, self._needs(group), states, table, steps, is_first)

    def _count_together(
        self, states: list[State], device: torch.device
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Make every ``step`` a view of one tensor, so that one addition counts them all up."""
        if not self._counts_steps:
            return None, []
        counts = [state["step"] for state in states]
        if all(isinstance(count, Tensor) and count.device == device for count in counts):
            # Without a wait for the device.
            steps = torch.stack([count.detach().to(torch.float32).reshape(()) for count in counts])
        else:
            steps = torch.tensor([float(c) for c in counts], dtype=torch.float32, device=device)
        views = list(steps.unbind())
        for state, view in zip(states, views, strict=True):
            state["step"] = view
        return steps, views

    def _complete(self, state: State, param: Tensor, name: str, group: Group) -> State:
        """A row's state with all that the operation reads, on the parameter's device."""
        assert param.grad is not None
        if param.grad.layout != torch.strided:
            raise ValueError(f"grad of {name}: expected a dense tensor, got {param.grad.layout}")
        self._start(state, param, group)
        if group["batch_fisher_decay"] is not None:
            if state.get("fisher") is None:
                dtype = reference.compute_dtype(param)
                state["fisher"] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
                state["anchor"] = torch.empty_like(param, requires_grad=False).copy_(param.detach())
            elif state["fisher"] is (borrowed := self._borrowed.get(param)):
                assert borrowed is not None
                state["fisher"] = borrowed.clone()
        if ops.is_8_bits(state.get("fisher")):
            self._lay_out_codes(state, param)
        for key in self._columns:
            value = state.get(key)
            if isinstance(value, Tensor) and key != "fisher_scale":
                if value.shape != param.shape:
                    raise ValueError(
                        f"{key} of {name}: expected {ops.describe(param)}, "
                        f"got {ops.describe(value)}"
                    )
                state[key] = ops.lay_out_like(value.to(param.device), param)
        return state

    @staticmethod
    def _lay_out_codes(state: State, param: Tensor) -> None:
        """Codes and scales in the order of the parameter's memory, which their blocks follow."""
        codes, scale = (state[key].to(param.device) for key in ("fisher", "fisher_scale"))
        if codes.shape == param.shape and ops.lay_out_like(codes, param) is not codes:
            fisher = ops.lay_out_like(quantization.dequantize(codes, scale), param)
            codes, scale = quantization.quantize(fisher, quantization.map_of(codes))
        state["fisher"], state["fisher_scale"] = codes, scale
        state["fisher_strides"] = torch.tensor(codes.stride())

    def _all_params(self) -> Iterator[tuple[Group, str, Tensor]]:
        """Group, what to call the parameter in an error, and the parameter."""
        for number, group in enumerate(self.param_groups):
            where = f" of group {number}" if len(self.param_groups) > 1 else ""
            names = group.get("param_names")
            for index, param in enumerate(group["params"]):
                yield group, names[index] if names else f"params[{index}]{where}", param

    # State

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim``'s; the new parameters get their Fisher and anchor from
        :meth:`set_anchor`.

        Raises:
            ValueError: a setting out of range, a complex parameter, one that is there twice. The
                group has not been added then.
        """
        super().add_param_group(param_group)
        try:
            self._check_new_group(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise
        self._forget_tables()

    def _check_new_group(self, group: Group) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        check_at_least_zero("lr", lr)
        self._settings(group)
        seen: set[Tensor] = set()
        for own, name, param in self._all_params() if "params" in group else ():
            if own is not group:
                continue
            if param.is_complex():
                raise ValueError(
                    f"{name}: expected a real parameter, got {param.dtype}: "
                    "complex parameters are not supported"
                )
            if param in seen:
                raise ValueError(f"{name}: expected every parameter once, got it twice")
            seen.add(param)

    def state_dict(self, *, include_ewc: bool = True) -> dict[str, Any]:
        """As ``torch.optim``'s, with every F and θ* unless ``include_ewc`` is False."""
        state_dict = super().state_dict()
        if not include_ewc:
            state_dict["state"] = {
                index: {key: v for key, v in state.items() if key not in _EWC_STATE}
                for index, state in state_dict["state"].items()
            }
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim``'s, but every tensor keeps the dtype it was saved in.

        ``torch.optim`` casts state to the parameter's dtype, which would round a float32 Fisher of
        a bfloat16 parameter (pytorch issue 43706). A dictionary without F and θ* leaves those that
        are attached, and settings that it lacks (it may be one of ``torch.optim.SGD`` or ``AdamW``)
        stay as they are. Moments are copied; F and θ* are not where they already lie right.

        Raises:
            ValueError: the groups do not match, a tensor does not have its parameter's shape, or a
                Fisher entry is negative or not finite. Nothing has been changed then.
        """
        # Registered last, so that it sees what the hooks of others made of the dictionary.
        hook = self.register_load_state_dict_pre_hook(lambda _, loaded: self._take_state(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self.__dict__.pop("_taken", None)

    def _take_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Keep the tensors from torch's casts: :meth:`__setstate__` puts them where they belong."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in self.param_groups]:
            return state_dict  # torch says what is wrong
        for group, own in zip(groups, self.param_groups, strict=True):
            for key in self.defaults:
                if key in own:
                    group.setdefault(key, own[key])
            self._check_loaded_group(group)
        ids = [index for group in groups for index in group["params"]]
        taken = {}
        fishers = []
        for index, (_, name, param) in zip(ids, self._all_params(), strict=True):
            state = taken[param] = dict(state_dict["state"].get(index, {}))
            in_8_bits = ops.is_8_bits(state.get("fisher"))
            for key in self._columns:
                if isinstance(state.get(key), Tensor) and key != "fisher_scale":
                    check_entry(key, state[key], param, name, or_codes=True)
            self._check_loaded_state(state, name)
            if in_8_bits:
                check_scale(state.get("fisher_scale"), param, name)
                state["fisher"] = _with_strides(state["fisher"], state.get("fisher_strides"))
            else:
                for key in _BESIDE_CODES:
                    state.pop(key, None)
            if state.get("fisher") is not None and not in_8_bits:
                fishers.append((name, state["fisher"]))
        check_fisher(fishers)
        self._taken = taken
        known = set(ids)
        others = {key: v for key, v in state_dict["state"].items() if key not in known}
        return {**state_dict, "state": others, "param_groups": groups}

    def _check_loaded_group(self, group: Group) -> None:
        self._settings(group)

    def _check_loaded_state(self, state: State, name: str) -> None:
        """Refuse moments that do not belong together."""

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: all but the tables, which hold addresses."""
        names = ("max_grad_norm", "error_if_nonfinite", "fisher_dtype", "anchor_dtype")
        own = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), **own, "penalty": self.penalty}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From pickle, copy and :meth:`load_state_dict`; settings that are missing get defaults."""
        before = self.__dict__.get("state", {})
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self._group_defaults.items():
                group.setdefault(key, value)
        self._forget_tables()
        self._borrowed = self.__dict__.get("_borrowed", {})
        taken: dict[Tensor, State] = self.__dict__.pop("_taken", {})
        for group, _, param in self._all_params():
            if param not in taken:
                continue
            attached = before.get(param, {})
            loaded = {key: attached[key] for key in _EWC_STATE if attached.get(key) is not None}
            if taken[param].get("fisher") is not None:
                for key in _BESIDE_CODES:
                    loaded.pop(key, None)
            for key, value in taken[param].items():
                loaded[key] = self._loaded(key, value, param, group)
            if loaded:
                self.state[param] = loaded
            if taken[param].get("fisher") is not None:
                self._borrowed[param] = taken[param]["fisher"]

    def _loaded(self, key: str, value: Any, param: Tensor, group: Group) -> Any:
        if not isinstance(value, Tensor):
            return value
        if key == "step":  # where it lies; the other optimizer goes on counting in its own
            return value.clone()
        # detach() makes a new tensor, so what was copied here does not count as borrowed.
        is_read_only = key in _EWC_STATE and group["batch_fisher_decay"] is None
        return (
            value.to(param.device) if is_read_only else value.detach().to(param.device, copy=True)
        )


def _with_strides(codes: Tensor, strides: Any) -> Tensor:
    """``codes`` laid out as they were when their blocks were made."""
    if not isinstance(strides, Tensor) or codes.stride() == tuple(strides.tolist()):
        return codes
    laid = torch.empty_strided(
        codes.shape, strides.tolist(), dtype=codes.dtype, device=codes.device
    )
    return laid.copy_(codes)


def _stays_on_device(value: float | Tensor, group: Group) -> bool:
    """Whether the kernels read it, so that a captured graph sees it change."""
    return group["capturable"] and isinstance(value, Tensor) and value.device.type == "cuda"


def _attach(entry: Tensor, param: Tensor, dtype: torch.dtype | None, own: set[int]) -> Tensor:
    """``entry`` on the parameter's device and laid out like it, not in the parameters' memory."""
    dtype = dtype or entry.dtype
    if dtype == torch.float64:
        # A step computes in the parameter's precision, and one float64 would keep kernels away.
        dtype = reference.compute_dtype(param)
    laid = ops.lay_out_like(entry.detach().to(param.device, dtype), param)
    return laid.clone() if laid.untyped_storage().data_ptr() in own else laid


def _nonfinite(work: list[Work]) -> str:
    for launch, grads, _ in work:
        for name, grad in zip(launch.table.names, grads.tensors, strict=True):
            count = int((~torch.isfinite(grad)).sum())
            if count > 0:
                return f"grad of {name}: expected finite values, got {count} that are not"
    return "grads: expected a finite norm, got one that overflows"


def _on(value: float | Tensor, device: torch.device) -> float | Tensor:
    return value.to(device) if isinstance(value, Tensor) else value


def _sum(penalties: list[Tensor]) -> Tensor:
    if not penalties:
        return torch.zeros(())
    total = penalties[0]
    for penalty in penalties[1:]:
        total = total + penalty.to(total.device)
    return total
