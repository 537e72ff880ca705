"""The grid of a sweep: which runs it has, what they are called, and what is refused."""

import json
import shlex
import shutil

import pytest

from totalprop.scripts.commands import parser_of
from totalprop.scripts.run.arguments import parse
from totalprop.scripts.run.errors import UsageError, UserError
from totalprop.scripts.studies import grid as studies_grid
from totalprop.scripts.studies import sweep
from totalprop.scripts.studies.grid import read_grid


def grid_of(words, flags=()):
    return read_grid(parser_of("sweep").parse_args([*words.split(), "--out", "o"]), list(flags))


def test_one_flag_has_the_names_and_the_command_that_it_always_had():
    grid = grid_of("pipps --estimators tpx lr --seeds 0 1", ["--horizon", "30"])
    assert list(grid.settings()) == ["tpx", "lr"] and grid.varied == "estimator"
    assert grid.settings()["lr"].run_name(1) == "lr_seed1"
    expected = ["pipps", "--estimator", "lr", "--seed", "1", "--horizon", "30"]
    assert grid.settings()["lr"].command(1) == expected
    assert grid.command() == "totalprop sweep pipps --estimators tpx lr"
    grid = grid_of("daappo --vary env-id --values a/b c --seeds 0")
    assert [each.run_name(0) for each in grid.settings().values()] == ["a_b_seed0", "c_seed0"]
    assert grid.command() == "totalprop sweep daappo --vary env-id --values a/b c"
    assert grid_of("pipps --values tpx --seeds 0").command().endswith("--estimators tpx")


def test_a_grid_has_every_combination():
    words = "daappo svg --vary gamma --values 0.9 0.99 --vary env-id --values A B C --seeds 0 1"
    grid = grid_of(words)
    settings = grid.settings()
    assert len(settings) == 12 and grid.varied == "setting"
    last = settings["agent=svg, gamma=0.99, env-id=C"]
    assert last.command(1) == ["svg", "--gamma", "0.99", "--env-id", "C", "--seed", "1"]
    assert last.run_name(1) == "agent=svg_gamma=0.99_env-id=C_seed1"
    assert list(grid_of("daappo svg --seeds 0").settings()) == ["daappo", "svg"]


def test_files_of_settings_are_known_by_their_folders_and_names():
    """A name is the key of finished runs, so it does not depend on which other files there are."""
    grid = grid_of("dreamer --vary config --values a/first.json x/b/second.yaml --seeds 0")
    settings = grid.settings()
    assert list(settings) == ["a/first", "b/second"]
    own = settings["b/second"]
    assert own.command(0) == ["dreamer", "--config", "x/b/second.yaml", "--seed", "0"]
    assert own.run_name(0) == "b_second_seed0"
    again = grid_of(f"{grid.command().removeprefix('totalprop sweep ')} --seeds 0")
    assert again == grid
    grid = grid_of("svg pipps --vary config --values a/x.json b/y.json --seeds 0")
    assert "agent=svg, config=a/x" in grid.settings()
    grid = grid_of("dreamer --vary config --values 1/a/x.json 2/a/x.json --seeds 0")
    with pytest.raises(UsageError, match="two files are called a/x: give them names that differ"):
        grid.settings()


@pytest.mark.parametrize(
    "flags",
    [["--env-arg", "gravity=(9.81 + 0)"], ["--env-arg=names=['a', 'b c']"], ["--preset", "it's"]],
)
def test_a_command_is_read_back_as_it_was_written(flags):
    words = "daappo --vary env-id --values A-v0 B-v0 --seeds 0"
    grid = grid_of(words, flags)
    again = studies_grid.grid_of(f"{grid.command()} --seeds 0 --out 'o o' -- {shlex.join(flags)}")
    assert again == grid


def test_one_agent_of_a_file_needs_nothing_to_compare():
    """What results.json quotes names no file."""
    again = studies_grid.grid_of("totalprop sweep daappo --seeds 0 1 --out o -- --gamma 0.9")
    assert again.agents == ["daappo"] and again.axes == {} and again.flags == ["--gamma", "0.9"]


def test_a_file_says_what_flags_say(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(
        "agent: daappo\nseed: [0, 1]\npreset: recommended\naction_source: [none, q]\n"
        "gamma: [0.9, 0.99]\ntotal_timesteps: 300\nenv_args: {noise: 4}\nnormalize: none\n"
        "normalize_advantage: [true, false]\n"
    )
    grid = grid_of(f"--grid {path}")
    assert len(grid.settings()) == 8 and list(grid.seeds) == [0, 1]
    flags = ["--preset", "recommended", "--total-timesteps", "300", "--env-arg=noise=4"]
    assert grid.flags == [*flags, "--normalize", "none"]
    job = parse(
        grid.settings()["action-source=q, gamma=0.9, normalize-advantage=false"].command(1), ""
    )
    assert (job.arguments["gamma"], job.arguments["normalize_advantage"]) == (0.9, False)
    assert job.env_args == {"noise": 4} and job.preset == "recommended"
    again = grid_of(f"{grid.command().removeprefix('totalprop sweep ')} --seeds 0 1", grid.flags)
    assert again == grid  # the command in results.json needs no file


@pytest.mark.parametrize(
    ("words", "text", "message"),
    [
        ("pipps --vary a --vary b --values 1 --seeds 0", None, "own --values, got 2 and 1"),
        ("pipps --vary a --values 1 --vary a --values 2 --seeds 0", None, "flag once, got a a"),
        ("pipps --estimators tpx", None, "needs an agent and --seeds"),
        ("--estimators tpx --seeds 0", None, "needs an agent and --seeds"),
        ("pips --estimators tpx --seeds 0", None, "unknown agent 'pips'; choose one of pipps"),
        ("pipps --estimators tpx --grid FILE", "seed: -1", "seed must be at least 0 and below 2"),
        ("pipps --grid FILE", "seed: [0, x]", "yaml: seed 'x' is not an integer"),
        ("pipps --grid FILE --seeds 0", "horizon: []", "horizon has no values"),
        ("pipps --grid FILE --seeds 0", "horizon: [{a: 1}]", "horizon must be a word, a number"),
        ("pipps --grid FILE --seeds 0", "horizon: null", "horizon must be a word, a number"),
        ("pipps --grid FILE --seeds 0", "agent: pipps", "each agent once, got pipps pipps"),
    ],
)  # fmt: skip
def test_what_is_no_grid_is_one_sentence(words, text, message, tmp_path):
    if text is not None:
        (tmp_path / "grid.yaml").write_text(text)
        words = words.replace("FILE", str(tmp_path / "grid.yaml"))
    with pytest.raises(UsageError, match=message):
        grid_of(words)


@pytest.mark.parametrize("flag", [["--estimator", "rp"], ["--estimator=rp"], ["--seed", "4"]])
def test_a_flag_of_all_runs_is_none_that_the_grid_varies(flag):
    """It would come last and count, in runs that are named after the grid's value."""
    with pytest.raises(UsageError, match=f"{flag[0].partition('=')[0]} is different in the runs"):
        grid_of("pipps --estimators tpx lr --seeds 0", ["--horizon", "30", *flag])
    words = "daappo --vary normalize-advantage --values true false --seeds 0"
    with pytest.raises(UsageError, match="--no-normalize-advantage is different"):
        grid_of(words, ["--no-normalize-advantage"])


def test_success_is_that_of_the_tasks_own_threshold():
    run = {"final_cost": 11.0, "costs": [11.0]}
    table = sweep._table({"tpx": {"0": {**run, "success_threshold": 10.0}}}, "cost", "estimator")
    assert "success < 7.5 | success < 10 | success < 12.5 |" in table and "0/1 | 0/1 | 1/1" in table
    for others in (None, 15.0):  # a task without one, and two tasks
        runs = {"tpx": {"0": {**run, "success_threshold": 10.0}, "1": run}}
        runs["tpx"]["1"] = {**run, "success_threshold": others}
        assert "success" not in sweep._table(runs, "cost", "estimator")


def test_seeds_of_one_setting_are_a_sweep():
    grid = grid_of("pilco --seeds 0 1", ["--preset", "recommended"])
    (setting,) = grid.settings().values()
    assert setting.label == "pilco" and setting.command(1)[-2:] == ["--preset", "recommended"]
    words = "totalprop sweep pilco --seeds 0 1 --out o -- --preset recommended"
    assert studies_grid.grid_of(words) == grid and grid.command() == "totalprop sweep pilco"


@pytest.mark.parametrize("text", ["- a\n", "a: [", "!!python/object/apply:os.getcwd []"])
def test_a_file_that_is_no_mapping_is_one_sentence(text, tmp_path):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(UserError, match=r"grid\.yaml"):
        grid_of(f"pipps --grid {tmp_path / 'grid.yaml'} --seeds 0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pipps --estimators tpx nope", "nope_seed0 cannot begin: unknown estimator 'nope'"),
        ("pipps --vary horizon --values 9 0", "0_seed0 cannot begin: --horizon must be at least 1"),
        (
            "daappo --vary env-id --values Pendulum-v1 Pendulum-v9",
            "Pendulum-v9_seed0 cannot begin: unknown environment 'Pendulum-v9'",
        ),
        ("pipps --estimators rp -- --eval-episodes 1", "--eval-episodes must be at least 2"),
        ("pipps --estimators rp -- --env-arg cost=none", "cannot make the environment"),
    ],
)
def test_a_value_that_a_run_would_refuse_is_said_before_the_first_run(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    own, _, flags = arguments.partition(" -- ")
    words = [*own.split(), "--seeds", "0", "1", "--out", "out", "--", *flags.split()]
    with pytest.raises(SystemExit):
        sweep.main(words)
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cpus-per-run", "0"], "--cpus-per-run must be above 0, got 0"),
        (["--gpus-per-run", "nan"], "--gpus-per-run must be above 0, got nan"),
        (["--slurm", "--cpus-per-run", "0.5"], "must be a whole number with --slurm, got 0.5"),
        (["--slurm", "--address", "auto"], "pass one of them"),
        (["--slurm-arg", "partition"], "--slurm-arg expects NAME=VALUE, got 'partition'"),
    ],
)  # fmt: skip
def test_wrong_places_are_one_sentence(flags, message, tmp_path, capsys):
    command = ["pipps", "--estimators", "tpx", "--seeds", "0", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        sweep.main([*command, *flags])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_costs_beside_returns_are_negative_returns(tmp_path, capsys):
    """Runs as they are read: the folders hold what `totalprop train` writes."""
    words = f"pipps daappo --vary learning-rate --values 0.9 --seeds 0 --runs {tmp_path / 'runs'}"
    for agent, quantity, final in (("pipps", "cost", 3.0), ("daappo", "return", -2.0)):
        folder = tmp_path / "runs" / f"agent={agent}_learning-rate=0.9_seed0"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"commit": "abc"}')
        (folder / "summary.json").write_text(json.dumps({f"final_{quantity}": final}))
        record = {"timesteps": [30, 60], "returns": [[-5.0, -7.0], [-2.0, -4.0]]}
        (folder / "evaluations.json").write_text(json.dumps(record))
    options = parser_of("sweep").parse_args([*words.split(), "--out", str(tmp_path / "out")])
    options.is_default = False
    grid = read_grid(options, [])
    sweep.report(options, grid, sweep.read_earlier(options.out, grid))
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert results["agent=pipps, learning-rate=0.9"]["0"]["final_return"] == -3.0
    assert "agent=daappo, learning-rate=0.9" in capsys.readouterr().out
    lines = (tmp_path / "runs" / "evaluations.csv").read_text().splitlines()
    assert lines == [
        "agent,learning-rate,seed,decisions,return",
        "pipps,0.9,0,30,-6.0", "pipps,0.9,0,60,-3.0",
        "daappo,0.9,0,30,-6.0", "daappo,0.9,0,60,-3.0",
    ]  # fmt: skip
    # On another machine, the results are enough, and further seeds and values join them.
    options.runs = tmp_path / "elsewhere"
    found = sweep.read_earlier(options.out, grid)
    assert found.results == results and found.commits == {"abc"}
    other = grid._replace(axes={"learning-rate": ["0.5"]}, seeds=[1])
    folder = tmp_path / "elsewhere" / "agent=pipps_learning-rate=0.5_seed1"
    shutil.copytree(tmp_path / "runs" / "agent=pipps_learning-rate=0.9_seed0", folder)
    sweep.report(options, other, sweep.read_earlier(options.out, other))
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    added = record["results"].pop("agent=pipps, learning-rate=0.5")
    assert list(added) == ["1"] and record["results"] == results
    assert "--values 0.9 0.5 --seeds 0 1" in record["command"]
    # Another sweep's results would be lost.
    for changed in (grid._replace(flags=["--gamma", "1"]), grid._replace(axes={"gamma": ["0.9"]})):
        with pytest.raises(UserError, match="holds the results of `totalprop sweep pipps daappo"):
            sweep.read_earlier(options.out, changed)


def test_a_table_of_evaluations_is_parquet_too(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    grid = grid_of("pipps --estimators tpx --seeds 0")
    results = {"tpx": {"0": {"timesteps": [30, 60], "costs": [5.0, 4.5]}}}
    path = sweep._write_evaluations(tmp_path, grid, results, "cost")
    found = parquet.read_table(path.with_suffix(".parquet")).to_pydict()
    assert found["estimator"] == ["tpx"] * 2 and found["cost"] == [5.0, 4.5]


def test_each_value_is_tried_once_whatever_the_seeds(monkeypatch):
    made = []
    monkeypatch.setattr(sweep.Job, "algorithm", lambda job, env: made.append(job.arguments))
    own = grid_of("pipps --estimators rp lr --seeds 0 1 2", ["--horizon", "9"])
    sweep.try_out(sweep.jobs_of(own))
    assert [arguments["estimator"] for arguments in made] == ["rp", "lr"]
