"""Networks by name. A variant is a small function that chooses numbers; its name is the network's name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any, TypeVar

from torch import nn

from medattn.errors import InputError

Builder = Callable[..., nn.Module]
BuilderT = TypeVar("BuilderT", bound=Builder)

_BUILDERS: dict[str, Builder] = {}
_TASKS: dict[str, str] = {}  # of those that do not segment volumes or images by organ


def register(build: BuilderT) -> BuilderT:
    """Make `build` available under its function name. A name can be taken once."""
    name = build.__name__
    if name in _BUILDERS:
        raise ValueError(f"network {name!r} is registered twice")
    _BUILDERS[name] = build
    return build


def register_classifier(build: BuilderT) -> BuilderT:
    """The same for a network that classifies images."""
    _TASKS[register(build).__name__] = "classification"
    return build


def register_panoptic(build: BuilderT) -> BuilderT:
    """The same for a network that gives a `medattn.panoptic.PanopticOutput`."""
    _TASKS[register(build).__name__] = "panoptic"
    return build


def names(pattern: str = "*", *, task: str | None = None) -> list[str]:
    """All network names that match a shell pattern, of one task if it is given, sorted."""
    _load_families()
    return sorted(name for name in _BUILDERS if fnmatch(name, pattern) and task in (None, task_of(name)))


def task_of(name: str) -> str:
    """What a network is made for: "segmentation", "classification" or "panoptic"."""
    builder(name)
    return _TASKS.get(name, "segmentation")


def create(name: str, **options: Any) -> nn.Module:
    """Build a network.

    Segmentation networks take spatial_dims (2 or 3), in_channels and out_channels, and map
    [B, in_channels, *size] to [B, out_channels, *size]. Image networks take num_classes (1000 by default)
    and image_size where they depend on it, and map [B, 3, h, w] to [B, num_classes]; panoptic ones (133
    classes by default) to a `PanopticOutput` of maps at 1/4 of the sides. `medattn networks` lists all names.

    Raises InputError for an unknown name or an option that the network does not have.
    """
    try:
        return builder(name)(**options)
    except InputError:
        raise
    except (TypeError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
        if "unexpected keyword argument" in str(error):
            option = str(error).rsplit(" ", 1)[-1]
            raise InputError(f"network {name!r} has no option {option}") from error
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise InputError(f"network {name!r} cannot be built with {given}: {error}") from error


def builder(name: str) -> Builder:
    """The function that builds a network, with its options as parameters."""
    _load_families()
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, _BUILDERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"unknown network {name!r}{hint} (`medattn networks` lists all)")
    return _BUILDERS[name]


def family(name: str) -> str:
    """The family of a network: the module or package of this one that holds it."""
    return builder(name).__module__.split(".")[2]


def _load_families() -> None:
    """Import every module of this package once, so that its networks register."""
    import medattn.networks as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
