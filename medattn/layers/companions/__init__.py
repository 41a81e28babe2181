"""Published attention modules to compare with: in 2D as published, in 3D derived from it.

One method per file. Each has a class and a function of (channels, spatial_dims, **options) that gives a
module [B, C, *size] -> [B, C, *size] for a network's attention. In 2D, parameters have the published names
and counts; what changes in 3D is derived in each docstring. None stores an N x N map but LESA's flat
form, which is for small maps and refuses others.
"""

from medattn.layers.companions.crisscross import CrissCrossAttention, criss_cross, crisscross_layers
from medattn.layers.companions.dual import ChannelAttention, DualAttention, PositionAttention, dual_layers
from medattn.layers.companions.external import (
    ExternalAttention,
    ExternalBlock,
    MultiHeadExternalAttention,
    external_layers,
)
from medattn.layers.companions.focal import FocalBlock, focal_layers
from medattn.layers.companions.lesa import LESA, lesa_layers
from medattn.layers.companions.map_attention import MapAttention, map_layers
from medattn.layers.companions.non_local import NonLocalBlock, nonlocal_layers
from medattn.layers.companions.psa import PointwiseSpatialAttention, psa_layers

__all__ = [
    "LESA",
    "ChannelAttention",
    "CrissCrossAttention",
    "DualAttention",
    "ExternalAttention",
    "ExternalBlock",
    "FocalBlock",
    "MapAttention",
    "MultiHeadExternalAttention",
    "NonLocalBlock",
    "PointwiseSpatialAttention",
    "PositionAttention",
    "criss_cross",
    "crisscross_layers",
    "dual_layers",
    "external_layers",
    "focal_layers",
    "lesa_layers",
    "map_layers",
    "nonlocal_layers",
    "psa_layers",
]
