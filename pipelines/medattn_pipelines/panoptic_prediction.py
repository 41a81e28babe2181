"""Images in; segments in the COCO format and coloured pictures of them out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from medattn.atomic import atomic_path
from medattn.data.images.readahead import delayed
from medattn.data.panoptic.source import PanopticImages, read_image
from medattn.data.panoptic.transforms import Viewed
from medattn.errors import InputError
from medattn.inference.panoptic import annotate, measured, segment
from medattn.inference.panoptic_resize import Placement
from medattn.inference.panoptic_views import over_views
from medattn.io.panoptic import write_ids, write_panoptic
from medattn.metrics.panoptic_quality import ClassCounts, add_up, class_quality, count, mean_iou, mean_quality
from medattn.panoptic import Annotation, ImageRecord, PanopticOutput, Segment
from medattn.panoptic_segmenter import PanopticCard, load_panoptic
from medattn.report.panoptic_overlay import overlay
from medattn.training.distributed import ALONE, Processes, joined
from medattn_pipelines.image_prediction import find_images
from medattn_pipelines.progress import case_progress
from medattn_pipelines.runs import choose_device, choose_precision

WORKERS = 2
PREDICTIONS, OVERLAYS = "predictions", "overlays"  # JSON and folder of PNGs; folder of pictures
CITYSCAPES = "_leftImg8bit"  # ends the names of its images, not their ids

Ids = npt.NDArray[np.int32]
Described = tuple[Annotation, ImageRecord]  # of one image, for the JSON file
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass
class PanopticSegmenter:
    """A network that segments images. precision: bfloat16 for autocast. workers: threads that read."""

    card: PanopticCard
    network: nn.Module
    device: torch.device
    precision: torch.dtype
    workers: int = WORKERS

    def __post_init__(self) -> None:
        self.network = self.network.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.things = torch.from_numpy(self.card.categories.things).to(self.device)

    def __call__(self, viewed: Viewed) -> tuple[Ids, tuple[Segment, ...]]:
        """[h, w] segment ids of the image as it was read, and its segments.

        Maps are made at the resolution at which the network saw the image: memory does not grow with photos.
        """
        self.network.eval()
        image = viewed.image[None].to(self.device).contiguous(memory_format=torch.channels_last)
        size = (image.shape[2], image.shape[3])
        with torch.inference_mode():
            output = over_views(
                self._predict,
                image,
                scales=self.card.scales,
                flip=self.card.flip,
                placement=Placement(size, viewed.seen, viewed.seen),
            )
            maps = segment(output, self.things, self.card.rules)
        ids, segments = annotate(maps, 0, self.card.categories)
        if viewed.seen != viewed.original:
            ids = viewed.restored(ids)
            segments = measured(ids, segments)
        return ids, segments

    def _predict(self, image: Tensor) -> PanopticOutput:
        low = self.precision == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            return cast(PanopticOutput, self.network(image))

    def quality(
        self, images: PanopticImages, most: int | None = None, processes: Processes = ALONE
    ) -> tuple[float, dict[str, float]]:
        """PQ over the classes that occur, and what to log; the processes share the images."""
        mine = range(processes.rank, len(images) if most is None else min(most, len(images)), processes.world)
        counts = [one for several in processes.gathered([*self._counts(images, mine)]) for one in several]
        if not counts:
            return 0.0, {}
        total = add_up(counts)
        classes = class_quality(total)
        score = mean_quality(classes).pq or 0.0
        return score, {"validation_pq": score, "validation_miou": mean_iou(total) or 0.0}

    def _counts(self, images: PanopticImages, indices: Sequence[int]) -> Iterator[ClassCounts]:
        def read(index: int) -> tuple[Viewed, Ids, tuple[Segment, ...]]:
            picture = images.read(index)
            return self.card.view(picture.image), picture.ids, picture.segments

        found = _ahead(read, indices, self.workers)
        for index, (viewed, ids, segments) in zip(indices, found, strict=True):
            try:
                yield count(*self(viewed), ids, segments, self.card.categories)
            except InputError as error:
                raise InputError(*(f"{images.name(index)}: {each}" for each in error.problems)) from None


def predict(model: Path, inputs: Sequence[Path], output: Path, *, device: str = "auto") -> Path:
    """Segment image files and all images below folders; returns the JSON file, `predictions.json` in output.

    The PNGs with segment ids are in predictions/ beside it, pictures for people in overlays/. Images are
    taken as they are stored, like the labels of the data sets: EXIF orientation is not applied. The
    processes of torchrun share the images. One that cannot be read does not stop the others; all such raise
    one InputError at the end.
    """
    with joined(choose_device(device)) as processes:
        card, network = load_panoptic(model)
        precision = choose_precision("auto", processes.device)
        segmenter = PanopticSegmenter(card, network, processes.device, precision)
        paths = find_images(inputs)
        _require_distinct(paths)
        images = {image_id(path): path for path in paths}
        json, problems = write_predictions(segmenter, images, output, processes)
        if problems:
            raise InputError(*problems)
        return json


def write_predictions(
    segmenter: PanopticSegmenter,
    images: Mapping[int | str, Path],
    output: Path,
    processes: Processes,
) -> tuple[Path, list[str]]:
    """Segment images, by their ids, and write JSON, PNGs and overlays; returns the JSON and what failed.

    The processes share the images, and get the same answer.
    """
    card, json = segmenter.card, output / f"{PREDICTIONS}.json"
    done, problems = dict[int | str, Described](), dict[int | str, Sequence[str]]()

    def read(number: int | str) -> tuple[Image.Image, Viewed] | InputError:
        try:
            image = read_image(images[number])
        except InputError as error:
            return error
        return image, card.view(image)

    def write(described: Sequence[Described]) -> None:
        if processes.main:
            annotations, records = [one[0] for one in described], [one[1] for one in described]
            write_panoptic(json, annotations, images=records, categories=card.categories)

    mine = list(images)[processes.rank :: processes.world]
    try:
        with case_progress("Segmenting", len(mine), processes=processes.world) as on_image:
            for number, item in zip(mine, _ahead(read, mine, segmenter.workers), strict=True):
                if isinstance(item, InputError):
                    problems[number] = item.problems
                    continue
                done[number] = _write_image(segmenter, number, images[number], *item, output)
                on_image(str(images[number]))
        described = processes.collected(done, images)
    except BaseException:  # what is done stays of use when memory runs out or somebody interrupts
        write(list(done.values()))
        raise
    write(described)
    failed = processes.collected(problems, images)
    return json, [problem for of_image in failed for problem in of_image]


def _write_image(
    segmenter: PanopticSegmenter,
    number: int | str,
    path: Path,
    image: Image.Image,
    viewed: Viewed,
    output: Path,
) -> Described:
    """Segment one image and write its PNG and overlay."""
    ids, segments = segmenter(viewed)
    name = f"{path.stem}.png"
    write_ids(output / PREDICTIONS / name, ids)
    picture = overlay(image, ids, segments, segmenter.card.categories)
    _write_picture(output / OVERLAYS / f"{path.stem}.jpg", picture)
    return Annotation(number, name, segments), ImageRecord(number, path.name, *ids.shape)


def image_id(path: Path) -> int | str:
    """The id that the data sets give an image of this name: COCO's a number, others the name.

    >>> image_id(Path("000000000139.jpg")), image_id(Path("frankfurt_000000_000294_leftImg8bit.png"))
    (139, 'frankfurt_000000_000294')
    """
    stem = path.stem.removesuffix(CITYSCAPES)
    return int(stem) if stem.isdecimal() else stem


def _require_distinct(paths: Sequence[Path]) -> None:
    times = Counter(image_id(path) for path in paths)
    if twice := [str(path) for path in paths if times[image_id(path)] > 1]:
        raise InputError(
            f"{', '.join(twice)}: images of one name, expected a name of its own for each, which its PNG and "
            "its id take; predict them into two folders"
        )


def _write_picture(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="JPEG", quality=88)


def _ahead(make: Callable[[Item], Made], items: Iterable[Item], workers: int) -> Iterator[Made]:
    """What is made of the items, in order, some ahead by threads; 0 makes each when it is asked for."""
    if not workers:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        try:
            begun = (pool.submit(partial(make, item)) for item in items)
            yield from (future.result() for future in delayed(begun, workers))
        finally:
            pool.shutdown(cancel_futures=True)
