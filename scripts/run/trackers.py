"""Experiment trackers beside TensorBoard: Weights & Biases, MLflow and Trackio.

`Tracker` is a writer of SB3's logger. It knows which rows a resumed run has sent already, and keeps
a failing tracker from stopping a run. Below it is a backend per library: how a run is opened, how a
row is sent, how a run ends. A library is imported where its backend is made.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import secrets
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from filelock import FileLock
from stable_baselines3.common.logger import Figure, KVWriter

from totalprop.agents.core.validation import is_whole
from totalprop.agents.persistence.safe_file import in_one_line, shown, write_text
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.folder import RunFolder, read_json
from totalprop.scripts.run.job import Job

if TYPE_CHECKING:
    from PIL.Image import Image

RETRY = 300.0  # s until a tracker that failed is tried again: some of them block for a minute
MAX_UNSENT = 10_000  # rows that wait for it
MAX_SAVED = 500  # ... and of them in a checkpoint, whose JSON has a bound
STEP = "global_step"  # W&B's horizontal axis, named as CleanRL and W&B's reader of TensorBoard do

Status = Literal["finished", "failed", "interrupted"]


class TrackingError(UserError):
    """A tracker cannot be opened: the library is missing, or its service refuses."""


class Row(NamedTuple):
    """One dump of the logger.

    Attributes:
        step: environment steps.
        number: of the dump among those of this step, from 1.
        scalars: every number that was logged.
        pictures: every figure, drawn.
    """

    step: int
    number: int
    scalars: dict[str, float]
    pictures: dict[str, Image]


@dataclass(frozen=True)
class Tracked:
    """What a backend opens a run with.

    Attributes:
        id: the tracker's own id of a run to be continued; None for a new one.
        project: project of W&B and Trackio, experiment of MLflow.
        folder: the run's folder, whose name is the run's name.
        settings: everything that config.json holds, by names without nesting, and the command.
    """

    id: str | None
    project: str
    folder: Path
    settings: Mapping[str, Any]


class Backend(Protocol):
    """One library; whatever it raises is one sentence for the user.

    Attributes:
        delay: seconds after which a row survives a kill of this process.
        id: the library's name for the run, by which it is continued.
    """

    delay: float
    id: str

    def __init__(self, run: Tracked) -> None: ...

    def log(self, row: Row) -> None:
        """Send a row."""

    def end(self, status: Status, files: Sequence[Path]) -> None:
        """Send the files of the run, say how it ended, and wait until all is sent."""


class Tracker(KVWriter):
    """Writer that sends what SB3's logger writes to a tracker, and survives kills.

    It gets every number, those that only CSV files or only TensorBoard have included, and figures.
    A resumed run repeats what followed its checkpoint. tracker.json says up to which row everything
    has arrived, and those rows are not sent again. Rows that may still be on their way, in a
    library's buffers or because the tracker cannot be reached, are part of a checkpoint.

    As a context manager it says how the run ended.

    Args:
        name: of the tracker, a key of `BACKENDS`.
        run: what it opens.
        arrived: step and number of the last row that has arrived, (-1, 0) for none.
    """

    def __init__(self, name: str, run: Tracked, arrived: tuple[int, int] = (-1, 0)) -> None:
        self.name, self.run = name, run
        self._backend: Backend | None = None
        self._arrived, self._last = arrived, (-1, 0)
        self._unsent: deque[Row] = deque(maxlen=MAX_UNSENT)
        self._sent: deque[tuple[float, Row]] = deque()  # and when; they may not have arrived yet
        self._retry_at, self._said = 0.0, False

    def open(self) -> None:
        """Open the run.

        Raises:
            TrackingError: it cannot be opened.
        """
        try:
            self._opened()
        except TrackingError:
            raise
        except Exception as error:
            raise TrackingError(f"--track {self.name} failed: {_reason(error)}") from error

    def _opened(self) -> Backend:
        if self._backend is None:
            check(self.name)
            self._backend = BACKENDS[self.name](self.run)
            self._record()
        return self._backend

    def _record(self) -> None:
        assert self._backend is not None
        command, (step, number) = self.run.settings["command"], self._arrived
        content = {"id": self._backend.id, "command": command, "step": step, "number": number}
        write_text(_record_of(self.run.folder), json.dumps(content) + "\n")

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        """Send a row, unless an earlier process did."""
        self._last = (step, self._last[1] + 1 if step == self._last[0] else 1)
        if self._last <= self._arrived:
            return
        numbers = (int, float, np.number, np.bool_)
        scalars = {k: float(v) for k, v in key_values.items() if isinstance(v, numbers)}
        figures = {k: v.figure for k, v in key_values.items() if isinstance(v, Figure)}
        is_failing = self._retry_at > 0  # pictures are not kept for later: they take memory
        pictures = {} if is_failing else {k: _drawn(figure) for k, figure in figures.items()}
        self._unsent.append(Row(*self._last, scalars, pictures))
        self.flush()

    def flush(self, *, now: bool = False) -> None:
        """Send what waits. A failure is said once, and tried again after RETRY seconds.

        Args:
            now: try again at once.
        """
        if time.monotonic() < self._retry_at and not now:
            return
        try:
            backend = self._opened()
            while self._unsent:
                backend.log(self._unsent[0])
                row = self._unsent.popleft()
                self._sent.append((time.monotonic(), row._replace(pictures={})))
            self._retry_at = 0.0
            self._confirm(time.monotonic() - backend.delay)
        except Exception as error:
            self._retry_at = time.monotonic() + RETRY
            self._say(f"training continues, and it is tried again every {RETRY:g} s", error)

    def _confirm(self, until: float) -> None:
        """Record that the rows that were sent by then have arrived."""
        before = self._arrived
        while self._sent and self._sent[0][0] <= until:
            row = self._sent.popleft()[1]
            self._arrived = (row.step, row.number)
        if self._arrived != before:
            self._record()

    def _say(self, what_follows: str, error: Exception) -> None:
        if not self._said:
            self._said = True
            print(
                f"--track {self.name} failed ({_reason(error)}): {what_follows}; progress.csv is "
                "complete in any case",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Do nothing; the context manager ends the run."""

    def state_dict(self) -> dict[str, Any]:
        """Step and number of the last row, and the rows on their way, for a checkpoint."""
        rows = [*(row for _, row in self._sent), *self._unsent][-MAX_SAVED:]
        return {
            "step": self._last[0],
            "number": self._last[1],
            "rows": [[row.step, row.number, dict(row.scalars)] for row in rows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the checkpoint's last row, and send again what may not have arrived."""
        rows = [Row(step, number, scalars, {}) for step, number, scalars in state["rows"]]
        places = [state["step"], state["number"], *(x for row in rows for x in row[:2])]
        if not all(map(is_whole, places)) or not all(
            isinstance(x, float) for row in rows for x in row.scalars.values()
        ):
            raise ValueError("it does not hold rows, with their steps and numbers")
        self._last = (state["step"], state["number"])
        self._unsent.extend(row for row in rows if row[:2] > self._arrived)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        status: Status = "finished"
        if kind is not None:  # signals end a run by SystemExit and KeyboardInterrupt
            status = "failed" if issubclass(kind, Exception) else "interrupted"
        self.flush(now=status == "finished")
        if self._backend is None:
            return
        folder = RunFolder(self.run.folder)
        found = [folder.learning_curve, folder.video, *folder.path.glob("open_loop.*")]
        files = [path for path in found if path.exists()] if status == "finished" else []
        try:
            self._backend.end(status, files)
            self._confirm(math.inf)
        except Exception as failure:
            self._say("the run may look unfinished there", failure)


def check(name: str) -> None:
    """Raise a TrackingError if a tracker's library is not installed; "none" needs none."""
    for module in NEEDED.get(name, ()):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:  # a folder called wandb is no library
            raise TrackingError(f"--track {name} needs {module}: pip install 'totalprop[{name}]'")


def start(job: Job, folder: RunFolder, command: str) -> Tracker | None:
    """Begin to track a new run; None without --track.

    Args:
        job: the run.
        folder: its folder.
        command: what was typed.
    Raises:
        TrackingError: the tracker cannot be used.
    """
    if job.options.track == "none":
        return None
    run = Tracked(None, job.options.track_project, folder.path, _settings(job, command))
    tracker = Tracker(job.options.track, run)
    tracker.open()
    return tracker


def resume(job: Job, folder: RunFolder, command: str) -> Tracker | None:
    """Continue to track a resumed run, as soon as its tracker can be reached; None without --track.

    Args:
        job: the run.
        folder: its folder, with tracker.json unless it was killed before that was written.
        command: what was typed.
    Raises:
        UserError: tracker.json is damaged.
    """
    path = _record_of(folder.path)
    if job.options.track == "none" or not path.exists():
        return start(job, folder, command)
    record = read_json(path)
    name, arrived = record.get("id"), (record.get("step"), record.get("number"))
    # It becomes part of paths, and a run's folder may be a stranger's.
    is_name = isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,200}", name)
    if not (is_name and all(map(is_whole, arrived))):
        raise UserError(
            f"{path} does not hold a run's id and the last row there, got {shown(record)}; delete "
            "it to track the rest as a new run"
        )
    command = str(record.get("command", command))  # the first one trains the same again
    run = Tracked(name, job.options.track_project, folder.path, _settings(job, command))
    tracker = Tracker(job.options.track, run, arrived)  # type: ignore[arg-type]
    tracker.flush()  # on another machine it may fail, and training should not
    return tracker


def _record_of(folder: Path) -> Path:
    return folder / "tracker.json"


def _settings(job: Job, command: str) -> dict[str, Any]:
    """Everything in config.json, flat; flags have different names, whatever part they are of."""
    config = json.loads(job.config())
    for part in ("options", "arguments", "policy_kwargs"):
        config |= config.pop(part)
    config["env_args"] = {str(k): v for k, v in config["env_args"].items()}
    flat = dict(_flattened(config))
    flat.pop("env_arg", None)  # the text that env_args are made of
    return {**flat, "command": command}


def _flattened(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _drawn(figure: Any) -> Image:
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return Image.open(file).convert("RGB")


def _reason(error: Exception) -> str:
    text = in_one_line(error)
    return text if len(text) <= 300 else f"{text[:300]}..."


class WandB:
    """Weights & Biases. Its variables count: WANDB_MODE, WANDB_ENTITY, WANDB_RUN_GROUP, ..."""

    delay = 30.0  # it writes and uploads every 15 s, and its process dies with ours

    def __init__(self, run: Tracked) -> None:
        # By default the end of a run waits for a network that is down. What is not sent by then
        # lies in the run's folder, for `wandb sync`.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
        import wandb

        self.id = run.id or secrets.token_hex(4)
        self._wandb: Any = wandb
        self._run = wandb.init(
            project=run.project, name=run.folder.name, id=self.id, resume="allow",
            dir=os.environ.get("WANDB_DIR") or str(run.folder), config=dict(run.settings),
            allow_val_change=True,
        )  # fmt: skip
        # W&B's own steps would have to increase: a row of a step that was logged would be dropped.
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, row: Row) -> None:
        """Send a row, whose axis is `global_step`."""
        pictures = {key: self._wandb.Image(picture) for key, picture in row.pictures.items()}
        self._run.log({**row.scalars, **pictures, STEP: row.step})

    def end(self, status: Status, files: Sequence[Path]) -> None:
        """Send the pictures and GIFs; W&B's states are finished, failed and killed."""
        media = {
            path.stem: (self._wandb.Video if path.suffix == ".gif" else self._wandb.Image)(
                str(path)
            )
            for path in files
        }
        if media:
            self._run.log(media)
        # 255 is what W&B itself takes for a run stopped by Ctrl-C.
        self._run.finish(exit_code={"finished": 0, "failed": 1, "interrupted": 255}[status])


class MLflow:
    """MLflow: the server of MLFLOW_TRACKING_URI, or mlflow.db beside the run's folder."""

    delay = 0.0

    def __init__(self, run: Tracked) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing is reported to anyone
        # By default a server that is down would stop training for many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        runs = run.folder.resolve().parent
        uri, place = os.environ.get("MLFLOW_TRACKING_URI", ""), None
        lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if not uri:
            uri, place = f"sqlite:///{runs / 'mlflow.db'}", (runs / "mlartifacts").as_uri()
            lock = FileLock(runs / ".mlflow.lock")  # the runs of a sweep begin together
            print(f"tracked by MLflow in {uri}")
        with lock:
            self._client = client = MlflowClient(tracking_uri=uri)
            experiment = client.get_experiment_by_name(run.project)
            number = (
                client.create_experiment(run.project, artifact_location=place)
                if experiment is None
                else experiment.experiment_id
            )
        known: Mapping[str, str] = {}
        if run.id is None:
            tags = {"mlflow.source.name": "totalprop train"}
            tags |= {name: str(run.settings[name]) for name in ("command", "commit")}
            self.id = client.create_run(number, tags=tags, run_name=run.folder.name).info.run_id
        else:
            self.id, known = run.id, client.get_run(run.id).data.params
            client.update_run(self.id, status="RUNNING")
        # MLflow refuses to change one, such as total_timesteps of an extended run.
        new = [Param(k, str(v)) for k, v in run.settings.items() if k not in known]
        for i in range(0, len(new), 100):  # as many as MLflow takes
            client.log_batch(self.id, params=new[i : i + 100])
        client.log_artifact(self.id, str(RunFolder(run.folder).config))

    def log(self, row: Row) -> None:
        """Send a row."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, row.step) for key, value in row.scalars.items()]
        for i in range(0, len(metrics), 1000):  # as many as MLflow takes
            self._client.log_batch(self.id, metrics=metrics[i : i + 1000])
        for key, picture in row.pictures.items():
            self._client.log_image(self.id, picture, key=key, step=row.step, synchronous=True)

    def end(self, status: Status, files: Sequence[Path]) -> None:
        """Send the files as artifacts; MLflow's states are FINISHED, FAILED and KILLED."""
        for path in files:
            self._client.log_artifact(self.id, str(path))
        states = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
        self._client.set_terminated(self.id, status=states[status])


class Trackio:
    """Trackio: its own folder, or the Space of TRACKIO_SPACE_ID."""

    delay = 10.0  # a thread writes every half second, and sends to a Space in batches

    def __init__(self, run: Tracked) -> None:
        import trackio

        # Trackio finds a run by its name, which runs in other folders may have, too.
        plain = re.sub(r"[^\w.-]", "_", run.folder.name).lstrip(".-")
        self.id = run.id or f"{plain}_{secrets.token_hex(3)}"
        self._trackio = trackio
        self._run = trackio.init(
            project=run.project, name=self.id, config=dict(run.settings), embed=False,
            resume="never" if run.id is None else "allow",
        )  # fmt: skip
        self._step = 0

    def log(self, row: Row) -> None:
        """Send a row."""
        pictures = {key: self._trackio.Image(picture) for key, picture in row.pictures.items()}
        self._run.log({**row.scalars, **pictures}, step=row.step)
        self._step = row.step

    def end(self, status: Status, files: Sequence[Path]) -> None:
        """Send the pictures and GIFs. Trackio knows no states: an alert says how the run ended."""
        media = {
            path.stem: (self._trackio.Video if path.suffix == ".gif" else self._trackio.Image)(path)
            for path in files
        }
        if media:
            self._run.log(media, step=self._step)
        level = self._trackio.AlertLevel
        levels = {"finished": level.INFO, "failed": level.ERROR, "interrupted": level.WARN}
        self._run.alert(title=f"run {status}", level=levels[status])
        self._trackio.finish()


BACKENDS: dict[str, type[Backend]] = {"wandb": WandB, "mlflow": MLflow, "trackio": Trackio}
# MLflow's own database needs the other two; a server would not, but they are small.
NEEDED = {
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
}
