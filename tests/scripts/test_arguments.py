"""The command line of `totalprop train`: help for every flag, policy flags and --config files."""

import argparse
import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from typing import Literal, Union, get_args, get_origin

import pytest
import yaml

from totalprop.agents import AGENTS
from totalprop.agents.core.validation import constructor_hints
from totalprop.scripts import cli, train
from totalprop.scripts.commands import parser_of
from totalprop.scripts.run.arguments import agent_flags, parse, parse_resume, policy_flags
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.run.job import Job, RunOptions

TINY = {
    "pipps": [
        "--total-timesteps", "60", "--n-particles", "20", "--horizon", "4", "--gradient-steps", "2",
        "--gp-evaluations", "5", "--n-centres", "5", "--eval-episodes", "2", "--eval-every", "60",
    ],
}  # fmt: skip


def job(*arguments):
    return parse(arguments, usage="")


def refused(capsys, *arguments):
    """The sentence with which wrong usage ends."""
    with pytest.raises(SystemExit, match=r"^2$"):
        job(*arguments)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def helped(field):
    """The help text of a dataclass's flag."""
    return field.type.__metadata__[-1].help


def symbols(hint):
    """Ranges of an annotation, and the words that a number's place can have."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    notes = [note for m in members for note in getattr(m, "__metadata__", ())]
    ranges = list(filter(None, (getattr(note, "symbol", "") for note in notes)))
    words = [word for m in members if get_origin(m) is Literal for word in get_args(m)]
    return [*ranges, *words] if ranges else []


@pytest.mark.parametrize("agent", AGENTS)
def test_every_flag_of_an_agent_has_its_own_help(agent):
    fields = [*dataclasses.fields(agent_flags(agent)), *dataclasses.fields(policy_flags(agent))]
    texts = {field.name: helped(field) for field in fields}
    assert all(len(text) > 10 for text in texts.values()), texts
    assert len(set(texts.values())) == len(texts)


@pytest.mark.parametrize("agent", AGENTS)
def test_the_help_shows_every_flag_with_text_and_default(agent, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        job(agent, "--help")
    text = capsys.readouterr().out
    # A flag begins its line, behind the box where one is drawn; its help is indented further.
    blocks = re.split(r"\n(?=[│ ]{0,3}--\w)|\n[╰ ]─", text)
    shown = {block.strip("│ ").split()[0].rstrip(","): block for block in blocks if "--" in block}
    kinds = RunOptions, agent_flags(agent), policy_flags(agent)
    for name in [field.name for kind in kinds for field in dataclasses.fields(kind)]:
        flag = f"--{name.replace('_', '-')}"
        words = " ".join(line.strip("│ ") for line in shown[flag].splitlines())
        assert "(default: " in words or "(repeatable)" in words, words
        assert len(words) > len(flag) + 25, words
        # A flag that takes numbers in a range shows it, and the words that it takes instead of one.
        hint = {**constructor_hints(RunOptions), **constructor_hints(AGENTS[agent].cls)}.get(name)
        for symbol in symbols(hint):
            assert symbol in words.partition("(default")[0], words


# train reads constructors, and zoo passes its flags on.
@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name not in ("train", "zoo")])
def test_every_flag_of_every_command_has_a_help(command, monkeypatch, capsys):
    parsers = []

    def note(parser, *_):
        parsers.append(parser)
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", note)
    monkeypatch.setattr(sys, "argv", ["totalprop"])
    with pytest.raises(SystemExit):
        cli.main(command.split())
    assert parsers and parsers[0].description
    bare = [action.dest for action in parsers[0]._actions if not (action.help or "").strip()]
    assert bare == []


@pytest.mark.parametrize("agent", AGENTS)
def test_every_argument_of_an_agent_is_a_flag_or_said_not_to_be(agent):
    names = set(inspect.signature(AGENTS[agent].cls.__init__).parameters)
    flags = {field.name for field in dataclasses.fields(agent_flags(agent))}
    not_flags = {"self", "env", "policy_kwargs", "cost_fn", "tensorboard_log", "verbose"}
    not_flags |= {"rollout_buffer_class", "rollout_buffer_kwargs", "group"}
    assert names - flags - not_flags == {"_init_setup_model"}


# Policy arguments


@pytest.mark.parametrize(
    ("agent", "preset"), [(agent, preset) for agent in AGENTS for preset in AGENTS[agent].presets]
)
def test_a_presets_policy_kwargs_reach_the_agent(agent, preset):
    entry = AGENTS[agent]
    wanted = entry.presets[preset].get("policy_kwargs", {})
    assert set(wanted) <= set(entry.policy_flags)
    made = job(agent, "--preset", preset, "--env-id", "Pendulum-v1", "--device", "cpu")
    if agent == "daappo":  # small: only what is passed on is looked at
        made = dataclasses.replace(made, arguments={**made.arguments, "dynamics_width": 8})
    env, _ = made.environments()
    passed = made.algorithm(env).policy_kwargs
    assert {name: passed[name] for name in wanted} == wanted
    assert json.loads(made.config())["policy_kwargs"].keys() == made.policy_kwargs.keys()


def test_sizes_are_flags_that_override_the_preset():
    made = job("dreamer", "--preset", "laptop", "--deter", "50", "--width=60")
    assert (made.policy_kwargs["deter"], made.policy_kwargs["width"]) == (50, 60)
    assert made.policy_kwargs["stoch"] == 16  # the preset's
    own = job("dreamer").policy_kwargs
    assert (own["size"], own["stoch"]) == ("m", None)  # the policy's own


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        (["256", "256"], [256, 256]),
        (["256,128"], [256, 128]),
        (["pi=512,512", "vf=1024"], {"pi": [512, 512], "vf": [1024]}),
        (["None"], None),
    ],
)
def test_layers_are_typed_as_numbers_or_by_part(words, layers):
    made = job("daappo", "--net-arch", *words, "--activation-fn", "relu")
    assert made.policy_kwargs["net_arch"] == layers
    assert json.loads(made.config())["policy_kwargs"]["activation_fn"] == "relu"


@pytest.mark.parametrize("text", ["100000", "100_000", "1e5", "1E+5", "100000.0"])
def test_a_whole_number_may_be_written_with_an_exponent(text):
    assert job("pipps", "--total-timesteps", text).options.total_timesteps == 100_000
    assert job("pipps", f"--n-particles={text}").arguments["n_particles"] == 100_000
    assert parse_resume(["--resume", "run", "--total-timesteps", text])[1] == 100_000
    peer = ["sac", "--env-id", "E", "--seeds", "0", "--out", "out", "--total-timesteps", text]
    assert parser_of("peer").parse_args(peer).total_timesteps == 100_000


@pytest.mark.parametrize("text", ["1.5", "1e-1", "inf", "nan", "many", ""])
def test_what_is_no_whole_number_is_refused(text, capsys):
    message = refused(capsys, "pipps", "--total-timesteps", text)
    assert f"{text!r} is not an integer, such as 100000 or 1e5" in message


def test_a_whole_number_keeps_all_its_digits():
    assert job("pipps", "--seed", str(2**53 + 1)).arguments["seed"] == 2**53 + 1


@pytest.mark.parametrize("words", [["many"], ["0"], ["pi=8", "9"], ["critic=8"], ["8,,9"]])
def test_wrong_layers_are_one_sentence(words, capsys):
    assert "--net-arch expects" in refused(capsys, "daappo", "--net-arch", *words)


def test_a_size_out_of_range_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^1$"):
        train.main(["dreamer", "--env-id", "Pendulum-v1", "--deter", "0", "--runs", str(tmp_path)])
    assert "deter must be at least 1, a whole number, got 0" in capsys.readouterr().err


def test_an_argument_of_another_policy_is_refused_and_its_default_is_not(capsys):
    linear = job("pipps", "--policy", "LinearPolicy", "--preset", "pipps2018")
    env, _ = linear.environments()
    assert "n_centres" not in linear.algorithm(env).policy_kwargs
    wrong = ["pipps", "--policy", "LinearPolicy", "--n-centres", "7"]
    with pytest.raises(SystemExit, match=r"^1$"):
        train.main(wrong)
    assert "--n-centres is not an argument of LinearPolicy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "cost", "estimator", "leg"),
    [("tpx2023", "tip", "tpx-unclipped", "score"), ("pipps2018", "angle", "tp", "biw")],
)
def test_a_preset_of_pipps_is_the_papers_task_and_estimator(preset, cost, estimator, leg, tmp_path):
    made = job("pipps", "--preset", preset)
    assert made.options.env_id == "totalprop/CartPoleSwingUp-v0"
    assert made.env_args == {"cost": cost, "noise": 1}
    assert (made.arguments["estimator"], made.arguments["leg"]) == (estimator, leg)
    mine = job("pipps", "--preset", preset, "--env-arg", "noise=4", "--estimator", "lr")
    assert mine.env_args == {"cost": cost, "noise": 4} and mine.arguments["estimator"] == "lr"
    assert job("pipps", "--preset", preset, "--env-id", "Pendulum-v1").env_args == {}
    config = json.loads(made.config())
    config["env_args"] = {}  # a run of before
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert job("--config", str(tmp_path)).env_args == {}
    (tmp_path / "mine.yaml").write_text(f"agent: pipps\npreset: {preset}\nenv_args: {{noise: 9}}\n")
    assert job("--config", str(tmp_path / "mine.yaml")).env_args == {"cost": cost, "noise": 9}


def test_the_unicycles_preset_is_its_task_with_a_linear_controller():
    made = job("pipps", "--preset", "pipps2018-unicycle")
    assert (made.options.env_id, made.options.total_timesteps) == ("totalprop/Unicycle-v0", 700)
    assert made.arguments["policy"] == "LinearPolicy"
    env, _ = made.environments()
    agent = made.algorithm(env)
    assert agent.invariant_dims == (8,) and agent.termination == "ignore"
    again = job("pipps", "--preset", "pipps2018-unicycle", "--invariant-dims", "7", "8")
    assert again.arguments["invariant_dims"] == (7, 8)


# --config


@pytest.mark.parametrize("suffix", ["json", "yaml"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["pipps", "--preset", "pipps2018", "--angle-dims", "1", "--env-arg", "noise=4"],
        ["dreamer", "--preset", "laptop", "--deter", "7", "--no-tensorboard", "--seed", "None"],
        ["daappo", "--preset", "mbma2023", "--name", "a b", "--target-kl", "0.02"],
        ["daappo", "--net-arch", "8", "--clip-range-vf", "None", "--env-arg", "action_repeat=2"],
        ["pipps", "--integrated-dims", "0,2", "[1,3]", "--start-means", "[-1,3,0,0]", "1,3,0,.5"],
    ],
    ids=" ".join,
)
def test_a_runs_config_is_a_command_line(tmp_path, arguments, suffix):
    wanted = job(*arguments)
    path = tmp_path / f"config.{suffix}"
    config = json.loads(wanted.config())
    path.write_text(json.dumps(config) if suffix == "json" else yaml.safe_dump(config))
    again = job("--config", str(path))
    assert again.flags() == wanted.flags()
    assert again.options.name == wanted.options.name
    assert job(arguments[0], f"--config={path}").flags() == wanted.flags()


def test_lists_of_lists_are_a_word_for_each(capsys):
    made = job("pilco", "--integrated-dims", "0,2", "[1,3]", "--start-means", "-1,3,0,.5", "1,2")
    assert made.arguments["integrated_dims"] == ((0, 2), (1, 3))
    assert made.arguments["start_means"] == ((-1.0, 3.0, 0.0, 0.5), (1.0, 2.0))
    assert "--integrated-dims cannot be 0,x" in refused(capsys, "pilco", "--integrated-dims", "0,x")


@pytest.mark.parametrize("agent", AGENTS)
def test_every_flag_takes_more_than_none(agent):
    for flags in (agent_flags(agent), policy_flags(agent)):
        hints = typing.get_type_hints(flags)
        assert type(None) not in hints.values(), hints


def test_a_yaml_file_of_settings_and_flags_that_override_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "agent: dreamer\npreset: laptop\nenv-id: dmc/walker-walk-v0\nestimator: lr\ndeter: 50\n"
        "env_args: {action_repeat: 4}\nlearning_rate: 1e-4\nbf16: true\n"
    )
    made = job("--config", str(path), "--estimator", "rp", "--env-arg", "action_repeat=2")
    assert (made.agent, made.preset, made.options.env_id) == (
        "dreamer",
        "laptop",
        "dmc/walker-walk-v0",
    )
    assert made.arguments["estimator"] == "rp" and made.arguments["learning_rate"] == 1e-4
    assert made.arguments["bf16"] is True and made.policy_kwargs["deter"] == 50
    assert made.env_args == {"action_repeat": 2}
    assert job("--config", str(path), "--preset", "laptop-pixels").arguments["free_nats"] == 3.0


def test_arguments_of_the_environment_may_have_the_flags_name_in_a_yaml_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("agent: pipps\nenv_arg: {noise: 9, mirrored: false}\n")
    made = job("--config", str(tmp_path / "mine.yaml"))
    assert made.env_args == {"noise": 9, "mirrored": False}


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("false", False), ("null", None), ("False", False), ("'true'", "true")],
)
def test_words_of_yaml_are_values_and_not_texts(text, value):
    found = job("pipps", "--env-arg", f"cost={text}").env_args["cost"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("estimator: tpx", "names no agent"),
        (
            "agent: pipps\nhorizonn: 3",
            "sets 'horizonn', which is not a setting; did you mean 'horizon'",
        ),
        ("agent: pipps\nhorizon: ten", "horizon"),
        ("agent: pipps\nhorizon: 2.5", "horizon"),
        ("agent: pipps\npreset: tpx2024", "unknown preset 'tpx2024'"),
        ("agent: sac", "unknown agent 'sac'"),
        ("- pipps", "must hold settings by name"),
        ("agent: [pipps", "cannot read"),
        ("agent: !!python/object/apply:os.system [ls]", "cannot read"),
    ],
)
def test_a_wrong_config_is_one_sentence(tmp_path, capsys, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert words in refused(capsys, "--config", str(path))


def test_a_config_of_another_agent_or_none_is_refused(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("agent: pipps\n")
    assert "is for pipps, not dreamer" in refused(capsys, "dreamer", "--config", str(path))
    assert "cannot read" in refused(capsys, "--config", str(tmp_path / "none.yaml"))


def test_a_run_made_from_a_runs_folder_is_the_same_run(tmp_path):
    first = ["pipps", *TINY["pipps"], "--no-tensorboard", "--no-progress", "--seed", "3"]
    train.main([*first, "--runs", str(tmp_path / "one"), "--name", "run"])
    folder = tmp_path / "one" / "run"
    train.main(["--config", str(folder), "--runs", str(tmp_path / "two")])
    again = tmp_path / "two" / "run"
    assert Job.read(RunFolder(again)).flags() == Job.read(RunFolder(folder)).flags()
    curves = [(path / "evaluations.json").read_bytes() for path in (folder, again)]
    assert curves[0] == curves[1]


def test_a_config_of_before_policy_flags_reads_the_presets(tmp_path):
    wanted = job("pipps", "--preset", "pipps2018")
    config = json.loads(wanted.config())
    del config["policy_kwargs"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Job.read(RunFolder(tmp_path)).flags() == wanted.flags()
