"""Tracking on a real MLflow server that is killed, comes back, or comes for the first time after the run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medattn.data.phantom import write_phantoms
from medattn.io import read_volume
from medattn.training import mirror
from medattn.training.mlflow_store import connect
from medattn.training.runrecord import read_record
from medattn.training.tracking import Tracker
from medattn_pipelines.cli import main
from medattn_pipelines.tracksync import sync

pytestmark = [
    pytest.mark.slow,
    # inside MLflow
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint:UserWarning"
    ),
]
SECRET = "geheim"
TINY = [
    "data.spacing_mm=[10, 10, 10]",
    "data.patch_size=[16, 16, 16]",
    "data.workers=1",
    "network.name=unet",
    "network.options={widths: [4, 8], strides: [2]}",
    "training.steps=4",
    "training.precision=fp32",
    "training.device=cpu",
    "training.log_every=1",
]


class Server:
    """An MLflow server on loopback, with SQLite. folder: survives a kill."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process = folder, None
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.uri = f"http://me:{SECRET}@127.0.0.1:{self.port}"

    process: subprocess.Popen[bytes] | None

    def start(self, seconds: float = 300) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        switches = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | switches
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(
            command, cwd=self.folder, env=environment, start_new_session=True, stdout=log, stderr=log
        )
        log.close()
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.2)
        pytest.fail("the MLflow server did not start")

    def kill(self) -> None:
        """With its workers, without a chance to end anything well."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
            self.process = None


@pytest.fixture
def server(tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Not started yet; trackings go there. A loaded machine answers late."""
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(tables, folder / "mlflow.db")
    made = Server(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    yield made
    made.kill()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs/first"
    (folder / "report").mkdir(parents=True)
    (folder / "report/report.html").write_text("<p>", encoding="utf-8")
    return folder


def tracker(run: Path, **options: Any) -> Tracker:
    given: dict[str, Any] = {"parameters": {"training.steps": 100}, "mirror": True, "experiment": "hn"}
    return Tracker(run, name=run.name, **given | options)


def log(record: Tracker, first: int, last: int) -> float:
    """Log steps; returns the seconds of the processor that this thread spent."""
    begun = time.thread_time()
    for step in range(first, last):
        record.log(step, loss=1 / (step + 1), **{"dice/Parotid (left)": step / 7})
    return time.thread_time() - begun


def journal(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_equal_line_by_line(client: Any, run_id: str, run: Path) -> None:
    """Every value of metrics.jsonl stands there once with its step and time, and nothing else does."""
    lines = journal(run)
    names = {name for line in lines for name in line} - {"step", "time"}
    there = client.get_run(run_id).data.metrics
    assert len([name for name in there if not name.startswith("system/")]) == len(names)
    for name in names:
        there = client.get_metric_history(run_id, name.replace("(", "_").replace(")", "_"))
        mine = [(line["step"], round(1000 * line["time"]), line[name]) for line in lines if name in line]
        assert sorted((point.step, point.timestamp, point.value) for point in there) == sorted(mine)


def only_run(server: Server) -> tuple[Any, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(server.uri)
    (found,) = client.search_runs([client.get_experiment_by_name("hn").experiment_id])
    return client, found


def assert_no_secret(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def wait_for_metrics(server: Server, count: int, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            client, found = only_run(server)
            if len(client.get_metric_history(found.info.run_id, "loss")) >= count:
                return
        except (AttributeError, ValueError):  # no experiment, no run yet
            pass
        time.sleep(0.5)
    pytest.fail(f"the server has not {count} values after {seconds} s")


def test_a_server_killed_in_mid_run_is_completed_by_sync(
    run: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.start()
    record = tracker(run)
    seconds = log(record, 0, 50)
    wait_for_metrics(server, 50)
    server.kill()
    seconds += log(record, 50, 100)
    record.artifact(run / "report")
    begun = time.monotonic()
    record.close("finished")
    assert time.monotonic() - begun < 25
    assert seconds < 0.5, "a step waited for the server"
    assert [line["step"] for line in journal(run)] == list(range(100))
    assert len(caplog.messages) == 1
    assert SECRET not in caplog.text
    assert "medattn track sync" in caplog.text

    server.start()
    client, found = only_run(server)
    run_id = found.info.run_id
    assert found.info.status == "RUNNING"
    assert len(client.get_metric_history(run_id, "loss")) == 50
    done = sync(run)
    assert done.run_id == run_id
    assert done.sent["metric values"] == 100
    assert_equal_line_by_line(client, run_id, run)
    client, found = only_run(server)
    assert found.info.status == "FINISHED"
    assert found.info.end_time == read_record(run).ended_ms
    assert [file.path for file in client.list_artifacts(run_id, "report")] == ["report/report.html"]
    once = found.to_dictionary()

    assert sync(run).sent == {}
    client, found = only_run(server)
    assert found.to_dictionary() == once
    assert_equal_line_by_line(client, run_id, run)
    assert_no_secret(run)


def test_a_server_that_comes_back_is_caught_up_with_by_the_training(
    run: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 1.0)
    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 120.0)
    server.start()
    with tracker(run) as record:
        log(record, 0, 50)
        wait_for_metrics(server, 50)
        server.kill()
        log(record, 50, 80)
        time.sleep(8)  # so that an attempt fails
        server.start()
        log(record, 80, 100)
    client, found = only_run(server)
    assert len(caplog.messages) == 1
    assert found.info.status == "FINISHED"
    assert_equal_line_by_line(client, found.info.run_id, run)
    assert sync(run).sent == {}


def test_a_server_that_was_never_there_gets_all_of_it_later(
    run: Path, server: Server, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracker(run) as record:
        seconds = log(record, 0, 100)
        record.artifact(run / "report")
        begun = time.monotonic()
    assert time.monotonic() - begun < 25
    assert seconds < 0.5
    assert main(["track", "sync", str(run)]) == 2
    shown = capsys.readouterr()
    assert f"me:***@127.0.0.1:{server.port}" in shown.err
    assert len(shown.err.splitlines()) == 1
    server.start()
    assert main(["track", "sync", str(run)]) == 0
    client, found = only_run(server)
    assert_equal_line_by_line(client, found.info.run_id, run)
    assert found.data.params == {"training.steps": "100"}
    assert found.info.status == "FINISHED"
    assert sync(run).sent == {}
    assert SECRET not in shown.out + shown.err + capsys.readouterr().out + caplog.text
    assert_no_secret(run)


def test_a_training_is_on_the_server_and_its_model_predicts_from_there(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 300.0)
    server.start()
    write_phantoms(tmp_path / "cases", cases=3, size=32, seed=1)
    config, run = tmp_path / "hn.yaml", tmp_path / "runs/first"
    config.write_text(f"data: {{root: {tmp_path / 'cases'}, validation: 0.4}}\nrun: {{dir: {run}}}\n")
    assert main(["train", str(config), *TINY]) == 0
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    client, found = only_run(server)
    run_id = found.info.run_id
    assert_equal_line_by_line(client, run_id, run)
    assert found.data.params["training.steps"] == "4"
    assert found.data.params["run.experiment"] == "hn"
    assert {one.dataset.name for one in found.inputs.dataset_inputs} == {"contents", "plan"}
    assert {file.path for file in client.list_artifacts(run_id)} >= {"report", "model", "config.yaml"}
    (version,) = client.search_model_versions("name = 'hn'")
    report = json.loads((run / "report/metrics.json").read_text(encoding="utf-8"))
    assert float(version.tags["mean.dice.mean"]) == report["mean"]["dice"]["mean"]
    mlflow.set_tracking_uri(server.uri)
    prediction = sorted((run / "predictions").glob("*.nii.gz"))[0]
    scan = tmp_path / "cases" / prediction.name.removesuffix(".nii.gz") / "image.nii.gz"
    for uri in (f"runs:/{run_id}/model", "models:/hn/1"):
        (answer,) = mlflow.pyfunc.load_model(uri).predict([str(scan)])
        np.testing.assert_array_equal(answer["segmentation"], read_volume(prediction).array)
    assert sync(run).sent == {}
    assert_no_secret(run)


SWEEP = """\
config:
  data: {{root: {root}, spacing_mm: [8, 8, 8], patch_size: [16, 16, 16], workers: 0, organs: [Bone_Mandible]}}
  run: {{dir: {run}}}
  network: {{name: unet, options: {{widths: [8, 16], strides: [2]}}}}
  augment: {{enabled: false}}
  inference: {{overlap: 0, keep_largest: false}}
  training: {{steps: 60, precision: fp32, device: cpu, log_every: 1, validate_every: 30, save_every: 10,
             ema_decay: 0.8, warmup_steps: 0, deep_supervision: false}}
space:
  training.learning_rate: {{type: categorical, choices: [0.02, 0.0000001, 0.00000011]}}
sampler: {{name: grid}}
"""


def test_a_search_of_two_workers_is_one_run_whatever_dies(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker is killed in mid-trial, then the server; the other worker ends the search without it."""
    server.start()
    write_phantoms(tmp_path / "cases", cases=3, size=32, seed=0)
    space, study = tmp_path / "sweep.yaml", tmp_path / "runs/sweep"
    space.write_text(SWEEP.format(root=tmp_path / "cases", run=study))
    command = [sys.executable, "-m", "medattn_pipelines.cli", "tune", str(space)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log").open("wb")
    workers = [subprocess.Popen(command, stdout=log, stderr=log, env=environment) for _ in range(2)]
    log.close()
    try:
        victim = workers[0]
        mine = f"-{victim.pid}-"
        until = time.monotonic() + 240
        begun: list[Path] = []
        while not begun:
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            journal_text = (study / "study.journal").read_text() if (study / "study.journal").exists() else ""
            numbers = [
                line["trial_id"]
                for line in map(json.loads, journal_text.splitlines())
                if mine in str(line.get("user_attr", {}).get("worker", ""))
            ]
            folders = [study / f"trial_{number:04d}" for number in numbers]
            begun = [one for one in folders if (one / "checkpoints/last").exists() and in_the_middle(one)]
            time.sleep(0.05)
        victim.kill()
        key = read_record(begun[0]).key
        server.kill()
        assert workers[1].wait(400) == 0, (tmp_path / "log").read_text()
    finally:
        for process in workers:
            process.kill()
            process.wait()
    assert "medattn track sync" in (tmp_path / "log").read_text()

    server.start()
    assert main(["track", "sync", str(study)]) == 0
    client, _ = connect(server.uri, study), capsys.readouterr()
    found = client.search_runs([client.get_experiment_by_name("sweep").experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_name for run in parents] == ["sweep"]
    children = [run for run in found if run not in parents]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    names = {run.info.run_name for run in children}
    assert names == {path.name for path in study.glob("trial_*")}
    assert len(children) == 3, "the trial of the killed worker goes on in its run"
    assert key in {run.data.tags["medattn.key"] for run in children}
    assert {run.info.status for run in found} == {"FINISHED"}
    points = client.get_metric_history(parents[0].info.run_id, "best_score")
    assert sorted(f"trial_{point.step:04d}" for point in points) == sorted(names)
    (version,) = client.search_model_versions("name = 'sweep'")
    *_, second, best = sorted(children, key=lambda run: max_of(client, run, "validation_dice"))
    assert max_of(client, second, "validation_dice") < max_of(client, best, "validation_dice")
    assert max_of(client, best, "validation_dice") == pytest.approx(max(point.value for point in points))
    assert version.run_id == best.info.run_id
    assert main(["track", "sync", str(study)]) == 0
    assert capsys.readouterr().out.count("nothing was missing") == 4
    assert_no_secret(study)


def in_the_middle(run: Path) -> bool:
    steps = [line["step"] for line in journal(run) if "loss" in line]
    return bool(steps) and steps[-1] < 50


def max_of(client: Any, run: Any, metric: str) -> float:
    return max(point.value for point in client.get_metric_history(run.info.run_id, metric))
