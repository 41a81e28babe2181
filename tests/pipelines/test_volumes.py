"""Training and prediction end to end on practice cases, through the command line where a user would be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medattn.data.phantom import write_phantoms
from medattn.errors import InputError
from medattn.io import Volume, read_volume, write_volume
from medattn_pipelines.config import Config
from medattn_pipelines.configfile import load
from medattn_pipelines.prediction import find_volumes, predict
from medattn_pipelines.volumes import train

TINY = [
    "data.spacing_mm=[10, 10, 10]",
    "data.patch_size=[16, 16, 16]",
    "data.workers=1",
    "network.options={widths: [4, 8], strides: [2]}",
    "training.precision=fp32",
    "training.device=cpu",
    "training.log_every=1",
    "run.tracking=false",
]


@pytest.fixture(scope="session")
def practice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small practice cases."""
    root = tmp_path_factory.mktemp("practice") / "cases"
    write_phantoms(root, cases=4, size=32, seed=1)
    return root


def config(practice: Path, run: Path, *overrides: str) -> Config:
    path = run.parent / f"{run.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"data: {{root: {practice}}}\nrun: {{dir: {run}}}\ntraining: {{steps: 20}}\n")
    return load(path, [*TINY, *overrides])


def logged(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("network", ["unet", "unet_block", "unet_axial"])
def test_ten_steps_and_ten_more_after_a_resume_equal_twenty(
    practice: Path, tmp_path: Path, network: str
) -> None:
    name = f"network.name={network}"
    rhythm = ("training.validate_every=10", "training.save_every=10", name)
    whole = train(config(practice, tmp_path / "whole", *rhythm)).run
    half = config(practice, tmp_path / "half", *rhythm)
    # stop by signal, not by steps: the schedule must not know that there is a break
    stop_at(half, 10)
    resumed = train(half, resume=True).run
    a, b = load_file(whole / "model/model.safetensors"), load_file(resumed / "model/model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    losses = [
        {line["step"]: line["loss"] for line in logged(run) if "loss" in line} for run in (whole, resumed)
    ]
    assert losses[0] == losses[1]
    assert sorted(losses[0]) == list(range(1, 21))


def stop_at(settings: Config, step: int) -> None:
    """Train in this process and send it SIGTERM while step `step` runs."""
    import medattn_pipelines.volumes as volumes

    original = volumes.loss_function

    def counting(device: torch.device, precision: torch.dtype):  # type: ignore[no-untyped-def]
        loss_of, seen = original(device, precision), [0]

        def loss(network: torch.nn.Module, batch: object):  # type: ignore[no-untyped-def]
            seen[0] += 1
            if seen[0] == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss_of(network, batch)  # type: ignore[arg-type]

        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(volumes, "loss_function", counting)
        done = train(settings)
    assert (done.reason, done.step, done.evaluation) == ("SIGTERM", step, None)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_run_folder_holds_all_that_was_promised(practice: Path, tmp_path: Path, dims: int) -> None:
    done = train(config(practice, tmp_path / "run", "training.steps=2", f"network.spatial_dims={dims}"))
    run = done.run
    for name in ("config.yaml", "plan.json", "metrics.jsonl", "model/model.json", "model/model.safetensors"):
        assert (run / name).is_file(), name
        assert (run / name).stat().st_mode == (run / "config.yaml").stat().st_mode, "others may read it too"
    for name in ("report.html", "metrics.csv", "metrics.json"):
        assert (run / "report" / name).is_file(), name
    cases = [
        case["case"]
        for case in json.loads((practice / "cases.json").read_text())
        if case["split"] == "validation"
    ]
    for case in cases:
        predicted, image = (
            read_volume(run / f"predictions/{case}.nii.gz"),
            read_volume(practice / case / "image.nii.gz"),
        )
        assert predicted.geometry.difference(image.geometry) is None
        assert read_volume(run / f"predictions/{case}.seg.nrrd").geometry.difference(image.geometry) is None
    assert done.evaluation is not None
    assert not list(run.rglob(".writing-*"))


def test_an_existing_run_is_neither_overwritten_nor_mixed(practice: Path, tmp_path: Path) -> None:
    settings = config(practice, tmp_path / "run", "training.steps=1")
    train(settings)
    before = sorted(path.name for path in settings.run.dir.iterdir())  # type: ignore[union-attr]
    with pytest.raises(
        InputError, match=r"this run exists; continue it with --resume, replace it with --overwrite"
    ):
        train(settings)
    assert sorted(path.name for path in settings.run.dir.iterdir()) == before  # type: ignore[union-attr]
    train(settings, overwrite=True)
    stranger = tmp_path / "thesis"
    stranger.mkdir()
    (stranger / "chapter1.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds 'chapter1.tex' and no run"):
            train(config(practice, stranger), overwrite=overwrite)
    assert (stranger / "chapter1.tex").read_text() == "years of work"
    with pytest.raises(InputError, match="nothing to resume"):
        train(config(practice, tmp_path / "fresh"), resume=True)


def test_prediction_repeats_the_report_and_names_cases_by_folder(practice: Path, tmp_path: Path) -> None:
    run = train(config(practice, tmp_path / "run", "training.steps=2")).run
    predict(run / "model", [practice], tmp_path / "out", export=["seg.nrrd"], device="cpu")
    names = {case["case"] for case in json.loads((practice / "cases.json").read_text())}
    assert {path.name.removesuffix(".nii.gz") for path in (tmp_path / "out").glob("*.nii.gz")} == names
    for path in (run / "predictions").glob("*.nii.gz"):
        again = read_volume(tmp_path / "out" / path.name).array
        assert (
            again != read_volume(path).array
        ).mean() < 0.01  # bf16 where the CPU has it, float32 in training here


def test_a_prediction_does_not_depend_on_how_the_file_stores_its_axes(practice: Path, tmp_path: Path) -> None:
    """The same scan with its axes turned and flipped gets the same organs at the same places."""
    run = train(config(practice, tmp_path / "run", "training.steps=3")).run
    case = sorted(path for path in practice.iterdir() if path.is_dir())[0]
    volume = read_volume(case / "image.nii.gz")
    turned = np.flip(volume.array.transpose(2, 0, 1), (0, 2))
    affine = volume.geometry.affine[:, [2, 0, 1, 3]].copy()
    for axis in (0, 2):
        affine[:3, 3] += affine[:3, axis] * (turned.shape[axis] - 1)
        affine[:3, axis] *= -1
    geometry = type(volume.geometry)(turned.shape, affine)
    write_volume(tmp_path / "turned.nii.gz", Volume(turned, geometry))
    predict(run / "model", [case, tmp_path / "turned.nii.gz"], tmp_path / "out", device="cpu")
    straight = read_volume(tmp_path / "out" / f"{case.name}.nii.gz").array
    other = read_volume(tmp_path / "out" / "turned.nii.gz").array
    assert np.array_equal(np.flip(straight.transpose(2, 0, 1), (0, 2)), other)


def test_inputs_are_found_and_clashing_names_refused(practice: Path, tmp_path: Path) -> None:
    case = sorted(path for path in practice.iterdir() if path.is_dir())[0]
    assert find_volumes([case / "image.nii.gz"]) == {case.name: case / "image.nii.gz"}
    shutil.copy(case / "image.nii.gz", tmp_path / "scan.nii.gz")
    assert find_volumes([tmp_path / "scan.nii.gz"]) == {"scan": tmp_path / "scan.nii.gz"}
    (tmp_path / "other").mkdir()
    shutil.copy(case / "image.nii.gz", tmp_path / "other/scan.nii.gz")
    with pytest.raises(InputError, match=r"would be called scan"):
        find_volumes([tmp_path / "scan.nii.gz", tmp_path / "other/scan.nii.gz"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: no volume here.*\n.*missing: no volume here"):
        find_volumes([tmp_path / "empty", tmp_path / "missing"])


def test_bad_data_and_bad_options_are_found_before_training(practice: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean 'unet_block'\?"):
        train(config(practice, tmp_path / "a", "network.name=unet_blok"))
    with pytest.raises(InputError, match="'resnet26' classifies images and does not segment"):
        train(config(practice, tmp_path / "a", "network.name=resnet26"))
    with pytest.raises(InputError, match=r"has no option 'blocks'"):
        train(config(practice, tmp_path / "b", "network.name=unet_block", "network.options={blocks: 3}"))
    with pytest.raises(InputError, match=r"medattn phantom .*medattn import"):
        train(config(tmp_path / "nowhere", tmp_path / "c"))
    with pytest.raises(InputError, match=r"data.organs: \['Spleen'\] not in"):
        train(config(practice, tmp_path / "d", "data.organs=[Spleen]"))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="finds no CUDA device"):
            train(config(practice, tmp_path / "e", "training.device=cuda"))


def test_every_broken_case_is_listed_at_once(practice: Path, tmp_path: Path) -> None:
    root = tmp_path / "broken"
    shutil.copytree(practice, root)
    first, second, third, _ = sorted(path for path in root.iterdir() if path.is_dir())
    (first / "image.nii.gz").write_bytes((first / "image.nii.gz").read_bytes()[:2000])
    (second / "label.nii.gz").unlink()
    label = read_volume(third / "label.nii.gz")
    write_volume(
        third / "label.nii.gz",
        Volume(label.array[:-1], type(label.geometry)(tuple(label.array[:-1].shape), label.geometry.affine)),
    )  # type: ignore[arg-type]
    with pytest.raises(InputError) as error:
        train(config(root, tmp_path / "run"))
    text = "\n".join(error.value.problems)
    for case in (first, second, third):
        assert case.name in text


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 2)])
def test_a_stopped_command_says_one_line_and_resumes(
    practice: Path, tmp_path: Path, number: int, code: int
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"data: {{root: {practice}}}\nrun: {{dir: {tmp_path / 'run'}}}\ntraining: {{steps: 100000}}\n"
    )
    command = [sys.executable, "-m", "medattn_pipelines.cli", "train", str(path), *TINY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waited = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").is_file() or not (tmp_path / "run/metrics.jsonl").read_text():
        assert time.monotonic() < waited
        time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "--resume continues it" in out
    steps = len(logged(tmp_path / "run"))
    resumed = subprocess.run(
        [*command, f"training.steps={steps + 3}", "--resume"], capture_output=True, text=True, timeout=300
    )
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "run/report/report.html").is_file()
