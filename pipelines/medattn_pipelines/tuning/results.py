"""What a search leaves: best.yaml, trials.csv, the page, and the table on the terminal."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from optuna.importance import get_param_importances
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

import medattn
from medattn.atomic import write_text
from medattn.report.tune import SearchResult, Trial, to_csv
from medattn.report.tune_page import axis_name, render, short, shown
from medattn_pipelines.configfile import dump
from medattn_pipelines.progress import print_table
from medattn_pipelines.tuning.sampling import from_optuna
from medattn_pipelines.tuning.space import UNITS
from medattn_pipelines.tuning.spacefile import Search

if TYPE_CHECKING:
    from medattn_pipelines.tuning.worker import Done

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
FEWEST = 4  # complete trials before anything is said of importance
ROWS = 10  # of the table


def report(search: Search, study: Study, storage: str, done: Done) -> SearchResult:
    """Write the results of a study into its folder and print the best trials."""
    trials = study.get_trials(deepcopy=False)
    best = best_trials(search, trials)
    config = search.folder / "best.yaml"
    if best:
        write_text(config, best_config(search, best[0]))
    result = SearchResult(
        name=search.name,
        objectives={str(name): str(way) for name, way in search.space.objectives.items()},
        constraints=_constraints(search),
        trials=[_row(search, trial, best) for trial in trials],
        target=done.target,
        storage=storage,
        best_config=str(config) if best else "",
        importances=importances(search, study, trials),
        versions={"medattn": medattn.__version__} | {name: version(name) for name in ("optuna", "torch")},
    )
    (search.folder / "report").mkdir(parents=True, exist_ok=True)
    write_text(search.folder / "trials.csv", to_csv(result))
    write_text(search.folder / "report" / "report.html", render(result))
    _print(search, result, done)
    return result


def best_trials(search: Search, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Of the complete trials that keep all constraints, those that none beats; the first objective ranks."""
    signs = [1 if direction == "maximize" else -1 for direction in search.space.objectives.values()]
    counted = [t for t in trials if t.state == TrialState.COMPLETE and is_feasible(t)]
    points = {t.number: [sign * value for sign, value in zip(signs, t.values, strict=True)] for t in counted}

    def beaten(number: int) -> bool:
        mine = points[number]
        return any(all(b >= a for a, b in zip(mine, p, strict=True)) and p != mine for p in points.values())

    front = [trial for trial in counted if not beaten(trial.number)]
    front.sort(key=lambda trial: (-points[trial.number][0], trial.number))
    return front if len(signs) > 1 else front[:1]


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether a trial keeps all constraints."""
    return all(excess <= 0 for excess in trial.constraints.values())


def values_of(search: Search, trial: FrozenTrial) -> dict[str, Any]:
    """The fields of a trial, as its config has them."""
    space = search.space.space
    return {path: from_optuna(space[path], found) for path, found in trial.params.items() if path in space}


def best_config(search: Search, trial: FrozenTrial) -> str:
    """The config of a trial as a YAML file for `medattn train`, to run in a folder of its own."""
    config = search.config(values_of(search, trial), search.folder.with_name(f"{search.folder.name}_best"))
    measured = ", ".join(
        f"{axis_name(name)} {shown(name, trial.user_attrs.get(name))}" for name in search.space.objectives
    )
    header = (
        f"# The best config that the search {search.name} found: trial {trial.number}, {measured}.\n"
        f"#\n# command   medattn train {search.folder / 'best.yaml'}\n\n"
    )
    return header + dump(config)


def importances(search: Search, study: Study, trials: list[FrozenTrial]) -> Mapping[str, Mapping[str, float]]:
    """Objective -> field -> share, largest first; of what the trials tell enough of."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    found: dict[str, dict[str, float]] = {}
    for number, name in enumerate(search.space.objectives):
        if len(complete) < FEWEST or len({trial.values[number] for trial in complete}) == 1:
            continue

        def target(trial: FrozenTrial, number: int = number) -> float:
            return float(trial.values[number])

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                shares = get_param_importances(study, target=target)
            except (ValueError, RuntimeError):  # Optuna finds too little in the trials to tell
                continue
        found[name] = dict(sorted(shares.items(), key=lambda item: -item[1]))
    return found


def _row(search: Search, trial: FrozenTrial, best: list[FrozenTrial]) -> Trial:
    attributes = trial.user_attrs
    return Trial(
        number=trial.number,
        state=STATES[trial.state],
        values=dict(trial.params),
        measures={name: attributes[name] for name in UNITS if name in attributes},
        feasible=is_feasible(trial),
        best=any(trial.number == one.number for one in best),
        seconds=attributes.get("seconds"),
        curve=sorted(trial.intermediate_values.items()),
        note=str(attributes.get("failure", "")) if trial.state == TrialState.FAIL else "",
    )


def _constraints(search: Search) -> list[str]:
    found = []
    for name, bound in search.space.constraints.items():
        found += [f"{axis_name(name)} at most {bound.at_most:g}"] if bound.at_most is not None else []
        found += [f"{axis_name(name)} at least {bound.at_least:g}"] if bound.at_least is not None else []
    return found


def _short(paths: list[str]) -> list[str]:
    """The last parts of dotted paths, for a terminal; the whole path where two end alike."""
    ends = [path.rpartition(".")[2] for path in paths]
    return [end if ends.count(end) == 1 else path for path, end in zip(paths, ends, strict=True)]


def _print(search: Search, result: SearchResult, done: Done) -> None:
    first, direction = next(iter(result.objectives.items()))
    sign = -1 if direction == "maximize" else 1
    complete = [trial for trial in result.trials if trial.state == "complete"]
    ranked = sorted(complete, key=lambda t: (not t.best, not t.feasible, sign * t.measures[first]))
    columns = ("trial", *map(axis_name, result.objectives), *_short(result.paths))
    rows = [
        (
            f"{trial.number}{' best' if trial.best else '' if trial.feasible else ' breaks a constraint'}",
            *(shown(name, trial.measures[name]) for name in result.objectives),
            *(short(trial.values.get(path, "-")) for path in result.paths),
        )
        for trial in ranked[:ROWS]
    ]
    if rows:
        print_table(f"Best trials of {len(complete)}", columns, rows)
    counts = ", ".join(
        f"{result.counted(state)} {state}" for state in STATES.values() if result.counted(state)
    )
    ended = {"timeout": "the time is up", "grid": "the grid is done", "trials": "the study has its trials"}
    print(f"{ended.get(done.reason, f'stopped by {done.reason}')}: {counts or 'no trials'}")
    if done.reason not in ("trials", "grid"):
        print("the same command goes on with the study")
    if result.best_config:
        print(f"best config: {result.best_config}")
    elif complete:
        print("best config: none, as no complete trial keeps the constraints")
    print(f"report:      {search.folder / 'report' / 'report.html'}")
