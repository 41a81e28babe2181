"""The examples for clusters: checked as their readers would, and run with stand-ins for the cluster alone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from medattn.data.phantom import write_phantoms
from medattn_pipelines.cli import parser_for
from medattn_pipelines.commands import COMMANDS

CLUSTER = Path(__file__).resolve().parents[2] / "pipelines/cluster"
TRAIN = CLUSTER / "slurm_train.sh"
SCRIPTS = sorted(CLUSTER.glob("*.sh"))
BINARIES = Path(sys.executable).parent  # torchrun, medattn, shellcheck
STEPS = 150
CONFIG = f"""\
task: volumes
seed: 0
data: {{root: cases, validation: 0.5, spacing_mm: [10, 10, 10], patch_size: [16, 16, 16], workers: 1}}
run: {{dir: elsewhere, tracking: false}}
network: {{name: unet, options: {{widths: [4, 8], strides: [2]}}}}
training:
  {{steps: {STEPS}, batch_size: 2, validate_every: {STEPS}, log_every: 1, device: cpu, precision: fp32}}
"""


def manifests() -> list[dict[str, Any]]:
    text = (CLUSTER / "kubernetes_train.yaml").read_text()
    return list(yaml.safe_load_all(text))


def container() -> dict[str, Any]:
    _, job = manifests()
    (only,) = job["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def shellcheck(script: str) -> subprocess.CompletedProcess[str]:
    command = [str(BINARIES / "shellcheck"), "--shell", "bash", "-"]
    return subprocess.run(command, input=script, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", [*SCRIPTS, None], ids=lambda path: path.name if path else "kubernetes")
def test_the_scripts_are_sound(path: Path | None) -> None:
    # of the manifest, with the variables that Kubernetes and the shell's -u see to
    script = container()["command"][-1] if path is None else path.read_text()
    done = shellcheck(script)
    assert done.returncode == 0, done.stdout
    syntax = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (syntax.returncode, syntax.stderr) == (0, "")
    broken = shellcheck(script + "\nrm -r $1\n")
    assert "SC2086" in broken.stdout, "the check can fail"


def test_the_manifests_are_of_kubernetes() -> None:
    for manifest in manifests():
        kubernetes_validate.validate(manifest, "1.37", strict=True)
    _, job = manifests()
    job["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.37", strict=True)


def test_the_names_and_numbers_of_the_manifests_agree() -> None:
    service, job = manifests()
    pod, variables = job["spec"]["template"]["spec"], environment()
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    port = service["spec"]["ports"][0]["port"]
    assert variables["ENDPOINT"] == f"{name}-0.{pod['subdomain']}:{port}"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(variables["MACHINES"])
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == variables["GPUS"]
    assert {mount["name"] for mount in container()["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert (CLUSTER.parents[1] / variables["CONFIG"]).is_file()


def environment() -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container()["env"]}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder to work in: cases and a config."""
    write_phantoms(tmp_path / "cases", cases=4, size=32, seed=1)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


@contextmanager
def started(command: list[str], folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A command with torchrun and medattn on its PATH; all that it started ends with the block."""
    path = f"{folder / 'bin'}:{BINARIES}:{os.environ['PATH']}"
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"PATH": path} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line["step"] for line in found if "loss" in line]


def wait_for_step(run: Path, step: int, *processes: subprocess.Popen[str]) -> None:
    waited = time.monotonic() + 120
    while step not in steps(run):
        assert time.monotonic() < waited
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def require_complete(run: Path) -> None:
    assert steps(run) == list(range(1, STEPS + 1))
    assert (run / "report/report.html").is_file()


SRUN = """\
#!/bin/bash
# a task per node, here
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_PROCID=$node "$@" &
    tasks+=("$!")
done
echo "${tasks[@]}" > tasks
trap 'kill -KILL "${tasks[@]}"' TERM  # as srun does
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "$code"
"""
SCANCEL = """\
#!/bin/bash
[[ "$*" == "--signal=TERM 4711" ]] && kill -TERM $(< tasks)
"""
SCONTROL = """\
#!/bin/bash
case "$1 $2" in
"show hostnames") [[ $3 == "node[1-2]" ]] && printf 'localhost\\nlocalhost\\n' ;;
"requeue 4711") touch requeued ;;
*) exit 1 ;;
esac
"""


def stand_in_for_slurm(folder: Path) -> dict[str, str]:
    """Write srun, scontrol and scancel; returns what SLURM tells a job."""
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}


@pytest.mark.parametrize("example", ["slurm_train.sh", "slurm_tune.sh", "kubernetes_train.yaml"])
def test_what_is_started_is_a_command_of_medattn(tmp_path: Path, example: str) -> None:
    """By a script in the place of srun and torchrun that notes what it is told, and medattn's own parser."""
    slurm = stand_in_for_slurm(tmp_path)
    for name in ("srun", "torchrun"):
        (tmp_path / "bin" / name).write_text("#!/bin/bash\nprintf '%s\\n' \"$@\" > told\n")
        (tmp_path / "bin" / name).chmod(0o755)
    arguments = ["configs/hn_ct.yaml", "runs/x" if "train" in example else "journal:x", "training.steps=3"]
    command = ["bash", str(CLUSTER / example), *arguments]
    if example.endswith("yaml"):
        command, slurm = container()["command"], environment() | {"JOB_COMPLETION_INDEX": "0"}
    with started(command, tmp_path, **slurm) as job:
        out, _ = job.communicate(timeout=30)
    assert job.returncode == 0, out
    told = (tmp_path / "told").read_text().splitlines()
    place = max(number for number, word in enumerate(told) if Path(word).name == "medattn")
    name, *rest = told[place + 1 :]
    parsed = parser_for(name, COMMANDS[name]).parse_intermixed_args(rest)
    assert str(getattr(parsed, "config", None) or parsed.space) == "configs/hn_ct.yaml"


@pytest.mark.slow
def test_the_slurm_job_saves_before_its_limit_and_goes_on_in_the_next(work: Path) -> None:
    """SLURM's own commands are stood in for by scripts; torchrun and medattn are real: two of each."""
    slurm = stand_in_for_slurm(work)
    command = ["bash", str(TRAIN), "config.yaml", "run", "training.learning_rate=0.01"]
    run = work / "run"
    with started(command, work, **slurm) as job:
        wait_for_step(run, 5, job)
        job.send_signal(signal.SIGTERM)  # as --signal=B:TERM@180 has SLURM send it, to this shell alone
        out, _ = job.communicate(timeout=100)
    assert job.returncode == 0, out
    assert out.count("stopped by SIGTERM at step") == 1
    assert (work / "requeued").is_file()
    assert (run / "checkpoints/last").is_dir()
    assert 5 <= len(steps(run)) < STEPS
    (work / "requeued").unlink()
    with started(command, work, **slurm | {"SLURM_JOB_ID": "4712"}) as other:  # by mistake
        out, _ = other.communicate(timeout=200)
    assert other.returncode == 1
    assert "this run exists; continue it with --resume" in out
    with started(command, work, **slurm) as job:
        out, _ = job.communicate(timeout=200)
    assert job.returncode == 0, out
    assert not (work / "requeued").exists()
    require_complete(run)
    text = (run / "config.yaml").read_text()
    assert re.search(r"learning_rate: 0\.01\b", text)


@pytest.mark.slow
def test_the_slurm_workers_search_together(work: Path) -> None:
    """The array's script, with a journal in PostgreSQL's place."""
    (work / "space.yaml").write_text(
        f"config:\n{''.join(f'  {line}' for line in CONFIG.splitlines(keepends=True)[1:])}"
        "space:\n  training.learning_rate: {type: float, low: 1e-3, high: 1e-2, log: true}\n"
    )
    command = ["bash", str(CLUSTER / "slurm_tune.sh"), "space.yaml", "journal:study.journal"]
    command += ["training.steps=3", "training.validate_every=3"]
    with started([*command, "--trials", "2"], work, **stand_in_for_slurm(work)) as job:
        out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    assert (work / "study.journal").stat().st_size


@pytest.mark.slow
def test_the_kubernetes_pods_train_together_and_after_one_was_drained(work: Path) -> None:
    """The container's command in two processes, with what Kubernetes sets; names of pods are this machine."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    variables = environment() | {"CONFIG": "config.yaml", "RUN": "runs/first", "GPUS": "1"}
    variables["ENDPOINT"] = f"127.0.0.1:{port}"
    command, run = container()["command"], work / "runs/first"

    def pod(index: int) -> Any:
        return started(command, work, **variables, JOB_COMPLETION_INDEX=str(index))

    with pod(0) as first:
        with pod(1) as second:
            wait_for_step(run, 5, first, second)
            second.send_signal(signal.SIGTERM)  # its machine is emptied
            out, _ = second.communicate(timeout=100)
            assert second.returncode != 0, f"it is not complete, and Kubernetes shall know\n{out}"
        assert 5 <= len(steps(run)) < STEPS
        with pod(1) as another:
            for process in (another, first):
                out, _ = process.communicate(timeout=200)
                assert process.returncode == 0, out
    assert out.count("goes on from its last checkpoint") == 1, out
    require_complete(run)
