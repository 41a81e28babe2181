"""What MLflow loads of a model: paths in, segmentations or classes out, by the code of `medattn predict`.

    model = mlflow.pyfunc.load_model("models:/hn_ct/1")
    model.predict(["scan.nii.gz"])

MLflow keeps the model folder as it is and the name of this module; nothing is pickled, and nothing is run
that came with the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from medattn.classifier import load_classifier
from medattn.data.images.decode import ImageError, decode
from medattn.errors import InputError
from medattn.io import read_volume
from medattn.modelfolder import CLASSIFICATION, PANOPTIC, model_task
from medattn.panoptic_segmenter import load_panoptic
from medattn.segmenter import Segmenter, load_model
from medattn_pipelines.image_prediction import Classifier
from medattn_pipelines.panoptic_prediction import PanopticSegmenter
from medattn_pipelines.prediction_table import BEST
from medattn_pipelines.runs import choose_device, choose_precision


class PathModel(Protocol):
    """Answers for one file."""

    def __call__(self, path: Path) -> dict[str, Any]:
        """What is in the file. Raises InputError where it cannot be read."""


class Served:
    """A model as MLflow wants it."""

    def __init__(self, model: PathModel) -> None:
        self.model = model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """A dict per path, in order. model_input: a path, or several in a list, array or table of one column.

        Of volumes: "segmentation", a uint8 [i, j, k] array on the volume's own grid, axes as in the file, and
        "labels", value -> organ. Of classifiers: "classes", the best first, each with "wnid", "name" and
        "probability". Of panoptic models: "ids", an int32 [h, w] array, and "segments" with "id", "category",
        "name", "area" and "score". Always "path". Raises InputError for files that cannot be read.
        """
        answers, problems = [], list[str]()
        for path in paths_of(model_input):
            try:
                answers.append({"path": str(path)} | self.model(path))
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(*problems)
        return answers


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> Served:
    """MLflow's entry. path: of the model folder. model_config: {"device": "cpu"} or "cuda"."""
    device = choose_device((model_config or {}).get("device", "auto"))
    return Served(served_model(Path(path), device))


def served_model(folder: Path, device: torch.device) -> PathModel:
    """The model of a folder, whatever it does."""
    precision = choose_precision("auto", device)
    task = model_task(folder)
    if task == CLASSIFICATION:
        return _Classes(Classifier(*load_classifier(folder), device, precision))
    if task == PANOPTIC:
        return _Segments(PanopticSegmenter(*load_panoptic(folder), device, precision))
    return _Organs(Segmenter(*load_model(folder), device, precision))


def paths_of(model_input: Any) -> list[Path]:
    """The paths of what MLflow hands over. Raises InputError for anything that is none."""
    if isinstance(model_input, (str, Path)):
        return [Path(model_input)]
    if hasattr(model_input, "to_numpy"):  # pandas, which MLflow brings
        model_input = model_input.to_numpy()
    if hasattr(model_input, "ravel"):
        model_input = model_input.ravel().tolist()
    if not isinstance(model_input, Iterable):
        raise InputError(f"model input: expected paths of files, got {type(model_input).__name__}")
    given = list(model_input)
    if wrong := [one for one in given if not isinstance(one, (str, Path))]:
        raise InputError(f"model input: expected paths of files, got {wrong[0]!r}")
    return [Path(one) for one in given]


class _Organs:
    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter

    def __call__(self, path: Path) -> dict[str, Any]:
        card = self.segmenter.card
        labels = {value: name for value, name in card.labels.items() if name in card.organs}
        return {"segmentation": self.segmenter.segment(read_volume(path)), "labels": labels}


class _Classes:
    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    def __call__(self, path: Path) -> dict[str, Any]:
        classifier, classes = self.classifier, self.classifier.card.classes
        image = classifier.card.view(_image(path, upright=True))[None].to(classifier.device)
        low = classifier.precision == torch.bfloat16
        classifier.network.eval()
        with torch.inference_mode(), torch.autocast(classifier.device.type, torch.bfloat16, enabled=low):
            logits = classifier.network(image.contiguous(memory_format=torch.channels_last))[0]
        best = logits.double().softmax(0).topk(min(BEST, len(classes)))
        return {
            "classes": [
                {"wnid": classes.wnids[i], "name": classes.names[i], "probability": p}
                for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        }


class _Segments:
    def __init__(self, segmenter: PanopticSegmenter) -> None:
        self.segmenter = segmenter
        self.names = {category.id: category.name for category in segmenter.card.categories.members}

    def __call__(self, path: Path) -> dict[str, Any]:
        ids, segments = self.segmenter(self.segmenter.card.view(_image(path, upright=False)))
        described = [
            {
                "id": one.id,
                "category": one.category,
                "name": self.names[one.category],
                "area": one.area,
                "score": one.score,
            }
            for one in segments
        ]
        return {"ids": ids, "segments": described}


def _image(path: Path, *, upright: bool) -> Any:
    try:
        return decode(path.read_bytes(), upright=upright)
    except (OSError, ImageError) as error:
        raise InputError(f"{path}: not readable as an image ({error}); copy it again") from None
