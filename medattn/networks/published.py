"""Names that other implementations of ResNets give to its parts, and ours for them."""

from __future__ import annotations

import re
from collections.abc import Mapping

BLOCK = {
    **{"conv1": "reduce.0", "bn1": "reduce.1", "conv2": "mix.0", "bn2": "mix.1"},
    **{"conv3": "expand.0", "bn3": "expand.1", "downsample": "shortcut"},
}
AROUND = {"conv1": "stem.0", "bn1": "stem.1", "fc": "head"}


def resnet_name(name: str, block: Mapping[str, str] = BLOCK) -> str:
    """Our name of a parameter or buffer that torchvision's ResNet has; any other name as it is.

    Theirs: conv1, bn1, layerN.M.{conv1, bn1, conv2, bn2, conv3, bn3, downsample}, fc. block: what the parts
    of a bottleneck are called there -> here, for authors who changed them.
    """
    if found := re.fullmatch(r"layer(\d)\.(\d+)\.(\w+)\.(.+)", name):
        stage, index, part, rest = found.groups()
        return f"stages.{int(stage) - 1}.{index}.{block.get(part, part)}.{rest}"
    first, _, rest = name.partition(".")
    return f"{AROUND[first]}.{rest}" if first in AROUND else name
