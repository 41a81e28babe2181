"""The shape of the house: where things are, how large they are, and what importing them costs."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from medattn_pipelines.cli import parser_for
from medattn_pipelines.commands import COMMANDS
from medattn_pipelines.configfile import load_any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (ROOT / "medattn", ROOT / "kernels/medattn_kernels", ROOT / "pipelines/medattn_pipelines")
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SPACES = ROOT / "configs/tune"  # searches, which tests/pipelines/test_tune_space.py reads
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent != SPACES)
HEAVY = ("torch", "monai", "numpy", "triton", "mlflow")
LARGEST_FILE, LARGEST_FUNCTION, LARGEST_KERNEL = 400, 80, 120

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_folders_that_are_no_packages_stay_none() -> None:
    # `kernels` and `pipelines` are names of other people's packages; a bare folder never hides them
    for folder in ("kernels", "pipelines"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_every_package_is_typed() -> None:
    for package in PACKAGES:
        assert (package / "__init__.py").is_file()
        assert (package / "py.typed").is_file()


def test_test_files_have_names_of_their_own_and_no_packages() -> None:
    names = [path.name for path in TESTS if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
    assert "__init__.py" not in names


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_stay_short(path: Path) -> None:
    length = len(path.read_text(encoding="utf-8").splitlines())
    assert length <= LARGEST_FILE, f"{length} lines: it has found its second job, split it"


def length_of(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_stay_short(path: Path) -> None:
    limit = LARGEST_KERNEL if path.name == "kernel.py" else LARGEST_FUNCTION
    found = {f.name: length_of(f) for f in functions(parse(path)) if length_of(f) > limit}
    assert not found


def public_without_docstring(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None and not _needs_none(node):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from public_without_docstring(node.body, f"{node.name}.")


def _needs_none(node: ast.stmt) -> bool:
    """`forward` is described by its class, and overloads by the function that they are of."""
    if not isinstance(node, Function):
        return False
    overload = any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)
    return node.name == "forward" or overload


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_everything_public_is_documented(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree), "the module says nothing about itself"
    assert list(public_without_docstring(tree.body)) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_drawer_for_everything(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}


def test_the_library_neither_prints_nor_parses_arguments() -> None:
    for path in SOURCES:
        if PACKAGES[2] in path.parents:
            continue
        called = {
            node.func.id
            for node in ast.walk(parse(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        imported = {
            alias.name
            for node in ast.walk(parse(path))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert "print" not in called, path
        assert "argparse" not in imported, path


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("from medattn_pipelines.cli import main; main(['--help'])", id="help"),
        pytest.param("import medattn, medattn_pipelines", id="packages"),
    ],
)
def test_what_must_start_at_once_loads_nothing_heavy(line: str) -> None:
    script = f"import sys; {line}; print([n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def header(path: Path) -> str:
    """The comment at the top of a config, without its marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#") for line in lines[:end])


def test_there_are_configs() -> None:
    assert ROOT / "configs/hn_ct.yaml" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_config_loads_and_its_commands_parse(path: Path) -> None:
    assert load_any(path).run_dir == Path("runs") / path.stem
    commands = re.findall(r"^ (?:command)? +(medattn .*)$", header(path), re.MULTILINE)
    assert f"medattn train {name_of(path)}" in commands
    for command in commands:
        _, name, *arguments = shlex.split(command)
        parser_for(name, COMMANDS[name]).parse_intermixed_args(arguments)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_config_says_what_to_expect_and_names_its_data_cards(path: Path) -> None:
    text = header(path)
    for word in ("command", "hardware", "time", "score"):
        assert re.search(rf"^ {word} ", text, re.MULTILINE), f"the header does not state the {word}"
    cards = re.findall(r"data_cards/\w+\.md", text)
    assert cards
    for card in cards:
        assert (ROOT / card).is_file()
