"""`medattn track`: brings MLflow's copies of runs up to what the run folders hold."""

from __future__ import annotations

import os
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medattn.errors import InputError
from medattn.training.mlflow_run import MlflowRun
from medattn.training.mlflow_store import uri_for
from medattn.training.redaction import HIDDEN, redacted
from medattn.training.runrecord import FILE, METRICS, RunRecord, is_held, read_record


@dataclass(frozen=True)
class Synced:
    """What a run's copy was short of. uri: where it is, without secrets. sent: how many of each kind. stale:
    points there of steps that were trained again after a resume. running: the training goes on."""

    run_id: str
    uri: str
    sent: Counter[str]
    stale: int
    running: bool


def track(args: Namespace) -> int:
    """Say what the copy of each run lacked, and of the runs in its folder, as those of a search's trials.

    Runs that cannot be synced do not stop the others.
    """
    problems = list[str]()
    for run in (one for given in args.runs for one in (given, *_inside(given))):
        try:
            print(f"{run}: {_sentence(sync(run, args.to))}")
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    return 0


def sync(run: Path, uri: str | None = None) -> Synced:
    """Send what MLflow lacks of a run: to uri, else to MLFLOW_TRACKING_URI, else to where the run went.

    Raises InputError where there is no run, where it is damaged, and where MLflow does not take it.
    """
    record = read_record(run)
    running = is_held(run / METRICS)
    if record.status == "running" and not running:
        record = replace(record, status="killed", ended_ms=_last_sign(run))
    uri = uri or _uri(run, record)
    try:
        copy = MlflowRun(run.resolve(), record, uri)
        copy.update()
        if not running:
            copy.end()
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{run / METRICS}: not a line of metrics ({error}); delete that line") from None
    except Exception as error:  # noqa: BLE001  whatever MLflow, a database driver or the network raise
        reason = redacted(f"{type(error).__name__}: {error}").splitlines()[0][:300]
        raise InputError(
            f"{run}: MLflow at {redacted(uri)} does not take it ({reason}); see that the server runs and the "
            "address is right, then run the same command again"
        ) from None
    return Synced(copy.run_id, redacted(uri), +copy.sent, copy.stale, running)


def _inside(run: Path) -> list[Path]:
    return sorted(path.parent for path in run.glob(f"*/{FILE}"))


def _uri(run: Path, record: RunRecord) -> str:
    if os.environ.get("MLFLOW_TRACKING_URI") or record.tracking_uri is None:
        return uri_for(run)
    if HIDDEN in record.tracking_uri:
        raise InputError(
            f"{run}: went to {record.tracking_uri}, whose secret is not kept; set MLFLOW_TRACKING_URI to the "
            "whole address"
        )
    # a run folder that moved takes its database along
    return uri_for(run) if record.tracking_uri.startswith("sqlite:") else record.tracking_uri


def _last_sign(run: Path) -> int:
    path = run / METRICS
    return round(1000 * (path if path.exists() else run).stat().st_mtime)


def _sentence(synced: Synced) -> str:
    sent: Sequence[str] = [f"{count} {kind}" for kind, count in synced.sent.items()]
    parts = [f"sent {', '.join(sent)}" if sent else "nothing was missing"]
    if synced.stale:
        parts.append(f"{synced.stale} values there are of steps that were trained again after a resume")
    if synced.running:
        parts.append("the training goes on")
    return f"{'; '.join(parts)} (run {synced.run_id} in {synced.uri})"
