"""Wrong command lines: exit code 2 (usage) or 1 (failure), one line, never a traceback."""

import argparse
import contextlib
import dataclasses
import json
import re
import signal
from pathlib import Path

import pytest
import torch

from totalprop.scripts import commands, evaluate, train
from totalprop.scripts.bench import pipps as bench
from totalprop.scripts.flag_types import at_least, new_file, real, seed
from totalprop.scripts.run.arguments import agent_flags
from totalprop.scripts.run.errors import continuing_later, ending_with_a_sentence, sigterm_stops
from totalprop.scripts.run.interruption import locked
from totalprop.scripts.studies import diagnose, variance

CART = ["--env-id", "totalprop/CartPoleSwingUp-v0"]
P, D, A = ["pipps"], ["dreamer", *CART], ["daappo", *CART]
RANGES = {  # flag: a value out of range
    "pipps": {
        "--n-particles": "1", "--horizon": "0", "--gradient-steps": "0", "--random-trials": "0",
        "--gp-evaluations": "0", "--noise-multiplier": "0", "--adam-eps": "-1", "--momentum": "1",
        "--learning-rate": "-0.1", "--estimator": "tpxx", "--leg": "arm", "--optimizer": "sgd",
        "--angle-dims": "9", "--policy": "NoPolicy", "--device": "abacus",
    },
    "pilco": {
        "--horizon": "0", "--gradient-steps": "0", "--random-trials": "0", "--gp-evaluations": "0",
        "--learning-rate": "-0.1", "--optimizer": "sgd", "--angle-dims": "9",
        "--exploration": "nan", "--termination": "never", "--max-points": "-1",
    },
    "dreamer": {
        "--horizon": "1", "--batch-size": "0", "--sequence-length": "1", "--buffer-size": "1",
        "--imagination-starts": "2", "--learning-starts": "0", "--train-freq": "0",
        "--gradient-steps": "-1", "--gamma": "1.5", "--lam": "-0.1", "--learning-rate": "inf",
        "--model-learning-rate": "0", "--free-nats": "-1", "--kl-scale": "nan",
        "--exploration-noise": "-1", "--storage": "cloud", "--baseline": "none", "--estimator": "r",
        "--pretrained-world-model": "no/such/run", "--max-grad-norm": "0", "--entropy-scale": "-1",
    },
    "daappo": {
        "--action-source": "oracle", "--n-extra-actions": "0", "--simulation-horizon": "0",
        "--grow-fraction": "2", "--estimator": "tp", "--real-advantage": "exact", "--n-q": "0",
        "--extra-baseline": "none", "--dynamics-target": "past", "--dynamics-width": "0",
        "--dynamics-learning-rate": "0", "--dynamics-activation": "gelu", "--batch-size": "1",
        "--dynamics-buffer-size": "0", "--n-steps": "0", "--n-epochs": "0", "--clip-range": "-1",
        "--gamma": "2", "--gae-lambda": "-1", "--learning-rate": "-3", "--vf-coef": "-1",
    },
    "svg": {
        "--variant": "2", "--estimator": "tpxx", "--nodes": "state", "--n-extra-actions": "-1",
        "--train-freq": "-1", "--horizon": "0", "--batch-size": "1.5", "--max-weight": "0",
        "--kl-weight": "-1", "--max-grad-norm": "0", "--value-hidden": "0", "--net-arch": "-3",
        "--activation": "gelu", "--reward": "none", "--log-std-init": "inf",
    },
}  # fmt: skip
OTHERS = [
    [], ["ppo"], ["--resume"], ["--resume", "no/such/run"], ["pipps", "--preset"],
    ["pipps", "--preset", "2019"], ["dreamer", "--preset=large"], ["pipps", "--no-such-flag", "1"],
    ["pipps", "--horizon", "ten"], ["pipps", "--horizon"], ["pipps", "--seed", "1.5"],
    ["pipps", "stray"], [*P, "--total-timesteps", "0"], [*P, "--eval-episodes", "1"],
    [*P, "--threads", "-1"], [*P, "--checkpoint-seconds", "-1"], [*P, "--eval-every", "-5"],
    [*P, "--env-id", "CartPoleSwingUp"], [*P, "--env-id", "totalprop/CartPoleSwingUp-v7"],
    [*P, "--env-id", "CartPole-v1"], [*P, "--env-id", "no_module:Env-v0"], [*P, "--env-id", ""],
    [*D[:1], "--env-id", "CartPole-v1", "--exploration-noise", "1.5"],
    [*A[:1], "--env-id", "CartPole-v1"],
    [*P, "--env-arg", "noise"], [*P, "--env-arg", "no_such=1"], [*P, "--env-arg", "noise=-1"],
    [*P, "--env-arg", "cost=gold"], [*P, "--normalize", "all"], [*P, "--normalize", "both"],
    [*D, "--learning-rate-schedule", "linear", "--learning-rate", "-1"],
    [*D, "--learning-rate-schedule", "cosine"], [*D, "--normalize", "rewards"],
    [*P, "--estimator", "rp", "--optimizer", "quasi-newton"],
    [*A, "--action-source", "states", "--estimator", "tpx"],
    [*A, "--extra-baseline", "leave-one-out", "--n-extra-actions", "1"],
    [*P, "--seed", "-1"], [*P, "--runs", "/dev/null/runs"], [*P, "--name", "a/../../b\0"],
    ["daappo", "--env-id", "InvertedPendulum-v5", "--action-source", "rewind"],
    [*P, "--name", "../beside"], [*P, "--name", "."], [*P, "--stats-window-size", "0"],
    [*A, "--ent-coef", "nan"], [*P, "--total-timesteps", "1e20"],
]  # fmt: skip
SCRIPTS = {
    "evaluate": evaluate.main, "diagnose": diagnose.main, "variance": variance.main,
    "bench": bench.main, "resume": train.main,
}  # fmt: skip
COMMANDS = [[agent, flag, value] for agent, bad in RANGES.items() for flag, value in bad.items()]
COMMANDS = [[c[0], *CART, *c[1:]] for c in COMMANDS] + OTHERS


class Begun(BaseException):
    """Raised when training begins: no error was found."""


def test_there_are_enough():
    assert len(COMMANDS) >= 60


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_wrong_training_commands(command, tmp_path, capsys, monkeypatch):
    def learn(*_):
        raise Begun

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "learn", learn)
    with pytest.raises(SystemExit) as stop:
        train.main([*command, *([] if command[:1] in ([], ["--resume"]) else ["--no-progress"])])
    output = capsys.readouterr()
    assert stop.value.code in (1, 2)
    text = output.err + output.out
    assert "Traceback" not in text
    assert len(text) > 20
    if command:  # one line, after whatever libraries print; without arguments, the usage
        error = [line for line in output.err.splitlines() if "error: " in line]
        assert stop.value.code == 2 or error[0].startswith("error: ")
        assert len(error) == 1 and output.err.rstrip().endswith(error[0]) and len(error[0]) > 20
        if command[1:3] == CART and command[-2] in RANGES[command[0]]:
            assert command[-2] in error[0] or command[-1] in error[0]
        spoken = re.findall(r"(\w+)=", error[0])  # flags are named as they are typed
        agent = command[0] if command[0] in RANGES else "pipps"
        assert not {field.name for field in dataclasses.fields(agent_flags(agent))} & {*spoken}
    assert not (tmp_path / "runs").exists()  # nothing was started


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--horizn", "5"], "Unrecognized options: --horizn, 5; did you mean --horizon?"),
        (["--horizon"], "Missing value for argument '--horizon'"),
        (["--storage", "cloud"], "invalid choice 'cloud' for argument '--storage'"),
        (["--seed", "1.5"], "--seed cannot be 1.5; totalprop"),
        (["--gamma", "x"], "Error parsing --gamma: could not convert string to float: 'x'"),
    ],
)
def test_what_a_usage_error_says(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["dreamer", *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1
    assert error.rstrip().endswith("totalprop train dreamer --help lists the flags")


def test_a_resumed_run_keeps_its_settings(capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        train.main(["svg", "--resume", "runs/a", "--gamma", "0.9", "--total-timesteps", "9"])
    assert "leave out svg --gamma 0.9, or start" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("evaluate", ["no/such/run"]), ("evaluate", ["{run}", "--episodes", "0"]),
        ("evaluate", ["{run}"]), ("evaluate", []), ("diagnose", ["no/such/run"]),
        ("diagnose", ["{run}"]), ("diagnose", ["{run}", "--starts", "x"]),
        ("diagnose", ["{run}", "--threads", "0"]), ("bench", ["--threads", "0"]),
        ("resume", ["--total-timesteps", "90", "--resume", "no/such/run"]),
        ("variance", ["--env-id", "no-env"]), ("variance", ["--trajectories", "many"]),
        ("evaluate", ["{run}", "--seed", "-1"]), ("evaluate", ["{run}", "--seed", "1e30"]),
        ("variance", ["--gamma", "nan"]), ("variance", ["--gamma", "7"]),
        ("variance", ["--delta", "nan"]), ("variance", ["--learning-rate", "nan"]),
        ("variance", ["{run}", "--env-id", "Pendulum-v1"]),
        ("variance", ["{run}", "--updates", "3"]),
    ],
)  # fmt: skip
def test_wrong_commands_of_other_scripts(script, arguments, tmp_path, capsys):
    """The run was killed before it had a model."""
    run = tmp_path / "run"
    run.mkdir()
    config = {"agent": "pipps", "env_id": "totalprop/CartPoleSwingUp-v0", "env_args": {}}
    (run / "config.json").write_text(json.dumps({**config, "arguments": {"seed": 0}}))
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script]([argument.format(run=run) for argument in arguments])
    output = capsys.readouterr()
    assert stop.value.code in (1, 2) and "Traceback" not in output.err
    assert "error" in output.err.lower()


def test_a_number_that_is_not_finite_is_said_to_be_none(capsys):
    with pytest.raises(SystemExit):
        train.main([*P, "--learning-rate", "inf"])
    assert "--learning-rate must be at least 0, a finite number, got inf" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["2.5", "nan", "many"])
def test_what_is_no_integer_is_said_by_every_command(text, capsys):
    for main, arguments in ((evaluate.main, ["run"]), (variance.main, [])):
        flag = "--episodes" if main is evaluate.main else "--trajectories"
        with pytest.raises(SystemExit, match="2"):
            main([*arguments, flag, text])
        expected = f"argument {flag}: '{text}' is not an integer, such as 100000 or 1e5 (--help"
        assert expected in capsys.readouterr().err


def is_bounded(action):
    """Whether a flag is a number, but for costs and returns, which may be any."""
    for text in ("1", "99") if callable(action.type) else ():  # 1 may be too small, 99 too large
        with contextlib.suppress(argparse.ArgumentTypeError):
            if isinstance(action.type(text), int | float):
                return action.dest not in ("success", "normalise")
    return False


COUNTED = [
    (name, action)
    for name, command in commands.COMMANDS.items() if command.add_flags is not None
    for action in commands.parser_of(name)._actions if is_bounded(action)
]  # fmt: skip


def test_there_are_numbers():
    assert len(COUNTED) >= 50


@pytest.mark.parametrize(("name", "action"), COUNTED, ids=lambda x: getattr(x, "dest", x))
def test_a_number_out_of_its_range_is_refused_in_one_sentence(name, action, capsys):
    (flag,) = action.option_strings
    with pytest.raises(SystemExit, match="2"):
        commands.parser_of(name).parse_args([flag, "-1"])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flag} must be ") and error.count("\n") == 1
    assert "got -1 (--help lists the flags)" in error


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (at_least(3), "3", 3), (at_least(3), "2", "must be at least 3, got 2"),
        (at_least(3), "1e2", 100), (at_least(3), "3.5", "'3.5' is not an integer"),
        (seed, "4294967295", 2**32 - 1), (seed, "4294967296", "below 2^32, got 4294967296"),
        (real(), "-2.5", -2.5), (real(), "inf", "must be finite, got inf"),
        (real(), "much", "'much' is not a number"), (real(least=0), "0", 0.0),
        (real(above=0), "0", "must be above 0, got 0"), (real(above=0), "nan", "got nan"),
        (real(least=0, most=1), "1.5", "must be at least 0 and at most 1, got 1.5"),
    ],
)  # fmt: skip
def test_ranges(kind, text, expected):
    if isinstance(expected, str):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(expected)):
            kind(text)
    else:
        assert kind(text) == expected


WRITERS = [
    (name, action)
    for name, command in commands.COMMANDS.items() if command.add_flags is not None
    for action in commands.parser_of(name)._actions
    if {"--out", "--json", "--runs"} & {*action.option_strings} and not is_bounded(action)
]  # fmt: skip


def test_there_are_writers():
    assert len(WRITERS) >= 20


@pytest.mark.parametrize(("name", "action"), WRITERS, ids=lambda x: getattr(x, "dest", x))
def test_results_that_cannot_be_written_are_refused_before_the_work(name, action, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        with pytest.raises(
            argparse.ArgumentTypeError, match=r"cannot write to .*file is no folder"
        ):
            action.type(str(path))
    new = tmp_path / "new" / "folder"
    assert action.type(str(new)) == new and not new.parent.exists()
    wrong = tmp_path if action.type is new_file else tmp_path / "file"
    with pytest.raises(argparse.ArgumentTypeError, match="cannot write to"):
        action.type(str(wrong))


def test_an_error_of_a_file_is_a_sentence(capsys):
    with pytest.raises(SystemExit, match="1"), ending_with_a_sentence():
        Path("no/such/file").read_text()
    assert capsys.readouterr().err == "error: [Errno 2] No such file or directory: 'no/such/file'\n"


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_says_how_to_continue(number, code, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, continuing_later(), sigterm_stops():
        signal.raise_signal(number)
    assert stop.value.code == code
    assert capsys.readouterr().err == "\nstopped; run the same command again to continue\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_memory_that_pytorch_did_not_get_is_no_fault_of_the_environment():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**57)
    text = train.sentence(caught.value)
    assert text.startswith("out of memory for ") and "--resume" not in text


def test_a_run_that_is_being_trained_is_waited_for(tmp_path, capsys):
    config = {"agent": "pipps", "env_id": "totalprop/CartPoleSwingUp-v0", "env_args": {}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "arguments": {"seed": 0}}))
    with locked(tmp_path), pytest.raises(SystemExit):
        evaluate.main([str(tmp_path)])
    said = capsys.readouterr().err
    assert "the run is being trained and has not finished; wait for it" in said
    assert "--resume" not in said
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path)])
    assert "continue it with totalprop train --resume" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"agent": "pipps"}', '{"agent": "human"}'])
def test_a_damaged_config(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    for main, arguments in ((train.main, ["--resume"]), (evaluate.main, [])):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, str(tmp_path)])
        assert stop.value.code == 1
        assert capsys.readouterr().err.count("\n") == 1
