"""`medattn track sync` makes MLflow's copy of a run equal to the run folder, from whatever was there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medattn.errors import InputError
from medattn.training.mlflow_store import connect
from medattn.training.runrecord import DataSet
from medattn.training.tracking import Tracker
from medattn_pipelines.cli import main
from medattn_pipelines.tracksync import sync

# raised inside MLflow's own use of SQLAlchemy
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint:UserWarning"
)
History = Callable[[Any, str], dict[str, list[tuple[int, int, float]]]]


@pytest.fixture
def runs(tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for runs with MLflow's database, which no environment variable replaces."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    shutil.copy(tables, tmp_path / "mlflow.db")
    return tmp_path


def client_of(runs: Path) -> Any:
    return connect(f"sqlite:///{runs / 'mlflow.db'}", runs / "any")


def all_runs(runs: Path) -> list[Any]:
    client = client_of(runs)
    experiments = [one.experiment_id for one in client.search_experiments()]
    return list(client.search_runs(experiments))


def in_mlflow(runs: Path, run_id: str) -> list[tuple[str, int, int, float]]:
    client = client_of(runs)
    names = client.get_run(run_id).data.metrics
    points = [(name, point) for name in names for point in client.get_metric_history(run_id, name)]
    return sorted((name, point.step, point.timestamp, point.value) for name, point in points)


def in_journal(run: Path) -> list[tuple[str, int, int, float]]:
    found = []
    for line in map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        step, time = line.pop("step"), line.pop("time")
        found += [
            (name, step, round(1000 * time), value) for name, value in line.items() if value is not None
        ]
    return sorted(found)


def write_run(run: Path, *, steps: int = 30, **options: Any) -> Tracker:
    """A complete run that MLflow has heard nothing of."""
    run.mkdir()
    (run / "report").mkdir()
    (run / "report/report.html").write_text("<p>", encoding="utf-8")
    (run / "model").mkdir()
    (run / "model/model.json").write_text("{}", encoding="utf-8")
    given: dict[str, Any] = {"parameters": {"seed": 1}, "mirror": False, "experiment": "hn"}
    with Tracker(run, name=run.name, **given | options) as tracker:
        for step in range(steps):
            tracker.log(step, loss=1 / (step + 1), rate=0.1, broken=float("nan"))
        tracker.artifact(run / "report")
        tracker.model(
            run / "model", loader="medattn_pipelines.modelserving", register="hn", numbers={"dice": 0.5}
        )
    return tracker


def test_a_run_that_mlflow_never_saw_is_complete_there_and_once(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = runs / "first", [DataSet("cases", "ab" * 16, "/data")]
    tracker = write_run(run, data=data)
    assert main(["track", "sync", str(run)]) == 0
    assert "60 metric values" in capsys.readouterr().out
    (found,) = all_runs(runs)
    client, run_id = client_of(runs), found.info.run_id
    assert client.get_experiment(found.info.experiment_id).name == "hn"
    assert in_mlflow(runs, run_id) == in_journal(run)
    assert len(in_journal(run)) == 60
    record = tracker.record
    assert (found.info.status, found.info.run_name) == ("FINISHED", "first")
    assert (found.info.start_time, found.info.end_time) == (record.started_ms, record.ended_ms)
    assert found.data.params == {"seed": "1"}
    assert found.data.tags["version.torch"] == record.tags["version.torch"]
    (entry,) = found.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("cases", "ab" * 16)
    assert {file.path for file in client.list_artifacts(run_id)} == {"report", "model"}
    (version,) = client.search_model_versions("name = 'hn'")
    assert (version.run_id, version.tags["dice"]) == (run_id, "0.5")
    everything = (found.to_dictionary(), in_mlflow(runs, run_id))

    assert main(["track", "sync", str(run)]) == 0
    assert "nothing was missing" in capsys.readouterr().out
    (again,) = all_runs(runs)
    assert (again.to_dictionary(), in_mlflow(runs, run_id)) == everything
    assert len(client.search_model_versions("name = 'hn'")) == 1


def test_only_what_is_missing_is_sent(runs: Path) -> None:
    run = runs / "first"
    write_run(run)
    sync(run)
    journal = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    late = json.dumps({"step": 7, "time": 1.5, "loss": 0.25}) + "\n"  # a line that stood in the middle
    (run / "metrics.jsonl").write_text("".join([*journal[:5], late, *journal[5:]]), encoding="utf-8")
    (run / "report/report.html").write_text("<b>", encoding="utf-8")
    done = sync(run)
    assert dict(done.sent) == {"metric values": 1, "artifacts": 1}
    assert in_mlflow(runs, done.run_id) == in_journal(run)
    (copy,) = (runs / "mlflow_artifacts").rglob("report.html")
    assert copy.read_text(encoding="utf-8") == "<b>"


def test_what_a_resume_took_back_is_counted(runs: Path) -> None:
    run = runs / "first"
    write_run(run)
    sync(run)
    with Tracker(run, name="first", parameters={"seed": 2}, mirror=False, resume_step=19) as tracker:
        for step in range(20, 40):
            tracker.log(step, loss=0.5)
    done = sync(run)
    assert done.stale == 20  # loss and rate of steps 20 to 29
    assert set(in_journal(run)) < set(in_mlflow(runs, done.run_id))
    (found,) = all_runs(runs)
    assert found.data.tags["resumed.seed"] == "2"
    assert sync(run).sent == {}


def test_a_killed_run_is_killed_there_and_a_running_one_goes_on(runs: Path) -> None:
    run = runs / "first"
    run.mkdir()
    script = (
        "import os, sys; from pathlib import Path; from medattn.training.tracking import Tracker\n"
        f"record = Tracker(Path({str(run)!r}), name='x', parameters={{}}, mirror=False)\n"
        "record.log(1, loss=1.0); print('begun', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"begun\n"
        assert sync(run).running
        assert all_runs(runs)[0].info.status == "RUNNING"
        child.kill()
        child.wait()
    assert not sync(run).running
    (found,) = all_runs(runs)
    assert found.info.status == "KILLED"
    assert found.info.end_time == round(1000 * (run / "metrics.jsonl").stat().st_mtime)
    assert sync(run).sent == {}


@pytest.mark.parametrize("order", [("sweep", "trial", "fold"), ("fold", "trial", "sweep")])
def test_trials_and_folds_stand_below_their_run_whichever_comes_first(
    runs: Path, order: tuple[str, ...]
) -> None:
    write_run(runs / "sweep", key="search/1", steps=1)
    trial = write_run(runs / "trial", parent="search/1", steps=1)
    write_run(runs / "fold", parent=trial.key, steps=1)
    for name in order:
        sync(runs / name)
    found = {run.info.run_name: run for run in all_runs(runs)}
    ids = {name: run.info.run_id for name, run in found.items()}
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in found.items()}
    assert parents == {"sweep": None, "trial": ids["sweep"], "fold": ids["trial"]}


def test_runs_of_one_key_are_one_run_and_doubles_vanish(runs: Path) -> None:
    write_run(runs / "worker1", key="study", steps=1)
    write_run(runs / "worker2", key="study", steps=2)
    one, two = sync(runs / "worker1"), sync(runs / "worker2")
    assert one.run_id == two.run_id
    # what a request leaves that was answered too late and asked again
    client = client_of(runs)
    experiment = all_runs(runs)[0].info.experiment_id
    client.create_run(experiment, tags={"medattn.key": "study"})
    assert len(all_runs(runs)) == 2
    sync(runs / "worker1")
    assert len(all_runs(runs)) == 1


def test_the_run_goes_where_it_is_told(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs / "first"
    write_run(run, steps=1)
    (runs / "far").mkdir()
    shutil.copy(runs / "mlflow.db", runs / "far/other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{runs / 'far/other.db'}")
    (runs / "here").mkdir()
    monkeypatch.chdir(runs / "here")
    assert sync(run).uri.endswith("other.db")
    assert all_runs(runs) == []
    assert list((runs / "far/mlflow_artifacts").rglob("report.html"))
    assert sync(run, f"sqlite:///{runs / 'mlflow.db'}").uri.endswith("mlflow.db")
    assert len(all_runs(runs)) == 1
    assert not list((runs / "here").iterdir()), "MLflow would leave mlruns where it stands"


@pytest.mark.parametrize("uri", ["http://me:geheim@127.0.0.1:9", "postgresql://me:geheim@127.0.0.1:9/mlflow"])
def test_no_secret_shows_where_the_server_is_away(
    runs: Path, uri: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs / "first"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    write_run(run, steps=1, parameters={"storage": uri}, mirror=True)
    assert main(["track", "sync", str(run)]) == 2
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["track", "sync", str(run)]) == 2
    shown = capfd.readouterr()
    first, second = [line for line in shown.err.splitlines() if line.startswith("medattn: error")]
    assert "me:***@127.0.0.1:9" in first
    assert "set MLFLOW_TRACKING_URI to the whole address" in second
    assert "geheim" not in shown.out + shown.err
    assert "Traceback" not in shown.err
    for path in run.rglob("*"):
        assert path.is_dir() or b"geheim" not in path.read_bytes(), path
    assert "me:***@" in (run / "run.json").read_text(encoding="utf-8")


def test_every_folder_without_a_run_is_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs / "good", steps=1)
    write_run(runs / "damaged", steps=1)
    (runs / "damaged/metrics.jsonl").write_text('{"step": 1\n', encoding="utf-8")
    (runs / "empty").mkdir()
    assert main(["track", "sync", *(str(runs / name) for name in ("empty", "damaged", "good"))]) == 2
    shown = capsys.readouterr()
    assert f"{runs / 'good'}: sent" in shown.out
    problems = shown.err.splitlines()
    assert len(problems) == 2
    assert "run.json is missing" in problems[0]
    assert "metrics.jsonl: not a line of metrics" in problems[1]


def test_help_says_how_to_look_at_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["track", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db" in text
    assert "medattn track sync runs/hn_ct" in text


def test_sync_of_nothing_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run here"):
        sync(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
