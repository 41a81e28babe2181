"""Images for classification: where they lie, how they are decoded, changed, mixed and put into batches.

    source = image_folder("imagenet/train")  # or Shards.open("train-{0000..1023}.tar",
    ...) images = TrainingImages(source, TrainingTransform(size=224), batch_size=1024, seed=0) for batch in
    images.batches(start=step, workers=8): ...

Every batch is a function of seed and step alone, so a run resumes at any step, bit for bit, with any number
of worker threads, and several processes share one global batch whatever their number.
"""

from medattn.data.images.classes import Classes, read_classes
from medattn.data.images.decode import ImageError, decode
from medattn.data.images.erasing import RandomErasing
from medattn.data.images.folder import ImageFolder, image_folder, validation_images
from medattn.data.images.mixing import Mixing
from medattn.data.images.randaugment import RandAugment
from medattn.data.images.reading import ImageSource, Skipped
from medattn.data.images.real import read_real_labels
from medattn.data.images.sampling import EvaluationImages, ImageBatch, TrainingImages
from medattn.data.images.shards import Shards
from medattn.data.images.transforms import ColourJitter, EvaluationTransform, TrainingTransform

__all__ = [
    "Classes",
    "ColourJitter",
    "EvaluationImages",
    "EvaluationTransform",
    "ImageBatch",
    "ImageError",
    "ImageFolder",
    "ImageSource",
    "Mixing",
    "RandAugment",
    "RandomErasing",
    "Shards",
    "Skipped",
    "TrainingImages",
    "TrainingTransform",
    "decode",
    "image_folder",
    "read_classes",
    "read_real_labels",
    "validation_images",
]
