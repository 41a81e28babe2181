"""A search over panoptic trainings, on a tiny data set in COCO's layout."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medattn.io.panoptic import write_ids, write_panoptic
from medattn.panoptic import Annotation, Categories, Category, ImageRecord, Segment
from medattn_pipelines.cli import main
from medattn_pipelines.configfile import load_any
from medattn_pipelines.panopticconfig import PanopticConfig

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
CATEGORIES = Categories(
    (Category(5, "square", True, (220, 20, 60)), Category(9, "ground", False, (128, 64, 128)))
)
SPACE = """\
config:
  task: panoptic
  crop_size: [49, 49]
  data: {{root: {root}, workers: 0}}
  run: {{dir: {run}, tracking: false}}
  network: {{options: {{depths: [1, 1, 1, 1], scale: 0.125, width: 16, rows: 33, projection: true}}}}
  augment: {{scale_range: [1, 1]}}
  targets: {{sigma: 2, small_area: 0}}
  training: {{steps: 20, batch_size: 2, optimizer: adamw, learning_rate: 0.01, warmup_steps: 0,
             precision: fp32, device: cpu, log_every: 2, validate_every: 10, save_every: 10, ema_decay: 0.5}}
  inference: {{longest_side: 49, nms_kernel: 5, stuff_area: 10}}
space:
  training.learning_rate: {{type: categorical, choices: [0.01, 0.0000001]}}
  network.options.width: {{type: int, low: 16, high: 32, step: 16}}
objectives: {{score: maximize, parameters: minimize}}
constraints: {{latency: {{at_most: 100000}}}}
sampler: {{name: grid}}
trials: 3
"""


def write_squares(root: Path, split: str, count: int) -> None:
    """A red square on grey ground in each image, 49 x 49 pixels."""
    chance = np.random.default_rng(len(split))
    json_path = root / f"annotations/panoptic_{split}2017.json"
    (root / f"{split}2017").mkdir(parents=True)
    annotations, images = [], []
    for number in range(1, count + 1):
        name = f"{number:012d}.png"
        ids, pixels = np.full((49, 49), 1, np.int32), np.full((49, 49, 3), 110, np.uint8)
        down, right = chance.integers(4, 28, 2)
        ids[down : down + 16, right : right + 16] = 2
        pixels[ids == 2] = (230, 40, 40)
        Image.fromarray(pixels).save(root / f"{split}2017" / name)
        write_ids(json_path.with_suffix("") / name, ids)
        annotations.append(Annotation(number, name, (Segment(1, 9), Segment(2, 5))))
        images.append(ImageRecord(number, name, 49, 49))
    write_panoptic(json_path, annotations, images=images, categories=CATEGORIES)


@pytest.mark.slow
def test_a_panoptic_search_trains_and_ranks(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        write_squares(tmp_path / "squares", split, count)
    space, study = tmp_path / "tiny.yaml", tmp_path / "study"
    space.write_text(SPACE.format(root=tmp_path / "squares", run=study))
    assert main(["tune", str(space)]) == 0
    rows = list(csv.DictReader((study / "trials.csv").read_text().splitlines()))
    complete = [row for row in rows if row["state"] == "complete"]
    assert len(complete) == 3
    for row in complete:
        metrics = study / f"trial_{int(row['trial']):04d}/metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        scores = [line["validation_pq"] for line in lines if "validation_pq" in line]
        assert len(scores) == 2
        assert float(row["score"]) == pytest.approx(max(scores))
        assert float(row["latency"]) > 0
    weights = {row["network.options.width"]: float(row["parameters"]) for row in complete}
    assert weights["16"] < weights["32"]
    front = [row for row in complete if row["best"] == "True"]
    most = max(float(row["score"]) for row in complete)
    assert most in {float(row["score"]) for row in front}
    assert min(weights.values()) in {float(row["parameters"]) for row in front}
    found = load_any(study / "best.yaml")
    assert isinstance(found, PanopticConfig)
    chosen = (str(found.network.options["width"]), found.training.learning_rate)
    fields = ("network.options.width", "training.learning_rate")
    assert chosen in [(row[fields[0]], float(row[fields[1]])) for row in front if float(row["score"]) == most]
