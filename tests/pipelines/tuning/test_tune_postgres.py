"""One study on a real PostgreSQL: four workers, two of them killed in the middle of a trial."""

from __future__ import annotations

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


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    """The URL of a temporary cluster on loopback, with a password; root starts it as another user."""
    pytest.importorskip("psycopg", reason='needs `pip install "psycopg[binary]"`')
    initdb, postgres = _program("initdb"), _program("postgres")
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [postgres, "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-F"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, user=account, cwd="/")
    try:
        _wait_for_server(port, server, folder / "log")
        yield f"postgresql://anna:s3cr3t%2Fof%40anna@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # a fast shutdown
        server.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


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
