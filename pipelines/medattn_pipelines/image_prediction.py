"""Images in, their most likely classes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from medattn.classifier import ImageCard, load_classifier
from medattn.data.images.classes import Classes
from medattn.data.images.folder import SUFFIXES
from medattn.data.images.reading import Skipped
from medattn.data.images.sampling import EvaluationImages, ImageBatch
from medattn.errors import InputError
from medattn.training.distributed import ALONE, Processes, joined
from medattn_pipelines.prediction_table import BEST, TABLE, Prediction, write_predictions
from medattn_pipelines.progress import case_progress
from medattn_pipelines.runs import choose_device, choose_precision

BATCH = 32
WORKERS = 2


@dataclass
class Classifier:
    """A network that looks at images. precision: bfloat16 for autocast. workers: threads that read.

    skipped: the images that could not be decoded so far.
    """

    card: ImageCard
    network: nn.Module
    device: torch.device
    precision: torch.dtype
    workers: int = WORKERS
    skipped: list[Skipped] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network = self.network.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def logits(
        self, images: EvaluationImages, most: int | None = None
    ) -> Iterator[tuple[ImageBatch, Tensor]]:
        """Each batch with its logits [B, classes] in float32; `most` batches at most."""
        self.network.eval()
        low = self.precision == torch.bfloat16
        for number, batch in enumerate(images.batches(self.workers), start=1):
            self.skipped += batch.skipped
            if batch.cases:  # none of them may be readable
                image = batch.image.to(self.device).contiguous(memory_format=torch.channels_last)
                with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=low):
                    found = self.network(image)
                yield batch, found.float().cpu()
            if number == most:
                return

    def top1(
        self, images: EvaluationImages, most: int | None = None, processes: Processes = ALONE
    ) -> tuple[float, dict[str, float]]:
        """Share of the images whose best class is theirs, and what to log; the processes share the images."""
        right = seen = 0
        images = replace(images, rank=processes.rank, world=processes.world)
        for batch, logits in self.logits(images, most):
            right += int((logits.argmax(1) == batch.target).sum())
            seen += len(batch.target)
        right, seen = processes.total(right, seen)
        score = right / max(1, seen)
        return score, {"validation_top1": score}

    def predictions(self, images: EvaluationImages, processes: Processes) -> list[Prediction]:
        """Each image with its best classes and their probabilities, best first.

        The processes share the images, and get the same answer.
        """
        source, wnids = images.source, self.card.classes.wnids
        images = replace(images, rank=processes.rank, world=processes.world)
        rows = dict[str, Prediction]()
        mine = sum(map(len, images.parts))
        with case_progress("Classifying", mine, processes=processes.world) as on_image:
            for batch, logits in self.logits(images):
                best = logits.double().softmax(1).topk(min(BEST, len(wnids)))
                for case, values, indices in zip(batch.cases, best.values, best.indices, strict=True):
                    rows[case] = case, [(wnids[i], float(p)) for i, p in zip(indices, values, strict=True)]
                    on_image(case)
        return processes.collected(rows, map(source.name, range(len(source))))


@dataclass(frozen=True)
class _Files:
    """Images whose class nobody knows, as a source."""

    paths: Sequence[Path]
    classes: Classes

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        return np.zeros(len(self.paths), np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def read(self, index: int) -> bytes:
        return self.paths[index].read_bytes()


def predict(model: Path, inputs: Sequence[Path], output: Path, *, device: str = "auto") -> Path:
    """Classify image files and all images below folders; returns the table, `predictions.csv` in output.

    Under torchrun the processes share the images. One that cannot be read does not stop the others; all such
    raise one InputError at the end.
    """
    with joined(choose_device(device)) as processes:
        card, network = load_classifier(model)
        precision = choose_precision("auto", processes.device)
        classifier = Classifier(card, network, processes.device, precision)
        paths = find_images(inputs)
        files = _Files(paths, card.classes)
        images = EvaluationImages(files, card.view, BATCH, unreadable_limit=len(files))
        predictions = classifier.predictions(images, processes)
        if processes.main:
            write_predictions(output, predictions, card.classes)
        problems = {image.name: f"{image.name}: {image.reason}" for image in classifier.skipped}
        if failed := processes.collected(problems, map(str, paths)):
            raise InputError(*failed)
        return output / TABLE


def find_images(inputs: Sequence[Path]) -> list[Path]:
    """The files among the inputs and the images below the folders, in order. Raises InputError for others."""
    found: list[Path] = []
    problems = []
    for given in inputs:
        images = [given] if given.is_file() else sorted(p for p in given.rglob("*") if _is_image(p))
        if not images:
            problems.append(
                f"{given}: no image here; expected {', '.join(sorted(SUFFIXES))}, or a folder of them"
            )
        found += images
    if problems:
        raise InputError(*problems)
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()
