"""Which problems are measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shapes import ALL_TERMS, Entry


def find(name: str) -> Entry:
    """The entry of that name. Raises KeyError."""
    return {entry.name: entry for entry in REGISTRY}[name]


def _volumes() -> Iterator[Entry]:
    """Head-and-neck volumes, 8 heads of 16; Axial-DeepLab's values are twice as wide."""

    def axial(side: int, name: str = "", axis: int = 1, **options: Any) -> Entry:
        size, options = (side,) * 3, {"terms": ALL_TERMS} | options
        return Entry(f"axial-{side}{name}", "axial", "cuda", size, 8, 16, 32, axis=axis, **options)

    def block(side: int, name: str = "", **options: Any) -> Entry:
        size, options = (side,) * 3, {"terms": ("rel",)} | options
        return Entry(f"block-{side}{name}", "block", "cuda", size, 8, 16, 16, block=8, halo=4, **options)

    yield axial(96, also=("compiled", "flex"))
    yield axial(96, "-first-axis", axis=0)
    yield axial(96, "-last-axis", axis=2)
    yield axial(96, "-logit-terms", terms=("rel_q", "rel_k"), also=("flex",))  # all that FlexAttention can do
    yield axial(128, also=("compiled",))
    yield axial(160)
    yield axial(192)
    yield block(96, also=("flex",))
    yield block(96, "-plain", terms=(), also=("flex",))
    yield block(64, also=("compiled", "flex"))  # where the dense forms fit into memory
    yield block(192)


def _linear() -> Iterator[Entry]:
    """Operators whose cost is linear in the number of voxels.

    Lambda attention has the table and the value width of the floor in kernels/README.md.
    """
    everywhere: dict[str, Any] = {"terms": ("table",), "scope": 7, "also": ("compiled",)}

    def lambdas(side: int, name: str = "", **options: Any) -> Entry:
        options = everywhere | options
        return Entry(f"lambda-{side}{name}", "lambda", "cuda", (side,) * 3, 4, 16, 32, **options)

    def crosscov(side: int, heads: int, name: str = "", width: int = 16) -> Entry:
        name = f"crosscov-{side}{name}"
        return Entry(name, "crosscov", "cuda", (side,) * 3, heads, width, width, also=("compiled",))

    yield lambdas(64)
    yield lambdas(96)
    yield lambdas(96, "-depth-4", depth=4)
    yield lambdas(96, "-content", terms=())
    yield lambdas(192, also=())
    yield crosscov(64, 8)
    yield crosscov(96, 8)
    yield crosscov(96, 4, "-width-32", width=32)
    yield crosscov(192, 4)


def _stages() -> Iterator[Entry]:
    """Attention layers of published 2D networks, batch 32."""

    def axial(side: int, width: int, also: tuple[str, ...] = ()) -> Entry:
        numbers: dict[str, Any] = {"batch": 32, "terms": ALL_TERMS, "also": also}
        size = (side, side)
        return Entry(f"axial-resnet-{side}", "axial", "cuda", size, 8, width, 2 * width, **numbers)

    def halo(side: int, heads: int, width: int, also: tuple[str, ...] = ()) -> Entry:
        numbers: dict[str, Any] = {"batch": 32, "terms": ("rel",), "padding": "zero", "also": also}
        size = (side, side)
        return Entry(
            f"halonet-{side}", "block", "cuda", size, heads, width, width, block=8, halo=3, **numbers
        )

    # Axial-ResNet-L at 224 x 224: 128 to 1024 channels of values
    yield axial(56, 8, ("compiled",))
    yield axial(28, 16)
    yield axial(14, 32)
    yield axial(7, 64)
    # HaloNet-H0 to H2 at 256 x 256: 64 to 512 channels
    yield halo(64, 4, 16, ("compiled", "flex"))
    yield halo(32, 8, 16)
    yield halo(16, 8, 32)
    yield halo(8, 8, 64)


def _linear_stages() -> Iterator[Entry]:
    """Attention layers of LambdaNetworks and XCiT, and one signal."""

    def lambdas(name: str, size: tuple[int, ...], width: int, **options: Any) -> Entry:
        numbers: dict[str, Any] = {"heads": 4, "batch": 32, "terms": ("table",), "also": ("compiled",)}
        return Entry(
            f"lambda-{name}", "lambda", "cuda", size, width=16, value_width=width, **numbers | options
        )

    def xcit(side: int, heads: int, width: int, batch: int, name: str = "") -> Entry:
        name = f"xcit-{side}{name}"
        numbers: dict[str, Any] = {"batch": batch, "also": ("compiled",)}
        return Entry(name, "crosscov", "cuda", (side, side), heads, width, width, **numbers)

    # LambdaResNet-50 at 256 x 256: 64 to 512 channels
    yield lambdas("resnet-64", (64, 64), 16, scope=23)
    yield lambdas("resnet-32", (32, 32), 32, scope=23)
    yield lambdas("resnet-16", (16, 16), 64, scope=23)
    yield lambdas("resnet-8", (8, 8), 128, scope=15)  # its table of 23 rows has no more that meet the image
    # the paper's comparison of memory: 8 heads, a row for every offset
    yield lambdas("global-64", (64, 64), 8, heads=8)
    yield lambdas("signal-4096", (4096,), 32, scope=127)
    # XCiT at 224 x 224, patches of 16 and 8, and 384 x 384
    yield xcit(14, 4, 32, 256, "-nano")
    yield xcit(14, 8, 48, 128)
    yield xcit(28, 8, 48, 64)
    yield xcit(28, 8, 64, 64, "-medium")
    yield xcit(48, 16, 48, 16, "-large")


def _for_cpus() -> Iterator[Entry]:
    """32 output channels and two heads, as in `unet_axial` and `unet_block`; small ones with `naive`."""

    def axial(name: str, side: int, heads: int, width: int, value_width: int) -> Entry:
        numbers: dict[str, Any] = {"axis": 1, "terms": ALL_TERMS, "also": ("naive",)}
        return Entry(f"cpu-axial-{name}", "axial", "cpu", (side,) * 3, heads, width, value_width, **numbers)

    def block(name: str, size: tuple[int, ...], heads: int, **options: Any) -> Entry:
        return Entry(f"cpu-{name}", "block", "cpu", size, heads, 16, 16, terms=("rel",), **options)

    def lambdas(name: str, size: tuple[int, ...], width: int, value_width: int, **options: Any) -> Entry:
        numbers: dict[str, Any] = {
            "heads": 4,
            "width": width,
            "value_width": value_width,
            "terms": ("table",),
        }
        return Entry(f"cpu-lambda-{name}", "lambda", "cpu", size, **numbers | options)

    def crosscov(name: str, size: tuple[int, ...], heads: int, width: int, **options: Any) -> Entry:
        also = ("compiled", *options.pop("also", ()))
        return Entry(f"cpu-{name}", "crosscov", "cpu", size, heads, width, width, also=also, **options)

    yield axial("64", 64, 2, 8, 16)
    yield axial("64-four-heads", 64, 4, 8, 8)
    yield axial("16", 16, 2, 8, 16)
    yield block("block-64", (64, 64, 64), 2, block=4, halo=2)  # naive would take minutes
    yield block("block-16", (16, 16, 16), 2, block=4, halo=2, also=("naive",))
    yield block("halonet-32", (32, 32), 4, batch=4, block=8, halo=3, padding="zero", also=("naive",))
    yield lambdas("64", (64, 64, 64), 8, 8, scope=7)
    yield lambdas("32", (32, 32, 32), 16, 16, scope=7, also=("naive",))
    yield lambdas("resnet-32", (32, 32), 16, 32, scope=23, batch=4)
    yield lambdas("signal-1024", (1024,), 16, 32, batch=4)  # a row for every offset
    yield crosscov("crosscov-64", (64, 64, 64), 2, 16, also=("naive",))
    yield crosscov("crosscov-32", (32, 32, 32), 8, 16, also=("naive",))
    yield crosscov("xcit-14", (14, 14), 8, 48, batch=16)


REGISTRY = (*_volumes(), *_linear(), *_stages(), *_linear_stages(), *_for_cpus())
