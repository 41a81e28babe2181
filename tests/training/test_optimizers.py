"""Optimizers: equal to timm's, to one step by hand, and to themselves after a resume; groups are complete."""

from __future__ import annotations

import copy
import math
import pickle
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RAdam

from medattn.errors import InputError
from medattn.training.checkpoint import load_checkpoint, save_checkpoint
from medattn.training.loop import State, averaged_model
from medattn.training.optimizers import OPTIMIZERS, Lamb, Lookahead, make_optimizer, parameter_groups

STEPS = 20


def small_network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Matrices, vectors, a matrix of zeros, one parameter that is frozen and one without gradient."""
    torch.manual_seed(seed)
    last = nn.Linear(3, 3)
    nn.init.zeros_(last.weight)
    last.bias.requires_grad_(False)
    network = nn.Sequential(nn.Conv2d(2, 5, 3), nn.GroupNorm(1, 5), nn.Flatten(), nn.Linear(45, 3), last)
    network.register_parameter("unused", nn.Parameter(torch.randn(2, 3)))
    return network.to(dtype)


def train(network: nn.Module, optimizer: Optimizer, steps: int = STEPS, scale: float = 1.0) -> list[float]:
    """Losses, `scale` times a squared error, of steps with a falling rate set from outside."""
    dtype = next(network.parameters()).dtype
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / steps / 2)
        images = torch.randn(4, 2, 5, 5, dtype=torch.float64).to(dtype)
        loss = scale * (network(images) - images.mean((2, 3))[:, :1]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(make: Any, dtype: torch.dtype, scale: float) -> Tensor:
    """All weights after `STEPS` steps, in float64."""
    network = small_network(dtype=dtype)
    optimizer = make(parameter_groups(network, 0.1))
    torch.manual_seed(1)
    train(network, optimizer, scale=scale)
    return nn.utils.parameters_to_vector(network.parameters()).detach().double()


def assert_same_training(ours: Any, theirs: Any, scale: float = 1.0) -> None:
    """To rounding in float64; in float32 with at most twice the error of theirs."""
    truth = trained(theirs, torch.float64, scale)
    torch.testing.assert_close(trained(ours, torch.float64, scale), truth, rtol=1e-11, atol=1e-12)
    band = torch.finfo(torch.float32).eps * truth.abs().max()
    budget = 2 * ((trained(theirs, torch.float32, scale) - truth).abs().max() + band)
    assert (trained(ours, torch.float32, scale) - truth).abs().max() <= budget


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("always_adapt", [False, True])
def test_lamb_is_timms(timm: ModuleType, max_grad_norm: float | None, always_adapt: bool) -> None:
    options: dict[str, Any] = {"lr": 0.05, "max_grad_norm": max_grad_norm, "always_adapt": always_adapt}
    timms = import_module("timm.optim").Lamb
    # at this scale most gradients are longer than 1
    assert_same_training(lambda p: Lamb(p, **options), lambda p: timms(p, **options), scale=30.0)


def test_lookahead_is_timms_started_from_the_first_weights(timm: ModuleType) -> None:
    def theirs(groups: list[dict[str, Any]]) -> Optimizer:
        base = RAdam(groups, 0.0, decoupled_weight_decay=True)
        for group in groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        base.step()  # moves nothing: RAdam makes its state only where there is none
        optimizer: Any = import_module("timm.optim").Lookahead(base)
        optimizer.sync_lookahead()  # moves nothing: the slow weights become the weights
        for p, state in base.state.items():
            state["step"].zero_()
            p.grad = None
        return optimizer  # type: ignore[no-any-return]

    assert_same_training(lambda p: Lookahead(RAdam(p, 0.05, decoupled_weight_decay=True)), theirs)


def test_timms_first_synchronisation_changes_nothing(timm: ModuleType) -> None:
    """The one difference, from the paper's: what timm's defaults do for the first k steps."""

    def first_steps(make: Any) -> Tensor:
        weight = nn.Parameter(torch.tensor([[1.0]]))
        optimizer = make(SGD([weight], 0.1))
        for _ in range(6):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.detach()

    torch.testing.assert_close(first_steps(import_module("timm.optim").Lookahead), torch.tensor([[0.4]]))
    torch.testing.assert_close(first_steps(Lookahead), torch.tensor([[0.7]]))


def test_one_step_of_lamb_by_hand() -> None:
    """Bias correction makes Adam's first step g / (|g| + eps), here the gradient's sign."""
    weight, bias = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in ([[3.0, 4.0]], [3.0, 4.0]))
    zero = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    groups = [{"params": [weight, zero], "weight_decay": 0.5}, {"params": [bias], "weight_decay": 0.0}]
    for parameter in (weight, bias, zero):
        parameter.grad = torch.full_like(parameter, -2.0)
    Lamb(groups, 0.1, eps=0.0).step()
    # the step is sign + decay * w = (0.5, 1), stretched to the weight's norm 5
    stretch = 5 / math.hypot(0.5, 1)
    torch.testing.assert_close(weight.data[0], torch.tensor([3 - 0.05 * stretch, 4 - 0.1 * stretch]).double())
    torch.testing.assert_close(bias.data, torch.tensor([3.1, 4.1]).double())
    torch.testing.assert_close(zero.data, torch.tensor([[0.1]]).double())


def test_lambs_step_does_not_depend_on_the_scale_of_gradients() -> None:
    def stepped(scale: float) -> Tensor:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(3, 4))
        weight.grad = scale * torch.randn(3, 4)
        Lamb([weight], 0.1, eps=0.0, weight_decay=0.1).step()
        return weight.detach()

    torch.testing.assert_close(stepped(1.0), stepped(1000.0))


def test_lamb_clips_over_all_groups_and_leaves_gradients_as_they_came() -> None:
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    for weight, value in zip(weights, (3.0, 4.0), strict=True):
        weight.grad = torch.tensor([value])
    optimizer = Lamb([{"params": [weight]} for weight in weights], 0.1, max_grad_norm=1.0)
    optimizer.step()
    assert [optimizer.state[w]["exp_avg"].item() for w in weights] == pytest.approx([0.06, 0.08])
    assert nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None]) == 5


def test_lookahead_by_hand() -> None:
    """Constant gradient 1, rate 0.1, k 3, alpha 0.5: three steps forward, half of them back."""
    weight = nn.Parameter(torch.tensor([[1.0]], dtype=torch.float64))
    optimizer = Lookahead(SGD([weight], 0.1), k=3)
    seen = []
    for _ in range(7):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        seen.append(weight.item())
    assert seen == pytest.approx([0.9, 0.8, 0.85, 0.75, 0.65, 0.7, 0.6])


def test_a_step_returns_the_loss_of_its_closure() -> None:
    weight = nn.Parameter(torch.tensor([[2.0]]))

    def closure() -> float:
        weight.grad = 2 * weight.detach()
        return weight.square().sum().item()

    for optimizer in (Lamb([weight], 0.0), Lookahead(SGD([weight], 0.0))):
        assert optimizer.step(closure) == 4.0


def copies(optimizer: Lookahead) -> list[Any]:
    loaded = Lookahead(SGD(optimizer.param_groups[0]["params"], 9.0))
    loaded.load_state_dict(optimizer.state_dict())
    return [optimizer, loaded, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]


@pytest.mark.parametrize("index", range(4), ids=["itself", "loaded", "copied", "pickled"])
def test_a_rate_set_from_outside_reaches_the_base(index: int) -> None:
    weight = nn.Parameter(torch.tensor([[1.0]]))
    weight.grad = torch.ones_like(weight)
    first = Lookahead(SGD([weight], 0.0), k=2)
    first.step()
    optimizer = copies(first)[index]
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    assert optimizer.param_groups[0]["lookahead_k"] == 2
    (own,) = optimizer.param_groups[0]["params"]
    own.grad = torch.ones_like(own)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert own.item() == 0.75  # the second step of two: 0.5 forward, half of it back


def test_a_group_added_later_reaches_the_base() -> None:
    optimizer = Lookahead(SGD([nn.Parameter(torch.ones(2))], 0.1))
    late = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(1)
    optimizer.step()
    assert late.item() == pytest.approx(0.9)


@pytest.mark.parametrize(("name", "momentum"), [*((name, 0.9) for name in OPTIMIZERS), ("sgd", 0.0)])
@pytest.mark.parametrize("steps", [8, 0])
def test_training_goes_on_to_the_bit(tmp_path: Path, name: str, momentum: float, steps: int) -> None:
    """Eight steps leave Lookahead between two synchronisations."""

    def parts(seed: int) -> Any:
        network = small_network(seed)
        del network.unused  # a parameter without gradient has no state to save
        optimizer = make_optimizer(name, network, 0.05, 0.1, momentum)
        return network, averaged_model(network, 0.9), optimizer, State()

    first, second = parts(0), parts(99)
    train(first[0], first[2], steps)
    save_checkpoint(tmp_path / "last", *first)
    expected = train(first[0], first[2], 7)
    load_checkpoint(tmp_path / "last", *second)
    assert train(second[0], second[2], 7) == expected
    for theirs, ours in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(theirs, ours)
        assert first[2].state.get(theirs, {}).keys() == second[2].state.get(ours, {}).keys()
        for key, value in first[2].state.get(theirs, {}).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[2].state[ours][key]))


def test_names_choose_constructors() -> None:
    network = small_network()
    made = {name: make_optimizer(name, network, 0.1, 0.2, 0.8) for name in OPTIMIZERS}
    assert {name: type(optimizer) for name, optimizer in made.items()} == {
        "adamw": AdamW,
        "lamb": Lamb,
        "radam_lookahead": Lookahead,
        "sgd": SGD,
    }
    for optimizer in made.values():
        assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
            (0.1, 0.2),
            (0.1, 0.0),
        ]
    assert made["sgd"].param_groups[0]["momentum"] == 0.8
    assert made["sgd"].param_groups[0]["nesterov"]
    bare = make_optimizer("lamb", network.parameters(), 0.1, 0.2)
    assert [group["weight_decay"] for group in bare.param_groups] == [0.2]


def test_unknown_names_and_values_are_one_sentence() -> None:
    with pytest.raises(InputError, match="unknown optimizer 'lamp'; did you mean 'lamb'"):
        make_optimizer("lamp", nn.Linear(1, 1), 0.1)
    with pytest.raises(InputError, match="k of at least 1 and alpha from 0 to 1, got k=0"):
        Lookahead(SGD(nn.Linear(1, 1).parameters(), 0.1), k=0)
    with pytest.raises(InputError) as caught:
        Lamb(nn.Linear(1, 1).parameters(), -1.0, betas=(0.9, 1.0), max_grad_norm=0.0)
    assert len(caught.value.problems) == 3


class Tables(nn.Module):
    """Parameters that no number of axes tells apart: names do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weight = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
        self.temperature = nn.Parameter(torch.ones(4, 1, 1))

    def no_weight_decay(self) -> set[str]:
        return {"table"}


def spared(network: nn.Module, *skip: str) -> set[str]:
    names = {parameter: name for name, parameter in network.named_parameters()}
    return {names[p] for p in without_decay(parameter_groups(network, 0.1, skip))}


def without_decay(groups: list[dict[str, Any]]) -> set[nn.Parameter]:
    return {p for group in groups if group["weight_decay"] == 0 for p in group["params"]}


def test_names_spare_parameters_in_the_network_and_in_its_modules() -> None:
    assert spared(Tables()) == {"table"}
    nested = nn.ModuleDict({"a": Tables(), "b": nn.ParameterDict({"table": torch.ones(2, 2)})})
    assert spared(nested) == {"a.table"}
    assert spared(nested, "temperature") == {"a.table", "a.temperature"}
    assert spared(nested, "a.weight", "b.table") == {"a.table", "a.weight", "b.table"}
    assert spared(nn.DataParallel(nested)) == {"module.a.table"}


def test_a_shared_parameter_is_spared_by_any_of_its_names() -> None:
    network = nn.ModuleDict({"first": nn.Linear(2, 2, bias=False), "second": nn.Linear(2, 2, bias=False)})
    network["second"].weight = network["first"].weight
    assert spared(network, "second.weight") == {"first.weight"}


def test_an_empty_group_is_left_out() -> None:
    assert [group["weight_decay"] for group in parameter_groups(nn.LayerNorm(3), 0.1)] == [0.0]
    assert [group["weight_decay"] for group in parameter_groups(nn.Linear(3, 3, bias=False), 0.1)] == [0.1]


layers = st.tuples(st.sampled_from(["linear", "norm", "conv", "tables", "shared"]), st.booleans())


@settings(max_examples=50)
@given(st.lists(layers, max_size=8), st.sets(st.sampled_from(["weight", "table", "temperature", "0.weight"])))
def test_every_trainable_parameter_is_in_exactly_one_group(
    chosen: list[tuple[str, bool]], skip: set[str]
) -> None:
    network = nn.Sequential()
    for kind, frozen in chosen:
        made: dict[str, nn.Module] = {
            "linear": nn.Linear(2, 3),
            "norm": nn.LayerNorm(2),
            "conv": nn.Conv2d(1, 1, 1),
            "tables": Tables(),
            "shared": network[0] if len(network) else nn.Identity(),
        }
        network.append(made[kind].requires_grad_(not frozen))
    groups = parameter_groups(network, 0.1, skip)
    found = [p for group in groups for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {p for p in network.parameters() if p.requires_grad}
    place = {p: n for n, p in enumerate(network.parameters())}
    for group in groups:
        assert [place[p] for p in group["params"]] == sorted(place[p] for p in group["params"])
        assert group["params"]
        assert group["weight_decay"] in (0.0, 0.1)
    without = without_decay(groups)
    for name, parameter in network.named_parameters():
        last = name.rpartition(".")[2]
        expected = parameter.ndim <= 1 or last == "table" or {last, name} & skip
        assert (parameter in without) == (bool(expected) and parameter.requires_grad)
