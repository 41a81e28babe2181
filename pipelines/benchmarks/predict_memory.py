"""Peak memory and time of `medattn predict` on a large CT: 512 x 512 x 160 voxels, 22 classes.

    python pipelines/benchmarks/predict_memory.py

The weights are random, which changes neither memory nor time. The command runs in a process of its own,
whose peak resident memory the kernel reports.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from medattn.data.plan import Plan
from medattn.geometry import Geometry
from medattn.io import Volume, write_volume
from medattn.labels import LabelSet
from medattn.segmenter import ModelCard, Settings, save_model

SPACING_MM = (0.98, 0.98, 2.5)


def write_model(folder: Path, flips: bool) -> None:
    """A model for 21 organs at the scan's own spacing."""
    organs = tuple(organ.name for organ in LabelSet.load("hn_oar").organs[:21])
    plan = Plan(
        organs, SPACING_MM, (96, 96, 32), (-200.0, 400.0), ((2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    )
    card = ModelCard(
        network="unet_block",
        spatial_dims=3,
        options={"residual": True, "full_resolution": False},
        plan=plan,
        labels=dict(enumerate(organs, 1)),
        organs={organ: LabelSet.load("hn_oar").describe(organ) for organ in organs},
        mirror=tuple(range(21)),
        settings=Settings(flips=flips),
    )
    save_model(folder, card, card.build().state_dict())


def write_scan(path: Path, size: tuple[int, int, int]) -> None:
    """A body-like cylinder of noise in air."""
    rng = np.random.default_rng(0)
    i, j = np.meshgrid(*(np.linspace(-1, 1, n) for n in size[:2]), indexing="ij")
    hu = np.where((i**2 + j**2 < 0.6)[..., None], rng.normal(30, 60, size), -1000).astype(np.int16)
    write_volume(path, Volume(hu, Geometry(size, np.diag([*SPACING_MM, 1.0]))))


def main() -> None:
    """Run the command and print what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=int, nargs=3, default=(512, 512, 160), metavar="V", help="voxels per axis"
    )
    parser.add_argument("--flips", action="store_true", help="with the mirrored view, twice the time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", args.flips)
        write_scan(folder / "scan.nii.gz", tuple(args.size))
        command = [sys.executable, "-m", "medattn_pipelines.cli", "predict", str(folder / "model")]
        begun = time.perf_counter()
        subprocess.run([*command, str(folder / "scan.nii.gz"), "--output", str(folder / "out")], check=True)
        seconds = time.perf_counter() - begun
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{' x '.join(map(str, args.size))} voxels, 22 classes: peak {peak_gb:.2f} GiB, {seconds:.0f} s")


if __name__ == "__main__":
    main()
