"""Pruners in real trainings: what falls behind is stopped in the middle, and is told from what failed."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from optuna.trial import TrialState

from medattn.data.phantom import write_phantoms
from medattn.training.runrecord import read_record
from medattn_pipelines.cli import main
from medattn_pipelines.tuning.store import JournalStore

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
# a rate of 0.02 finds the mandible, one of 1e-7 or so nothing; the seed puts the good one first
SPACE = """\
config:
  data: {{root: {root}, spacing_mm: [8, 8, 8], patch_size: [16, 16, 16], workers: 0,
         organs: [Bone_Mandible]}}
  run: {{dir: {run}, tracking: false}}
  network: {{name: unet, options: {{widths: [8, 16], strides: [2]}}}}
  augment: {{enabled: false}}
  inference: {{overlap: 0, keep_largest: false}}
  training: {{steps: 24, precision: fp32, device: cpu, log_every: 1, validate_every: 8, save_every: 16,
             ema_decay: 0.8, warmup_steps: 0, deep_supervision: false}}
space:
  training.learning_rate: {{type: categorical, choices: [0.02, 0.0000001, 0.00000011]}}
sampler: {{name: grid}}
pruner: {pruner}
seed: 0
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pruning") / "cases"
    write_phantoms(root, cases=7, size=32, seed=0)
    return root


@pytest.mark.parametrize(
    ("pruner", "stops_at"),
    [
        pytest.param("{name: median, startup_trials: 1, warmup_steps: 8}", {8}, id="median"),
        # brackets are drawn by the trial's name, and say which rung is the first
        pytest.param("{name: hyperband, reduction: 2}", {8, 16}, id="hyperband", marks=pytest.mark.slow),
        # two validation cases, both worse than the best trial's: p = 1/4
        pytest.param("{name: wilcoxon, startup_trials: 1, warmup_steps: 8, p: 0.3}", {8}, id="wilcoxon"),
    ],
)
def test_bad_trainings_are_stopped_in_the_middle_and_counted_as_pruned(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pruner: str, stops_at: set[int]
) -> None:
    space, study = tmp_path / "pruned.yaml", tmp_path / "study"
    space.write_text(SPACE.format(root=cases, run=study, pruner=pruner))
    assert main(["tune", str(space)]) == 0
    assert ": pruned at 0.000" in capsys.readouterr().out

    store = JournalStore(study / "study.journal", lambda study, trial: None)
    stored = store.storage.get_all_trials(store.storage.get_study_id_from_name("pruned"))
    store.close()
    pruned = [trial for trial in stored if trial.state == TrialState.PRUNED]
    kept = [trial for trial in stored if trial.state == TrialState.COMPLETE]
    assert len(pruned) + len(kept) == 3
    assert "0.02" in [trial.params["training.learning_rate"] for trial in kept]
    assert {trial.last_step for trial in pruned} <= stops_at
    assert pruned

    rows = list(csv.DictReader((study / "trials.csv").read_text().splitlines()))
    assert [row["state"] for row in rows].count("pruned") == len(pruned)
    assert not [row for row in rows if row["state"] == "pruned" and (row["score"] or row["note"])]
    page = (study / "report/report.html").read_text()
    assert f"<b>{len(pruned)}</b>pruned" in page
    assert "<b>0</b>failed" in page
    for trial in pruned:
        folder = study / f"trial_{trial.number:04d}"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, trial.last_step + 1))
        assert read_record(folder).status == "pruned"
        assert not (folder / "model").exists()
        assert not (folder / "checkpoints").exists()
        assert not list(folder.rglob(".writing-*"))
    for trial in kept:
        folder = study / f"trial_{trial.number:04d}"
        assert read_record(folder).status == "finished"
        assert (folder / "model/model.json").is_file()
