"""A model folder as MLflow loads it: its own files, and the name of the module that reads them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import medattn

DIGEST = "medattn.digest"


@contextmanager
def written(folder: Path, loader: str) -> Iterator[Path]:
    """A temporary folder that `mlflow.pyfunc.load_model` takes: `data` holds the model folder as it is.

    loader: a module with `_load_pyfunc(path)`, of which MLflow keeps the name alone: nothing is pickled.
    """
    # of MLflow's own code, when it is imported
    warnings.filterwarnings("ignore", ".*Any type hint is inferred as AnyType", UserWarning)
    from mlflow import pyfunc

    packages = ("torch", "monai", "numpy", "mlflow")
    needs = [f"medattn=={medattn.__version__}", *(f"{name}=={_release(name)}" for name in packages)]
    with TemporaryDirectory(prefix="medattn-mlflow-") as temporary:
        made = Path(temporary) / "model"
        pyfunc.save_model(str(made), loader_module=loader, data_path=str(folder), pip_requirements=needs)
        yield made


def register(
    client: Any, name: str, source: str, run_id: str, digest: str, numbers: Mapping[str, float]
) -> bool:
    """Make a version of a registered model, with its numbers as tags, and say whether one was made.

    Not where there is one of this run and digest, nor where the store keeps no registered models.
    """
    from mlflow.exceptions import MlflowException, RestException

    name = re.sub(r"[/:]|^\.+$", "_", name)
    try:
        versions = client.search_model_versions(f"name = '{name}'")
    except RestException as error:
        if error.error_code in ("ENDPOINT_NOT_FOUND", "FEATURE_DISABLED", "NOT_IMPLEMENTED"):
            return False
        raise
    if any((one.run_id, one.tags.get(DIGEST)) == (run_id, digest) for one in versions):
        return False
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    described = "\n".join(f"{number}: {value:.4g}" for number, value in numbers.items())
    tags = {re.sub(r"[^\w\-./: ]", "_", number)[:250]: repr(value) for number, value in numbers.items()}
    client.create_model_version(
        name,
        source,
        run_id,
        tags={DIGEST: digest} | tags,
        description=f"Evaluated on the validation data; report/ of the run holds all.\n{described}",
        await_creation_for=0,
    )
    return True


def _release(package: str) -> str:
    """Without the build: torch 2.13.0+cpu is on no package index."""
    return version(package).partition("+")[0]
