"""Networks by name: `create(name, ...)`, `names(pattern)`."""

from medattn.networks.registry import create, names

__all__ = ["create", "names"]
