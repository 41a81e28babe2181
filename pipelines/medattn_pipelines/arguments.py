"""The arguments of each subcommand."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

SEGMENTATION_FORMATS = ("seg.nrrd",)
CONVERT_NAMES = (
    *("cerr-block-unet", "timm", "xcit", "axial-deeplab", "lambda-d-li14", "lesa", "focal"),
    "eamlp",
)
CONVERT_SOURCES = """\
Nothing in a checkpoint is run: a file that needs code to be read is refused.

sources:
  cerr-block-unet  head-and-neck CT model of Jiang et al. 2019: a state dict of cerr/CT_HeadAndNeck_OARs
  timm             image networks of timm: HaloNets, LambdaResNets, XCiT, ResNets
  xcit             XCiT, of facebookresearch/xcit
  axial-deeplab    Axial-ResNet, of csrhddlam/axial-deeplab
  lambda-d-li14    LambdaResNets, of d-li14/lambda.pytorch
  lesa             ResNets with LESA, of Chenglin-Yang/LESA_classification
  focal            Focal Transformers, of microsoft/Focal-Transformer
  eamlp            EAMLP, of MenghaoGuo/EANet

options of cerr-block-unet, which its weights do not tell, with the values of the released code:
  placement=penultimate      where attention stands: penultimate, last or none
  --organs                   known for the released weights with 12 outputs alone, whose channels 1 to 11 are
                             Parotid_L Parotid_R Glnd_Submand_L Glnd_Submand_R background background
                             Bone_Mandible SpinalCord Brainstem Cavity_Oral background
  --spacing-mm 1 1 2.5       in plane; it keeps the slice spacing of a scan, so give that of yours
  --window-hu -85 265
  --labels hn_oar            packaged label set or the path of a label-set YAML

The released code crops each slice to 256 x 256 around the body. The model runs overlapping tiles of that
size instead, so segmentations of wide scans differ from it.

options of the others; without the last five, images are seen as the source evaluates that network:
  network=NAME               one of `medattn networks`; a wrong one is answered with those of the source
  options={}                 further ones of the network by name, where the weights need them: '{heads: 4}'
  classes=FILE               of the outputs: lines `wnid name`, or JSON {wnid: name}; numbers without it
  image_size=224             side of the network's input, for which its tables of positions are as well
  crop_ratio=0.875           that side over the shorter side of the resized image
  interpolation=bicubic      or bilinear
  mean=[0.485, 0.456, 0.406] of red, green and blue in 0 to 1, and their deviations:
  std=[0.229, 0.224, 0.225]

How a network is evaluated is not always published; a view that was assumed is printed as such."""

TRACK_EXAMPLES = (
    "medattn track sync runs/hn_ct",
    "medattn track sync runs/hn_ct runs/ours --to http://mlflow.example:5000",
)
TRACK_NOTES = """\
A training writes metrics.jsonl and run.json into its run folder, and MLflow follows in the background: into
the server of the variable MLFLOW_TRACKING_URI, or without it into mlflow.db beside the run folder. A server
that is slow, down or away never holds a step. What it missed is sent when it is back, and at the end of the
training; what is missing then, `medattn track sync RUN` sends: parameters, tags, data hashes, metrics,
report, model and the final state. It compares first, so the same command twice changes nothing. It goes to
--to, else to MLFLOW_TRACKING_URI, else to where the training went.

to look at runs:
  mlflow ui --backend-store-uri sqlite:///runs/mlflow.db   then http://127.0.0.1:5000 in a browser
  MLFLOW_TRACKING_URI=http://SERVER:5000 medattn train ... and that address in a browser

  An experiment is called as the config file is; trials of a sweep stand below the sweep's run. The model of
  a run is an artefact, and a version of the registered model of the experiment's name, with the numbers of
  its report as tags (not for trials and folds). In Python, paths in, segmentations or classes out:
    mlflow.set_tracking_uri("sqlite:///runs/mlflow.db")
    mlflow.pyfunc.load_model("models:/hn_ct/1").predict(["scan.nii.gz"])

A password belongs into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. One in the URI works too, and
is shown as user:***@ in all that is written. How busy the machine is, is recorded where the packages
psutil (processor, memory, disk, network) and nvidia-ml-py (GPUs) are installed."""

PREDICT_NOTES = """\
Many GPUs: torchrun --nproc-per-node 4 $(which medattn) predict MODEL INPUT... --output DIR
The processes share the cases and write the same files as one process."""

TUNE_EXAMPLES = (
    "medattn tune configs/tune/demo.yaml",
    "medattn tune configs/tune/learning.yaml data.root=data/hn_ct --trials 30",
    "medattn tune configs/tune/block_attention.yaml --check",
    "medattn tune configs/tune/learning.yaml --storage postgresql://anna@db.hospital.org/tune --timeout 600",
)

TASK_OPTIONS = {  # options of `evaluate` that one task has
    "baseline": "volumes",
    "real": "classification",
    "ground_truth": "classification",
    "images": "panoptic",
}


def phantom(parser: ArgumentParser) -> None:
    """OUT --cases --size --seed"""
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="folder to write; new, empty, or of practice cases"
    )
    parser.add_argument(
        "--cases", type=_positive, default=24, metavar="N", help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--size",
        type=_positive,
        default=96,
        metavar="S",
        help="voxels per axis in plane (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="K", help="another seed, other patients (default: %(default)s)"
    )


def import_(parser: ArgumentParser) -> None:
    """KIND SOURCE OUT --labels --contoured --drop-unknown --validation --seed"""
    parser.add_argument("kind", choices=("nifti", "nnunet", "openkbp"), metavar="KIND", help="see below")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder to read")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write in medattn's case layout")
    _label_set(parser)
    parser.add_argument(
        "--contoured",
        choices=("present", "all"),
        default="present",
        help="organs of a label map that count as drawn: those with voxels, or all (default: %(default)s)",
    )
    parser.add_argument(
        "--drop-unknown", action="store_true", help="leave out organs unknown to the label set"
    )
    parser.add_argument(
        "--validation",
        type=_share,
        default=0.15,
        metavar="SHARE",
        help="share of patients held out where the source has no split (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="K", help="seed of that draw (default: %(default)s)"
    )


def check(parser: ArgumentParser) -> None:
    """DATA --repair --labels --workers --images"""
    parser.add_argument(
        "data",
        type=Path,
        metavar="DATA",
        help="folder in medattn's case layout; or a JSON file of the COCO panoptic format with its PNGs in "
        "the folder of the same name beside it, a folder of such files, or the root of COCO, Cityscapes or "
        "Mapillary Vistas",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="list organs with voxels in a label map as contoured in cases.json, then check again",
    )
    _label_set(parser)
    _workers(parser)
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="of the photos of panoptic files, to check as well"
    )


def train(parser: ArgumentParser) -> None:
    """CONFIG [a.b=c ...] [--resume | --overwrite]"""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, such as configs/hn_ct.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="a.b=c",
        help="replaces a field of the config; the value is YAML",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="continue the run in run.dir where it stopped"
    )
    existing.add_argument("--overwrite", action="store_true", help="delete the run in run.dir and start anew")


def predict(parser: ArgumentParser) -> None:
    """MODEL INPUT... --output --export --device"""
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a run's model folder, such as runs/hn_ct/model"
    )
    parser.add_argument(
        "inputs", type=Path, nargs="+", metavar="INPUT", help="a volume, a case folder, or a folder of them"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for <case>.nii.gz")
    parser.add_argument(
        "--export",
        action="extend",
        nargs="+",
        choices=SEGMENTATION_FORMATS,
        default=[],
        metavar="FORMAT",
        help=f"write these too: {', '.join(SEGMENTATION_FORMATS)}",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one"
    )


def evaluate(parser: ArgumentParser) -> None:
    """--prediction --reference --output --task --baseline --labels --workers, and those of one task"""
    parser.add_argument(
        "--prediction",
        type=Path,
        required=True,
        metavar="P",
        help="folder of <case>.nii.gz with labels.json; of images, one of predictions.csv with classes.json, "
        "or that table; panoptic, a JSON file of COCO's format with its PNGs in the folder of the same name",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        required=True,
        metavar="R",
        help="folder of case folders with label.nii.gz, or of <case>.nii.gz, with labels.json; of images, a "
        "folder per class, named by wnid; panoptic, a JSON file as for the prediction",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the report")
    parser.add_argument(
        "--task",
        choices=("volumes", "panoptic", "classification"),
        default="volumes",
        help="what is compared (default: %(default)s)",
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="P2", help="another prediction to compare with; volumes only"
    )
    _label_set(parser)
    _workers(parser)
    images = parser.add_argument_group("with --task classification")
    images.add_argument(
        "--real", type=Path, metavar="FILE", help="ImageNet's reassessed labels, real.json, to score as well"
    )
    images.add_argument(
        "--ground-truth",
        type=Path,
        metavar="FILE",
        help="classes of a flat folder of images: lines `file wnid`, or the data folder of ImageNet's devkit",
    )
    panoptic = parser.add_argument_group("with --task panoptic")
    panoptic.add_argument(
        "--images", type=Path, metavar="FOLDER", help="of the photos, for the pictures of the report"
    )


def export(parser: ArgumentParser) -> None:
    """SEGMENTATION --as --output --labels"""
    parser.add_argument(
        "segmentation", type=Path, metavar="SEGMENTATION", help="label map with labels.json beside it"
    )
    parser.add_argument(
        "--as", dest="format", required=True, choices=SEGMENTATION_FORMATS, help="format to write"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="file to write")
    _label_set(parser)


def tune(parser: ArgumentParser) -> None:
    """SPACE [a.b=c ...] --trials --timeout --storage --heartbeat --check"""
    parser.add_argument("space", type=Path, metavar="SPACE", help="YAML file, as below")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=c", help="replaces a field of all trials' config"
    )
    parser.add_argument(
        "--trials",
        type=_positive,
        metavar="N",
        help="complete trials of the whole study (default: SPACE says)",
    )
    parser.add_argument(
        "--timeout", type=_minutes, metavar="MIN", help="start no trial after so many minutes"
    )
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="journal:FILE, for workers on one machine, or postgresql://USER@HOST/DATABASE "
        "(default: journal:<run.dir>/study.journal)",
    )
    parser.add_argument(
        "--heartbeat",
        type=_positive,
        default=60,
        metavar="SECONDS",
        help="with PostgreSQL: how often a worker shows itself; after three of these without, its trial is "
        "run again (default: %(default)s)",
    )
    parser.add_argument("--check", action="store_true", help="check the space, and stop")


def networks(parser: ArgumentParser) -> None:
    """[PATTERN] --json"""
    parser.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="of names, such as 'xcit_*' (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list for programs")


def track(parser: ArgumentParser) -> None:
    """sync RUN... --to"""
    parser.add_argument("action", choices=("sync",), metavar="sync", help="send what MLflow lacks")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, such as runs/hn_ct")
    parser.add_argument("--to", metavar="URI", help="MLflow server or database, in place of the run's own")


def convert(parser: ArgumentParser) -> None:
    """SOURCE CHECKPOINT OUT [option=value ...] --organs --spacing-mm --window-hu --labels"""
    parser.add_argument("source", choices=CONVERT_NAMES, metavar="SOURCE", help="see below")
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="file of torch.save or safetensors"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="model folder to write; new or empty")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="option=value",
        help="what the weights do not tell, such as network=halonet26t; the value is YAML",
    )
    # None where absent: a source takes those that it has, and names any other as unknown
    parser.add_argument(
        "--organs",
        nargs="+",
        metavar="NAME",
        help="of the output channels after the background, in order; `background` for one not to report",
    )
    parser.add_argument(
        "--spacing-mm",
        nargs=3,
        type=float,
        metavar=("L", "P", "S"),
        help="voxel spacing to resample scans to: left-right, front-back, head-foot",
    )
    parser.add_argument(
        "--window-hu", nargs=2, type=float, metavar=("LOW", "HIGH"), help="CT numbers that are told apart"
    )
    parser.add_argument("--labels", metavar="SET", help="label set of the organs, as for `medattn import`")


def _label_set(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--labels",
        default="hn_oar",
        metavar="SET",
        help="packaged label set or the path of a label-set YAML (default: %(default)s)",
    )


def _workers(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=_positive,
        default=2,
        metavar="N",
        help="cases read at a time (default: %(default)s)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0
    if not 0 < minutes < float("inf"):
        raise ArgumentTypeError(f"expected minutes above 0, got {text!r}")
    return minutes


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1
    if not 0 <= share <= 0.9:
        raise ArgumentTypeError(f"expected a share from 0 to 0.9, got {text!r}")
    return share
