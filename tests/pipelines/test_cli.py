"""The command line: what it teaches, and what a user sees when something goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import medattn
from medattn.data.cases import read_cases
from medattn.data.phantom import write_phantoms
from medattn.errors import InputError
from medattn.io import read_volume
from medattn_pipelines import cli
from medattn_pipelines.cli import main, parser_for
from medattn_pipelines.commands import COMMANDS, Command

MEDATTN = (sys.executable, "-m", "medattn_pipelines.cli")
EXAMPLES = [example for command in COMMANDS.values() for example in command.examples]


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MEDATTN, *arguments], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture(scope="module")
def practice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("practice")
    write_phantoms(root, cases=2, size=32, seed=3)
    return root


@pytest.fixture
def cases(practice: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(practice, tmp_path / "cases"))


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name}" in text
        assert command.purpose in text


def test_the_commands_are_those_of_the_design() -> None:
    assert list(COMMANDS) == [
        *("phantom", "import", "check", "train", "predict", "evaluate", "export"),
        *("track", "tune", "reproduce", "networks", "convert"),
    ]


def test_no_command_at_all_shows_the_overview_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: medattn COMMAND")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_by_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert COMMANDS[name].purpose in text
    assert all(example in text for example in COMMANDS[name].examples)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_parses(example: str) -> None:
    program, name, *arguments = shlex.split(example)
    assert program == "medattn"
    parser_for(name, COMMANDS[name]).parse_intermixed_args(arguments)


def test_the_help_of_train_lists_the_fields_of_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "training.max_minutes=null" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"medattn {medattn.__version__}\n"


def test_an_unknown_command_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        "medattn: error: unknown command 'trian'; did you mean `train`? (`medattn --help` lists all)\n"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("phantom out --cases 0", "expected a whole number of at least 1, got '0'"),
        ("phantom out --cases some", "expected a whole number of at least 1, got 'some'"),
        ("import dicom a b", "invalid choice: 'dicom'"),
        ("import nifti a b --validation 1.5", "expected a share from 0 to 0.9, got '1.5'"),
        ("train", "the following arguments are required: CONFIG"),
        ("train a.yaml --resume --overwrite", "not allowed with argument"),
        ("train a.yaml --resum", "unrecognized arguments: --resum"),
        ("export a.nii.gz --as stl --output b", "invalid choice: 'stl'"),
    ],
)
def test_wrong_arguments_say_what_was_expected(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("order", ["{config} --resume {override}", "--resume {config} {override}"])
def test_flags_and_overrides_mix(order: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "small.yaml"
    config.write_text("data: {root: cases}\nseeed: 1\n", encoding="utf-8")
    assert main(["train", *order.format(config=config, override="training.steps=0").split()]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "medattn: error: override 'training.steps=0': training.steps: "
        "Input should be greater than or equal to 1 (got 0)",
        f"medattn: error: {config}:2: seeed: unknown field; did you mean 'seed'?",
    ]


def test_data_that_is_missing_names_the_two_commands_that_make_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(f"data: {{root: {tmp_path / 'nowhere'}}}\n", encoding="utf-8")
    assert main(["train", str(config), f"run.dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert "medattn phantom" in error
    assert "medattn import" in error


def test_check_passes_clean_cases_finds_an_undeclared_organ_and_repairs_it(
    cases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(cases)]) == 0
    assert "errors: 0" in capsys.readouterr().out

    entries = json.loads((cases / "cases.json").read_text(encoding="utf-8"))
    organ = entries[0]["contoured"].pop(0)
    (cases / "cases.json").write_text(json.dumps(entries), encoding="utf-8")
    assert main(["check", str(cases)]) == 1
    text = capsys.readouterr().out
    assert organ in text
    assert "errors: 1" in text

    assert main(["check", str(cases), "--repair"]) == 0
    assert organ in read_cases(cases).cases[0].contoured


def test_export_writes_what_the_label_map_holds(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = read_cases(cases).cases[0]
    shutil.copy(cases / "labels.json", case.folder / "labels.json")
    target = tmp_path / "new" / "case.seg.nrrd"
    assert main(["export", str(case.label), "--as", "seg.nrrd", "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    written, label = read_volume(target), read_volume(case.label)
    assert label.geometry.difference(written.geometry) is None
    assert np.array_equal(written.array, label.array)


def test_networks_are_listed_for_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["networks", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    unet = next(row for row in rows if row["name"] == "unet")
    assert unet["family"] == "unet"
    built = medattn.networks.create("unet", spatial_dims=3, in_channels=1, out_channels=8)
    assert unet["parameters"] == sum(weight.numel() for weight in built.parameters())
    published = next(row for row in rows if row["name"] == "block_unet_2d")  # for images alone
    assert published["parameters"] == published["parameters_2d"] == 13_394_567 + 65 + 2 * 12_481
    panoptic = {row["name"]: row for row in rows if row["task"] == "panoptic"}  # for images alone, too
    assert panoptic.keys() >= {
        "panoptic_deeplab",
        *(f"axial_deeplab_{size}" for size in ("s", "m", "l", "xl")),
    }
    assert panoptic["axial_deeplab_s"]["parameters"] == 12_216_568
    assert main(["networks"]) == 0
    assert str(unet["parameters"]) in capsys.readouterr().out


def failing(error: BaseException) -> Command:
    def handler(args: Namespace) -> int:
        raise error

    return Command("Fails.", (), lambda parser: None, handler)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("a.nii.gz: empty", "b.nii.gz: torn"), "a.nii.gz: empty\nmedattn: error: b.nii.gz: torn"),
        (OSError(errno.ENOSPC, "No space left", "run/x"), "run/x: the disk is full"),
        (OSError(errno.EDQUOT, "Quota", "run/x"), "run/x: the disk quota is used up"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out: no permission"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    ],
)
def test_what_the_machine_or_the_input_refuses_is_a_sentence(
    error: BaseException, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "fail", failing(error))
    assert main(["fail"]) == 2
    assert capsys.readouterr().err.startswith(f"medattn: error: {message}")


def test_the_cpu_allocator_of_torch_is_recognised() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert "out of memory" in (cli._machine_error(error.value) or "")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "fail", failing(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["fail"])


def test_a_full_disk_under_standard_output_is_one_line() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            [*MEDATTN, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("medattn: error: output: the disk is full")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*MEDATTN, "--help"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    command = [*MEDATTN, "phantom", str(tmp_path / "many"), "--cases", "500", "--size", "64"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs, such as these tests may be, hand down that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    first = process.stderr.readline()  # the first progress line: the command is at work
    assert first.startswith("Practice cases 1/500")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in error
    assert error.rstrip().endswith("medattn: interrupted")


def test_the_command_line_starts_without_heavy_imports() -> None:
    heavy = ("torch", "monai", "numpy", "triton", "mlflow", "pydantic", "yaml", "rich")
    script = (
        "import sys; from medattn_pipelines.cli import main; main(['--help']); "
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
