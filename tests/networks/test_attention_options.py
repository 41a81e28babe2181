"""How many parameters each attention adds to a U-Net, in closed form, and how many layers of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from medattn.errors import InputError
from medattn.networks import create, names

WIDTHS = (16, 32)  # attention stands at the first


def _block(c: int, d: int) -> int:
    """Norm, four projections of two heads, a table per axis; blocks of 8 (4 in 3D), halo of half of them."""
    size, side = 4, 8 if d == 2 else 4
    return 2 * c + 4 * c * 2 * size + d * size * (2 * (side + side // 2) - 1)


def _halo(c: int, d: int) -> int:
    return 2 * c + 4 * c * 2 * 16 + d * 16 * (2 * ((8 if d == 2 else 4) + 3) - 1)


def _axial(c: int, d: int) -> int:
    """Per axis: norm, queries and keys of 4, values of 8 and the way back, three tables of 63 rows."""
    return d * (2 * c + 6 * c * 2 * 4 + 4 * 4 * 63)


def _lambda(c: int, d: int) -> int:
    """Four queries and a key of 16, a value of c / 4, two batch norms, the table; norm and output around."""
    reach = 9 if d == 2 else 5
    inner = c * (4 * 16 + 16 + c // 4) + 2 * 4 * 16 + 2 * c // 4 + 16 * reach**d
    return inner + 2 * c + c * c


def _crosscov(c: int, d: int) -> int:
    """Norm, four projections, two temperatures; norm, two depthwise convolutions, batch norm."""
    return 2 * c + 4 * c * c + 2 + 2 * c + 2 * (3**d + 1) * c + 2 * c


def _nonlocal(c: int, d: int) -> int:
    m = c // 2
    return 3 * (c * m + m) + m * c + c + 2 * c


def _crisscross(c: int, d: int) -> int:
    m = c // 8
    return 2 * (c * m + m) + c * c + c + 1


def _dual(c: int, d: int) -> int:
    return _crisscross(c, d) + 1


def _psa(c: int, d: int) -> int:
    m, offsets = c // 4, 59**2 if d == 2 else 9**3
    return 4 * c * m + 2 * m * m + 2 * m * offsets + 8 * m + 2 * c


def _external(c: int, d: int) -> int:
    return 2 * c * c + 3 * c + 2 * 64 * c


def _enhanced(c: int, d: int) -> int:
    heads, length = 8 if d == 2 else 2, 32
    local = 4 * c * c + c * c * 3**d // heads + 6 * c
    return local + 2 * c * c + 6 * c + 4 * heads + d * (2 * length - 1) * (c // (2 * heads))


def _focal(c: int, d: int) -> int:
    heads, (w, e, f) = 2, (7, 3, 7) if d == 2 else (4, 2, 3)
    ring = 2**d * (w**d - (w - e) ** d)
    tables = heads * ((2 * w - 1) ** d + w**d * ring + (w + f - 1) ** d)
    return 4 * c * c + 6 * c + tables + w**d + 1


ADDED: dict[str, Callable[[int, int], int]] = {
    "unet_block": _block,
    "unet_halo": _halo,
    "unet_axial": _axial,
    "unet_lambda": _lambda,
    "unet_crosscov": _crosscov,
    "unet_nonlocal": _nonlocal,
    "unet_dual": _dual,
    "unet_crisscross": _crisscross,
    "unet_psa": _psa,
    "unet_external": _external,
    "unet_enhanced": _enhanced,
    "unet_focal": _focal,
}


def _count(name: str, dims: int, **options: object) -> int:
    usual: dict[str, object] = {"widths": WIDTHS, "strides": (2,)}
    network = create(name, spatial_dims=dims, in_channels=1, out_channels=2, **(usual | options))
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ADDED)
def test_every_layer_adds_the_parameters_of_its_formula(name: str, dims: int) -> None:
    """In the decoder, twice in sequence, and in the encoder at another width too."""
    plain = _count("unet", dims)
    first, second = (ADDED[name](width, dims) for width in WIDTHS)
    assert _count(name, dims) == plain + first
    assert _count(name, dims, layers=2) == plain + 2 * first
    everywhere = _count(name, dims, layers=3, encoder_attention_levels=(1,))
    assert everywhere == plain + 3 * (first + second)


def test_two_block_layers_have_a_name_and_every_method_a_formula() -> None:
    assert _count("unet_block2", 3) == _count("unet_block", 3, layers=2)
    assert set(names("unet_*")) == {*ADDED, "unet_block2"}


@pytest.mark.parametrize("layers", [0, -1])
@pytest.mark.parametrize("name", names("unet_*"))
def test_no_layers_are_refused(name: str, layers: int) -> None:
    with pytest.raises(InputError, match="layers must be at least 1; a network without attention"):
        _count(name, 2, layers=layers)
