"""Search spaces: what a file may say, where it is wrong, and that every space here can be run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from medattn.errors import InputError
from medattn_pipelines.cli import parser_for
from medattn_pipelines.commands import COMMANDS
from medattn_pipelines.tuning.probe import check_search
from medattn_pipelines.tuning.space import FloatRange, IntRange, combinations, grid_values
from medattn_pipelines.tuning.spacefile import Search, read_search

ROOT = Path(__file__).resolve().parents[3]
SPACES = sorted((ROOT / "configs/tune").glob("*.yaml"))
PLAIN = """\
config:
  data: {root: cases}
  network: {name: unet, options: {widths: [4, 8], strides: [2]}}
space:
  training.learning_rate: {type: float, low: 1e-4, high: 1e-2, log: true}
  network.name: {type: categorical, choices: [unet, unet_block]}
  network.options.halo:
    type: int
    low: 0
    high: 4
    when: {network.name: unet_block}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return path


def problems(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        check_search(read_search(written(tmp_path, text), overrides))
    return "\n".join(problem.removeprefix(f"{tmp_path}/") for problem in error.value.problems)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_a_space_in_the_repository_is_valid_and_its_commands_parse(path: Path) -> None:
    search = read_search(path)
    check_search(search)
    assert (search.name, search.folder) == (path.stem, Path("runs") / path.stem)
    lines = path.read_text(encoding="utf-8").splitlines()
    head = "\n".join(line.removeprefix("#") for line in lines[: lines.index("")])
    for word in ("command", "hardware", "time", "score"):
        assert re.search(rf"^ {word} ", head, re.MULTILINE), word
    commands = re.findall(r"^ (?:command)? +(medattn .*)$", head, re.MULTILINE)
    assert f"medattn tune configs/tune/{path.name}" in commands
    for command in commands:
        _, name, *arguments = shlex.split(command)
        parser_for(name, COMMANDS[name]).parse_intermixed_args(arguments)
    cards = re.findall(r"data_cards/\w+\.md", head)
    assert cards
    assert all((ROOT / card).is_file() for card in cards)


def test_values_reach_the_config_of_a_trial(tmp_path: Path) -> None:
    search = read_search(written(tmp_path, PLAIN), ["training.steps=7", "run.dir=elsewhere"])
    values = {"network.name": "unet_block", "network.options.halo": 3, "training.learning_rate": 5e-4}
    config = search.config(values, tmp_path / "trial_0000")
    assert (config.network.name, config.training.steps, config.training.learning_rate) == (
        *("unet_block", 7, 5e-4),
    )
    assert config.network.options == {"widths": [4, 8], "strides": [2], "halo": 3}
    assert (config.run_dir, search.folder) == (tmp_path / "trial_0000", Path("elsewhere"))
    assert "halo" not in search.config({"network.name": "unet"}).network.options  # nothing leaks from trials


def test_a_base_lies_beside_the_space_and_config_replaces_its_fields(tmp_path: Path) -> None:
    base = {"data": {"root": "a"}, "run": {"dir": "runs/other"}, "training": {"steps": 5, "batch_size": 3}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    text = "base: base.yaml\nconfig: {training: {steps: 9}}\nspace: {seed: {type: int, low: 0, high: 5}}\n"
    search = read_search(written(tmp_path, text))
    config = search.config({"seed": 4})
    assert (config.training.steps, config.training.batch_size, config.seed) == (9, 3, 4)
    assert search.folder == Path("runs/space"), "the run folder of the base is not that of a search"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("learning_rate:", "learning_rat:", r"space\.yaml:5: .*unknown field; did you mean 'learning_rate'"),
        ("high: 1e-2", "high: 99", r"space\.yaml:5: training\.learning_rate: .*less than or equal to 10"),
        ("low: 1e-4", "low: 1", r":5: .*expected low below high, got low 1 and high 0\.01"),
        ("low: 1e-4", "low: 0", r":5: .*expected low above 0 with log"),
        ("type: float", "type: flot", r":5: .*'flot' is no distribution; did you mean 'float'\?"),
        (
            "unet_block]",
            "unet_blok]",
            r":11: .*never has the value unet_block; its choices are unet, unet_blok",
        ),
        ("choices: [unet,", "choices: [unett,", r":6: .*unknown network 'unett'; did you mean 'unet'\?"),
        ("options.halo", "options.hallo", r":9: .*has no option 'hallo'"),
        ("high: 4", "hihg: 4", r":10: .*hihg: unknown field; did you mean 'high'\?"),
        (
            "when: {network.name",
            "when: {network.nam",
            r":11: .*is not searched; did you mean 'network\.name'",
        ),
        ("root: cases", "rot: cases", r":2: data\.rot: unknown field; did you mean 'root'"),
        ("space:\n", "sampler: {name: tpee}\nspace:\n", r":4: sampler: name: Input should be 'tpe'"),
        ("space:\n", "objective: {score: maximize}\nspace:\n", r":4: objective: unknown field.*'objectives'"),
        ("space:\n", "objectives: {score: minimize}\nspace:\n", r":4: .*minimize finds the worst"),
        ("space:\n", "base: nowhere.yaml\nspace:\n", r":4: base: .*nowhere\.yaml: no such config"),
        ("config:\n", "configuration:\n", r"config"),
        (
            *(
                "space:\n",
                "objectives: {score: maximize, latency: minimize}\npruner: {name: median}\nspace:\n",
            ),
            r":5: pruner: name: median: stops trials by their score",
        ),
        ("space:\n", "sampler: {name: cmaes}\nspace:\n", r":4: .*needs two ranges of numbers"),
    ],
)
def test_a_mistake_is_found_before_the_first_trial_and_named_with_its_line(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    assert old in PLAIN
    assert re.search(expected, problems(tmp_path, PLAIN.replace(old, new, 1)))


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = PLAIN.replace("learning_rate", "learning_rat").replace("high: 4", "high: 4\n    stepp: 2")
    assert "stepp" in problems(tmp_path, text)
    text = PLAIN.replace("learning_rate", "learning_rat").replace("network.name: {", "network.nam: {")
    text = text.replace("when: {network.name", "when: {network.nam")
    found = problems(tmp_path, text)
    assert "space.yaml:5: training.learning_rat" in found
    assert "space.yaml:6: network.nam" in found


def test_overrides_are_checked_and_cannot_fix_what_is_searched(tmp_path: Path) -> None:
    assert "override 'training.stepps=3'" in problems(tmp_path, PLAIN, "training.stepps=3")
    assert "network.name is searched (" in problems(tmp_path, PLAIN, "network.name=unet")


def test_conditions_in_a_circle_are_an_error(tmp_path: Path) -> None:
    text = PLAIN.replace("[unet, unet_block]}", "[unet, unet_block], when: {network.options.halo: 1}}")
    assert "depend on each other in a circle" in problems(tmp_path, text)


def test_pairs_of_cases_are_for_volumes_alone(tmp_path: Path) -> None:
    text = (
        "config: {task: classification, data: {root: x}}\npruner: {name: wilcoxon}\n"
        "space: {seed: {type: int, low: 0, high: 3}}\n"
    )
    assert "which classification has not; use median or hyperband" in problems(tmp_path, text)


@pytest.mark.parametrize("task", ["classification", "panoptic"])
def test_spaces_for_images_are_checked_alike(tmp_path: Path, task: str) -> None:
    network = {"classification": "resnet26", "panoptic": "axial_deeplab_s"}[task]
    text = (
        f"config: {{task: {task}, data: {{root: x}}}}\nspace:\n"
        f"  network.name: {{type: categorical, choices: [{network}, unet]}}\n"
    )
    assert re.search(r":3: .*'unet' is made for segmentation, not for " + task, problems(tmp_path, text))


def test_values_that_fail_together_are_found(tmp_path: Path) -> None:
    text = (
        "config: {data: {root: x}, network: {name: unet}}\nspace:\n"
        "  network.options.widths: {type: categorical, choices: [[4, 8], [4, 8, 16]]}\n"
        "  network.options.strides: {type: categorical, choices: [[2], [2, 2]]}\n"
    )
    assert "network.options.strides" in problems(tmp_path, text)


def test_a_grid_has_every_combination_once() -> None:
    search = {
        "a": IntRange(type="int", low=0, high=4, step=2),
        "b": FloatRange(type="float", low=0.01, high=1, log=True, when={"a": [0, 4]}),
    }
    values = {path: grid_values(kind, 3) for path, kind in search.items()}
    assert values["a"] == [0, 2, 4]
    assert values["b"] == pytest.approx([0.01, 0.1, 1])
    found = combinations(search, values)
    assert len(found) == 3 + 1 + 3
    assert {"a": 2} in found
    assert len({str(one) for one in found}) == 7


def test_the_space_of_a_search_is_unchanged_by_its_trials(tmp_path: Path) -> None:
    search: Search = read_search(written(tmp_path, PLAIN))
    before = str(search.base.content)
    search.config({"network.options.halo": 2, "network.name": "unet_block"})
    assert str(search.base.content) == before
