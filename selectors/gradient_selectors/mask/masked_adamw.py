"""AdamW whose moments live on unmasked weights only: memory falls with density, masked weights never change.

What may move is a set of units: single weights, or whole leading rows of a parameter. The moments of a parameter are
compact tensors over its kept units, beside the units' positions in int32: 12 bytes for each kept weight, with rows a
little over 8, where torch's AdamW holds 8 for every weight. At 5 % density that is 7.5 % of it.

Every weight has its own age. A weight that joins at a change of the mask begins as under a fresh AdamW: zero moments
and a bias correction that counts from its joining. (Under the old step count its first steps would be several
learning rates long, for its second moment is slower to fill than its first.) One that leaves and comes back begins
again. Units that joined together form a cohort and lie together, so ages cost two numbers for each cohort.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradient_selectors.capture.shards import is_sharded, lying_as, own_rows
from gradient_selectors.mask.anticipating import Usual, moment_sums, values_of_kept
from gradient_selectors.mask.cohorts import (
    FIELDS,
    OF_UNITS,
    ages,
    at_first,
    count_moved,
    empty_state,
    per_unit,
    spread,
    state_between,
)
from gradient_selectors.mask.rule import Granularity, positions_of, unit_size
from gradient_selectors.preconditioner import Preconditioner, plain
from gradient_selectors.world.base import Alone, World
from gradient_selectors.world.deal import own_span


@dataclass(frozen=True)
class MaskChange:
    """What a new mask changed, in weights.

    Attributes:
        kept: weights that may move now.
        joined: of these, the ones that could not before.
        left: weights that could move before and cannot now.
    """

    kept: int
    joined: int
    left: int

    @property
    def churn(self) -> float:
        """Share of the mask that is new."""
        return self.joined / self.kept if self.kept else 0.0


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW on the weights that a mask keeps. Until the first `replace_mask` nothing moves.

    Examples:
        >>> from gradient_selectors import MaskedAdamW
        >>> layer = torch.nn.Linear(4, 2, bias=False)
        >>> optimizer = MaskedAdamW(layer.named_parameters(), lr=1e-3)
        >>> change = optimizer.replace_mask({"weight": torch.eye(2, 4, dtype=torch.bool)})
        >>> change.kept, optimizer.density
        (2, 0.25)

    Of parameters that lie in rows on several ranks each has the moments of its own rows. A change of the mask and
    `load_state_dict` are then calls of all ranks, and so is what says so.

    State of a parameter with m kept units of s weights in c cohorts: `kept` (m,) int32 positions, `exp_avg` and
    `exp_avg_sq` (m, s) in the parameter's dtype, `step` () int64 updates made, `cohort_sizes` (c,) and `cohort_joined`
    (c,) int64: how many units joined at which step.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        granularity: Granularity = "weight",
        world: World | None = None,
    ) -> None:
        """`params`: (name, parameter) pairs, or groups of them; masks go by these names.

        `world`: the ranks, where parameters lie in rows on them; else it counts for nothing. Raises ValueError for
        parameters without names, or that are not contiguous, and for rows without a world.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if any("param_names" not in group for group in self.param_groups):
            raise ValueError("MaskedAdamW needs named parameters; pass (name, parameter) pairs")
        self.granularity = granularity
        self.parameters = parameters_by_name(self.param_groups)
        for name, parameter in self.parameters.items():
            if not parameter.is_contiguous():
                raise ValueError(f"parameter {name} is not contiguous; store it so")
        lies_in_rows = any(map(is_sharded, self.parameters.values()))
        if lies_in_rows and world is None:
            raise ValueError("the parameters lie in rows on several ranks; give MaskedAdamW their world")
        self.world: World = world if lies_in_rows and world is not None else Alone()
        self._kept = dict.fromkeys(self.parameters, 0)  # weights that may move, of all ranks

    @torch.no_grad()
    def replace_mask(self, masks: Mapping[str, Tensor]) -> MaskChange:
        """Let the weights move where the mask of each parameter (bool, in its shape) is true, and no others.

        Moments of weights that stay are kept; those that join begin with none. Raises ValueError, before anything
        changes, if a parameter's mask is missing or does not fit.
        """
        return self.replace_units({name: self._selected_units(name, masks.get(name)) for name in self.parameters})

    @torch.no_grad()
    def replace_units(self, units: Mapping[str, Tensor]) -> MaskChange:
        """`replace_mask` by the positions of the units of each parameter that may move, (m,) int32, ascending.

        Where parameters lie in rows, the positions are among this rank's.
        """
        counts = [self._replace(name, units[name]) for name in self.parameters]
        sums = self.world.sum(torch.tensor(counts, device=next(iter(self.parameters.values())).device))
        weights = [self._unit_size(name) * of_name.cpu() for name, of_name in zip(self.parameters, sums, strict=True)]
        self._kept = {name: int(of_name[0]) for name, of_name in zip(self.parameters, weights, strict=True)}
        kept, joined, left = torch.stack(weights).sum(0).tolist()
        return MaskChange(kept, joined, left)

    @property
    def density(self) -> float:
        """Share of all weights that may move; 0 before the first mask."""
        return sum(self._kept.values()) / sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def densities(self) -> dict[str, tuple[int, int]]:
        """Of each parameter, the weights that may move and all of them."""
        return {name: (self._kept[name], parameter.numel()) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of the kept weights, as torch's AdamW would make it; masked ones are not even read."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is not None and self._kept[name]:
                    _update(own_rows(parameter), own_rows(parameter.grad), self.state[parameter], group)
        return loss

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of masked weights, so that clipping measures only what will be applied."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                continue
            state = self.state.get(parameter)
            if not state:
                parameter.grad.zero_()
                continue
            rows = own_rows(parameter.grad)
            kept, grad = state["kept"].long(), rows.reshape(-1, state["exp_avg"].shape[1])
            grads = grad[kept]
            parameter.grad = lying_as(parameter, grad.zero_().index_copy_(0, kept, grads).view(rows.shape))

    def mask(self, name: str) -> Tensor:
        """The mask of a parameter as numbers: 1 where it may move, else 0. As a P, plain inner products.

        Of a parameter in rows, that of this rank's.
        """
        own, state = own_rows(self.parameters[name]), self.state.get(self.parameters[name])
        return spread(own, state, torch.ones_like(state["exp_avg"]), 0.0) if state else torch.zeros_like(own)

    @torch.no_grad()
    def preconditioner(self, name: str) -> Tensor:
        """P of `preconditioner` from the current moments, float32, zero where masked: a mask is an element-wise P.

        Learning rates count relative to the largest one. Units without any update yet have no P of their own and get
        the mean of the parameter's others; a parameter without any gets its mask. Weights without any gradient have
        P = 0, as in `preconditioner.adam_preconditioner`. Of a parameter in rows, P of this rank's: a call of all.
        """
        return self._anticipated(name, self._usual([name])[name])

    @torch.no_grad()
    def second_moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Where a second moment is known, (m,) positions of units, and what it is, (m, s) float32, corrected for bias.

        Units without any update yet have none. Of a parameter in rows, those of this rank's.
        """
        state = self.state.get(self.parameters[name]) or self._empty_state(name)
        ages_c = ages(state)
        settled_m1 = per_unit(state, 1 - self._group_of(name)["betas"][1] ** ages_c)
        second = state["exp_avg_sq"].float() / settled_m1
        if bool((ages_c > 0).all()):
            return state["kept"], second
        moved = (settled_m1 > 0).expand(len(second), 1).squeeze(1).nonzero().squeeze(1)
        return state["kept"][moved], second[moved]

    def current_preconditioner(self, *, warm: bool) -> Preconditioner:
        """P of the next step: `preconditioner`, or while the moments cannot be trusted the mask alone.

        Before there is any mask, everything counts: the first one is chosen from what the first step finds. Where
        parameters lie in rows, it is of this rank's, and to ask for it a call of all ranks; to call it is none.
        """
        if not self.density:
            return plain
        if not warm:
            return self.mask
        if self.world.size == 1:
            return self.preconditioner
        usual = self._usual(list(self.parameters))
        return lambda name: self._anticipated(name, usual[name])

    def state_dict(self) -> dict[str, Any]:
        """Flat, as `<parameter name>.<field>`, and without the settings of groups: these stay as they are given.

        Tensors share memory with the live ones, but for `kept` of parameters in rows: of these it is this rank's state,
        whose positions are those in the whole parameter.
        """
        states = {name: self.state[p] for name, p in self.parameters.items() if self.state.get(p)}
        if self.world.size > 1:
            states = {name: at_first(state, self._span(name)[0]) for name, state in states.items()}
        return {f"{name}.{field}": state[field] for name, state in states.items() for field in FIELDS}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a copy of what `state_dict` returned, or of a whole state: a rank takes its own of it.

        Raises ValueError, naming a parameter that does not fit.
        """
        names = {key.rpartition(".")[2] for key in state_dict}
        if "exp_avg" in names and "kept" not in names:
            raise ValueError("it was made without a mask; go on without one")
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state_dict.items():
            name, _, field = key.rpartition(".")
            found.setdefault(name, {})[field] = tensor
        for name, fields in found.items():
            self._check_fields(name, fields)
        self.state.clear()
        for name, fields in found.items():
            parameter, (first, last) = self.parameters[name], self._span(name)
            if self.world.size > 1:
                fields = at_first(state_between(fields, first, last), -first)
            self.state[parameter] = {
                field: fields[field].clone().to(parameter.device if field in OF_UNITS else "cpu") for field in FIELDS
            }
        own = [self.state[p]["exp_avg"].numel() if p in self.state else 0 for p in self.parameters.values()]
        counts = self.world.facts(own)
        self._kept = {name: sum(ranks) for name, ranks in zip(self.parameters, zip(*counts, strict=True), strict=True)}

    def _group_of(self, name: str) -> dict[str, Any]:
        return next(group for group in self.param_groups if name in group["param_names"])

    def _unit_size(self, name: str) -> int:
        return unit_size(self.parameters[name].shape, self.granularity)

    def _empty_state(self, name: str) -> dict[str, Tensor]:
        return empty_state(own_rows(self.parameters[name]), self._unit_size(name))

    def _span(self, name: str) -> tuple[int, int]:
        """Which of a parameter's units are this rank's, `first:last`."""
        shape, count = self.parameters[name].shape, self.parameters[name].numel() // self._unit_size(name)
        if self.world.size == 1:
            return 0, count
        first, last = own_span(self.world, shape[0])
        return first * count // shape[0], last * count // shape[0]

    def _usual(self, names: Sequence[str]) -> dict[str, Usual | None]:
        """What is usual in some parameters, None where nothing has moved: a call of all ranks."""
        states = {name: self.state.get(self.parameters[name]) or self._empty_state(name) for name in names}
        counts = self.world.facts([count_moved(state) for state in states.values()])
        moved = {n: sum(ranks) * self._unit_size(n) for n, ranks in zip(names, zip(*counts, strict=True), strict=True)}
        sums = self.world.sum(torch.stack([moment_sums(state, self._group_of(n)) for n, state in states.items()]))
        second, seen = (sums[:, 0] / sums[:, 1].clamp(min=1)).float(), sums[:, 1].clamp(min=1)
        at = {name: i for i, name in enumerate(names)}
        joined = [name for name in names if 0 < moved[name] < self._kept[name]]
        values = dict[str, Tensor]()
        if joined:
            own = [self._values_of_kept(name, second[at[name]]).sum().double() for name in joined]
            totals = self.world.sum(torch.stack(own))
            values = {name: total / seen[at[name]] for name, total in zip(joined, totals, strict=True)}
        return {name: Usual(second[at[name]], values.get(name)) if moved[name] else None for name in names}

    def _values_of_kept(self, name: str, usual: Tensor) -> Tensor:
        """P of a parameter's kept units; learning rates count relative to the largest one."""
        group, top_rate = self._group_of(name), max(g["lr"] for g in self.param_groups) or 1.0
        rate = group["lr"] / top_rate if group["lr"] else 1.0
        return values_of_kept(self.state[self.parameters[name]], group, rate, usual)

    def _anticipated(self, name: str, usual: Usual | None) -> Tensor:
        """P of a parameter, or of this rank's rows of it."""
        if usual is None:
            return self.mask(name).float()
        parameter = self.parameters[name]
        state, values = self.state[parameter], self._values_of_kept(name, usual.second)
        if usual.value is not None:
            has_moved = per_unit(state, ages(state)).expand(len(values), 1) > 0
            values = torch.where(has_moved, values, usual.value.to(values))
        return spread(own_rows(parameter), state, values, 0.0)

    def _selected_units(self, name: str, mask: Tensor | None) -> Tensor:
        """Positions of the units that a mask selects, (m,) int32."""
        parameter = self.parameters[name]
        if mask is None or mask.dtype != torch.bool or mask.shape != parameter.shape:
            raise ValueError(f"the mask of {name} must be bool of shape {tuple(parameter.shape)}")
        units = mask.to(parameter.device).reshape(-1, self._unit_size(name))
        if units.shape[1] > 1 and not torch.equal(units.all(1), units.any(1)):
            raise ValueError(f"the mask of {name} cuts through a row; use granularity='weight'")
        first, last = self._span(name)
        return positions_of(units[first:last, 0], name)

    def _replace(self, name: str, chosen: Tensor) -> tuple[int, int, int]:
        """New state of one parameter; returns units kept, joined and left."""
        parameter = self.parameters[name]
        state = self.state.get(parameter) or self._empty_state(name)
        first, last = self._span(name)
        new_n = torch.zeros(last - first, dtype=torch.bool, device=parameter.device)
        new_n.scatter_(0, chosen.long(), True)
        stays_m = new_n.index_select(0, state["kept"])
        new_n.scatter_(0, state["kept"].long(), False)
        joined, stays = chosen[new_n.index_select(0, chosen)], stays_m.nonzero().squeeze(1)
        ends_c = torch.searchsorted(stays, state["cohort_sizes"].cumsum(0).to(stays.device)).cpu()
        sizes_c = torch.cat([ends_c, torch.tensor([len(stays) + len(joined)])]).diff(prepend=torch.tensor([0]))
        joined_c = torch.cat([state["cohort_joined"], state["step"][None]])
        fresh = state["exp_avg"].new_zeros(len(joined), state["exp_avg"].shape[1])
        self.state[parameter] = {
            "step": state["step"],
            "kept": torch.cat([state["kept"].index_select(0, stays), joined]),
            "exp_avg": torch.cat([state["exp_avg"].index_select(0, stays), fresh]),
            "exp_avg_sq": torch.cat([state["exp_avg_sq"].index_select(0, stays), fresh]),
            "cohort_sizes": sizes_c[sizes_c > 0],
            "cohort_joined": joined_c[sizes_c > 0],
        }
        return int(sizes_c.sum()), len(joined), len(stays_m) - len(stays)

    def _check_fields(self, name: str, fields: Mapping[str, Tensor]) -> None:
        parameter = self.parameters.get(name)
        if parameter is None or set(fields) != set(FIELDS):
            raise ValueError(f"the state of {name} is not that of a masked optimizer with this parameter")
        size = self._unit_size(name)
        kept, moments, sizes_c = fields["kept"], fields["exp_avg"], fields["cohort_sizes"]
        fits = (
            moments.shape == fields["exp_avg_sq"].shape == (len(kept), size)
            and kept.dtype == torch.int32
            and sizes_c.shape == fields["cohort_joined"].shape
            and int(sizes_c.sum()) == len(kept)
            and (not len(kept) or (int(kept.min()) >= 0 and int(kept.max()) < parameter.numel() // size))
        )
        if not fits:
            raise ValueError(f"the state of {name} does not fit its shape {tuple(parameter.shape)} or itself")


def parameters_by_name(groups: Iterable[Mapping[str, Any]]) -> dict[str, nn.Parameter]:
    """The parameters of an optimizer's groups that were given as (name, parameter) pairs, in their order."""
    return {
        name: parameter
        for group in groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _update(parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: Mapping[str, Any]) -> None:
    """Gather, update, scatter: dense memory is touched at the kept units only."""
    state["step"] += 1
    (beta1, beta2), ages_c = group["betas"], ages(state)
    exp_avg, exp_avg_sq, kept = state["exp_avg"], state["exp_avg_sq"], state["kept"].long()
    weights = parameter.view(-1, exp_avg.shape[1])
    grads = grad.reshape(weights.shape)[kept]
    exp_avg.lerp_(grads, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(per_unit(state, (1 - beta2**ages_c).sqrt())).add_(group["eps"])
    step = (exp_avg / denominator).mul_(per_unit(state, group["lr"] / (1 - beta1**ages_c)))
    weights.index_copy_(0, kept, weights[kept].mul_(1 - group["lr"] * group["weight_decay"]).sub_(step))
