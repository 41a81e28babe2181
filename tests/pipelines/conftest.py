"""What several tests of the commands start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from medattn.training.mlflow_store import connect


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow's, whose tables take it long to make."""
    folder = tmp_path_factory.mktemp("tables") / "run"
    folder.mkdir()
    connect(f"sqlite:///{folder.parent / 'mlflow.db'}", folder)
    return folder.parent / "mlflow.db"
