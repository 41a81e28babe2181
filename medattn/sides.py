"""The side check: does the left organ of a pair lie on the patient's left?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from medattn.geometry import Array, Geometry
from medattn.labels import Organ


def side_errors(label: Array, geometry: Geometry, organs: Mapping[int, Organ]) -> list[str]:
    """One sentence per left organ whose centroid lies on the patient's right of its pair's.

    label: integer label map [i, j, k] on `geometry`. organs: voxel value -> organ. Pairs of which the map
    holds only one organ are not judged: the patient may be turned, so neither the grid's middle nor the
    body's says where left begins.
    """
    x_mm = _centroids_x_mm(label, geometry, organs)
    errors = []
    for name, pair in sorted((o.name, o.pair) for o in organs.values() if o.side == "left"):
        if pair in x_mm and name in x_mm and x_mm[name] <= x_mm[pair]:
            errors.append(
                f"{name} lies {x_mm[pair] - x_mm[name]:.1f} mm to the patient's right of {pair}; "
                "expected on the left (names swapped, or the image mirrored?)"
            )
    return errors


def _centroids_x_mm(label: Array, geometry: Geometry, organs: Mapping[int, Organ]) -> dict[str, float]:
    """Organ name -> x of its centroid (LPS, grows to the patient's left), of paired organs that are there."""
    integers = label if label.dtype.kind in "iu" else label.astype(np.int32)
    boxes = ndimage.find_objects(integers, max_label=max(organs, default=0))
    centroids = {}
    for value, organ in organs.items():
        box = boxes[value - 1] if organ.pair is not None and 0 < value <= len(boxes) else None
        if box is not None:
            start = [axis.start for axis in box]
            middle = np.argwhere(integers[box] == value).mean(axis=0) + start
            centroids[organ.name] = float(geometry.to_lps(middle)[0])
    return centroids
