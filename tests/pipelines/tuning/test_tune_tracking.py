"""A search in MLflow: one run for all of it, a child per trial, and folds by the same means."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from medattn.data.phantom import write_phantoms
from medattn.training import mirror
from medattn.training.mlflow_store import connect
from medattn.training.runrecord import new_record, read_record
from medattn_pipelines.cli import main
from medattn_pipelines.configfile import load

pytestmark = pytest.mark.filterwarnings(  # inside MLflow
    "ignore::optuna.exceptions.ExperimentalWarning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:.*Any type hint:UserWarning",
)
CONFIG = """\
  data: {{root: {root}, spacing_mm: [8, 8, 8], patch_size: [16, 16, 16], workers: 0, organs: [Bone_Mandible]}}
  run: {{dir: {run}}}
  network: {{name: unet, options: {{widths: [8, 16], strides: [2]}}}}
  augment: {{enabled: false}}
  inference: {{overlap: 0, keep_largest: false}}
  training: {{steps: 16, precision: fp32, device: cpu, log_every: 4, validate_every: 8, save_every: 16,
             ema_decay: 0.8, warmup_steps: 0, deep_supervision: false}}
"""
SPACE = (
    "config:\n"
    + CONFIG
    + """\
space:
  training.learning_rate: {{type: categorical, choices: [0.02, 0.0000001]}}
sampler: {{name: grid}}
pruner: {{name: median, startup_trials: 1}}
"""
)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Practice cases, and a folder for runs with MLflow's empty database."""
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 120.0)
    write_phantoms(tmp_path / "cases", cases=3, size=32, seed=0)
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def in_mlflow(runs: Path) -> tuple[Any, dict[str, Any]]:
    """The client, and the runs of all experiments by name."""
    client = connect(f"sqlite:///{runs / 'mlflow.db'}", runs / "any")
    experiments = [one.experiment_id for one in client.search_experiments()]
    found = list(client.search_runs(experiments))
    names = [run.info.run_name for run in found]
    assert len(set(names)) == len(names)
    return client, dict(zip(names, found, strict=True))


def max_of(client: Any, run: Any, metric: str) -> float:
    return max(point.value for point in client.get_metric_history(run.info.run_id, metric))


def test_the_turn_of_another_worker_is_no_silence(
    runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 0.2)
    connect(f"sqlite:///{runs / 'mlflow.db'}", runs / "any")
    folder = runs / "sweep"
    folder.mkdir()
    record = new_record("sweep", "sweep", None, None)
    record.begin({"seed": 0}, {}, ())
    record.end("finished")
    turn = threading.Lock()
    with turn:
        following = mirror.Mirror(folder, record, f"sqlite:///{runs / 'mlflow.db'}", lambda: turn)
        closing = threading.Thread(target=following.close)
        closing.start()
        closing.join(1.5)
        assert closing.is_alive(), "gave up while another worker had its turn"
        monkeypatch.setattr(mirror, "CLOSE_SECONDS", 120.0)
    closing.join(120)
    assert caplog.messages == []
    assert in_mlflow(runs)[1]["sweep"].info.status == "FINISHED"


def test_a_search_is_a_run_with_a_child_per_trial(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space, study = tmp_path / "sweep.yaml", runs / "sweep"
    space.write_text(SPACE.format(root=tmp_path / "cases", run=study))
    assert main(["tune", str(space)]) == 0
    score = float(next(re.finditer(r"trial 0: score (\S+),", capsys.readouterr().out))[1])
    assert [path.parent.name for path in tmp_path.rglob("mlflow.db")] == ["runs"], "one database for all"

    client, found = in_mlflow(runs)
    assert sorted(found) == ["sweep", "trial_0000", "trial_0001"]
    parent, best, pruned = (found[name] for name in sorted(found))
    assert client.get_experiment(parent.info.experiment_id).name == "sweep"
    assert {run.info.experiment_id for run in found.values()} == {parent.info.experiment_id}
    children = {best.data.tags["mlflow.parentRunId"], pruned.data.tags["mlflow.parentRunId"]}
    assert children == {parent.info.run_id}
    assert [run.info.status for run in (parent, best, pruned)] == ["FINISHED", "FINISHED", "KILLED"]
    assert pruned.data.tags["medattn.status"] == "pruned"
    assert "medattn.status" not in best.data.tags
    choices = "{type: categorical, choices: [0.02, 1.0e-07]}"
    assert parent.data.params["space.training.learning_rate"] == choices
    assert parent.data.params["training.steps"] == "16"
    (point,) = client.get_metric_history(parent.info.run_id, "best_score")
    assert (point.step, round(point.value, 3)) == (0, round(score, 3))
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert names == {"best.yaml", "trials.csv", "report", "sweep.yaml"}
    (version,) = client.search_model_versions("name = 'sweep'")
    assert version.run_id == best.info.run_id
    assert load(study / "best.yaml").run.parent is None

    assert main(["track", "sync", str(study)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[1:4] for line in told] == [["nothing", "was", "missing"]] * 3

    # the same command again: nothing is trained, sent or registered twice
    assert main(["tune", str(space)]) == 0
    client, found = in_mlflow(runs)
    assert sorted(found) == ["sweep", "trial_0000", "trial_0001"]
    assert len(client.get_metric_history(parent.info.run_id, "best_score")) == 1
    assert len(client.search_model_versions("name = 'sweep'")) == 1
    assert found["sweep"].info.status == "FINISHED"


def test_a_search_that_was_not_tracked_is_sent_by_sync(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space, study = tmp_path / "sweep.yaml", runs / "sweep"
    text = SPACE.format(root=tmp_path / "cases", run=study).replace("median", "none")
    space.write_text(text)
    assert main(["tune", str(space), "run.tracking=false", "run.experiment=ablation"]) == 0
    assert not (runs / "mlflow.db").exists()
    assert main(["track", "sync", str(study)]) == 0
    client, found = in_mlflow(runs)
    parents = [run.data.tags.get("mlflow.parentRunId") for _, run in sorted(found.items())]
    assert parents == [None, found["sweep"].info.run_id, found["sweep"].info.run_id]
    assert {point.step for point in client.get_metric_history(parents[1], "best_score")} == {0, 1}
    children = [run for name, run in found.items() if name != "sweep"]
    worse, best = sorted(children, key=lambda run: max_of(client, run, "validation_dice"))
    assert max_of(client, worse, "validation_dice") < max_of(client, best, "validation_dice")
    (version,) = client.search_model_versions("name = 'ablation'")
    assert version.run_id == best.info.run_id
    assert read_record(study).experiment == "ablation"


@pytest.mark.slow
def test_folds_stand_below_the_run_that_they_belong_to(runs: Path, tmp_path: Path) -> None:
    """The loop of docs/tracking.md as it stands there."""
    docs = (Path(__file__).resolve().parents[3] / "docs/tracking.md").read_text(encoding="utf-8")
    (loop,) = (part for part in docs.split("\n\n") if "run.parent=$key" in part)
    text = CONFIG.format(root=tmp_path / "cases", run="null").replace("\n  ", "\n")[2:]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/hn_ct.yaml").write_text(text.replace("steps: 16", "steps: 2"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(["bash", "-ec", loop], cwd=tmp_path, env=environment, check=True, timeout=500)
    shutil.rmtree(tmp_path / "cases")  # a sync needs no data
    folders = sorted(path for path in runs.iterdir() if path.name.startswith("hn_ct"))
    assert main(["track", "sync", *map(str, folders)]) == 0
    client, found = in_mlflow(runs)
    parent = found.pop("hn_ct")
    assert sorted(found) == ["hn_ct_fold_1", "hn_ct_fold_2", "hn_ct_fold_3"]
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    assert {run.data.params["seed"] for run in found.values()} == {"1", "2", "3"}
    (version,) = client.search_model_versions("name = 'hn_ct'")
    assert version.run_id == parent.info.run_id
