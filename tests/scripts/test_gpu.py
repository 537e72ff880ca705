"""`totalprop gpu` on a CPU: the time it keeps, what it writes, and what it carries."""

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from totalprop.scripts.bench import dreamer
from totalprop.scripts.commands import parser_of
from totalprop.scripts.gpu import carried, session, speed, summary
from totalprop.scripts.run.folder import RunFolder

TINY = (
    "--preset", "laptop", "--env-id", "totalprop/CartPoleSwingUp-v0", "--learning-starts", "60",
    "--sequence-length", "8", "--batch-size", "4", "--imagination-starts", "8",
    "--gradient-steps", "1", "--eval-every", "100", "--eval-episodes", "2",
    "--eval-max-steps", "20", "--buffer-size", "2000", "--total-timesteps", "1000000",
)  # fmt: skip


def a_session(folder, *flags):
    options = parser_of("gpu").parse_args([*flags, "--device", "cpu", "--out", str(folder)])
    options.steps = options.steps.split(",")
    found = session.Session(options, [])
    found.environment, found.scratch = None, folder
    return found


# The command


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_steps_run_on_a_cpu_and_the_training_is_resumed(tmp_path):
    out, runs = tmp_path / "out", tmp_path / "runs"
    small = ["--device", "cpu", "--batch", "2", "--length", "3", "--repeats", "1"]
    where = ["--out", str(out), "--runs", str(runs)]
    session.main(["--minutes", "2", "--steps", "tests,bench", *small, *where])
    session.main(["--minutes", "1.5", "--steps", "train", *small, *where, "--", *TINY])
    names = {path.name for path in out.iterdir()}
    pictures = {"learning_curve.png", "open_loop.png"}
    assert names == {
        "README.md", "tests.json", "bench.json", "train.json", "log.txt", *pictures
    }  # fmt: skip
    tests, bench, train = (json.loads((out / f"{n}.json").read_text()) for n in session.GPU_STEPS)
    assert tests["status"] == bench["status"] == "done" and train["status"] == "stopped"
    assert tests["collected"] > 20
    assert bench["updates"].keys() == {"rp, H=15", "rp, H=15, bf16"} | (
        {"sheeprl"} if not bench["left_out"] else set()
    )
    assert 0 < bench["updates"]["rp, H=15"]["share_of_peak"] < 1
    assert train["updates"] > 0 and len(train["final_returns"]) == 10
    (run,) = runs.iterdir()
    text = (out / "README.md").read_text()
    assert "open_loop.png" in text and f"{train['decisions']} decisions" in text
    session.main(["--minutes", "1.2", "--steps", "train", "--resume", str(run), *small, *where])
    resumed = json.loads((out / "train.json").read_text())
    assert resumed["decisions"] > train["decisions"] and len(resumed["final_returns"]) == 10
    assert RunFolder.open(run).read_config()["preset"] == "laptop"


def test_without_a_gpu_it_says_one_sentence(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as ended:
        session.main(["--out", str(tmp_path / "new")])
    assert ended.value.code == 2 and not (tmp_path / "new").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --device cuda needs an NVIDIA GPU")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps", "tests,sing"], "--steps must be among tests,bench,train, got 'sing'"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--length", "1"], "--length must be at least 2, got 1"),
        (["--resume", "runs/x", "--", "--seed", "1"], "drop the flags after --"),
    ],
)
def test_wrong_flags_are_one_line(flags, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        session.main(flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and sentence in line


# Time


def test_a_process_is_stopped_when_its_time_is_up_and_its_output_kept(tmp_path):
    code = "import time; print('begun', flush=True); time.sleep(60)"
    began = time.monotonic()
    ended = a_session(tmp_path).process("bench", [sys.executable, "-c", code], 3)
    assert ended.status == "stopped" and ended.lines == ["begun"]
    assert 3 <= time.monotonic() - began < 20
    assert (tmp_path / "log.txt").read_text() == "begun\n"


def test_a_process_that_ignores_the_stop_is_killed_with_its_children(tmp_path):
    child = "import time; time.sleep(600)"
    code = (
        "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True);"
        "p.wait()"
    )
    ended = a_session(tmp_path).process("bench", [sys.executable, "-c", code], 3, grace=0.5)
    assert ended.status == "stopped"
    status = Path(f"/proc/{ended.lines[0]}/stat")
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child still runs"
        time.sleep(0.05)


def test_a_failure_records_its_exit_code_and_last_lines(tmp_path):
    code = "print('why'); raise SystemExit(7)"
    ended = a_session(tmp_path).process("bench", [sys.executable, "-c", code], 30)
    assert ended.record() | {"seconds": 0} == {
        "status": "failed", "seconds": 0, "exit_code": 7, "output": ["why"]
    }  # fmt: skip


def test_shares_leave_the_rest_to_the_last_step(tmp_path):
    every = a_session(tmp_path, "--minutes", "10")
    assert every.share("tests") == 150 and every.share("bench") == 240
    assert a_session(tmp_path, "--minutes", "10", "--steps", "tests").share("tests") > 590


# What is measured


@pytest.mark.parametrize(("name", "horizon"), [("rp", 15), ("rp", 60), ("tpx", 15)])
def test_counted_operations_equal_those_of_the_layers(name, horizon):
    """The counter, oneDNN's layers included, against multiply-accumulates counted by hand."""
    data = dreamer.synthetic_batch(2, 3, "cpu")
    flop = speed.count_flop(dreamer.make_update(name, horizon, data, device="cpu"))
    by_hand = 2 * 3 * 6 * (dreamer.FRAME_MACS + horizon * dreamer.STEP_MACS)
    assert flop == pytest.approx(by_hand, rel=0.01)


def test_a_matrix_product_s_rate_is_that_of_a_clock(monkeypatch):
    ticks = iter([10.0, 12.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks))
    assert speed.matrix_rate(torch.float32, "cpu", repeats=4) == 2 * 512**3 * 4 / 2.0


def test_a_mode_that_fails_leaves_the_others_and_a_sentence(tmp_path, monkeypatch):
    def make(name, horizon, data, modes=(), *, device):
        if modes:
            raise RuntimeError("no such kernel")
        return lambda: None

    monkeypatch.setattr(speed, "make_update", make)
    monkeypatch.setattr(speed.sheeprl_peer, "interpreter", lambda: None)
    monkeypatch.setattr(speed, "count_flop", lambda update: 1e9)
    path = tmp_path / "bench.json"
    settings = speed.SpeedSettings(out=str(path), device="cpu", batch=1, length=2, repeats=1)
    found = speed.measure(settings)
    assert found["updates"].keys() == {"rp, H=15"} and json.loads(path.read_text()) == found
    peer, mode = found["left_out"]
    assert peer.startswith("sheeprl 0.8.4, which") and mode.endswith("RuntimeError: no such kernel")


def test_verdicts_of_a_stopped_pytest_are_counted():
    wrong = "tests/a.py::test_y[vector-{'bf16': True}]"
    lines = [
        "tests/a.py::test_x PASSED   [ 10%]",
        f"{wrong} FAILED   [ 20%]",
        "tests/a.py::test_z SKIPPED (why)   [ 30%]",
        "tests/a.py::test_w ",
    ]
    found = summary.test_results(lines)
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "failures": [wrong]}
    found = summary.test_results(["", "=== 25/338 tests collected (313 deselected) in 3s ==="])
    assert found["collected"] == 25


# What is carried


def test_versions_are_those_of_the_constraints():
    pins = carried.pinned("constraints.txt", carried.OURS, "3.12")
    assert [pin.split("==")[0] for pin in pins] == list(carried.OURS)
    assert carried.pinned("constraints.txt", ["numpy"], "3.10") == ["numpy==2.2.6"]
    assert carried.pinned("constraints.txt", ["numpy"], "3.12") == ["numpy==2.4.6"]
    assert len(carried.pinned("constraints-peer.txt", carried.PEER, "3.12")) == len(carried.PEER)
    with pytest.raises(RuntimeError, match=r"constraints\.txt has no version of nonsuch"):
        carried.pinned("constraints.txt", ["nonsuch"], "3.12")


def a_wheel(folder):
    """A pure wheel of one module with a folder to cut out."""
    path, info = folder / "carriedtest-1.0-py3-none-any.whl", "carriedtest-1.0.dist-info"
    files = {
        "carriedtest/__init__.py": "VALUE = 7\n",
        "carriedtest/big/mesh.py": "0" * 1000,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: carriedtest\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in {**files, f"{info}/RECORD": rows}.items():
            wheel.writestr(name, text)
    return path


def test_wheels_are_installed_without_a_network_beside_this_python_s_packages(
    tmp_path, monkeypatch
):
    carried.cut(a_wheel(tmp_path), ["carriedtest/big/"])
    monkeypatch.setattr(carried, "NEEDED", ("torch", "gymnasium", "carriedtest"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    carried.install(tmp_path, tmp_path / "env")
    code = (
        "import carriedtest, importlib.util as u, torch; print(carriedtest.VALUE, torch.__file__)"
    )
    code += "; print(u.find_spec('carriedtest.big'))"
    command = [str(tmp_path / "env" / "bin" / "python"), "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert out == ["7", torch.__file__, "None"]
    monkeypatch.setattr(carried, "NEEDED", ("nonsuch",))
    with pytest.raises(RuntimeError, match="has nonsuch; add the packages"):
        carried.install(tmp_path, tmp_path / "env")
    with pytest.raises(RuntimeError, match="holds no wheels"):
        carried.install(tmp_path / "env", tmp_path / "other")


def test_opengl_is_taken_from_the_folder_only_where_the_machine_has_none(tmp_path, monkeypatch):
    (tmp_path / "opengl").mkdir()
    monkeypatch.setattr(carried, "_loads", lambda name: True)
    found = carried.opengl_environment(tmp_path, tmp_path)
    assert "LD_LIBRARY_PATH" not in found
    monkeypatch.setattr(carried, "_loads", lambda name: name.startswith("/usr/local/nvidia/lib64/"))
    found = carried.opengl_environment(tmp_path, tmp_path)
    assert found["LD_LIBRARY_PATH"] == str(tmp_path / "opengl")
    if path := found.get("__EGL_VENDOR_LIBRARY_FILENAMES"):  # no driver of NVIDIA is installed
        driver = json.loads(Path(path).read_text())["ICD"]["library_path"]
        assert driver == "/usr/local/nvidia/lib64/libEGL_nvidia.so.0"
