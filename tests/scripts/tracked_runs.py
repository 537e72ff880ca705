"""What trackers have stored on this machine, read back by means of each library's own."""

import json
import math
import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.scripts import wandb_files

PROJECT = "tests"


@dataclass
class Stored:
    """A run as a tracker has it.

    Attributes:
        name: the run's.
        scalars: key -> (step, value) of each row, in the order of the rows.
        pictures: keys of pictures and videos -> steps.
        config: settings; of MLflow, all are text.
        status: "finished", "failed" or "interrupted".
    """

    name: str
    scalars: dict[str, list[tuple[int, float]]]
    pictures: dict[str, list[int | None]]
    config: dict[str, Any]
    status: str | None


def read(tracker: str, folder: Path) -> list[Stored]:
    """All runs that a tracker has of a run folder."""
    return {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}[tracker](folder)


def _wandb(folder: Path) -> list[Stored]:
    # wandb's own process writes the file, and ends it shortly after `finish` has returned.
    found, until = _wandb_now(folder), time.monotonic() + 20
    while not all(run.status for run in found) or not found:
        assert time.monotonic() < until, found
        time.sleep(0.1)
        found = _wandb_now(folder)
    return found


def _wandb_now(folder: Path) -> list[Stored]:
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):  # of one process each
        own = Stored("", {}, {}, {}, None)
        for record in wandb_files.records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                assert record.run.project == PROJECT
                own = found.setdefault(record.run.run_id, own)
                own.status = None  # this process has not ended the run
                own.name = record.run.display_name
                own.config |= {
                    key: value
                    for (key,), value in wandb_files.values(record.run.config.update).items()
                }
            elif kind == "history":
                row = wandb_files.values(record.history.item)
                step = row.pop(("global_step",), None)
                for (key, *part), value in row.items():
                    if part == ["path"]:
                        own.pictures.setdefault(key, []).append(step)
                    elif not part and not key.startswith("_"):
                        own.scalars.setdefault(key, []).append((step, value))
            elif kind == "exit":
                codes = {0: "finished", 1: "failed", 255: "interrupted"}
                own.status = codes[record.exit.exit_code]
    return list(found.values())


def _mlflow(folder: Path) -> list[Stored]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    experiment = client.get_experiment_by_name(PROJECT)
    found = []
    for run in client.search_runs([experiment.experiment_id]):
        if run.info.run_name != folder.name:
            continue
        scalars = {
            key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        pictures: dict[str, list[int | None]] = {}
        for file in client.list_artifacts(run.info.run_id, "images"):
            name = Path(file.path).name
            if "compressed" not in name:  # a small copy for MLflow's own pages
                key, _, step, *_ = name.split("+")
                pictures.setdefault(key.replace("~", "/"), []).append(int(step))
        for file in client.list_artifacts(run.info.run_id):
            if file.path.endswith((".png", ".gif")):
                pictures[Path(file.path).stem] = [None]
        states = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "interrupted"}
        status = states.get(run.info.status)
        found.append(Stored(run.info.run_name, scalars, pictures, run.data.params, status))
        assert run.data.tags["command"] == run.data.params["command"]
    return found


def _trackio(folder: Path) -> list[Stored]:
    found = {}
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"], f"{PROJECT}.db")) as database:
        for run, name, config in database.execute("SELECT run_id, run_name, config FROM configs"):
            if name.rpartition("_")[0] == folder.name:
                found[run] = Stored(folder.name, {}, {}, json.loads(config), None)
        for run, step, text in database.execute("SELECT run_id, step, metrics FROM metrics"):
            if run not in found:
                continue
            for key, value in json.loads(text).items():
                if isinstance(value, dict):
                    found[run].pictures.setdefault(key, []).append(step)
                else:  # JSON has no NaN
                    value = math.nan if value in (None, "NaN") else value
                    found[run].scalars.setdefault(key, []).append((step, value))
        for run, title in database.execute("SELECT run_id, title FROM alerts ORDER BY id"):
            if run in found:
                found[run].status = title.removeprefix("run ")
    return list(found.values())
