"""Published weights become models: what comes out equals what went in, and nothing else gets in."""

from __future__ import annotations

import gzip
import json
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medattn.data.phantom import write_phantoms
from medattn.io import read_volume
from medattn.networks import create
from medattn.segmenter import load_model
from medattn.weights import read_weights
from medattn_pipelines.arguments import CONVERT_NAMES, CONVERT_SOURCES
from medattn_pipelines.cli import main
from medattn_pipelines.commands import COMMANDS
from medattn_pipelines.convert import SOURCES
from medattn_pipelines.convert_volumes import RELEASED

Makes = Callable[..., dict[str, Tensor]]
SIX = ["Parotid_L", "Parotid_R", "Glnd_Submand_L", "Glnd_Submand_R", "Bone_Mandible", "Brainstem"]


@pytest.fixture
def seven(block_unet_state: Makes, tmp_path: Path) -> Path:
    """A checkpoint of six organs."""
    path = tmp_path / "six.pth"
    torch.save(block_unet_state(), path)
    return path


def convert(checkpoint: Path, out: Path, *more: str) -> int:
    return main(["convert", "cerr-block-unet", str(checkpoint), str(out), *more])


def refused(checkpoint: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What the command says in place of a model, of which nothing is left behind."""
    out = checkpoint.parent / "new" / "model"
    assert convert(checkpoint, out, *more) == 2
    assert not out.parent.exists() or not list(out.parent.iterdir())
    said = capsys.readouterr().err
    assert said.startswith("medattn: error: ")
    return said.removeprefix("medattn: error: ")


def logits_of_model(folder: Path, slices: Tensor) -> Tensor:
    """[B, 1, rows, columns] stored images -> logits on them, from a model whose slices run left, back."""
    _, network = load_model(folder)
    with torch.no_grad():
        found: Tensor = network.eval()(slices.mT[..., None])[..., 0].mT
    return found


@pytest.mark.parametrize("placement", ["penultimate", "last"])
def test_a_model_gives_the_output_of_the_network_it_came_from(
    placement: str, seven: Path, block_unet_state: Makes, tmp_path: Path
) -> None:
    assert convert(seven, tmp_path / "model", f"placement={placement}", "--organs", *SIX) == 0
    network = create("block_unet_2d", placement=placement, out_channels=7).eval()
    network.load_state_dict(block_unet_state())
    slices = torch.randn(2, 1, 80, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(slices)
    found = logits_of_model(tmp_path / "model", slices)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_released_model_needs_nothing_but_its_weights(
    block_unet_state: Makes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(block_unet_state(outputs=12), tmp_path / "released.pth")
    assert convert(tmp_path / "released.pth", tmp_path / "model") == 0
    card, network = load_model(tmp_path / "model")
    assert card.plan.organs == RELEASED
    assert card.labels[8] == "SpinalCord"
    assert sorted(card.labels) == [0, 1, 2, 3, 4, 7, 8, 9, 10]  # the authors' own numbers
    assert card.plan.window_hu == (-85, 265)
    assert card.plan.spacing_mm[:2] == (1, 1)
    assert card.provenance["file"] == "released.pth"
    assert len(card.provenance["sha256"]) == 64
    said = capsys.readouterr().out
    count = sum(p.numel() for p in network.parameters())
    assert count == 13_432_335 - 12_481  # as released, without the attention that is never called
    assert f"{count:,} parameters" in said
    assert "8 SpinalCord" in said
    assert "not reported: 5, 6, 11" in said
    assert str(tmp_path / "model") in said


def test_predict_runs_a_converted_model(block_unet_state: Makes, tmp_path: Path) -> None:
    """Channels that are not reported are background on the scan's own grid, others keep their numbers."""
    state = block_unet_state(outputs=12)
    state["outc.conv.bias"][[4, 5]] += 3.0  # so that both kinds win somewhere
    torch.save({"state_dict": state, "epoch": 200}, tmp_path / "released.pth")
    spacing = ("--spacing-mm", "4", "4", "24")
    assert convert(tmp_path / "released.pth", tmp_path / "model", *spacing) == 0
    card = json.loads((tmp_path / "model/model.json").read_text())
    assert card["plan"]["patch_size"] == [256, 256, 1]
    card["plan"]["patch_size"] = [64, 64, 1]  # for a test of seconds
    (tmp_path / "model/model.json").write_text(json.dumps(card))
    write_phantoms(tmp_path / "cases", cases=2, size=32, seed=3)
    scan = min((tmp_path / "cases").glob("*/image.nii.gz"))
    assert main(["predict", str(tmp_path / "model"), str(scan), "--output", str(tmp_path / "out")]) == 0
    segmentation, image = (read_volume(p) for p in (tmp_path / f"out/{scan.parent.name}.nii.gz", scan))
    assert image.geometry.difference(segmentation.geometry) is None
    names = json.loads((tmp_path / "out/labels.json").read_text())
    assert names == {str(n): name for n, name in enumerate(RELEASED, 1) if name != "background"}
    assert {0, 4} <= set(np.unique(segmentation.array)) <= {0, *map(int, names)}


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": torch.tensor(3), "args": {"lr": 1e-3}},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.1},
    "net": lambda state: {"net": state, "acc": 93.0},
    "unknown-name": lambda state: {"netSeg_A": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "ema-beside": lambda state: {"ema": {k: v + 1 for k, v in state.items()}, "model": state},
    "parallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "compiled": lambda state: {"model": {f"_orig_mod.module.{k}": v for k, v in state.items()}},
    "half": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_wrappers_are_taken_off(
    wrap: Callable[[dict[str, Tensor]], Any], zipped: bool, tmp_path: Path
) -> None:
    state = {"inc.weight": torch.randn(3, 2), "inc.bias": torch.zeros(3), "inc.steps": torch.tensor(1)}
    torch.save(wrap(dict(state)), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = read_weights(tmp_path / "a.pth")
    assert found.keys() == state.keys()
    assert all(torch.allclose(found[k].float(), state[k].float(), atol=1e-2) for k in state)


def test_safetensors_and_counters_that_old_versions_lack(block_unet_state: Makes, tmp_path: Path) -> None:
    state = {k: v for k, v in block_unet_state().items() if "num_batches_tracked" not in k}
    save_file({f"module.{k}": v.clone() for k, v in state.items()}, tmp_path / "a.bin")
    torch.save(state, tmp_path / "b.pth")
    for name in ("a.bin", "b.pth"):
        assert convert(tmp_path / name, tmp_path / name[0], "--organs", *SIX) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace"

    class Malicious:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (trace,)

    path = tmp_path / "bad.pth"
    for write in (
        lambda: torch.save({"state_dict": {"a": Malicious()}}, path),
        lambda: torch.save(Malicious(), path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps(Malicious(), protocol=2)),
        lambda: path.write_bytes(pickle.dumps(Malicious())),
    ):
        write()
        said = refused(path, capsys)
        assert not trace.exists()
        assert "would run code" in said
        assert "torch.save(checkpoint" in said
    pickle.loads(path.read_bytes())
    assert trace.exists()  # the trap was live


def test_a_pickled_network_or_its_settings_are_named_and_the_advice_works(
    block_unet_state: Makes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "whole.pth"
    torch.save(nn.Linear(2, 2), path)
    assert "torch.nn.modules.linear.Linear" in refused(path, capsys)
    torch.save({"state_dict": block_unet_state(), "args": Namespace(lr=1)}, path)
    said = refused(path, capsys)
    assert "argparse.Namespace" in said
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in said.splitlines()[1:]), {})
    assert convert(tmp_path / "plain.pth", tmp_path / "model", "--organs", *SIX) == 0


def _truncated(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "no weights")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_text("\n<!DOCTYPE html><html>Sign in</html>"), "a web page, not a checkpoint"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid 1"), "git lfs pull"),
        (lambda p: p.touch(), "an empty file"),
        (lambda p: p.mkdir(), "a folder; give a checkpoint file"),
        (lambda p: None, "no such file"),
        (lambda p: p.write_text("some notes"), "no checkpoint: expected a file of torch.save or safetensors"),
        (lambda p: p.write_bytes(gzip.compress(b"x")), "no checkpoint: expected"),
        (_zip, "damaged, incomplete or no checkpoint"),
        (lambda p: p.write_bytes(b"\x80\x02junk"), "bad.pth: "),
        (lambda p: p.write_bytes(b"\x20" + b"\0" * 7 + b"{not json" + b"}" * 40), "damaged, incomplete"),
        (lambda p: torch.save(7, p), "holds an int and no weights"),
        (lambda p: torch.save({"epoch": 3, "args": {}}, p), "holds a dict (epoch, args) and no weights"),
        (lambda p: torch.save({"a": {"x": torch.ones(1)}, "b": {"x": torch.ones(1)}}, p), "weights, a, b;"),
        (lambda p: torch.save({"x": torch.tensor([1.0, float("nan")])}, p), "x holds numbers that are not"),
        (lambda p: torch.save({"x": torch.ones(2, dtype=torch.complex64)}, p), "x is no ordinary tensor"),
        (lambda p: torch.save({"x": torch.eye(2).to_sparse()}, p), "x is no ordinary tensor"),
        (lambda p: torch.save({"x": torch.ones(2, device="meta")}, p), "x is no ordinary tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_checkpoint_is_a_sentence(
    write: Callable[[Path], None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "bad.pth")
    said = refused(tmp_path / "bad.pth", capsys)
    assert message in said
    assert len(said.splitlines()) == 1 or "would run code" in said


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
def test_a_truncated_file_is_a_sentence(
    kind: str, kept: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = tmp_path / "torn.pth", {"weight": torch.randn(200, 200)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    said = refused(path, capsys)
    assert "damaged, incomplete or no checkpoint" in said
    assert len(said.splitlines()) == 1


def test_another_architecture_is_told_by_its_first_five_misfits(
    block_unet_state: Makes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict(), tmp_path / "other.pth")
    assert refused(tmp_path / "other.pth", capsys) == (
        f"{tmp_path / 'other.pth'}: not the weights of block_unet_2d: 0 of another shape, 7 unexpected, "
        "124 missing; the first: unexpected 0.weight [8, 3, 3, 3]; missing inc.0.weight [64, 1, 3, 3]; "
        "unexpected 0.bias [8]; missing inc.0.bias [64]; unexpected 1.weight [8]\n"
    )
    state = block_unet_state()
    state["inc.conv.conv.0.weight"] = torch.zeros(64, 3, 3, 3)
    del state["down1.mpconv.1.conv.0.bias"]
    torch.save(state, tmp_path / "colour.pth")
    said = refused(tmp_path / "colour.pth", capsys, "--organs", *SIX)
    assert "inc.conv.conv.0.weight is [64, 3, 3, 3], expected [64, 1, 3, 3]" in said
    assert "missing down.0.0.bias [128]" in said
    torch.save(state | {"outc.conv.weight": torch.tensor(1.0)}, tmp_path / "scalar.pth")
    assert "outc.conv.weight is [], expected [12, 64, 1, 1]" in refused(tmp_path / "scalar.pth", capsys)
    torch.save({k: v for k, v in block_unet_state().items() if "Block_SA" not in k}, tmp_path / "plain.pth")
    assert "missing attention.0.gamma [1]" in refused(tmp_path / "plain.pth", capsys, "--organs", *SIX)
    assert convert(tmp_path / "plain.pth", tmp_path / "m", "placement=none", "--organs", *SIX) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "only the order of the released model's twelve is known"),
        ("--organs Brainstem", "--organs names 1; name every one"),
        ("--organs A B Parotid_L Parotid_R Brainstem Cord", "organ 'A' is not in label set hn_oar"),
        ("--organs Cord Cord Parotid_L background background background", "SpinalCord more than once"),
        ("placement=deep", "option placement: Input should be 'penultimate', 'last' or 'none' (got 'deep')"),
        ("placment=last", "option placment: cerr-block-unet has no such option; did you mean placement?"),
        ("last", "'last': expected option=value"),
        ("placement=[", "the value is not valid YAML"),
        ("--window-hu 100 -100", "option window_hu: expected [low, high] with low below high"),
        ("--spacing-mm 1 1 0", "option spacing_mm.2: Input should be greater than 0 (got 0.0)"),
        ("--labels nowhere", "option"),
    ],
)
def test_wrong_options_are_named(
    more: str, message: str, seven: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if more.startswith("--labels"):
        more, message = f"{more} --organs {' '.join(SIX)}", "nowhere: no such label set"
    assert message in refused(seven, capsys, *more.split())


def test_what_exists_is_kept(seven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/notes").write_text("mine")
    assert convert(seven, tmp_path / "model", "--organs", *SIX) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "model/notes").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert convert(seven, tmp_path / "empty", "--organs", *SIX) == 0
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["model.json", "model.safetensors"]


def test_every_source_and_option_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(SOURCES) == CONVERT_NAMES
    for source, entry in SOURCES.items():
        assert f"  {source} " in CONVERT_SOURCES
        for option in entry.options.model_fields:
            assert f"  {option}=" in CONVERT_SOURCES or f"  --{option.replace('_', '-')} " in CONVERT_SOURCES
    with pytest.raises(SystemExit):
        main(["convert", "nowhere", "a.pth", "out"])
    listed = capsys.readouterr().err
    assert all(source in listed for source in SOURCES)
    assert COMMANDS["convert"].notes() == CONVERT_SOURCES
