"""Images with panoptic labels: where they lie, how they are changed, what a network should say of them.

    source = panoptic_images("coco", "data/coco", "train")
    images = TrainingPanoptic(source, PanopticTransform(size=641), batch_size=64, seed=0)
    for batch in images.batches(start=step, workers=8): ...

Every batch is a function of seed and step alone, so a run resumes at any step, bit for bit, with any number
of worker threads, and several processes share one global batch whatever their number.
"""

from medattn.data.panoptic.colour import ColourPolicy
from medattn.data.panoptic.layouts import LAYOUTS
from medattn.data.panoptic.sampling import PanopticBatch, PanopticSource, TrainingPanoptic
from medattn.data.panoptic.source import PanopticImages, Picture, panoptic_images
from medattn.data.panoptic.targets import TargetArrays, TargetRules, targets
from medattn.data.panoptic.transforms import PanopticTransform, PanopticView, Sample, Viewed

__all__ = [
    "LAYOUTS",
    "ColourPolicy",
    "PanopticBatch",
    "PanopticImages",
    "PanopticSource",
    "PanopticTransform",
    "PanopticView",
    "Picture",
    "Sample",
    "TargetArrays",
    "TargetRules",
    "TrainingPanoptic",
    "Viewed",
    "panoptic_images",
    "targets",
]
