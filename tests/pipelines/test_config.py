"""Configs: what a user may write, and how mistakes are reported."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from medattn.errors import InputError
from medattn_pipelines.config import Config
from medattn_pipelines.configfile import dump, explain, flatten, load

FAST = tuple(set(Phase) - {Phase.explain})  # explaining a failure takes minutes here
SMALL = "data:\n  root: cases\n"


def write(folder: Path, text: str, name: str = "small.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as error:
        load(path, overrides)
    return [problem.replace(f"{path}", path.name) for problem in error.value.problems]


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{name}.")
        else:
            yield prefix + name, field


def test_a_config_needs_only_its_data(tmp_path: Path) -> None:
    config = load(write(tmp_path, SMALL))
    assert config.data.root == Path("cases")
    assert config.run_dir == config.run.dir == Path("runs/small")
    assert config.cache_dir == Path("runs/prepared")


def test_all_problems_are_reported_at_once_with_file_line_field_and_suggestion(tmp_path: Path) -> None:
    bad = write(
        tmp_path,
        "# a comment\n"
        "data:\n"
        "  root: cases\n"
        "  patch_size: [64, 0, 64]\n"
        "  window_hu: [300, -200]\n"
        "network:\n"
        "  spatial_dim: 3\n"
        "training:\n"
        "  steps: many\n"
        "  optimizer: adam\n"
        "learning_rate: 1\n",
        "bad.yaml",
    )
    assert sorted(problems(bad, "training.learning_rate=-1")) == [
        "bad.yaml:10: training.optimizer: Input should be 'adamw' or 'sgd' (got 'adam')",
        "bad.yaml:11: learning_rate: unknown field; did you mean 'training.learning_rate'?",
        "bad.yaml:4: data.patch_size.1: Input should be greater than or equal to 1 (got 0)",
        "bad.yaml:5: data.window_hu: expected [low, high] with low below high, got low 300 and high -200",
        "bad.yaml:7: network.spatial_dim: unknown field; did you mean 'spatial_dims'?",
        "bad.yaml:9: training.steps: Input should be a valid integer, unable to parse string as an integer "
        "(got 'many')",
        "override 'training.learning_rate=-1': training.learning_rate: "
        "Input should be greater than 0 (got -1)",
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        pytest.param("", "bad.yaml: empty", id="empty"),
        pytest.param("# nothing\n", "bad.yaml: empty", id="only-a-comment"),
        pytest.param("- a\n", "bad.yaml:1: expected sections", id="a-list"),
        pytest.param("data:\n  root: [a\n", "bad.yaml:3: not valid YAML", id="syntax"),
        pytest.param("data:\n\troot: a\n", "bad.yaml:2: not valid YAML", id="tab"),
        pytest.param("data: !!python/object:os.x {}\n", "bad.yaml:1: not valid YAML", id="python-tag"),
        pytest.param("data: {root: a}\n---\nseed: 1\n", "bad.yaml:2: not valid YAML", id="two-documents"),
        pytest.param("data: &a\n  b: *a\n", "bad.yaml: nested too deeply", id="self-reference"),
        pytest.param("seed: 2001-99-99\n", "bad.yaml: not valid YAML", id="impossible-date"),
        pytest.param("seed: 1\n", "bad.yaml:1: data: missing", id="no-data"),
        pytest.param("data: {label_set: x}\n", "bad.yaml:1: data.root: missing", id="no-root"),
        pytest.param("data: cases\n", "bad.yaml:1: data: expected a section", id="scalar-for-section"),
    ],
)
def test_a_file_that_is_no_config_is_one_sentence(tmp_path: Path, text: str, found: str) -> None:
    (sentence,) = problems(write(tmp_path, text, "bad.yaml"))
    assert sentence.startswith(found)


def test_a_key_that_stands_twice_is_reported_with_both_lines(tmp_path: Path) -> None:
    bad = write(tmp_path, SMALL + "seed: 1\ntraining:\n  steps: 1\n  steps: 2\nseed: 3\n", "bad.yaml")
    assert problems(bad) == [
        "bad.yaml:6: training.steps: stands on line 5 already; keep one of them",
        "bad.yaml:7: seed: stands on line 3 already; keep one of them",
    ]


def test_unreadable_files_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "configs").mkdir()
    write(tmp_path, SMALL, "configs/hn_ct.yaml")
    monkeypatch.chdir(tmp_path)
    assert problems(Path("binary.yaml"))[0].startswith("binary.yaml: not readable as a text file")
    assert problems(Path("configs"))[0].startswith("configs: not readable as a text file")
    with pytest.raises(
        InputError, match=r"^configs/hn_tc.yaml: no such config; did you mean configs/hn_ct.yaml\?$"
    ):
        load("configs/hn_tc.yaml")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("training.steps", "expected field=value, such as training.steps=1000"),
        ("=3", "expected field=value, such as training.steps=1000"),
        ("training..steps=3", "expected field=value, such as training.steps=1000"),
        ("training.steps=[1", "not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("data.root.name=3", "data.root is a value, not a section"),
        ("training.stepz=3", "training.stepz: unknown field; did you mean 'steps'?"),
        ("trainning.steps=3", "trainning: unknown field; did you mean 'training'?"),
        ("training=3", "training: expected a section of fields (got 3)"),
        ("training.flips.deep=3", "training.flips: unknown field; did you mean 'inference.flips'?"),
        ("training.steps=0", "training.steps: Input should be greater than or equal to 1 (got 0)"),
        ("training.steps=yes", "training.steps: expected a number, got true"),
        ("training.max_minutes=.inf", "training.max_minutes: Input should be a finite number (got inf)"),
        ("training.learning_rate=.nan", "training.learning_rate: Input should be a finite number (got nan)"),
        ("data.spacing_mm=[1, 2]", "data.spacing_mm.2: Field required (got [1, 2])"),
        ("data.organs=[A, B, A]", "data.organs: every name once, got A more than once"),
        ("augment.scale_range=[2, 1]", "augment.scale_range: expected [low, high], got low 2 above high 1"),
        ("network.spatial_dims=4", "network.spatial_dims: Input should be 2 or 3 (got 4)"),
    ],
)
def test_an_override_that_does_not_fit_names_itself(tmp_path: Path, override: str, reason: str) -> None:
    assert problems(write(tmp_path, SMALL), override) == [f"override {override!r}: {reason}"]


def test_overrides_take_yaml_values_in_order(tmp_path: Path) -> None:
    config = load(
        write(tmp_path, SMALL + "training:\n  steps: wrong\n"),
        [
            "training.steps=1",
            "training.steps=2e3",
            "training.learning_rate=1e-3",
            "training.patience=null",
            "run.tracking=no",
            "data.organs=[Brainstem, SpinalCord]",
            "network.options.gain=1e-2",
            "network.options.norm=batch",
        ],
    )
    assert config.training.steps == 2000
    assert config.training.learning_rate == 0.001
    assert config.training.patience is None
    assert config.run.tracking is False
    assert config.data.organs == ["Brainstem", "SpinalCord"]
    assert config.network.options == {"gain": 0.01, "norm": "batch"}


def test_a_section_whose_fields_are_commented_out_keeps_its_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, SMALL + "augment:\n  # noise: 1\ntraining:\n"), ["augment.noise=0.5"])
    assert config.augment.noise == 0.5
    assert config.training == load(write(tmp_path, SMALL)).training


def test_home_folders_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert load(write(tmp_path, SMALL), ["data.root=~/cases"]).data.root == Path("/home/someone/cases")


def test_a_config_cannot_be_changed(tmp_path: Path) -> None:
    config = load(write(tmp_path, SMALL))
    with pytest.raises(ValidationError, match="frozen"):
        config.training.steps = 3  # type: ignore[misc]


def test_every_field_is_explained() -> None:
    text = explain()
    for path, field in fields(Config):
        assert getattr(field, "description", None), f"{path} has no description"
        assert f"  {path}" in text


names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8)
configs = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "data.organs": st.none() | st.lists(names, min_size=1, max_size=4, unique=True),
        "data.spacing_mm": st.none() | st.tuples(*[st.floats(0.1, 50)] * 3),
        "data.root": st.text("abc/._- :#é~", min_size=1).filter(lambda text: not text.startswith("~")),
        "training.learning_rate": st.floats(1e-12, 10),
        "training.max_minutes": st.none() | st.floats(1e-3, 1e6),
        "network.options": st.dictionaries(
            names,
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | names,
        ),
        "run.tracking": st.booleans(),
    }
)


@settings(
    max_examples=40, deadline=None, phases=FAST, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(values=configs)
def test_a_dumped_config_loads_back_equal(tmp_path: Path, values: dict[str, object]) -> None:
    content: dict[str, dict[str, object]] = {}
    for path, value in values.items():
        section, _, name = path.partition(".")
        if name:
            content.setdefault(section, {})[name] = list(value) if isinstance(value, tuple) else value
    text = json.dumps(content | {"seed": values["seed"]}, ensure_ascii=False)  # which is YAML
    config = load(write(tmp_path, text))
    assert load(write(tmp_path, dump(config), "config.yaml")) == config
    assert config.training.learning_rate == values["training.learning_rate"]
    assert config.network.options == values["network.options"]


def test_text_that_looks_like_a_number_and_infinity_survive(tmp_path: Path) -> None:
    config = load(write(tmp_path, SMALL), ["network.options={a: '1e3', b: .inf, c: 'no', d: '12'}"])
    assert config.network.options == {"a": "1e3", "b": float("inf"), "c": "no", "d": "12"}
    assert load(write(tmp_path, dump(config), "config.yaml")).network == config.network


def test_flattened_paths_are_overrides(tmp_path: Path) -> None:
    config = load(write(tmp_path, SMALL), ["network.options.depth=4", "training.batch_size=3"])
    flat = flatten(config)
    assert flat["training.batch_size"] == 3
    assert flat["network.options.depth"] == 4
    overrides = [f"{path}={yaml.safe_dump(value, default_flow_style=True)}" for path, value in flat.items()]
    assert load(write(tmp_path, "seed: 1\n", "other.yaml"), overrides) == config


@settings(
    max_examples=100, deadline=None, phases=FAST, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text("ab.:=-[]{}&*!#'\" \n\t01,|>%@é", max_size=40),
    override=st.text("training.=[]{}:&* 1", max_size=20),
)
def test_whatever_is_written_ends_in_a_config_or_in_sentences(
    tmp_path: Path, text: str, override: str
) -> None:
    for content, overrides in ((text, []), (SMALL + text, []), (SMALL, [override])):
        with contextlib.suppress(InputError):
            assert isinstance(load(write(tmp_path, content), overrides), Config)
