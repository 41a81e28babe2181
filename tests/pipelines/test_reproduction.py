"""`medattn reproduce` repeats a training to the bit, and says what is other than it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medattn.data.phantom import write_phantoms
from medattn.errors import InputError
from medattn.training.runrecord import read_record
from medattn_pipelines.cli import main
from medattn_pipelines.configfile import load_any
from medattn_pipelines.reproduction import differences
from medattn_pipelines.runcompare import compare_runs

TINY = [
    "data.spacing_mm=[10, 10, 10]",
    "data.patch_size=[16, 16, 16]",
    "data.workers=1",
    "network.name=unet",
    "network.options={widths: [4, 8], strides: [2]}",
    "training.device=cpu",
    "training.steps=4",
    "training.log_every=1",
    "training.validate_every=2",
    "run.tracking=false",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run."""
    root = tmp_path_factory.mktemp("reproduced")
    write_phantoms(root / "cases", cases=3, size=32, seed=1)
    (root / "tiny.yaml").write_text(f"data: {{root: {root / 'cases'}}}\nrun: {{dir: {root / 'run'}}}\n")
    assert main(["train", str(root / "tiny.yaml"), *TINY]) == 0
    return root / "run"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def kept(trained: Path) -> Any:
    """Puts the files of the run back after a test that changes them."""
    names = ("run.json", "metrics.jsonl", "config.yaml", "model/model.safetensors")
    before = {name: (trained / name).read_bytes() for name in names}
    yield trained
    for name, content in before.items():
        (trained / name).write_bytes(content)


def test_a_run_records_what_it_came_from(trained: Path) -> None:
    record = json.loads((trained / "run.json").read_text())
    machine = {name: value for name, value in record["parameters"].items() if name.startswith("machine.")}
    assert machine["machine.device"] == "cpu"
    assert machine["machine.threads"] == str(torch.get_num_threads())
    assert machine["machine.processes"] == "1"
    assert machine["machine.precision"] in ("float32", "bfloat16")
    assert record["tags"]["version.torch"] == torch.__version__
    assert "contents" in {one["name"] for one in record["data"]}


def test_a_run_is_repeated_to_the_bit(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", str(trained)]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("equal to the bit")
    again = trained.with_name("run_reproduced")
    mine, theirs = (run / "model/model.safetensors" for run in (trained, again))
    assert mine.read_bytes() == theirs.read_bytes()
    with pytest.raises(SystemExit):
        main(["reproduce", str(trained), "--tolerance", "-1"])
    assert main(["reproduce", str(trained)]) == 2
    assert "run_reproduced: exists" in capsys.readouterr().err


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_on_cuda_is_equal_to_the_bit_only_where_it_was_deterministic(
    trained: Path, deterministic: bool
) -> None:
    record = read_record(trained)
    record.parameters["machine.device"] = "cuda"
    config = load_any(trained / "config.yaml", [f"training.deterministic={str(deterministic).lower()}"])
    warned = [sentence for sentence in differences(record, config) if "training.deterministic" in sentence]
    assert len(warned) == (not deterministic)


@pytest.mark.parametrize("network", ["unet_block", "unet_axial"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_deterministic_run_is_repeated_to_the_bit(
    trained: Path, tmp_path: Path, device: str, network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    fields = [f"network.name={network}", f"training.device={device}", "training.deterministic=true"]
    source = str(trained.with_name("tiny.yaml"))
    assert main(["train", source, *TINY, *fields, "training.steps=2", f"run.dir={run}"]) == 0
    assert not torch.are_deterministic_algorithms_enabled(), "only while it trains"
    assert main(["reproduce", str(run)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("equal to the bit")


@pytest.mark.slow
def test_another_result_is_1_unless_tolerated(kept: Path, tmp_path: Path, capsys: Any) -> None:
    """The record is edited: what is repeated then differs by what was edited."""
    weights = load_file(kept / "model/model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 0.25
    save_file(weights, kept / "model/model.safetensors")
    record = json.loads((kept / "run.json").read_text())
    edit(kept / "run.json", tags=record["tags"] | {"version.torch": "1.0"})
    assert main(["reproduce", str(kept), "--output", str(tmp_path / "a")]) == 1
    out = capsys.readouterr().out
    assert "warning: torch: 1.0 in the run" in out
    assert f"different beyond the tolerance 0: weights at {name}: 0.25" in out
    assert main(["reproduce", str(kept), "--output", str(tmp_path / "b"), "--tolerance", "0.3"]) == 0


def test_other_data_is_another_experiment(kept: Path, tmp_path: Path, capsys: Any) -> None:
    record = json.loads((kept / "run.json").read_text())
    changed = [one | {"digest": "0" * 32} if one["name"] == "contents" else one for one in record["data"]]
    edit(kept / "run.json", data=changed)
    assert main(["reproduce", str(kept), "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "not what" in err
    assert "recorded 00000000" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_an_incomplete_run_is_not_reproduced(kept: Path, tmp_path: Path, capsys: Any) -> None:
    edit(kept / "run.json", status="running")
    assert main(["reproduce", str(kept)]) == 2
    assert "the run is running, expected finished" in capsys.readouterr().err
    assert main(["reproduce", str(tmp_path)]) == 2
    assert "run.json is missing" in capsys.readouterr().err


def test_the_largest_difference_is_found_where_it_is(tmp_path: Path) -> None:
    for name, losses in (("a", (1.0, 2.0, None)), ("b", (1.0, 2.5, 3.0))):
        run = tmp_path / name
        (run / "model").mkdir(parents=True)
        lines = [{"step": s, "time": hash((name, s)), "loss": x} for s, x in enumerate(losses, start=1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
        save_file({"w": torch.tensor([1.0, float("nan"), len(name)])}, run / "model/model.safetensors")
    loss, weights, report = compare_runs(tmp_path / "a", tmp_path / "b")
    assert (loss.what, loss.compared, loss.equal, loss.difference, loss.where) == (
        "loss",
        2,
        1,
        0.5,
        "step 2",
    )
    assert (weights.compared, weights.equal, weights.difference) == (3, 3, 0.0)
    assert (report.compared, report.difference) == (0, 0.0)
    (tmp_path / "b/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert compare_runs(tmp_path / "a", tmp_path / "b")[0].difference == float("inf")
    (tmp_path / "b/metrics.jsonl").write_text("[]\n")
    with pytest.raises(InputError, match="no journal of a run"):
        compare_runs(tmp_path / "a", tmp_path / "b")
