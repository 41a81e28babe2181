"""Workers that are stopped, given up or in the wrong folder, and what they leave to the others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from optuna.study import Study
from optuna.trial import TrialState

from medattn.data.phantom import write_phantoms
from medattn.errors import InputError
from medattn.training.runrecord import FILE, METRICS, new_record, read_record
from medattn_pipelines.tuning import store as store_module
from medattn_pipelines.tuning.spacefile import Search, read_search
from medattn_pipelines.tuning.store import WORKER, JournalStore, fail, open_store
from medattn_pipelines.tuning.study import join_study, requeue, taken_over
from medattn_pipelines.tuning.sweeprecord import SweepRecord
from medattn_pipelines.tuning.trials import run_trial

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
SPACE = """\
config:
  seed: 7
  data: {{root: {root}, spacing_mm: [10, 10, 10], patch_size: [16, 16, 16], workers: 0}}
  run: {{dir: {run}, tracking: false}}
  network: {{name: unet, options: {{widths: [4, 8], strides: [2]}}}}
  augment: {{enabled: false}}
  training: {{steps: 5000, precision: fp32, device: cpu, validate_every: 5000, save_every: 2}}
space:
  training.learning_rate: {{type: float, low: 1e-4, high: 1e-2}}
sampler: {{name: random}}
trials: 1
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("workers") / "cases"
    write_phantoms(root, cases=3, size=32, seed=1)
    return root


@pytest.fixture
def space(tmp_path: Path, cases: Path) -> Path:
    path = tmp_path / "shared.yaml"
    path.write_text(SPACE.format(root=cases, run=tmp_path / "study"))
    return path


@pytest.fixture
def search(space: Path) -> Search:
    found = read_search(space)
    found.folder.mkdir()
    return found


@pytest.fixture
def store(search: Search) -> Iterator[JournalStore]:
    made = JournalStore(search.folder / "study.journal", requeue)
    yield made
    made.close()


def states(study: Study) -> list[TrialState]:
    return [trial.state for trial in study.get_trials(deepcopy=False)]


def wait_for(condition: Callable[[], object], log: Path) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def start(space: Path, log: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts a worker, which does not outlive the test."""
    begun: list[subprocess.Popen[bytes]] = []

    def start_worker() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "medattn_pipelines.cli", "tune", str(space)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("wb") as output:
            begun.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
        return begun[-1]

    yield start_worker
    for process in begun:
        process.kill()
        process.wait()


def test_a_folder_of_another_search_is_refused_also_by_a_study_that_is_there(
    search: Search, store: JournalStore
) -> None:
    study = join_study(search, store)
    new_record("shared", "shared", None, "another").write(search.folder)
    with pytest.raises(InputError, match=r"holds run.json of another search; choose another run.dir"):
        join_study(search, store)
    (search.folder / FILE).unlink()
    (search.folder / "trial_0000").mkdir()
    with pytest.raises(InputError, match="holds trial_0000 of another search"):
        join_study(search, store)
    new_record("shared", "shared", None, study.user_attrs["key"]).write(search.folder)
    join_study(search, store)


def test_a_trial_that_was_given_up_and_is_stopped_is_queued_once(
    search: Search, store: JournalStore, start: Callable[[], subprocess.Popen[bytes]], log: Path
) -> None:
    study = join_study(search, store)
    process = start()
    wait_for((search.folder / "trial_0000/checkpoints/last").exists, log)
    with store.turn():
        fail(study, study.trials[0], requeue)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    assert states(study) == [TrialState.FAIL, TrialState.WAITING]
    assert study.trials[1].system_attrs["kills"] == 1


@pytest.mark.slow
def test_a_worker_that_was_given_up_finds_its_folder_gone_and_does_not_make_it_again(
    search: Search, store: JournalStore, start: Callable[[], subprocess.Popen[bytes]], log: Path
) -> None:
    study = join_study(search, store)
    process = start()
    first = search.folder / "trial_0000"
    wait_for((first / "checkpoints/last").exists, log)
    with store.turn():
        assert taken_over(search.folder, search.folder / "trial_0001", [0])
        fail(study, study.trials[0], requeue)
    wait_for(lambda: "not counted, as it was given up and is run again" in log.read_text(), log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0, log.read_text()
    assert not first.exists()
    assert "Traceback" not in log.read_text()


def test_a_run_is_not_renamed_onto_another_one(tmp_path: Path) -> None:
    (tmp_path / "trial_0000/checkpoints").mkdir(parents=True)
    (tmp_path / "trial_0001/report").mkdir(parents=True)
    with pytest.raises(InputError, match="trial_0001: exists and is not an empty folder"):
        taken_over(tmp_path, tmp_path / "trial_0001", [0])


@pytest.mark.slow
def test_sigterm_ends_a_worker_that_waits_with_its_results_written(
    search: Search, store: JournalStore, start: Callable[[], subprocess.Popen[bytes]], log: Path
) -> None:
    join_study(search, store).ask().set_user_attr(WORKER, store.worker)
    process = start()
    wait_for(lambda: "waiting for the trials of other workers" in log.read_text(), log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, log.read_text()
    assert "stopped by SIGTERM: 1 running" in log.read_text()
    assert (search.folder / "report/report.html").is_file()
    assert read_record(search.folder).status == "running", "the other worker goes on"


def test_the_record_ends_with_the_last_worker(search: Search, store: JournalStore) -> None:
    study = join_study(search, store)
    with SweepRecord(search, study, store):
        with pytest.raises(KeyboardInterrupt), SweepRecord(search, study, store):
            raise KeyboardInterrupt
        assert read_record(search.folder).status == "running"
    with pytest.raises(KeyboardInterrupt), SweepRecord(search, study, store):
        raise KeyboardInterrupt
    record = read_record(search.folder)
    assert record.status == "killed"
    assert (record.parameters["seed"], record.parameters["search.seed"]) == ("7", "0")
    assert (search.folder / METRICS).exists()


def test_a_failure_of_a_trial_that_was_given_up_is_told_from_one_that_counts(
    search: Search, store: JournalStore
) -> None:
    study = join_study(search, store)
    wrong = {"training.learning_rate": -1.0}
    counted = run_trial(search, study, store, study.ask(), wrong)
    assert counted.failed
    trial = study.ask()
    fail(study, study.trials[1], requeue)
    given_up = run_trial(search, study, store, trial, wrong)
    assert not given_up.failed
    assert given_up.text.endswith("not counted, as it was given up and is run again")
    assert states(study) == [TrialState.FAIL, TrialState.FAIL, TrialState.WAITING]


def test_tracking_is_read_as_in_a_training(space: Path) -> None:
    assert not read_search(space, ["run.tracking='false'"]).tracking
    assert read_search(space, ["run.tracking='true'"]).tracking


def test_a_database_that_takes_the_connection_and_says_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("psycopg", reason='needs `pip install "psycopg[binary]"`')
    monkeypatch.setitem(store_module.CONNECTION, "connect_timeout", "2")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"postgresql://anna@127.0.0.1:{silent.getsockname()[1]}/tune"
        with pytest.raises(InputError, match="timeout"):
            open_store(url, "shared", heartbeat=60, requeue=requeue)
