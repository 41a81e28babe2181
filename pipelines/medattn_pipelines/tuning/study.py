"""The study of a search: what its trials have in common, and how one of them is run again."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.study import Study, create_study
from optuna.trial import FrozenTrial, TrialState, create_trial

from medattn.atomic import require_new_folder
from medattn.errors import InputError
from medattn.training.runrecord import FILE, read_record
from medattn_pipelines.configfile import leaves
from medattn_pipelines.tuning.sampling import grid_trials, make_pruner
from medattn_pipelines.tuning.spacefile import Search
from medattn_pipelines.tuning.store import WORKER, Store

MOST_KILLS = 3  # a trial that took so many workers with it is left
# attributes of studies and trials. KEY: of the run that the trials belong to. ENDED: seconds since 1970
SPACE, KEY, ENDED = "space", "key", "ended"
HISTORY, KILLS = "retry_history", "kills"
# of a config, what may differ between the workers of a study or when it goes on
OWN = (
    "run.dir",
    "run.tracking",
    "run.experiment",
    "run.parent",
    "data.root",
    "data.workers",
    "data.cache",
    "training.device",
)


def join_study(search: Search, store: Store) -> Study:
    """The study of a search, new or as other workers left it.

    Raises InputError where a study of this name is of another space or config, and where the folder holds the
    trials of another one.
    """
    space = search.space
    training = search.base.content.get("training") or {}
    pruner = make_pruner(space.pruner, int(training.get("validate_every") or 1), training.get("steps"))
    with store.turn():
        study = create_study(
            storage=store.storage,
            study_name=search.name,
            directions=list(space.objectives.values()),
            load_if_exists=True,
            pruner=pruner,
        )
        if KEY not in study.user_attrs:
            study.set_user_attr(KEY, uuid.uuid4().hex)
        _require_own_folder(search.folder, study.user_attrs[KEY])
        mine = _signature(search)
        found = study.user_attrs.get(SPACE)
        if found is None:
            if space.sampler.name == "grid":
                for trial in grid_trials(space):
                    study.add_trial(trial)
            study.set_user_attr(SPACE, mine)
        elif changed := sorted(key for key in mine | found if mine.get(key) != found.get(key)):
            raise InputError(
                f"{search.file.path}: the study {search.name!r} was begun with another {', '.join(changed)}; "
                "its trials cannot be compared: give the space another file name, or another --storage"
            )
    return study


def _require_own_folder(folder: Path, key: str) -> None:
    """Raise InputError where a folder holds trials or the record of another run than that of the key."""
    there = [path.name for path in (folder / FILE, *sorted(folder.glob("trial_*"))) if path.exists()]
    if there and (there[0] != FILE or read_record(folder).key != key):
        raise InputError(
            f"{folder}: holds {there[-1]} of another search; choose another run.dir, or remove the folder"
        )


def _signature(search: Search) -> dict[str, str]:
    """What all trials of a study have in common, field by field, as text."""
    space = search.space
    content = dict(leaves(search.base.content))
    own = {*OWN, *space.space}
    found = {path: json.dumps(value, default=str) for path, value in content.items() if path not in own}
    found |= {f"space: {path}": kind.model_dump_json() for path, kind in space.space.items()}
    parts: Mapping[str, Any] = {"objectives": space.objectives, "sampler": space.sampler.name}
    found |= {name: json.dumps(value) for name, value in parts.items()}
    return found


def requeue(study: Study, trial: FrozenTrial, *, killed: bool = True) -> None:
    """Let a failed trial be run again, with the same values and what it reported.

    One that took MOST_KILLS workers with it is left: it may be what kills them.
    """
    system = {k: v for k, v in trial.system_attrs.items() if not k.startswith("constraints")}
    kills = int(system.get(KILLS, 0)) + killed
    if kills > MOST_KILLS:
        return
    history = [*system.get(HISTORY, []), trial.number]
    system |= {"failed_trial": history[0], HISTORY: history, KILLS: kills}
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={k: v for k, v in trial.user_attrs.items() if k not in (WORKER, ENDED)},
            system_attrs=system,
            intermediate_values=trial.intermediate_values,
        )
    )


def trial_folder(study: Path, number: int) -> Path:
    """The run folder of a trial."""
    return study / f"trial_{number:04d}"


def taken_over(study: Path, folder: Path, history: list[int]) -> bool:
    """Go on with the run of a trial that was not finished: True where it had begun.

    The folder is renamed first. A worker that was given up and is not dead then finds it gone and stops.
    Raises InputError where something of the new name is there.
    """
    for number in reversed(history):
        old = trial_folder(study, number)
        if (old / "checkpoints").is_dir():  # the first of what a training writes
            require_new_folder(folder)
            old.rename(folder)
            return True
    return False
