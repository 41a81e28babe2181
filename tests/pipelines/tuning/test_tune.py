"""Searches end to end on practice cases, and what becomes of trials whose workers are killed."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from PIL import Image

from medattn.data.phantom import write_phantoms
from medattn_pipelines.cli import main
from medattn_pipelines.configfile import load, load_any
from medattn_pipelines.tuning.store import JournalStore

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

CONFIG = """\
config:
  data: {{root: {root}, spacing_mm: [10, 10, 10], patch_size: [16, 16, 16], workers: 1,
         organs: [Parotid_L, Parotid_R]}}
  run: {{dir: {run}, tracking: false}}
  network: {{name: unet, options: {{widths: [4, 8], strides: [2]}}}}
  augment: {{enabled: false}}
  inference: {{overlap: 0, keep_largest: false}}
  training: {{steps: {steps}, precision: fp32, device: cpu, log_every: 1, validate_every: 4, save_every: 2}}
space:
  training.learning_rate: {{type: float, low: 1e-4, high: 1e-2, log: true}}
  network.options.residual: {{type: categorical, choices: [true, false]}}
sampler: {{name: random}}
trials: {trials}
"""


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small practice cases."""
    root = tmp_path_factory.mktemp("tune") / "cases"
    write_phantoms(root, cases=3, size=32, seed=1)
    return root


def written(tmp_path: Path, cases: Path, *, trials: int, steps: int = 4, more: str = "") -> Path:
    path = tmp_path / "tiny.yaml"
    text = CONFIG.format(root=cases, run=tmp_path / "study", trials=trials, steps=steps)
    path.write_text(text + more)
    return path


def worker(space: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "medattn_pipelines.cli", "tune", str(space), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    store = JournalStore(folder / "study.journal", lambda study, trial: None)
    study = optuna.load_study(study_name="tiny", storage=store.storage)
    store.close()
    return study.trials


def require_each_counted_once(trials: list[optuna.trial.FrozenTrial], wanted: int) -> Counter[str]:
    """Every trial is complete, or failed and run again as exactly one other; returns states."""
    assert Counter(trial.state for trial in trials)[TrialState.COMPLETE] == wanted
    assert not [t for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    heirs: Counter[int] = Counter()
    for trial in trials:
        heirs.update(trial.system_attrs.get("retry_history", [])[-1:])
    failed = [trial.number for trial in trials if trial.state == TrialState.FAIL]
    assert dict(heirs) == dict.fromkeys(failed, 1)
    params = [str(sorted(t.params.items())) for t in trials if t.state == TrialState.COMPLETE]
    assert len(set(params)) == wanted, "a set of values counted twice"
    return Counter(trial.state.name for trial in trials)


def wait_for(condition: Any, seconds: float, process: subprocess.Popen[str] | None = None) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]  # type: ignore[union-attr]
        assert time.monotonic() < until, "not in time"
        time.sleep(0.05)


def test_a_search_leaves_a_config_a_table_and_a_page(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "objectives: {score: maximize, parameters: minimize}\nconstraints: {memory: {at_most: 100000}}\n"
    space = written(tmp_path, cases, trials=2, more=more)
    assert main(["tune", str(space)]) == 0
    shown = capsys.readouterr().out
    folder = tmp_path / "study"
    assert "trial 0 (0 of 2 complete): training.learning_rate=" in shown
    assert f"best config: {folder / 'best.yaml'}" in shown
    best = load(folder / "best.yaml")
    assert best.run_dir == tmp_path / "study_best"
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["complete"] * 2
    winners = [row for row in rows if row["best"] == "True"]
    top = max(winners, key=lambda row: float(row["score"]))
    assert best.training.learning_rate == float(top["training.learning_rate"]), "not in full precision"
    # trial folders are runs; their checkpoints, of use to nobody, are gone
    assert (folder / "trial_0000/model/model.json").is_file()
    assert not (folder / "trial_0000/checkpoints").exists()
    page = (folder / "report/report.html").read_text()
    assert page.count("<svg") >= 2
    assert "http" not in page.replace("http://www.w3.org", "")
    residual = [int(float(row["parameters"])) for row in rows if row["network.options.residual"] == "true"]
    plain = [int(float(row["parameters"])) for row in rows if row["network.options.residual"] == "false"]
    assert len({*residual}) <= 1
    assert len({*plain}) <= 1

    # the same command finds nothing left to do, and more trials go on where it ended
    assert main(["tune", str(space)]) == 0
    assert "trial " not in capsys.readouterr().out.partition("runs in")[2].partition("Best trials")[0]
    assert main(["tune", str(space), "--trials", "3"]) == 0
    require_each_counted_once(trials_of(folder), 3)

    space.write_text(space.read_text().replace("high: 1e-2", "high: 2e-2"))
    assert main(["tune", str(space)]) == 2
    assert "was begun with another space: training.learning_rate" in capsys.readouterr().err


def test_a_trial_that_cannot_train_fails_with_its_sentence(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "  data.organs: {type: categorical, choices: [[Spleen], [Brain_of_a_bird]]}\n"
    space = written(tmp_path, cases, trials=2)
    space.write_text(space.read_text().replace("sampler:", more + "sampler:"))
    assert main(["tune", str(space)]) == 2
    printed = capsys.readouterr()
    assert "failed: data.organs: ['" in printed.out
    assert "5 trials failed in succession" in printed.err
    assert "Traceback" not in printed.out + printed.err


def test_the_trial_of_a_killed_worker_goes_on_and_is_counted_once(cases: Path, tmp_path: Path) -> None:
    space = written(tmp_path, cases, trials=1, steps=40)
    folder = tmp_path / "study"
    victim = worker(space)
    checkpoint = folder / "trial_0000/checkpoints/last"
    wait_for(checkpoint.exists, 120, victim)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert main(["tune", str(space)]) == 0
    trials = trials_of(folder)
    assert require_each_counted_once(trials, 1) == {"COMPLETE": 1, "FAIL": 1}
    assert trials[0].state == TrialState.FAIL
    heir = next(t for t in trials if t.system_attrs.get("retry_history") == [0])
    assert heir.params == trials[0].params
    # it went on from the checkpoint: one run folder, with every step once
    assert not (folder / "trial_0000").exists()
    lines = (folder / f"trial_{heir.number:04d}/metrics.jsonl").read_text().splitlines()
    steps = [line for line in lines if '"loss"' in line]
    assert len(steps) == 40
    assert not list((folder / "study.journal.workers").iterdir())


@pytest.mark.slow
def test_sigterm_saves_a_trial_and_the_same_command_goes_on(cases: Path, tmp_path: Path) -> None:
    space = written(tmp_path, cases, trials=1, steps=60)
    stopped = worker(space)
    wait_for((tmp_path / "study/trial_0000/checkpoints/last").exists, 120, stopped)
    stopped.send_signal(signal.SIGTERM)
    out, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 0, out
    assert "stopped by SIGTERM; the same command goes on from its checkpoint" in out
    assert main(["tune", str(space)]) == 0
    require_each_counted_once(trials_of(tmp_path / "study"), 1)


@pytest.mark.slow
def test_the_demo_of_the_repository_runs_where_there_is_nothing(tmp_path: Path) -> None:
    space = Path(__file__).resolve().parents[3] / "configs/tune/demo.yaml"
    arguments = [f"data.root={tmp_path / 'cases'}", f"run.dir={tmp_path / 'run'}", "--trials", "3"]
    assert main(["tune", str(space), *arguments]) == 0
    assert (tmp_path / "cases/cases.json").is_file()
    assert (tmp_path / "run/report/report.html").is_file()
    load(tmp_path / "run/best.yaml")


@pytest.mark.slow
def test_a_classifier_is_searched_in_the_same_way(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for wnid, level in (("n00000001", 40), ("n00000002", 200)):
            folder = tmp_path / "images" / split / wnid
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = generator.normal(level, 10, (40, 40, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    space = tmp_path / "tiny.yaml"
    space.write_text(
        "config:\n  task: classification\n  image_size: 32\n"
        f"  data: {{root: {tmp_path / 'images'}, workers: 0}}\n"
        f"  run: {{dir: {tmp_path / 'study'}, tracking: false}}\n"
        "  network: {name: resnet26}\n  inference: {image_size: 32, batch_size: 4}\n"
        "  training: {steps: 2, batch_size: 4, validate_every: 1, precision: fp32, device: cpu}\n"
        "space:\n  training.learning_rate: {type: categorical, choices: [0.01, 0.1]}\n"
        "sampler: {name: grid}\nconstraints: {latency: {at_most: 1e6}}\n"
    )
    assert main(["tune", str(space)]) == 0
    trials = trials_of(tmp_path / "study")
    require_each_counted_once(trials, 2)
    assert {trial.params["training.learning_rate"] for trial in trials} == {"0.01", "0.1"}
    assert all(0 <= trial.values[0] <= 1 and trial.user_attrs["latency"] > 0 for trial in trials)
    assert load_any(tmp_path / "study/best.yaml").task == "classification"
