"""`medattn networks`: the table of networks."""

from __future__ import annotations

import json
from argparse import Namespace

from medattn.errors import InputError


def networks(args: Namespace) -> int:
    """List networks with their families and parameter counts; nothing is allocated."""
    from medattn.networks import names
    from medattn.networks.registry import family, task_of
    from medattn_pipelines.progress import print_table

    rows = [(name, family(name), task_of(name), *_counts(name)) for name in names(args.pattern)]
    if args.json:
        keys = ("name", "family", "task", "parameters_2d", "parameters")
        # of networks for images alone, which have no count in 3D, that in 2D
        found = [dict(zip(keys, (*row[:4], row[4] or row[3]), strict=True)) for row in rows]
        print(json.dumps(found, indent=1))
    else:
        header = ("name", "family", "task", "parameters in 2D", "in 3D")
        print_table("", header, rows)
        print("parameters: of segmentation with 1 channel in and 8 out, of classification with 1000 classes,")
        print("of panoptic segmentation with 133")
    return 0


def _counts(name: str) -> tuple[int | None, int | None]:
    """Parameters in 2D and in 3D; None where a network is not made for so many axes."""
    from medattn.networks.registry import task_of

    if task_of(name) in ("classification", "panoptic"):
        return _parameters(name), None
    options = {"in_channels": 1, "out_channels": 8}
    return _parameters(name, spatial_dims=2, **options), _parameters(name, spatial_dims=3, **options)


def _parameters(name: str, **options: int) -> int | None:
    """How many a network has; None if it is not made with these options."""
    import torch

    from medattn.networks import create

    try:
        with torch.device("meta"):
            network = create(name, **options)
    except InputError:
        return None
    return sum(weight.numel() for weight in network.parameters())
