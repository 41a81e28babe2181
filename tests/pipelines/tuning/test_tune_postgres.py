"""One study on a real PostgreSQL: four workers, two of them killed in the middle of a trial."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from medattn.data.phantom import write_phantoms
from medattn_pipelines.tuning.store import open_store
from medattn_pipelines.tuning.study import requeue

SECRET = "s3cr3t/of@anna"
SPACE = """\
config:
  data: {{root: {root}, spacing_mm: [10, 10, 10], patch_size: [16, 16, 16], workers: 0}}
  run: {{dir: {run}, tracking: false}}
  network: {{name: unet, options: {{widths: [4, 8], strides: [2]}}}}
  augment: {{enabled: false}}
  inference: {{overlap: 0, keep_largest: false}}
  training: {{steps: 40, precision: fp32, device: cpu, log_every: 1, validate_every: 20, save_every: 5}}
space:
  training.learning_rate: {{type: float, low: 1e-4, high: 1e-2, log: true}}
  network.name: {{type: categorical, choices: [unet, unet_axial]}}
  network.options.heads: {{type: int, low: 1, high: 2, when: {{network.name: unet_axial}}}}
sampler: {{name: tpe, startup_trials: 4}}
trials: 10
"""
WORKERS, TRIALS = 4, 10


def _program(name: str) -> str:
    found = shutil.which(name) or next(
        (str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None
    )
    if found is None:
        pytest.skip(f"needs PostgreSQL's {name}, of the Debian package postgresql")
    return found


class Cluster:
    """PostgreSQL on loopback. account: who runs it, None for this user."""

    def __init__(self, folder: Path, account: str | None) -> None:
        self.folder, self._account = folder, account
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"postgresql://anna:s3cr3t%2Fof%40anna@127.0.0.1:{self.port}/postgres"
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        command = [_program("postgres"), "-D", str(self.folder / "data"), "-h", "127.0.0.1"]
        command += ["-p", str(self.port), "-k", str(self.folder), "-F"]
        with (self.folder / "log").open("ab") as log:
            self._server = subprocess.Popen(command, stdout=log, stderr=log, user=self._account, cwd="/")
        _wait_for_server(self.port, self._server, self.folder / "log")

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """SIGQUIT is `pg_ctl stop -m immediate`: no connection ends well."""
        if self._server is not None:
            self._server.send_signal(how)
            self._server.wait(60)
            self._server = None


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A temporary cluster that runs, with a password; root starts it as another user."""
    pytest.importorskip("psycopg", reason='needs `pip install "psycopg[binary]"`')
    initdb = _program("initdb")
    account = None
    if os.geteuid() == 0:
        known = [name for name in ("postgres", "nobody") if _exists(name)]
        if not known:
            pytest.skip("PostgreSQL refuses to run as root, and there is no other account")
        account = known[0]
    folder = Path(f"/tmp/medattn-postgres-{os.getpid()}")  # a socket's path must be short
    folder.mkdir(mode=0o700)
    password = folder / "password"
    password.write_text(SECRET + "\n")
    if account:
        for path in (folder, password):
            shutil.chown(path, account)
    arguments = ["--username=anna", f"--pwfile={password}", "--auth=scram-sha-256", "--encoding=UTF8"]
    data = str(folder / "data")
    subprocess.run(
        [initdb, "--pgdata", data, *arguments, "--no-sync"],
        check=True, capture_output=True, user=account, cwd="/",
    )  # fmt: skip
    made = Cluster(folder, account)
    try:
        made.start()
        yield made
    finally:
        made.stop(signal.SIGINT)  # a fast shutdown
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(cluster: Cluster) -> str:
    """Its URL."""
    return cluster.url


def _exists(account: str) -> bool:
    try:
        pwd.getpwnam(account)
    except KeyError:
        return False
    return True


def _wait_for_server(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg

    until = time.monotonic() + 60
    while True:
        assert server.poll() is None, log.read_text()
        try:
            psycopg.connect(
                host="127.0.0.1", port=port, user="anna", password=SECRET, dbname="postgres"
            ).close()
            return
        except psycopg.OperationalError:
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)


def _state(url: str) -> list[optuna.trial.FrozenTrial]:
    store = open_store(url, "shared", heartbeat=60, requeue=lambda study, trial: None)
    try:
        return optuna.load_study(study_name="shared", storage=store.storage).get_trials(deepcopy=True)
    finally:
        store.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_no_trial_is_lost_or_counted_twice_when_workers_are_killed(database: str, tmp_path: Path) -> None:
    write_phantoms(tmp_path / "cases", cases=3, size=32, seed=1)
    space = tmp_path / "shared.yaml"
    space.write_text(SPACE.format(root=tmp_path / "cases", run=tmp_path / "study"))
    command = [sys.executable, "-m", "medattn_pipelines.cli", "tune", str(space)]
    command += ["--storage", database, "--heartbeat", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    logs = [tmp_path / f"worker_{number}.log" for number in range(WORKERS)]
    workers = []
    for log in logs:
        with log.open("wb") as output:
            workers.append(
                subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            )
    try:
        killed = _kill_in_mid_trial(workers, logs, tmp_path / "study", 2)
        for process in workers:
            process.wait(540)
    finally:
        for process in workers:
            process.kill()
    texts = [log.read_text() for log in logs]
    codes = [process.returncode for process in workers]
    assert codes == [-signal.SIGKILL if number in killed else 0 for number in range(WORKERS)], "\n".join(
        texts
    )

    trials = _state(database)
    states = Counter(trial.state for trial in trials)
    assert states == {TrialState.COMPLETE: TRIALS, TrialState.FAIL: 2}, states
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    for lost in failed:
        heirs = [t for t in trials if t.system_attrs.get("retry_history", [])[-1:] == [lost.number]]
        assert len(heirs) == 1
        assert heirs[0].params == lost.params
        assert heirs[0].state == TrialState.COMPLETE
    complete = [str(sorted(t.params.items())) for t in trials if t.state == TrialState.COMPLETE]
    assert len(set(complete)) == TRIALS
    # what every worker says, and what is on disk, agrees with the database; and nobody tells the password
    told = [line for text in texts for line in text.splitlines() if ": score " in line]
    assert len(told) == TRIALS
    folders = {path.name for path in (tmp_path / "study").glob("trial_*/model/model.json")}
    assert folders == {"model.json"}
    assert len(list((tmp_path / "study").glob("trial_*/model/model.json"))) == TRIALS
    files = [
        path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".gz", ".safetensors")
    ]
    for secret in (SECRET, "s3cr3t"):
        assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert any("anna:***@127.0.0.1" in text for text in texts)


def _kill_in_mid_trial(
    workers: list[subprocess.Popen[bytes]], logs: list[Path], study: Path, count: int
) -> set[int]:
    """Kill workers while their trainings run; returns their numbers."""
    killed: set[int] = set()
    until = time.monotonic() + 400
    while len(killed) < count:
        assert time.monotonic() < until, "\n".join(log.read_text() for log in logs)
        for number, (process, log) in enumerate(zip(workers, logs, strict=True)):
            begun = [line for line in log.read_text().splitlines() if line.startswith("trial ")]
            if number in killed or process.poll() is not None or not begun or " complete): " not in begun[-1]:
                continue  # between two trials
            trial = int(begun[-1].split()[1])
            metrics = study / f"trial_{trial:04d}/metrics.jsonl"
            if metrics.exists() and 0 < len(metrics.read_text().splitlines()) < 25 and len(killed) < count:
                process.send_signal(signal.SIGKILL)
                process.wait(30)
                killed.add(number)
        time.sleep(0.05)
    return killed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_wrong_password_is_a_sentence_without_it(database: str, tmp_path: Path) -> None:
    from medattn.errors import InputError

    wrong = database.replace("s3cr3t", "wr0ng")
    with pytest.raises(InputError, match="password authentication failed") as error:
        open_store(wrong, "shared", heartbeat=60, requeue=lambda study, trial: None)
    assert "wr0ng" not in str(error.value)
    assert "anna:***@127.0.0.1" in str(error.value)


def _steps(run: Path) -> list[int]:
    """Of the training that stand in its journal."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if '"loss"' in line]


def _wait_for_steps(run: Path, count: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 240
    while len(_steps(run)) < count:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_training_outlives_the_database_and_its_result_arrives(cluster: Cluster, tmp_path: Path) -> None:
    """The first trial sees the server restart; in the second one it stays away until the worker gives up."""
    write_phantoms(tmp_path / "cases", cases=3, size=32, seed=1)
    space, log, study = tmp_path / "shared.yaml", tmp_path / "log", tmp_path / "study"
    text = SPACE.format(root=tmp_path / "cases", run=study).replace("steps: 40", "steps: 100")
    space.write_text(text.replace("trials: 10", "trials: 2"))
    command = [sys.executable, "-m", "medattn_pipelines.cli", "tune", str(space)]
    command += ["--storage", cluster.url, "--heartbeat", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        worker = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        first, second = study / "trial_0000", study / "trial_0001"
        _wait_for_steps(first, 10, worker, log)
        cluster.stop()
        _wait_for_steps(first, 65, worker, log)  # past three validations, of which the study hears nothing
        cluster.start()
        _wait_for_steps(second, 30, worker, log)
        (done,) = (trial for trial in _state(cluster.url) if trial.state == TrialState.COMPLETE)
        assert sorted(done.intermediate_values) == [20, 40, 60, 80, 100]
        cluster.stop()
        assert worker.wait(240) == 2, log.read_text()
    finally:
        worker.kill()
    told = log.read_text()
    assert "the storage is away; waiting 6 s for it" in told
    assert "Warning" not in told
    assert told.splitlines()[-1].startswith(("error: --storage postgresql://anna:***@", "medattn"))
    assert "Traceback" not in told
    assert "s3cr3t" not in told
    assert _steps(second) == list(range(1, 101))
    assert (second / "checkpoints/last").is_dir()

    cluster.start()
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert again.returncode == 0, again.stderr
    trials = _state(cluster.url)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert trials[2].params == trials[1].params
    lines = [json.loads(line) for line in (study / "trial_0002/metrics.jsonl").read_text().splitlines()]
    scores = [line["validation_dice"] for line in lines if "validation_dice" in line]
    assert len(scores) == 5
    assert trials[2].values == [max(scores)]
    assert _steps(study / "trial_0002") == list(range(1, 101))
    assert not second.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_an_outage_takes_no_trial_from_a_worker_that_lives(cluster: Cluster, tmp_path: Path) -> None:
    """Neither by one that saw the outage nor by one that starts right after it; a dead one's is taken."""
    write_phantoms(tmp_path / "cases", cases=3, size=32, seed=1)
    space, log, run = tmp_path / "shared.yaml", tmp_path / "log", tmp_path / "study/trial_0000"
    text = SPACE.format(root=tmp_path / "cases", run=tmp_path / "study")
    space.write_text(
        text.replace("steps: 40", "steps: 9000").replace("validate_every: 20", "validate_every: 9000")
    )
    command = [sys.executable, "-m", "medattn_pipelines.cli", "tune", str(space)]
    command += ["--storage", cluster.url, "--heartbeat", "4"]
    with log.open("wb") as output:
        worker = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_for_steps(run, 10, worker, log)
        early = open_store(cluster.url, "shared", heartbeat=4, requeue=requeue)
        study = optuna.load_study(study_name="shared", storage=early.storage)
        time.sleep(9)  # two heartbeats, so that what it finds counts
        cluster.stop()
        time.sleep(14)  # more than three heartbeats
        with pytest.raises(optuna.exceptions.StorageInternalError) as error:
            early.fail_dead(study)
        assert early.away(error.value)
        worker.send_signal(signal.SIGSTOP)  # its next heartbeat comes after the others looked
        cluster.start()
        late = open_store(cluster.url, "shared", heartbeat=4, requeue=requeue)
        for store in (early, late):
            store.fail_dead(optuna.load_study(study_name="shared", storage=store.storage))
        assert [trial.state for trial in study.trials] == [TrialState.RUNNING]
        worker.send_signal(signal.SIGCONT)
        time.sleep(10)
        early.fail_dead(study)
        assert [trial.state for trial in study.trials] == [TrialState.RUNNING], "it showed itself again"
        worker.kill()
        worker.wait(30)
        time.sleep(14)
        early.fail_dead(study)
        assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]
        early.close()
        late.close()
    finally:
        worker.kill()
        worker.wait()
