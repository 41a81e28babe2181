"""Optimizers by name, and which parameters their weight decay shrinks."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RAdam
from torch.optim.optimizer import ParamsT

from medattn.errors import InputError

Closure = Callable[[], float]


def make_optimizer(
    name: str, parameters: nn.Module | ParamsT, lr: float, weight_decay: float = 0.0, momentum: float = 0.9
) -> Optimizer:
    """One of `OPTIMIZERS`: adamw, lamb, radam_lookahead, sgd (Nesterov).

    parameters: a network, of which `parameter_groups` chooses what decays, or anything torch's optimizers
    take; there `weight_decay` is for the groups that state none. momentum: of sgd alone, 0 for none.
    """
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"unknown optimizer {name!r}{hint} (there are {', '.join(OPTIMIZERS)})")
    groups = parameter_groups(parameters, weight_decay) if isinstance(parameters, nn.Module) else parameters
    return OPTIMIZERS[name](groups, lr, weight_decay, momentum)


def parameter_groups(
    network: nn.Module, weight_decay: float, skip: Collection[str] = ()
) -> list[dict[str, Any]]:
    """The trainable parameters in two groups, with and without weight decay, each in the network's order.

    Without: parameters of at most one axis (biases, norms, LayerScale), those whose full or last name is in
    `skip`, and those a module of the network names so in a method `no_weight_decay() -> set[str]`, relative
    to itself. A shared parameter is in the group without if any of its names is. An empty group is left out.
    """
    exempt = _exempt(network, skip)
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in network.parameters():
        if parameter.requires_grad:
            (spared if parameter.ndim <= 1 or parameter in exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Lamb(Optimizer):
    """Adam whose step, for every tensor, is as long as the tensor's own norm times the rate.

    LAMB, algorithm 2 of You et al., ICLR 2020 (arXiv:1904.00962), with bias correction, phi(x) = x and weight
    decay inside the step that is normalised. A tensor or a step of norm 0 is not rescaled. As in the authors'
    code, tensors without weight decay take Adam's step as it is, unless `always_adapt`.

    max_grad_norm: scales gradients down to this norm over all groups, as the authors' code does with 1; None
    where the training loop clips. Not for sparse or complex parameters, and lr is a number.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        always_adapt: bool = False,
    ) -> None:
        found = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        wrong = [f"{option} must be at least 0, got {value}" for option, value in found.items() if value < 0]
        if not all(0 <= beta < 1 for beta in betas):
            wrong.append(f"betas must be at least 0 and below 1, got {betas}")
        if max_grad_norm is not None and max_grad_norm <= 0:
            wrong.append(f"max_grad_norm must be above 0, got {max_grad_norm}")
        if wrong:
            raise InputError(*wrong)
        self.max_grad_norm = max_grad_norm
        super().__init__(params, found | {"betas": betas, "always_adapt": always_adapt})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"max_grad_norm": self.max_grad_norm}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Closure) -> float: ...

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """One update; a parameter without gradient rests."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        excess = self._excess()
        for group in self.param_groups:
            if params := _with_gradient(group):
                self._update(group, params, excess)
        return loss

    def _excess(self) -> Tensor | None:
        """How many times longer than `max_grad_norm` all gradients together are, at least 1."""
        grads = [grad for group in self.param_groups for grad in _gradients(group["params"])]
        if self.max_grad_norm is None or not grads:
            return None
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        return (norm / self.max_grad_norm).clamp_(min=1.0)

    def _update(self, group: dict[str, Any], params: list[Tensor], excess: Tensor | None) -> None:
        updates = self._updates(group, params, excess)
        if group["weight_decay"] or group["always_adapt"]:
            lengths = torch.stack(torch._foreach_norm(params))
            norms = torch.stack(torch._foreach_norm(updates))
            ratios = torch.where((lengths > 0) & (norms > 0), lengths / norms, 1.0)
            torch._foreach_addcmul_(params, updates, (-group["lr"] * ratios).unbind())
        else:
            torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _updates(
        self, group: dict[str, Any], params: list[Tensor], excess: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Adam's steps at rate 1 with weight decay, in new tensors; moves the moments on."""
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
        grads = _gradients(params)
        if excess is not None:
            grads = list(torch._foreach_div(grads, excess))  # not in place: gradients stay as they came
        means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        # both bias corrections in the numbers: two passes over the tensors less than dividing the moments
        steps = [state["step"].item() for state in states]
        roots = [(1 - beta2**step) ** 0.5 for step in steps]
        below = torch._foreach_sqrt(squares)
        torch._foreach_add_(below, [group["eps"] * root for root in roots])
        updates = torch._foreach_mul(params, group["weight_decay"])
        scales = [root / (1 - beta1**step) for root, step in zip(roots, steps, strict=True)]
        torch._foreach_addcdiv_(updates, means, below, scales)
        return updates


class Lookahead(Optimizer):
    """Every k steps of `base`, slow weights go a share alpha of the way to its weights, and it goes on there.

    Zhang et al., NeurIPS 2019 (arXiv:1907.08610): the slow weights start as the weights before the first
    step, and the moments of `base` are kept. timm's starts them at the first synchronisation, which therefore
    changes nothing. Steps are counted for each parameter, over those in which it has a gradient.

    Groups and state are the base's own, so that rates set here reach it and one state dict holds both.
    """

    def __init__(self, base: Optimizer, k: int = 6, alpha: float = 0.5) -> None:
        if k < 1 or not 0 <= alpha <= 1:
            raise InputError(f"Lookahead needs k of at least 1 and alpha from 0 to 1, got {k=}, {alpha=}")
        self.base = base
        super().__init__(base.param_groups, base.defaults | {"lookahead_k": k, "lookahead_alpha": alpha})
        self.__setstate__({"param_groups": base.param_groups, "state": base.state})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also the end of `load_state_dict`, which makes new groups and a new state."""
        super().__setstate__(state)
        self.base.__setstate__({"param_groups": self.param_groups, "state": self.state})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Closure) -> float: ...

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """One step of the base, and of the slow weights where it is their turn."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = [(group, _with_gradient(group)) for group in self.param_groups]
        # kept aside until the base has stepped: it takes a state that is not empty for its own
        start = {p: p.clone() for _, params in groups for p in params if "slow" not in self.state.get(p, ())}
        self.base.step()
        for p, weights in start.items():
            # a plain number: loading would cast a tensor to the parameter's type and device
            self.state[p] |= {"slow": weights, "fast_steps": 0}
        for group, params in groups:
            self._synchronise(group, params)
        return loss

    def _synchronise(self, group: dict[str, Any], params: list[Tensor]) -> None:
        due = []
        for p in params:
            self.state[p]["fast_steps"] = (self.state[p]["fast_steps"] + 1) % group["lookahead_k"]
            if self.state[p]["fast_steps"] == 0:
                due.append(p)
        if due:
            slow = [self.state[p]["slow"] for p in due]
            torch._foreach_lerp_(slow, due, group["lookahead_alpha"])
            for p, weights in zip(due, slow, strict=True):  # sharded ones have no _foreach_copy_
                p.copy_(weights)


def _exempt(network: nn.Module, skip: Collection[str]) -> set[nn.Parameter]:
    """The parameters named in `skip`, or by a module of the network."""
    named = [(network, skip)]
    for module in network.modules():
        if callable(own := getattr(module, "no_weight_decay", None)):
            named.append((module, own()))
    return {
        parameter
        for module, names in named
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if name in names or name.rpartition(".")[2] in names
    }


def _with_gradient(group: dict[str, Any]) -> list[Tensor]:
    return [p for p in group["params"] if p.grad is not None]


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


OPTIMIZERS: dict[str, Callable[[ParamsT, float, float, float], Optimizer]] = {
    "adamw": lambda groups, lr, decay, _: AdamW(groups, lr, weight_decay=decay),
    "lamb": lambda groups, lr, decay, _: Lamb(groups, lr, weight_decay=decay),
    # RAdam's authors decay beside the step; torch does by default inside
    "radam_lookahead": lambda groups, lr, decay, _: Lookahead(
        RAdam(groups, lr, weight_decay=decay, decoupled_weight_decay=True)
    ),
    "sgd": lambda groups, lr, decay, momentum: SGD(
        groups, lr, momentum=momentum, nesterov=momentum > 0, weight_decay=decay
    ),
}
