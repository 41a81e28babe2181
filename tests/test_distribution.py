"""The wheel and the sdist hold what they should, and the wheel works where no checkout is."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of this checkout."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def test_wheel_holds_three_packages_their_data_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"medattn", "medattn_kernels", "medattn_pipelines"}
    assert names >= {
        "medattn/label_sets/hn_oar.yaml",
        "medattn/report/templates/report.html.j2",
        "medattn/_configs/hn_ct.yaml",
        "medattn/py.typed",
        "medattn_kernels/py.typed",
        "medattn_pipelines/py.typed",
    }


def test_sdist_can_be_tested_and_built_from(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert names >= {
        "pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "configs/hn_ct.yaml", "tests/conftest.py",
        "data_cards/phantom.md", "kernels/README.md",
    }  # fmt: skip


def test_wheel_runs_in_a_fresh_environment_outside_the_checkout(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env/lib").glob("python*/site-packages"))
    wheel = next(built.glob("*.whl"))
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
    ]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    # dependencies come from this environment; its own editable medattn does not, since .pth files do not nest
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = tmp_path / "env/bin/python"

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [python, "-m", "medattn_pipelines.cli", *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "medattn" in run("--version")
    where = subprocess.run(
        [python, "-c", "import medattn; print(medattn.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(site) in where.stdout
    run("phantom", "cases", "--cases", "2", "--size", "32")
    assert (tmp_path / "cases/cases.json").is_file()
    assert "unet_block" in run("networks")
