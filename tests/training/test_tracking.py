"""The record of a run: exact, resumable, and indifferent to MLflow's health."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medattn.errors import InputError
from medattn.training import mirror
from medattn.training.runrecord import DataSet, is_held, provenance, read_record
from medattn.training.tracking import Tracker

# raised inside MLflow's own use of SQLAlchemy, in the mirror's thread
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def lines(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def tracker(run: Path, *, resume_step: int | None = None, mirror: bool = False, **parameters: Any) -> Tracker:
    return Tracker(run, name=run.name, parameters=parameters, mirror=mirror, resume_step=resume_step)


@pytest.fixture(autouse=True)
def _no_follower_left() -> Iterator[None]:
    """A thread that was given up would go on inside the next test."""
    yield
    for thread in threading.enumerate():
        if thread.name == "mlflow-mirror":
            thread.join(300)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    return folder


def test_every_line_is_on_disk_when_log_returns(run: Path) -> None:
    before = time.time()
    with tracker(run) as record:
        record.log(10, loss=0.5, rate=1e-3)
        (line,) = lines(run)
        assert before - 0.001 <= line.pop("time") <= time.time() + 0.001
        assert line == {"step": 10, "loss": 0.5, "rate": 0.001}


def test_numbers_that_json_cannot_hold_are_null(run: Path) -> None:
    with tracker(run) as record:
        record.log(1, loss=float("nan"), norm=float("inf"))
    assert lines(run)[0].items() >= {"loss": None, "norm": None}.items()


def test_the_names_of_the_record_itself_are_taken(run: Path) -> None:
    with tracker(run) as record, pytest.raises(ValueError, match="time"):
        record.log(1, time=3.0)


def test_a_new_run_starts_with_an_empty_record(run: Path) -> None:
    with tracker(run) as record:
        record.log(1, loss=1.0)
    with tracker(run):
        assert lines(run) == []


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    logged=st.integers(0, 30),
    resume=st.integers(0, 35),
    torn=st.binary(max_size=20).filter(lambda tail: b"\n" not in tail),
)
def test_a_resumed_record_equals_an_uninterrupted_one(
    run: Path, logged: int, resume: int, torn: bytes
) -> None:
    with tracker(run) as record:
        for step in range(1, logged + 1):
            record.log(step, loss=1 / step)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    with tracker(run, resume_step=resume) as record:
        for step in range(resume + 1, 36):
            record.log(step, loss=1 / step)
    steps = [*range(1, min(logged, resume) + 1), *range(resume + 1, 36)]
    assert [(line["step"], line["loss"]) for line in lines(run)] == [(step, 1 / step) for step in steps]


def test_a_damaged_record_is_not_silently_shortened(run: Path) -> None:
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "time": 0}\n{"st\n{"step": 3, "time": 0}\n', encoding="utf-8"
    )
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not a line of metrics"):
        tracker(run, resume_step=3)
    assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_a_record_that_a_kill_tore_resumes(run: Path) -> None:
    script = (
        "import os, signal; from pathlib import Path; from medattn.training.tracking import Tracker\n"
        f"record = Tracker(Path({str(run)!r}), name='x', parameters={{}}, mirror=False)\n"
        "record.log(1, loss=1.0); record.log(2, loss=0.5)\n"
        'record._file.write(\'{"step": 3, "ti\'); record._file.flush()\n'
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    with tracker(run, resume_step=2) as record:
        record.log(3, loss=0.25)
    assert [line["loss"] for line in lines(run)] == [1.0, 0.5, 0.25]


def test_a_copy_of_what_is_not_there_is_refused(run: Path) -> None:
    with tracker(run) as record, pytest.raises(FileNotFoundError):
        record.artifact(run / "report.html")


def test_the_record_alone_loads_no_mlflow(run: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from medattn.training.tracking import Tracker\n"
        f"with Tracker(Path({str(run)!r}), name='x', parameters={{}}, mirror=False) as record:\n"
        "    record.log(1, loss=1.0)\n"
        "assert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def assert_unharmed(run: Path, warnings: list[str], seconds: float) -> None:
    assert [line["step"] for line in lines(run)] == list(range(100))
    assert len(warnings) == 1, warnings
    assert "MLflow does not follow this run, metrics.jsonl does" in warnings[0]
    assert seconds < 0.5, "log() waited for the server"


def log_a_hundred_steps(record: Tracker) -> float:
    begun = time.thread_time()
    for step in range(100):
        record.log(step, loss=1.0)
    return time.thread_time() - begun


def test_a_server_that_is_down_costs_one_warning(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with tracker(run, mirror=True, steps=3) as record:
        seconds = log_a_hundred_steps(record)
    assert_unharmed(run, caplog.messages, seconds)


@pytest.mark.slow
def test_a_server_that_never_answers_costs_one_warning_and_a_bounded_wait(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:  # accepts and says nothing
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        record = tracker(run, mirror=True)
        seconds = log_a_hundred_steps(record)
        begun = time.monotonic()
        record.close("finished")
        assert time.monotonic() - begun < 15
        assert_unharmed(run, caplog.messages, seconds)


def stored(uri: str) -> tuple[Any, Any]:
    """MLflow's client and the one run that it holds."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("medattn")
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow's, whose tables take it long to make."""
    from medattn.training.mlflow_store import connect

    folder = tmp_path_factory.mktemp("tables") / "run"
    folder.mkdir()
    connect(f"sqlite:///{folder.parent / 'mlflow.db'}", folder)
    return folder.parent / "mlflow.db"


def first_and_resumed(run: Path) -> None:
    """A run that logs 0..4, was saved at step 2, and goes on from there to 5 with another parameter."""
    report = run / "report"
    report.mkdir()
    (report / "report.html").write_text("<p>", encoding="utf-8")
    with tracker(run, mirror=True, **{"training.steps": 5, "network.name": "unet"}) as record:
        for step in range(5):
            record.log(step, loss=1 / (step + 1), **{"dice/Parotid (left)": 0.5, "bad": float("nan")})
        record.artifact(report)
        record.artifact(run / "metrics.jsonl")
    with tracker(run, mirror=True, resume_step=2, **{"training.steps": 6, "network.name": "unet"}) as record:
        for step in range(3, 6):
            record.log(step, loss=1 / (step + 1))


def assert_mirrored(uri: str, run: Path) -> None:
    client, found = stored(uri)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == run.name
    assert found.data.params == {"training.steps": "5", "network.name": "unet"}
    assert found.data.tags["resumed.training.steps"] == "6"
    assert found.data.tags["version.torch"]
    run_id = found.info.run_id
    assert json.loads((run / "mlflow.json").read_text(encoding="utf-8"))["run_id"] == run_id
    history = sorted((point.step, point.value) for point in client.get_metric_history(run_id, "loss"))
    # steps 0 to 2 were sent by both sessions and stand once; 3 and 4 were trained twice
    assert history == [(step, 1 / (step + 1)) for step in (0, 1, 2, 3, 3, 4, 4, 5)]
    assert len(client.get_metric_history(run_id, "dice/Parotid _left_")) == 5
    assert "bad" not in found.data.metrics
    assert {file.path for file in client.list_artifacts(run_id)} == {"report", "metrics.jsonl"}


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded machine makes a database in more than a few seconds."""
    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 300.0)


@pytest.mark.usefixtures("patient")
def test_a_database_beside_the_run_mirrors_and_resumes(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(run)  # so that a stray ./mlruns would be seen
    first_and_resumed(run)
    assert caplog.messages == []
    assert_mirrored(f"sqlite:///{run.parent / 'mlflow.db'}", run)
    assert {path.name for path in run.parent.iterdir()} == {"first", "mlflow.db", "mlflow_artifacts"}
    assert {path.name for path in run.iterdir()} == {"metrics.jsonl", "mlflow.json", "run.json", "report"}


def test_the_mirror_sends_no_telemetry(run: Path) -> None:
    script = (
        "from pathlib import Path; from medattn.training.tracking import Tracker\n"
        f"Tracker(Path({str(run)!r}), name='x', parameters={{}}, mirror=True).close('finished')\n"
        "import mlflow.telemetry as telemetry; print(telemetry.get_telemetry_client())"
    )
    # MLflow is silent in CI and under pytest by itself; take their marks away
    marks = ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    clean = {name: value for name, value in os.environ.items() if name not in marks}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=clean
    )
    assert done.stdout.strip() == "None"


def test_the_record_says_what_ran(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [DataSet("cases", "ab" * 16, "/data/cases")]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:geheim@db/mlflow")
    begun = time.time()
    with Tracker(
        run, name="r", parameters={"a.b": [1, 2]}, mirror=False, experiment="hn", parent="p", data=data
    ) as t:
        t.model(run, loader="loader", register="hn", numbers={"dice": 0.5, "hd95": float("nan")})
        assert read_record(run).status == "running"
    record = read_record(run)
    assert (record.name, record.experiment, record.parent, record.key) == ("r", "hn", "p", t.key)
    assert (record.parameters, record.data) == ({"a.b": "[1, 2]"}, data)
    assert record.model is not None
    assert record.model.numbers == {"dice": 0.5}
    assert record.status == "finished"
    assert 1000 * begun - 1 <= record.started_ms <= (record.ended_ms or 0) <= 1000 * time.time() + 1
    assert "geheim" not in (run / "run.json").read_text(encoding="utf-8")


def test_a_resumed_record_keeps_its_key_and_names_what_changed(run: Path) -> None:
    old, new = DataSet("cases", "1" * 32, "/x"), DataSet("cases", "2" * 32, "/x")
    with Tracker(run, name="r", parameters={"steps": 5, "seed": 0}, mirror=False, data=[old]) as first:
        first.log(1, loss=1.0)
    with Tracker(
        run, name="r", parameters={"steps": 6, "seed": 0}, mirror=False, data=[new], resume_step=1
    ) as second:
        pass
    assert second.key == first.key
    assert second.record.parameters == {"steps": "5", "seed": "0"}
    assert {k: v for k, v in second.record.tags.items() if k.startswith(("resumed", "data"))} == {
        "data.cases": "1" * 32,
        "resumed.data.cases": "2" * 32,
        "resumed.steps": "6",
    }
    with Tracker(run, name="r", parameters={}, mirror=False) as third:
        assert third.key != first.key, "a new run in an old folder is another one"


def test_a_run_is_held_until_its_process_ends(run: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from medattn.training.tracking import Tracker\n"
        f"record = Tracker(Path({str(run)!r}), name='x', parameters={{}}, mirror=False)\n"
        "print('begun', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout.readline() == b"begun\n"
        assert is_held(run / "metrics.jsonl")
        child.kill()
        child.wait()
    assert not is_held(run / "metrics.jsonl")
    assert read_record(run).status == "running", "nobody could say that it ended"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 9}', "{"])
def test_a_damaged_record_is_one_sentence(run: Path, content: str) -> None:
    (run / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"run\.json: (damaged|written by another version)"):
        read_record(run)


def test_a_change_of_the_code_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import medattn

    code = tmp_path / "checkout/medattn/__init__.py"
    code.parent.mkdir(parents=True)
    code.write_text("", encoding="utf-8")
    git = ["git", "-C", str(tmp_path / "checkout"), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(medattn, "__file__", str(code))
    assert provenance()["git.dirty"] == "false"
    code.write_text("changed = 1", encoding="utf-8")
    tags = provenance()
    assert tags["git.dirty"] == "true"
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert tags["mlflow.source.git.commit"] == head.strip()
    monkeypatch.setattr(medattn, "__file__", str(tmp_path / "elsewhere.py"))
    assert "git.dirty" not in provenance()


@pytest.mark.usefixtures("patient")
def test_awkward_names_and_long_values_reach_mlflow(
    run: Path, tables: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(tables, run.parent / "mlflow.db")
    parameters = {f"p{number}": "x" * 7000 for number in range(120)} | {"n" * 300: 1, "n" * 299 + "m": 2}
    metrics = {"dice/Parotid (left)": 0.1, "dice/Parotid [left]": 0.2, "../up": 0.3, "a//b": 0.4, "ß/é": 0.5}
    with tracker(run, mirror=True, **parameters) as record:
        record.log(1, **metrics)
    assert caplog.messages == []
    _, found = stored(f"sqlite:///{run.parent / 'mlflow.db'}")
    assert len(found.data.params) == 122
    assert {len(value) for value in found.data.params.values()} == {6000, 1}
    assert sorted(found.data.metrics.values()) == sorted(metrics.values())


@pytest.mark.usefixtures("patient")
def test_the_machine_is_watched(
    run: Path, tables: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("psutil")
    monkeypatch.setattr("medattn.training.system_metrics.SECONDS", 0.1)
    shutil.copy(tables, run.parent / "mlflow.db")
    with tracker(run, mirror=True):
        until = time.monotonic() + 120
        while not (run / "system.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.1)
    assert caplog.messages == []
    first = json.loads((run / "system.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["step"] == 1
    assert 0 < first["system/system_memory_usage_percentage"] <= 100
    client, found = stored(f"sqlite:///{run.parent / 'mlflow.db'}")
    (point, *_) = client.get_metric_history(found.info.run_id, "system/system_memory_usage_percentage")
    assert (point.step, point.value) == (1, first["system/system_memory_usage_percentage"])
    assert lines(run) == []
