"""Published weights of image networks become classifiers that give the output of what they came from."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from medattn.classifier import load_classifier
from medattn.data.images.transforms import EvaluationTransform
from medattn.layers.companions.focal import WindowAttention
from medattn.networks import create, names
from medattn.networks.registry import task_of
from medattn_pipelines.cli import main
from medattn_pipelines.convert_images import IMAGE_SOURCES, RELEASES

CLASSES, SIZE = 7, 64
State = dict[str, Tensor]
XCIT = "xcit_nano_12_p16"


def convert(source: str, checkpoint: Path, out: Path, *more: str) -> int:
    return main(["convert", source, str(checkpoint), str(out), *more])


def refused(source: str, checkpoint: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What the command says, one sentence, in place of a model, of which nothing is left behind."""
    out = checkpoint.parent / "new" / "model"
    assert convert(source, checkpoint, out, *more) == 2
    assert not out.parent.exists() or not list(out.parent.iterdir())
    said = capsys.readouterr().err
    assert said.startswith("medattn: error: ")
    assert len(said.splitlines()) == 1
    return said.removeprefix("medattn: error: ")


@torch.no_grad()
def filled(network: nn.Module, size: int = SIZE) -> nn.Module:
    """Random weights through which every part shows, the same every time, and statistics of noise."""
    torch.manual_seed(0)
    for name, value in network.named_parameters():
        if value.ndim >= 2 and "temperature" not in name:
            value.normal_().mul_(value[0].numel() ** -0.5)
        elif name.endswith("bias"):
            value.normal_().mul_(0.1)
        else:
            value.uniform_(0.3, 1.3)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(torch.randn(2, 3, size, size))
    for norm in norms:
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.25)).add_(0.1)
    return network.eval()


# from our names to those of torchvision's ResNet, after which others took theirs
AROUND = (
    (r"^stem\.0\.", "conv1."),
    (r"^stem\.1\.", "bn1."),
    (r"^head\.", "fc."),
    (r"shortcut", "downsample"),
)
MIX = ((r"mix\.0\.", "conv2."), (r"mix\.1\.", "bn2."))
BLOCK = (*((rf"reduce\.{n}\.", f"{p}1.") for n, p in enumerate(("conv", "bn"))),)
BLOCK += (*((rf"expand\.{n}\.", f"{p}3.") for n, p in enumerate(("conv", "bn"))),)
LAMBDA = ((r"mix\.0\.(table|bias)", r"conv2.lambda_conv.\1"), (r"mix\.0\.qkv", "conv2.conv_qkv"))
AXIAL = ((r"reduce\.0", "conv_down"), (r"reduce\.1", "bn1"), (r"mix\.height", "hight_block"))
AXIAL += ((r"mix\.width", "width_block"), (r"expand\.0", "conv_up"), (r"expand\.1", "bn2"))


def renamed(state: State, *rules: tuple[str, str]) -> State:
    """The state dict under the names of others, by the first rule of each kind that matches."""
    theirs = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        theirs[re.sub(r"^stages\.(\d)", lambda found: f"layer{int(found[1]) + 1}", name)] = value
    return theirs


def as_axial(state: State) -> State:
    buffer = {"layer1.0.hight_block.flatten_index": torch.arange(9)}
    return renamed(state, *AROUND, *AXIAL) | buffer


def as_lesa(state: State) -> State:
    context = (r"mix\.0\.context\.", "conv2.")
    return renamed(state, *AROUND, *BLOCK, context, *MIX) | {"layer4.0.conv2.flatten_index": torch.arange(9)}


def as_lambda(state: State) -> State:
    """Tables are the weights of a convolution over [U, h, w]."""
    theirs = renamed(state, *AROUND, *BLOCK, *LAMBDA, *MIX)
    return {
        name.replace("lambda_conv.table", "lambda_conv.weight"): value.permute(3, 2, 0, 1)[:, :, None]
        if name.endswith("table")
        else value
        for name, value in theirs.items()
    }


def as_focal(state: State) -> State:
    constant = f"layers.0.blocks.0.attn.{WindowAttention.CONSTANTS[0]}"
    return {"model." + name: value for name, value in (state | {constant: torch.arange(4)}).items()}


@dataclass(frozen=True)
class Case:
    """A network of a source. options: as the command takes them. publish: our state dict -> theirs."""

    source: str
    network: str
    publish: Callable[[State], State]
    options: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("axial-deeplab", "axial_resnet26_s", as_axial),
    Case("lambda-d-li14", "lambda_resnet26", as_lambda, {"scope": 5, "depth": 2}),
    Case("lesa", "lesa_resnet50", as_lesa, {"depths": [1, 1, 2, 1]}),
    Case("focal", "focal_tiny", as_focal, {"width": 24, "depths": [1, 1, 1, 1], "conv_embedding": True}),
    Case("eamlp", "eamlp_7", lambda state: state),
)


def assert_same(folder: Path, expected: Callable[[Tensor], Tensor], size: int = SIZE) -> None:
    """The converted model, as `predict` reads it, gives this output to 1e-5."""
    _, network = load_classifier(folder)
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want, got = expected(image), network.eval()(image)
    assert want.shape == (2, CLASSES)
    assert want.std(0).min() > 0
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.source)
def test_authors_weights_give_their_networks_output(case: Case, tmp_path: Path) -> None:
    """Their names and forms; that the networks equal theirs is for tests of the networks."""
    theirs = filled(create(case.network, num_classes=CLASSES, image_size=SIZE, **case.options))
    torch.save({"state_dict": case.publish(theirs.state_dict()), "epoch": 9}, tmp_path / "a.pth")
    options = (f"network={case.network}", f"image_size={SIZE}", f"options={json.dumps(case.options)}")
    assert convert(case.source, tmp_path / "a.pth", tmp_path / "model", *options) == 0
    assert_same(tmp_path / "model", theirs)


@pytest.mark.parametrize("name", ["lambda_resnet26t", "halonet26t"])
def test_timms_weights_give_timms_output(name: str, timm: ModuleType, tmp_path: Path) -> None:
    """At timm's own size and crop, with the halo's zeros and offsets that timm's weights need."""
    theirs = filled(timm.create_model(name, num_classes=CLASSES), 256)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    assert convert("timm", tmp_path / "a.pth", tmp_path / "model", f"network={name}") == 0
    assert_same(tmp_path / "model", theirs, 256)
    card, _ = load_classifier(tmp_path / "model")
    assert card.options["image_size"] == card.view.size == 256
    assert card.view.crop_ratio == theirs.pretrained_cfg["crop_pct"]
    assert card.provenance["source"] == "timm"


def test_xcits_authors_and_timm_give_one_model(timm: ModuleType, tmp_path: Path) -> None:
    theirs = filled(timm.create_model(f"{XCIT}_224", num_classes=CLASSES))
    state = dict(theirs.state_dict())
    torch.save(state, tmp_path / "timm.pth")
    authors = {name.replace("pos_embed.", "pos_embeder."): value for name, value in state.items()}
    for block in range(2):
        for kind in ("weight", "bias"):
            parts = [authors.pop(f"cls_attn_blocks.{block}.attn.{letter}.{kind}") for letter in "qkv"]
            authors[f"cls_attn_blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    torch.save({"model": authors}, tmp_path / "xcit.pth")
    for source in ("timm", "xcit"):
        model = tmp_path / source
        assert convert(source, tmp_path / f"{source}.pth", model, f"network={XCIT}") == 0
        assert_same(model, theirs)
        assert load_classifier(model)[0].view == EvaluationTransform(224, 1.0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Weights of the smallest EAMLP, whose names are the authors'."""
    path = tmp_path / "seven.pth"
    torch.save(create("eamlp_7", num_classes=CLASSES, image_size=SIZE).state_dict(), path)
    return path


SMALL = ("network=eamlp_7", f"image_size={SIZE}")


def test_what_is_said_and_kept(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Classes by name, the view that was chosen, and what of it was assumed."""
    model = tmp_path / "model"
    assert convert("eamlp", checkpoint, model, *SMALL) == 0
    said = capsys.readouterr().out
    assert "eamlp_7, " in said
    assert " parameters, image_size=64" in said
    assert "7, 0000 to 0006; without classes=FILE they are numbered" in said
    assert "64 x 64 pixels, crop ratio 0.9, bicubic, mean 0.485 0.456 0.406" in said
    assert "(assumed: crop_ratio, interpolation; as T2T-ViT's)" in said
    assert said.splitlines()[-1].split() == ["model:", str(model)]
    listed = tmp_path / "classes.txt"
    listed.write_text("".join(f"n{n:08} kind {n}\n" for n in reversed(range(CLASSES))))
    view = ("crop_ratio=1", "interpolation=bilinear", "mean=[0.5, 0.5, 0.5]", "std=[0.5, 0.5, 0.5]")
    assert convert("eamlp", checkpoint, tmp_path / "named", *SMALL, *view, f"classes={listed}") == 0
    said = capsys.readouterr().out
    assert "7, n00000000 to n00000006\n" in said
    assert "assumed" not in said
    card, _ = load_classifier(tmp_path / "named")
    assert card.classes.names[2] == "kind 2"
    assert card.view == EvaluationTransform(SIZE, 1.0, None, "bilinear", (0.5,) * 3, (0.5,) * 3)


def test_predict_runs_a_converted_model(timm: ModuleType, tmp_path: Path) -> None:
    torch.save(timm.create_model(f"{XCIT}_224", num_classes=CLASSES).state_dict(), tmp_path / "a.pth")
    options = (f"network={XCIT}", "image_size=96")
    assert convert("timm", tmp_path / "a.pth", tmp_path / "model", *options) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (120, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    inputs = [str(tmp_path / "model"), str(tmp_path / "image.png")]
    assert main(["predict", *inputs, "--output", str(tmp_path / "out")]) == 0
    with (tmp_path / "out/predictions.csv").open() as file:
        rows = list(csv.reader(file))
    assert len(rows) == 2
    assert set(rows[1]) & {f"{n:04}" for n in range(CLASSES)}


@pytest.mark.parametrize("source", IMAGE_SOURCES)
def test_a_network_of_another_source_is_answered_with_those_of_this_one(
    source: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {n for release in RELEASES[source] for p in release.patterns for n in names(p)}
    assert own
    assert all(names(p) for release in RELEASES[source] for p in release.patterns)
    assert {task_of(name) for name in own} == {"classification"}
    other = "resnet26"
    expected = f"expected one of {', '.join(sorted(own))}\n"
    assert (
        refused(source, checkpoint, capsys, f"network={other}")
        == f"option network: 'resnet26' is not of {source}, {expected}"
    )
    assert refused(source, checkpoint, capsys) == f"option network: missing, {expected}"


def test_timms_lambda_networks_are_not_d_li14s(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused("lambda-d-li14", checkpoint, capsys, "network=lambda_resnet26t")
    assert said.endswith(
        "200, lambda_resnet26, lambda_resnet270, lambda_resnet350, lambda_resnet420, lambda_resnet50\n"
    )


def test_another_architecture_is_told_by_its_first_misfits(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused("xcit", checkpoint, capsys, f"network={XCIT}")
    assert f"{checkpoint}: not the weights of {XCIT}: " in said
    assert said.count(";") == 5
    assert "missing stem.0.0.weight [16, 3, 3, 3]" in said
    said = refused("eamlp", checkpoint, capsys, "network=eamlp_7")  # made for other images
    assert "1 of another shape" in said
    assert "pos_embed is [1, 17, 256], expected [1, 197, 256]" in said
    state = torch.load(checkpoint, weights_only=True)
    torch.save({k: v for k, v in state.items() if not k.startswith("head.")}, checkpoint)
    assert "missing head.weight [1000, 256]" in refused("eamlp", checkpoint, capsys, *SMALL)
    torch.save(state | {"head.weight": torch.zeros(0, 256)}, checkpoint)
    assert "head.weight is [0, 256], expected [1000, 256]" in refused("eamlp", checkpoint, capsys, *SMALL)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("network=26", "option network: Input should be a valid string (got 26)"),
        ("options={num_classes: 7}", "num_classes cannot be chosen, it is read from the checkpoint"),
        ("options={in_channels: 1}", "in_channels cannot be chosen, a classifier sees red"),
        ("options={name: a}", "name cannot be chosen, it is the option `network`"),
        ("options={hight: 3}", "network 'eamlp_7' has no option 'hight'"),
        ("options={drop_path: high}", "network 'eamlp_7' cannot be built with"),
        ("options=3", "option options: Input should be a valid dictionary (got 3)"),
        ("crop_ratio=1.1", "option crop_ratio: Input should be less than or equal to 1 (got 1.1)"),
        ("crop_ratio=true", "option crop_ratio: expected a number, got true"),
        ("image_size=0", "option image_size: Input should be greater than or equal to 1 (got 0)"),
        ("interpolation=nearest", "option interpolation: Input should be 'bilinear' or 'bicubic'"),
        ("std=[0, 1, 1]", "option std.0: Input should be greater than 0 (got 0)"),
        ("mean=[0, 1]", "option mean.2: Field required"),
        ("crop=0.9", "option crop: eamlp has no such option; did you mean crop_ratio?"),
        ("placement=last", "eamlp has no such option; its options are network, options, classes,"),
        ("classes=/nowhere.json", "/nowhere.json: no class list"),
    ],
)
def test_wrong_options_are_named(
    more: str, message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused("eamlp", checkpoint, capsys, *SMALL, more)


def test_a_class_list_of_another_length_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "classes.json").write_text(json.dumps({f"n{n:08}": "kind" for n in range(5)}))
    assert refused("eamlp", checkpoint, capsys, *SMALL, f"classes={tmp_path / 'classes.json'}") == (
        f"{tmp_path / 'classes.json'}: lists 5 classes, and {checkpoint} has 7 outputs; give the list of the "
        "classes that it was trained with\n"
    )


def test_a_view_that_the_network_does_not_take_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LESA's flat tables are for one size of images."""
    options = {"depths": [1, 1, 2, 1], "image_size": 48}
    network = create("lesa_resnet50", num_classes=CLASSES, **options)
    torch.save(as_lesa(network.state_dict()), tmp_path / "a.pth")
    given = ("network=lesa_resnet50", "image_size=64", f"options={json.dumps(options)}")
    assert "flat tables are made for 3 x 3" in refused("lesa", tmp_path / "a.pth", capsys, *given)
