"""Samplers, pruners and storages of searches, on studies without trainings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from medattn.errors import InputError
from medattn.training.redaction import redacted
from medattn_pipelines.tuning.sampling import CASES, GENERATION, CaseWilcoxon, CmaEs, make_sampler, suggest
from medattn_pipelines.tuning.space import Pruner, Space
from medattn_pipelines.tuning.store import JournalStore, open_store

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
NUMBERS = {
    "training.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
    "training.ema_decay": {"type": "float", "low": 0, "high": 0.9, "step": 0.3},
    "training.batch_size": {"type": "int", "low": 1, "high": 6},
}
CONDITIONAL = NUMBERS | {
    "network.name": {"type": "categorical", "choices": ["unet", "unet_block", None, [1, 2]]},
    "network.options.halo": {
        "type": "int",
        "low": 0,
        "high": 5,
        "step": 2,
        "when": {"network.name": "unet_block"},
    },
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def space(paths: dict[str, Any], **settings: Any) -> Space:
    return Space.model_validate({"config": {}, "space": paths} | settings)


def loss(values: dict[str, Any]) -> float:
    """Smallest at a rate of 1e-3, decay 0.3 and 4 per batch."""
    import math

    rate = math.log10(values["training.learning_rate"]) + 3
    return (
        rate**2 + (values["training.ema_decay"] - 0.3) ** 2 + 0.1 * (values["training.batch_size"] - 4) ** 2
    )


def run(settings: Space, trials: int, study: optuna.Study | None = None) -> list[dict[str, Any]]:
    study = study or optuna.create_study(direction="minimize")
    found = []
    for _ in range(trials):
        study.sampler = sampler = make_sampler(settings, len(study.trials))
        trial = study.ask()
        values = suggest(trial, settings)
        if isinstance(sampler, CmaEs) and sampler.generation is not None:
            trial.set_user_attr(GENERATION, sampler.generation)
        study.tell(trial, loss(values))
        found.append(values)
    return found


@pytest.mark.parametrize("name", ["tpe", "cmaes", "random"])
def test_a_study_that_was_stopped_goes_on_as_if_it_had_not_been(name: str) -> None:
    settings = space(NUMBERS, sampler={"name": name, "startup_trials": 4}, seed=3)
    study = optuna.create_study(direction="minimize")
    assert run(settings, 9, study) + run(settings, 9, study) == run(settings, 18)
    assert run(settings, 5) != run(settings.model_copy(update={"seed": 4}), 5)


@pytest.mark.parametrize("name", ["tpe", "cmaes"])
def test_samplers_learn_and_keep_to_ranges_and_steps(name: str) -> None:
    settings = space(NUMBERS, sampler={"name": name, "startup_trials": 7})
    found = run(settings, 70)
    for values in found:
        assert 1e-4 <= values["training.learning_rate"] <= 1e-1
        assert round(values["training.ema_decay"] / 0.3, 6) in (0, 1, 2, 3)
        assert values["training.batch_size"] in range(1, 7)
    first, last = (sum(map(loss, part)) / 20 for part in (found[:20], found[-20:]))
    assert last < first / 2


def test_nothing_in_a_journal_of_cmaes_is_a_pickle(tmp_path: Path) -> None:
    store = JournalStore(tmp_path / "journal", lambda study, trial: None)
    study = optuna.create_study(storage=store.storage, direction="minimize")
    run(space(NUMBERS, sampler={"name": "cmaes", "startup_trials": 2}), 20, study)
    store.close()
    lines = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
    attributes = {key for line in lines for key in line.get("system_attr", {})}
    assert not any("optimizer" in key for key in attributes)
    assert max(trial.user_attrs.get(GENERATION, -1) for trial in study.trials) >= 1


def test_a_conditional_field_is_drawn_where_it_counts_and_values_come_back_whole() -> None:
    settings = space(CONDITIONAL, sampler={"name": "tpe", "startup_trials": 5})
    found = run(settings, 40)
    assert all(("network.options.halo" in v) == (v["network.name"] == "unet_block") for v in found)
    names = [values["network.name"] for values in found]
    assert {"unet", "unet_block", None} <= {n for n in names if not isinstance(n, list)}
    assert [1, 2] in names
    assert {v["network.options.halo"] for v in found if "network.options.halo" in v} <= {0, 2, 4}


def test_pairs_of_cases_show_what_means_hide() -> None:
    """Both trials have nearly the same mean, as cases differ far more than methods do."""
    best = {f"case_{n}": 0.1 * n for n in range(1, 9)}
    worse = {case: score - 0.005 for case, score in best.items()}
    shuffled = dict(zip(best, reversed([s - 0.005 for s in best.values()]), strict=True))
    pruner = CaseWilcoxon(Pruner(name="wilcoxon", p=0.05))
    assert pruner.worse(worse, best)
    assert not pruner.worse(shuffled, best)
    assert not pruner.worse(best, worse)
    assert not pruner.worse(dict(best), best)
    few = {case: worse[case] for case in list(worse)[:4]}
    assert not pruner.worse(few, best), "of four cases p is at least 1/16"


def test_the_pairs_are_those_of_the_same_step_of_the_best_trial_that_counts() -> None:
    best = {f"case_{n}": 0.1 * n for n in range(1, 9)}
    study = optuna.create_study(
        direction="maximize", pruner=CaseWilcoxon(Pruner(name="wilcoxon", startup_trials=2))
    )

    def finished(shift: float, value: float, excess: float) -> None:
        trial = study.ask()
        trial.set_user_attr(f"{CASES}/10", {case: score + shift for case, score in best.items()})
        trial.set_constraint("latency", excess)
        study.tell(trial, value)

    def is_stopped(step: int) -> bool:
        trial = study.ask()
        trial.set_user_attr(f"{CASES}/{step}", {case: score - 0.1 for case, score in best.items()})
        trial.report(0.5, step)
        stopped = trial.should_prune()
        study.tell(trial, state=TrialState.FAIL)
        return stopped

    finished(-0.2, 0.4, 0)
    assert not is_stopped(10), "one trial is no start"
    finished(0.5, 0.9, 1)
    assert not is_stopped(10), "the better one breaks a constraint"
    finished(0, 0.6, 0)
    assert is_stopped(10)
    assert not is_stopped(20), "the best trial has no validation there"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://anna:pw@db:5432/tune", "postgresql://anna:***@db:5432/tune"),
        ("postgresql+psycopg://anna:p@ss:w/@db/tune", None),
        ("postgresql://anna@db/tune", "postgresql://anna@db/tune"),
        ("postgresql:///tune?user=anna&password=pw", "postgresql:///tune?user=anna&password=***"),
        ("journal:runs/a/study.journal", "journal:runs/a/study.journal"),
    ],
)
def test_passwords_are_masked(url: str, shown: str | None) -> None:
    assert not [part for part in ("pw", "p@s", "ss:", "w/@") if part in redacted(url)]
    assert shown is None or redacted(url) == shown


@pytest.mark.parametrize("url", ["sqlite:///a.db", "runs/a.db", "journal:", "mysql://anna:pw@db/x"])
def test_other_storages_are_refused_with_a_sentence(url: str) -> None:
    with pytest.raises(InputError, match=r"expected journal:FILE or postgresql://") as error:
        open_store(url, "study", heartbeat=60, requeue=lambda study, trial: None)
    assert "pw" not in str(error.value)


def test_a_server_that_is_not_there_is_a_sentence_without_the_password() -> None:
    pytest.importorskip("psycopg", reason='needs `pip install "psycopg[binary]"`')
    with pytest.raises(InputError, match=r"anna:\*\*\*@127\.0\.0\.1:1/") as error:
        open_store(
            "postgresql://anna:pw1@127.0.0.1:1/x", "study", heartbeat=60, requeue=lambda study, trial: None
        )
    assert "pw1" not in str(error.value)


def test_half_a_line_of_a_killed_worker_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    store = JournalStore(path, lambda study, trial: None)
    study = optuna.create_study(storage=store.storage, study_name="a")
    study.ask()
    with path.open("a") as file:
        file.write('{"op_code": 4, "worker_')
    other = JournalStore(path, lambda study, trial: None)
    optuna.load_study(storage=other.storage, study_name="a").ask()
    assert len(study.trials) == 2
    assert all(json.loads(line) for line in path.read_text().splitlines())
    store.close()
    other.close()


def test_a_worker_that_is_killed_holding_every_lock_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    script = (
        "import os, optuna; from pathlib import Path\n"
        "from medattn_pipelines.tuning.store import JournalStore\n"
        f"s = JournalStore(Path({str(path)!r}), None)\n"
        "study = optuna.create_study(storage=s.storage, study_name='a')\n"
        "with s.turn():\n    study.ask()\n    print('mine', flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    died = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=os.environ
    )
    assert died.stdout == "mine\n", died.stderr
    handed: list[int] = []
    store = JournalStore(path, lambda study, trial: handed.append(trial.number))
    study = optuna.load_study(storage=store.storage, study_name="a")
    with store.turn():
        store.fail_dead(study)
        store.fail_dead(study)
    assert handed == [0]
    assert study.trials[0].state == TrialState.FAIL
    store.close()


def test_a_dashboard_that_writes_a_note_finds_no_lock_in_its_way(tmp_path: Path) -> None:
    """Optuna's own lock is a link `.lock`: of a file of that name it would wait 30 s, and then remove it."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    store = JournalStore(tmp_path / "journal", lambda study, trial: None)
    study = optuna.create_study(storage=store.storage, study_name="a")
    begun = time.monotonic()
    dashboard = JournalStorage(JournalFileBackend(str(tmp_path / "journal")))
    optuna.load_study(storage=dashboard, study_name="a").set_user_attr("note", "text")
    assert time.monotonic() - begun < 20
    assert study.user_attrs["note"] == "text"
    store.close()
