"""Practice cases: synthetic head-and-neck CT with organ labels, drawn from a seed."""

from medattn.data.phantom.anatomy import ORGANS
from medattn.data.phantom.render import Phantom, phantom
from medattn.data.phantom.write import write_phantoms

__all__ = ["ORGANS", "Phantom", "phantom", "write_phantoms"]
