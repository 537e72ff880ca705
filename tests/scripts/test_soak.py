"""The soak test: its criteria, and a run of a few seconds."""

import json
import subprocess
import sys

import numpy as np
import pytest

from totalprop.scripts.reliability import soak

TIMES = np.arange(0.0, 3600.0, 10.0)
WARM_UP = 300 * (1 - np.exp(-TIMES / 200))  # MB, gone within the first third


def judge(memory, files=None):
    counts = np.full(len(TIMES), 6) if files is None else files
    return soak.judge(list(zip(TIMES.tolist(), memory.tolist(), counts.tolist())))


@pytest.mark.parametrize(
    ("megabytes_per_hour", "is_flat"), [(0, True), (10, True), (25, False), (-50, True)]
)
def test_flat_is_less_than_two_percent_over_the_rest_of_the_time(megabytes_per_hour, is_flat):
    noise = np.random.default_rng(0).normal(0, 3, len(TIMES))
    found = judge(500 + WARM_UP + megabytes_per_hour * TIMES / 3600 + noise)
    assert found["is_flat"] == is_flat
    assert found["megabytes_per_hour"] == pytest.approx(megabytes_per_hour, abs=3)
    assert found["megabytes"] == pytest.approx(800 + megabytes_per_hour * 2 / 3, abs=3)


def test_a_file_that_is_being_written_is_no_leak_but_one_that_stays_open_is():
    written, leaked, warm = (np.full(len(TIMES), 6) for _ in range(3))
    written[::7] += 1
    leaked[310:] += 1
    warm[:60] = 4  # opened during the warm-up
    memory = np.full(len(TIMES), 500.0)
    assert judge(memory, written)["is_constant"] and judge(memory, warm)["is_constant"]
    assert judge(memory, written)["open_files"] == 6
    assert judge(memory, written)["most_open_files"] == 7
    assert not judge(memory, leaked)["is_constant"]


TRAINING = """
import signal, sys, time
from pathlib import Path

def stop(*_):
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
folder = Path(sys.argv[1]) / "daappo" / "checkpoints"
folder.mkdir(parents=True)
kept, file = bytearray(50 * 2**20), open(folder / "checkpoint_000000000120.zip", "w")
time.sleep(60)
"""


def test_a_process_is_watched_and_stopped(tmp_path, monkeypatch, capsys):
    def start(agent, folder):
        return subprocess.Popen([sys.executable, "-c", TRAINING, str(folder)])

    command = ["soak", "--agents", "daappo", "--minutes", "0.05", "--every", "0.2"]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(tmp_path)])
    monkeypatch.setattr(soak, "_start", start)
    earlier = {"agent": "pipps", "samples": [[0, 1, 2], [9, 1, 2]]}
    (tmp_path / "soak.json").write_text(json.dumps([earlier]))
    soak.main()
    assert capsys.readouterr().out.startswith("daappo: 120 steps in 3 s, ")
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found[0] == earlier and len(found) == 2  # earlier results are kept
    assert 55 < found[1]["megabytes"] < 100 and found[1]["open_files"] == 4
    assert (tmp_path / "soak.png").stat().st_size > 5000


def test_a_training_that_ends_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "_start", lambda *_: subprocess.Popen([sys.executable, "-c", "1/0"]))
    with pytest.raises(SystemExit, match=r"error: pipps ended after \d+ s"):
        soak.soak(["pipps"], tmp_path, 30, 0.1)


def test_too_short_a_soak(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["soak", "--minutes", "0.1"])
    with pytest.raises(SystemExit) as stop:
        soak.main()
    assert stop.value.code == 2 and "at least 8 samples" in capsys.readouterr().err
