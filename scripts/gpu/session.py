"""Show within minutes what only a GPU can: run the tests, time the updates, train from pixels.

    totalprop gpu                                    # into results/gpu, in 9 minutes
    totalprop gpu --minutes 4 --steps tests,bench
    totalprop gpu --steps train --resume runs/NAME   # goes on where an earlier call stopped
    totalprop gpu --steps train -- --preset recommended --env-id dmc/finger-spin-v0 --cuda-graph

`make gpu` first installs what a machine without a network lacks, from the folder that `make
gpu-wheels` has filled. The steps are:

- tests: those marked `gpu`;
- bench: the Dreamer's updates in every mode and sheeprl's, as shares of the GPU's peak;
- train: the Dreamer on walker-walk from pixels in all of the time that is left, with an evaluation,
  its learning curve and an open-loop film. Flags of `totalprop train dreamer` after `--` replace
  those that it has then.

A step that would overrun its share is stopped, and what it has measured is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts.commands import GPU_STEPS, parser_of
from totalprop.scripts.flag_types import split_flags
from totalprop.scripts.gpu.carried import ROOT, opengl_environment
from totalprop.scripts.gpu.summary import summary, test_results
from totalprop.scripts.run.errors import UsageError, ending_with_a_sentence
from totalprop.scripts.run.program import current_commit

SHARES = {"tests": 0.25, "bench": 0.4}  # of all the time, at most
# Kept for the last checkpoint, the evaluation and the film: of all the time, or seconds if that is
# more, but no more than half of what is left.
REPORT, REPORT_SECONDS = 0.15, 45.0
GRACE = 10.0  # s between asking a step to stop and killing it; a checkpoint takes longer
# Other packages' deprecations would fill the log.
QUIET = {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore::DeprecationWarning"}
TRAINING = (
    "--preset", "recommended", "--size", "m", "--env-id", "dmc/walker-walk-v0",
    "--env-arg", "observation=pixels", "--total-timesteps", "50000", "--eval-every", "5000",
    "--eval-episodes", "5", "--cuda-graph", "--storage", "device",
)  # fmt: skip


class Ended(NamedTuple):
    """How a step's process ended.

    Attributes:
        status: "done", "failed", or "stopped" where its time was up.
        seconds: that it took.
        lines: of its output.
        exit_code: of a process that failed; -11 is a segmentation fault.
    """

    status: str
    seconds: float
    lines: list[str]
    exit_code: int = 0

    def record(self) -> dict[str, Any]:
        """The JSON of these facts; of a failure also the last lines."""
        found: dict[str, Any] = {"status": self.status, "seconds": round(self.seconds, 1)}
        if self.status == "failed":
            found |= {"exit_code": self.exit_code, "output": self.lines[-15:]}
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = parser_of("gpu")
    own, flags = split_flags(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(own)
    options.steps = options.steps.split(",")
    check(parser, options, flags)
    with ending_with_a_sentence():
        Session(options, flags).run()


def check(
    parser: argparse.ArgumentParser, options: argparse.Namespace, flags: Sequence[str]
) -> None:
    """Reject wrong values in one line each."""
    if wrong := [step for step in options.steps if step not in GPU_STEPS]:
        parser.error(f"--steps must be among {','.join(GPU_STEPS)}, got '{wrong[0]}'")
    if options.resume is not None and flags:
        parser.error("a run that is resumed keeps its settings; drop the flags after --")


class Session:
    """One call: its time, its results, and the steps."""

    def __init__(self, options: argparse.Namespace, flags: Sequence[str]) -> None:
        self.options, self.flags = options, list(flags) or list(TRAINING)
        self.out: Path = options.out
        self.began = time.monotonic()
        self.seconds = 60 * options.minutes
        self.device = describe(options.device)
        self.results: dict[str, dict[str, Any]] = {}
        self.next = ""

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.began)

    def run(self) -> None:
        """Run the steps, and write each one's results as soon as it is over."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "log.txt").unlink(missing_ok=True)
        print(f"{self.device['name']}, {self.seconds:.0f} s, results in {self.out}/", flush=True)
        steps = {"tests": self.tests, "bench": self.bench, "train": self.train}
        with tempfile.TemporaryDirectory() as scratch:
            self.scratch = Path(scratch)
            carried = opengl_environment(ROOT / ".gpu-wheels", self.scratch)
            self.environment = {**os.environ, **_joined(carried), **QUIET}
            for name in self.options.steps:
                found = steps[name]()
                self.results[name] = {"device": self.device, **found}
                text = json.dumps(self.results[name], indent=1) + "\n"
                write_text(self.out / f"{name}.json", text)
                write_text(self.out / "README.md", summary(self.out))
                print(f"{name}: {found['status']} after {found['seconds']:.0f} s", flush=True)
        spent = self.seconds - self.left
        print(
            f"{spent / 60:.1f} of {self.options.minutes:g} min; results in {self.out}/README.md"
            + (f"; next: {self.next}" if self.next else "")
        )
        if any(found["status"] == "failed" for found in self.results.values()):
            raise SystemExit(1)

    def share(self, name: str) -> float:
        """Seconds that a step may take: its share, or all the rest for the last one."""
        is_last = name == self.options.steps[-1]
        return max(self.left if is_last else min(SHARES[name] * self.seconds, self.left), 1.0)

    def tests(self) -> dict[str, Any]:
        """Run the tests that need a GPU; on a CPU, only collect them."""
        files = sorted((ROOT / "tests").rglob("test_*.py"))
        marked = [str(f.relative_to(ROOT)) for f in files if "mark.gpu" in f.read_text("utf-8")]
        command = [sys.executable, "-m", "pytest", *marked, "-m", "gpu", "-vv"]
        command += ["-p", "no:cacheprovider"]
        if self.options.device == "cpu":
            command.append("--collect-only")
        ended = self.process("tests", command, self.share("tests"))
        return {**ended.record(), **test_results(ended.lines)}

    def bench(self) -> dict[str, Any]:
        """Time the updates."""
        path, options = self.scratch / "bench.json", self.options
        settings = {
            "out": str(path), "device": options.device, "batch": options.batch,
            "length": options.length, "repeats": options.repeats,
        }  # fmt: skip
        module = "totalprop.scripts.gpu.speed"
        command = [sys.executable, "-m", module, json.dumps(settings)]
        ended = self.process("bench", command, self.share("bench"))
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {**ended.record(), **found}

    def train(self) -> dict[str, Any]:
        """Train or resume until little time is left, then evaluate and draw."""
        options, python = self.options, [sys.executable, "-m"]
        if options.resume is not None:
            run = options.resume
            command = [*python, "totalprop", "train", "--resume", str(run)]
        else:
            run = options.runs / f"gpu_{time.strftime('%Y%m%d-%H%M%S')}"
            command = [*python, "totalprop", "train", "dreamer", *self.flags, "--device"]
            command += [options.device, "--runs", str(run.parent), "--name", run.name]
            command.append("--no-progress")
        kept = min(max(REPORT * self.seconds, REPORT_SECONDS), self.left / 2)
        is_over = (run / "summary.json").exists()
        ended = Ended("done", 0.0, [])
        if not is_over:
            ended = self.process("train", command, max(self.left - kept, 1.0), grace=kept / 2)
        path = self.scratch / "train.json"
        found = {**ended.record(), "run": str(run), "command": command[2:]}
        if not (run / "checkpoints").is_dir():
            return {**found, "note": "It ended before its first checkpoint."}
        module = "totalprop.scripts.gpu.training"
        report = [*python, module, str(run), str(self.out.resolve()), str(path)]
        drawn = self.process("train", report, max(self.left, 1.0))
        if path.exists():
            found |= json.loads(path.read_text(encoding="utf-8"))
        if drawn.status == "failed":
            found |= {"status": "failed", "output": drawn.lines[-15:]}
        if not (run / "summary.json").exists():
            self.next = f'make gpu ARGS="--steps train --resume {run}"'
        return {**found, "seconds": round(ended.seconds + drawn.seconds, 1)}

    def process(
        self, name: str, command: list[str], limit: float, *, grace: float = GRACE
    ) -> Ended:
        """Run a command within a limit; its output is shown, and appended to log.txt.

        Args:
            name: of the step.
            command: the program and its arguments.
            limit: seconds after which it is asked to stop.
            grace: seconds after which it is then killed.
        """
        print(f"{name}: at most {limit:.0f} s", flush=True)
        began, lines = time.monotonic(), []
        process = subprocess.Popen(
            command, cwd=ROOT if name == "tests" else None, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip

        def read() -> None:
            assert process.stdout is not None
            with open(self.out / "log.txt", "a", encoding="utf-8") as log:
                for line in process.stdout:
                    lines.append(line.rstrip("\n"))
                    log.write(line)
                    log.flush()
                    sys.stdout.write(line)
                    sys.stdout.flush()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        is_late = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            is_late = True
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                print(f"{name}: killed, {grace:.0f} s after it was asked to stop", flush=True)
        finally:
            _kill_group(process.pid)  # with what it started, sheeprl's process for example
            process.wait()
        reader.join(GRACE)
        status = "stopped" if is_late else "done" if process.returncode == 0 else "failed"
        return Ended(status, time.monotonic() - began, lines, process.returncode)


def describe(device: str) -> dict[str, Any]:
    """The device, its driver, and the versions that results depend on.

    Raises:
        UsageError: PyTorch has no such device.
    """
    found: dict[str, Any] = {
        "name": "cpu", "torch": torch.__version__, "cuda": torch.version.cuda,
        "python": sys.version.split()[0], "cores": os.cpu_count(), "commit": current_commit(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if device == "cpu":
        return found
    kind = torch.device(device).type if device.split(":")[0] in ("cuda", "cpu") else ""
    if kind != "cuda" or not torch.cuda.is_available():
        raise UsageError(
            f"--device {device} needs an NVIDIA GPU that PyTorch {torch.__version__} can use, and "
            "there is none here; totalprop doctor says why, --device cpu tries the steps without"
        )
    properties = torch.cuda.get_device_properties(device)
    memory, driver = properties.total_memory / 2**30, _driver()
    return {**found, "name": properties.name, "memory_gib": round(memory, 1), "driver": driver}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.split() or ["unknown"])[0]


def _joined(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables; a search path is put before the one that is set."""
    found = dict(variables)
    if (name := "LD_LIBRARY_PATH") in found and os.environ.get(name):
        found[name] += os.pathsep + os.environ[name]
    return found


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
