"""Metrics: boolean arrays in, floats out.

The rule for empty masks, the same everywhere: where both masks are empty they agree (Dice and surface Dice 1,
distances 0); where one is empty they do not (Dice and surface Dice 0, distances infinite).
"""

from medattn.metrics.overlap import dice, volume_ml
from medattn.metrics.scores import (
    OrganSummary,
    Score,
    Statistic,
    mean_over_organs,
    score_case,
    summarise,
)
from medattn.metrics.surface import (
    SurfaceDistances,
    average_surface_distance,
    hausdorff95,
    surface_dice,
    surface_distances,
)

__all__ = [
    "OrganSummary",
    "Score",
    "Statistic",
    "SurfaceDistances",
    "average_surface_distance",
    "dice",
    "hausdorff95",
    "mean_over_organs",
    "score_case",
    "summarise",
    "surface_dice",
    "surface_distances",
    "volume_ml",
]
