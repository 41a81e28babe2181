"""Each operation of RandAugment equals timm's at the same magnitude; the draws have their distribution."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from medattn.data.images import RandAugment
from medattn.data.images.randaugment import OPERATIONS, Setting
from medattn.errors import InputError

FILL = (124, 116, 104)
PEERS = {
    "autocontrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate",
    "posterize": "Posterize", "solarize": "Solarize", "solarize_add": "SolarizeAdd", "colour": "Color",
    "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness", "shear_x": "ShearX",
    "shear_y": "ShearY", "translate_x": "TranslateXRel", "translate_y": "TranslateYRel",
}  # fmt: skip
STRONGER = {"posterize", "solarize", "colour", "contrast", "brightness", "sharpness"}


def photograph() -> Image.Image:
    """Low contrast, so that autocontrast and equalize have something to do."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(30, 200, (6, 7, 3), np.uint8))
    return coarse.resize((53, 37), Image.Resampling.BICUBIC)


def peer_name(name: str, increasing: bool) -> str:
    return PEERS[name] + ("Increasing" if increasing and name in STRONGER else "")


@pytest.mark.parametrize("increasing", [True, False])
def test_the_operations_are_timms(timm: ModuleType, increasing: bool) -> None:
    from timm.data.auto_augment import rand_augment_choices

    peers = rand_augment_choices("", increasing)
    assert [peer_name(name, increasing) for name in OPERATIONS] == peers


@pytest.mark.parametrize("resampling", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_equals_timms(
    timm: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    increasing: bool,
    resampling: Image.Resampling,
) -> None:
    from timm.data import auto_augment

    image, signs = photograph(), (1, -1)
    for sign in signs:
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
        setting = Setting(sign, FILL, resampling, increasing)
        for magnitude in (0.0, 0.4, 3.3, 5.0, 7.77, 9.0, 9.6, 10.0):
            peer = auto_augment.AugmentOp(
                peer_name(name, increasing), 1.0, magnitude, {"img_mean": FILL, "interpolation": resampling}
            )
            ours = OPERATIONS[name](image, magnitude, setting)
            if name == "posterize" and int(magnitude / 10 * 4) == (4 if increasing else 0):
                assert not np.any(ours)  # no bit is kept; timm's raises there since Pillow does
                continue
            assert np.array_equal(ours, peer(image)), magnitude


def test_fill_is_timms_rounded_mean(timm: ModuleType) -> None:
    from timm.data.transforms_factory import transforms_imagenet_train

    made = transforms_imagenet_train(auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic")
    peer = next(t for t in made.transforms if type(t).__name__ == "RandAugment")
    ours = RandAugment()
    assert peer.ops[0].hparams["img_mean"] == ours.fill
    assert (peer.ops[0].magnitude, peer.ops[0].magnitude_std) == (ours.magnitude, ours.deviation)
    assert (peer.num_layers, peer.ops[0].prob) == (ours.count, ours.probability)


def test_draws_have_their_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of fifteen, each used half the time, magnitudes about 9 and cut at 10, either direction."""
    seen: list[tuple[str, float, int]] = []

    def note(name: str) -> object:
        return lambda image, magnitude, setting: seen.append((name, magnitude, setting.sign)) or image

    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, note(name))
    image, augment = photograph(), RandAugment()
    for seed in range(3000):
        augment(image, np.random.default_rng(seed))
    names, magnitudes, signs = zip(*seen, strict=True)
    assert abs(len(seen) - 3000) < 150
    counts = np.unique(names, return_counts=True)[1]
    assert len(counts) == 15
    assert counts.min() > 140
    assert counts.max() < 260
    assert abs(np.median(magnitudes) - 9) < 0.05
    assert max(magnitudes) == 10.0
    assert abs(np.mean(np.array(magnitudes) == 10) - 0.0228) < 0.01
    assert abs(np.mean(signs)) < 0.06


def test_nothing_happens_at_probability_zero() -> None:
    image = photograph()
    assert RandAugment(probability=0.0)(image, np.random.default_rng(0)) is image


@pytest.mark.parametrize("options", [{"magnitude": 11}, {"magnitude": -1}, {"deviation": -0.5}])
def test_magnitudes_off_the_scale_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected a magnitude from 0 to 10"):
        RandAugment(**options)  # type: ignore[arg-type]
