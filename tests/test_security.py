"""What others made runs no code, writes nowhere else and shows no secrets: malicious files, and sources."""

from __future__ import annotations

import ast
import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from medattn.data.images.classes import Classes
from medattn.data.images.shards import Shards
from medattn.errors import InputError
from medattn.labels import LabelSet
from medattn.training.checkpoint import load_checkpoint, save_checkpoint
from medattn.training.loop import State, averaged_model
from medattn.training.redaction import redacted
from medattn.weights import read_weights
from medattn_pipelines.configfile import load
from medattn_pipelines.convert import convert

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (ROOT / "medattn", ROOT / "kernels/medattn_kernels", ROOT / "pipelines")
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A file that must not come to be."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists(), "code of the file ran"


def test_the_bomb_is_live(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_weights_run_nothing(mark: Path, tmp_path: Path) -> None:
    for number, content in enumerate(
        (Bomb(mark), {"state_dict": {"w": torch.zeros(1)}, "extra": Bomb(mark)})
    ):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        with pytest.raises(InputError, match="would run code that came with the file"):
            read_weights(path)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(InputError):
        read_weights(tmp_path / "plain.pkl")


def checkpoint(folder: Path) -> tuple[Any, ...]:
    model = nn.Linear(2, 2)
    parts = (model, averaged_model(model, 0.9), torch.optim.AdamW(model.parameters()), State(step=3))
    save_checkpoint(folder, *parts)
    return parts


def test_the_table_of_a_checkpoint_runs_nothing(mark: Path, tmp_path: Path) -> None:
    """--resume in a run folder that somebody else has prepared."""
    parts = checkpoint(tmp_path / "last")
    (tmp_path / "last/.metadata").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(InputError, match=r"cannot be loaded .*instructions of its own"):
        load_checkpoint(tmp_path / "last", *parts)


def test_small_values_of_a_checkpoint_run_nothing(mark: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    parts = checkpoint(tmp_path / "last")
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        save({"state": Bomb(mark)}, checkpoint_id=tmp_path / "evil", no_dist=True)
    evil = next((tmp_path / "evil").glob("*.distcp")).read_bytes()
    table = pickle.loads((tmp_path / "last/.metadata").read_bytes())
    stored = next(value for key, value in table.storage_data.items() if key.fqn == "state")
    file = tmp_path / "last" / stored.relative_path
    stored.offset, stored.length = len(file.read_bytes()), len(evil)
    file.write_bytes(file.read_bytes() + evil)
    (tmp_path / "last/.metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_checkpoint(tmp_path / "last", *parts)


def test_a_checkpoint_reads_no_file_outside_it(tmp_path: Path) -> None:
    parts = checkpoint(tmp_path / "last")
    table = pickle.loads((tmp_path / "last/.metadata").read_bytes())
    for stored in table.storage_data.values():
        stored.relative_path = f"../other/{stored.relative_path}"
    checkpoint(tmp_path / "other")
    (tmp_path / "last/.metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(InputError, match="a file outside the folder"):
        load_checkpoint(tmp_path / "last", *parts)


def test_yaml_runs_nothing(mark: Path, tmp_path: Path) -> None:
    evil = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{mark}]]"
    path = tmp_path / "evil.yaml"
    path.write_text(f"data: {{root: {evil}}}\n")
    with pytest.raises(InputError, match="not valid YAML"):
        load(path)
    path.write_text("data: {root: x}\n")
    with pytest.raises(InputError, match="not valid YAML"):
        load(path, [f"seed={evil}"])
    path.write_text(f"organs: {evil}\n")
    with pytest.raises(InputError):
        LabelSet.load(str(path))
    with pytest.raises(InputError, match="not valid YAML"):
        convert("timm", path, tmp_path / "out", {}, [f"network={evil}"])


def png() -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (4, 4)).save(encoded, format="PNG")
    return encoded.getvalue()


def shard(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_shards_write_nothing_and_follow_no_link(tmp_path: Path) -> None:
    """Names that climb out of a folder are names only; links and devices are not samples."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    link, hard, device = (tarfile.TarInfo(f"{n}.png") for n in ("link", "hard", "device"))
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    hard.type, hard.linkname = tarfile.LNKTYPE, str(secret)
    device.type = tarfile.CHRTYPE
    good = [(tarfile.TarInfo("../../climbed.png"), png()), (tarfile.TarInfo("../../climbed.cls"), b"0")]
    (tmp_path / "deep/er").mkdir(parents=True)
    path = tmp_path / "deep/er/a.tar"
    shard(path, [*good, (link, b""), (hard, b""), (device, b"")])
    before = sorted(tmp_path.rglob("*"))
    found = Shards.open(str(path), Classes.of(["n01"]), cache=None)
    assert (len(found), found.read(0)) == (1, png())
    assert sorted(tmp_path.rglob("*")) == before


def test_arrays_of_objects_are_not_read(mark: Path, tmp_path: Path) -> None:
    """A cache of shards with a pickle in it is made anew."""
    path, cache = tmp_path / "a.tar", tmp_path / "cache"
    shard(path, [(tarfile.TarInfo("a.png"), png()), (tarfile.TarInfo("a.cls"), b"0")])
    Shards.open(str(path), Classes.of(["n01"]), cache=cache)
    (entry,) = cache.glob("*.npz")
    evil = np.array([Bomb(mark)], dtype=object)
    np.savez(entry, offset=evil, size=evil, targets=evil, keys=evil)
    assert len(Shards.open(str(path), Classes.of(["n01"]), cache=cache)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://anna:pa@ss/word@db:5432/study",
        "https://anna:pa@ss/word@mlflow.example",
        "error: could not reach 'postgresql+psycopg2://anna:pa@ss/word@db/x': timeout",
        "http://mlflow.example?access_token=pa@ss/word&x=1",
    ],
)
def test_secrets_in_addresses_are_hidden(text: str) -> None:
    hidden = redacted(text)
    assert "ss/word" not in hidden
    assert "***" in hidden


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, str]:
    return {keyword.arg or "**": ast.unparse(keyword.value) for keyword in call.keywords}


def dangers(tree: ast.AST) -> Iterator[str]:
    """What could run the code of a file or of a text, or write where an archive says."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (n for n in names if n.split(".")[0] in FORBIDDEN)
    for name, call in calls(tree):
        given, last = keywords(call), name.rpartition(".")[2]
        if name == "torch.load" and given.get("weights_only") != "True":
            yield f"{name} without weights_only"
        elif name in ("yaml.load", "yaml.load_all") and "_Loader" not in ast.unparse(call):
            yield f"{name} with a loader that is not safe"
        elif name in RUNNING or last in UNPACKING or (last == "extract" and "tar" in name.lower()):
            yield name
        elif given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False":
            yield f"{name} with shell or allow_pickle"


FORBIDDEN = ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
RUNNING = ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
UNPACKING = ("extractall", "unpack_archive", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all")
ALLOWED = {
    # to name the error that torch's own safe reader raises; nothing is unpickled here
    "medattn/weights.py": ["pickle"],
    # a reader that lets through torch's own classes alone, proven above
    "medattn/training/checkpoint_reading.py": ["pickle"],
    "medattn/training/checkpoint.py": ["pickle"],
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_has_no_door_for_foreign_code(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    text = path.read_text(encoding="utf-8")
    assert list(dangers(ast.parse(text))) == ALLOWED.get(name, [])
    if name in ALLOWED:
        assert "pickle.load" not in text


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from marshal import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "np.load(path, allow_pickle=True)",
        "archive.extractall(out)",
        "shutil.unpack_archive(path)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_that_look_finds_what_it_looks_for(line: str) -> None:
    assert len(list(dangers(ast.parse(line)))) == 1


def test_the_loader_of_configs_is_a_safe_one() -> None:
    import yaml

    from medattn_pipelines import configfile

    assert issubclass(configfile._Loader, yaml.SafeLoader)


CLOCKS = {  # time.time may jump; what these write is for people, and decides nothing
    "medattn/training/tracking.py": 1,
    "medattn/training/runrecord.py": 1,
    "medattn/training/system_metrics.py": 1,
    "pipelines/medattn_pipelines/tuning/worker.py": 1,
}


def test_only_monotonic_clocks_decide() -> None:
    found = {}
    for path in SOURCES:
        number = sum(name in ("time.time", "datetime.now") for name, _ in calls(ast.parse(path.read_text())))
        if number and "benchmarks" not in path.parts:
            found[str(path.relative_to(ROOT))] = number
    assert found == CLOCKS
