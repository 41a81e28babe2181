"""Images per second from encoded files to normalised batches, against timm's and torchvision's own pipelines.

    python pipelines/benchmarks/image_input.py imagenet/val --batch 50 --repeats 9 --workers 0 2

IMAGES is a folder of class folders. The peers are their transforms in torch's DataLoader, as timm's training
script and torchvision's reference build them: the same crop, flip, normalisation and erasing, and RandAugment
in each library's own variant (torchvision's has other operations). Workers are threads here and processes
there. One pass over the images of each takes its turn, so that whatever else the machine does hits all of
them alike; the ratio of medians is the result, images per second are for orientation. Without workers,
seconds are those of the processor, with workers those of the clock.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from medattn.data.images import (
    EvaluationImages,
    EvaluationTransform,
    ImageFolder,
    RandAugment,
    RandomErasing,
    TrainingImages,
    TrainingTransform,
    image_folder,
)
from medattn.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD
from medattn_pipelines.progress import print_table

SIZE = 224
RECIPES = ("evaluation", "crop and flip", "RandAugment")
# torchvision's package for CUDA machines does not load elsewhere unless these exist; no transform calls them
OPERATORS = (
    "nms qnms roi_align _roi_align_backward ps_roi_align _ps_roi_align_backward roi_pool _roi_pool_backward "
    "ps_roi_pool _ps_roi_pool_backward qroi_align deform_conv2d _deform_conv2d_backward"
)

Images = Callable[[], Iterator[Any]]


class Files(Dataset[tuple[torch.Tensor, int]]):
    """What torchvision's and timm's data sets do for an image."""

    def __init__(self, source: ImageFolder, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.open(self.source.name(index)).convert("RGB")
        return self.transform(image), int(self.source.targets[index])


def ours(source: ImageFolder, recipe: str, batch: int, workers: int) -> Images:
    """One pass over the images, training without the last partial batch."""
    if recipe == "evaluation":
        return lambda: EvaluationImages(source, EvaluationTransform(SIZE), batch).batches(workers)
    transform = TrainingTransform(
        SIZE,
        randaugment=RandAugment() if recipe == "RandAugment" else None,
        erasing=RandomErasing() if recipe == "RandAugment" else None,
    )
    images, epoch = TrainingImages(source, transform, batch, seed=0), count()
    steps = images.steps_per_epoch
    return lambda: islice(images.batches(next(epoch) * steps, workers), steps)


def timm_transform(recipe: str) -> Callable[[Image.Image], torch.Tensor]:
    """As timm's `create_loader` without its prefetcher, which normalises on a GPU."""
    create: Callable[..., Any] = importlib.import_module("timm.data").create_transform
    if recipe == "evaluation":
        return create(SIZE, interpolation="bicubic", crop_pct=0.875)
    # mmax9: at 10 its posterize keeps 0 bits, which Pillow 13 refuses; the cost is the same
    augment = {"auto_augment": "rand-m9-mstd0.5-mmax9-inc1", "re_prob": 0.25, "re_mode": "pixel"}
    return create(
        SIZE,
        is_training=True,
        interpolation="bicubic",
        color_jitter=None,
        **augment if recipe == "RandAugment" else {},
    )


def torchvision_transform(recipe: str) -> Callable[[Image.Image], torch.Tensor]:
    """As torchvision's classification reference, PIL backend."""
    t: Any = importlib.import_module("torchvision.transforms")
    bicubic = t.InterpolationMode.BICUBIC
    last = [t.ToTensor(), t.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    if recipe == "evaluation":
        return t.Compose([t.Resize(256, bicubic), t.CenterCrop(SIZE), *last])
    first = [t.RandomResizedCrop(SIZE, interpolation=bicubic), t.RandomHorizontalFlip()]
    if recipe == "RandAugment":
        first.append(t.RandAugment(2, 9, interpolation=bicubic))
        last.append(t.RandomErasing(0.25, value="random"))
    return t.Compose([*first, *last])


def theirs(
    source: ImageFolder,
    transform: Callable[[Image.Image], torch.Tensor],
    recipe: str,
    batch: int,
    workers: int,
) -> Images:
    """The same passes by torch's DataLoader, its processes kept between them."""
    training = recipe != "evaluation"
    loader = DataLoader(
        Files(source, transform),
        batch,
        shuffle=training,
        drop_last=training,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: iter(loader)


def seconds_per_image(
    passes: dict[str, Images], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds per image of every pass, by turns; the first fills caches, starts workers and is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(repeats + 1):
        for name, images in passes.items():
            begun, done = clock(), 0
            for given in images():
                done += len(given[0] if isinstance(given, list) else given.image)
            if repeat:
                seconds[name].append((clock() - begun) / done)
    return seconds


def load_torchvision() -> None:
    """Import torchvision, also where its compiled part does not load."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in OPERATORS.split():
            library.define(f"{name}() -> ()")
        LIBRARIES.append(library)  # its operators live as long as it does
        importlib.import_module("torchvision")


LIBRARIES: list[torch.library.Library] = []


def rows(source: ImageFolder, batch: int, repeats: int, workers: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """A row per recipe and number of workers."""
    for recipe in RECIPES:
        for several in workers:
            passes = {
                "medattn": ours(source, recipe, batch, several),
                "timm": theirs(source, timm_transform(recipe), recipe, batch, several),
                "torchvision": theirs(source, torchvision_transform(recipe), recipe, batch, several),
            }
            clock = time.perf_counter if several else time.process_time
            seconds = seconds_per_image(passes, repeats, clock)
            middle = {name: median(times) for name, times in seconds.items()}
            ratios = [f"{middle[peer] / middle['medattn']:.2f}" for peer in ("timm", "torchvision")]
            yield recipe, str(several), *(f"{1 / value:.0f}" for value in middle.values()), *ratios


def main() -> None:
    """Time the pipelines and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of class folders")
    parser.add_argument("--batch", type=int, default=50, metavar="B", help="images per batch")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="timed passes of each")
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 2), metavar="W", help="0: none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load_torchvision()
    source = image_folder(args.images)
    print_table(
        f"{len(source)} images to {SIZE} x {SIZE}, {args.repeats} passes",
        ("recipe", "workers", "ours /s", "timm /s", "tv /s", "/ timm", "/ torchvision"),
        list(rows(source, args.batch, args.repeats, args.workers)),
    )


if __name__ == "__main__":
    main()
