"""What attention costs: time of a training step and parameters, against the plain U-Net and MONAI's.

    python pipelines/benchmarks/training_step.py --repeats 30

Steps of the networks are interleaved, so that whatever else the machine does hits all of them alike; the
ratio of medians is the result, the milliseconds are for orientation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from statistics import median

import torch
from monai.networks.nets import UNet as MonaiUNet
from torch import Tensor, nn

from medattn.losses import segmentation_loss
from medattn.networks import create
from medattn_pipelines.progress import print_table
from medattn_pipelines.runs import choose_device, choose_precision

ORGANS = 7
WARMUP = 2  # the first steps allocate
NAMES = ("unet", "unet_block", "unet_block2", "unet_halo", "unet_axial", "unet_lambda", "unet_crosscov")


def networks(full_resolution: bool) -> dict[str, nn.Module]:
    """The networks to compare; ours as configs/hn_ct.yaml builds them, MONAI's with its own defaults."""
    ours = {
        name: create(
            name,
            spatial_dims=3,
            in_channels=1,
            out_channels=1 + ORGANS,
            residual=True,
            full_resolution=full_resolution,
        )
        for name in NAMES
    }
    peer = MonaiUNet(3, 1, 1 + ORGANS, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2)
    return {**ours, "monai UNet 16-256": peer}


def step_seconds(
    networks: Mapping[str, nn.Module], image: Tensor, organs: int, *, low: bool, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each training step of each network, in training mode on the device of the image.

    image: [B, 1, *size]; the labels are drawn at random. low: bfloat16 autocast. Steps are interleaved.
    """
    device = image.device
    label = torch.randint(0, 1 + organs, (len(image), *image.shape[2:]), device=device)
    drawn = torch.ones(len(image), organs, dtype=torch.bool, device=device)
    optimizers = {name: torch.optim.AdamW(network.parameters()) for name, network in networks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for repeat in range(repeats + WARMUP):
        for name, network in networks.items():
            begun = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                outputs = network(image)
            segmentation_loss(outputs, label, drawn).backward()  # type: ignore[no-untyped-call]
            optimizers[name].step()
            optimizers[name].zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= WARMUP:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def main() -> None:
    """Time the networks and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="timed steps per network")
    parser.add_argument(
        "--patch", type=int, nargs=3, default=(48, 48, 80), metavar="V", help="voxels per axis"
    )
    parser.add_argument("--batch", type=int, default=2, metavar="B", help="patches per step")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--full-resolution", action="store_true", help="feature maps of the input's size too")
    args = parser.parse_args()
    device = choose_device("auto")
    low = choose_precision(args.precision, device) == torch.bfloat16
    torch.manual_seed(0)
    image = torch.randn(args.batch, 1, *args.patch, device=device)
    made = {name: network.to(device).train() for name, network in networks(args.full_resolution).items()}
    seconds = step_seconds(made, image, ORGANS, low=low, repeats=args.repeats)
    count = {name: sum(p.numel() for p in network.parameters()) for name, network in made.items()}
    base = median(seconds["unet"])
    rows = [
        (
            name,
            count[name],
            f"{count[name] / count['unet'] - 1:+.2%}",
            f"{1000 * median(seconds[name]):.0f}",
            f"{median(seconds[name]) / base:.3f}",
        )
        for name in made
    ]
    title = f"{device}, {'bf16' if low else 'fp32'}, {args.batch} patches of {tuple(args.patch)}"
    print_table(
        f"{title}, {args.repeats} steps",
        ("network", "parameters", "against unet", "median ms", "step / unet's"),
        rows,
    )


if __name__ == "__main__":
    main()
