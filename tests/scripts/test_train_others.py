"""The commands with DreamerTPX and DAAPPO, end to end on the cart-pole."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, unwrap_vec_normalize

from totalprop import estimators
from totalprop.agents import AGENTS, DreamerTPX
from totalprop.envs.rewind import Rewindable
from totalprop.estimators.analysis.diagnostics import mean_difference, statistics_of
from totalprop.scripts import evaluate, train
from totalprop.scripts.bench import pipps as bench
from totalprop.scripts.bench import ppo as bench_ppo
from totalprop.scripts.bench import sheeprl_peer
from totalprop.scripts.run import arguments as train_arguments
from totalprop.scripts.run import normalisation
from totalprop.scripts.run.environments import make_env
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.studies import agent_problems, diagnose, sweep, variance

CART_POLE = ["--env-id", "totalprop/CartPoleSwingUp-v0", "--threads", "1", "--no-progress"]
DREAMER = ["dreamer", "--preset", "laptop", "--total-timesteps", "120", "--learning-starts", "60"]
DREAMER += ["--sequence-length", "8", "--batch-size", "4", "--imagination-starts", "8"]
DREAMER += ["--eval-every", "40", "--eval-episodes", "2", "--gradient-steps", "1", *CART_POLE]
DAAPPO = ["daappo", "--total-timesteps", "120", "--n-steps", "60", "--batch-size", "30"]
DAAPPO += ["--dynamics-width", "8", "--n-extra-actions", "2", "--simulation-horizon", "2"]
DAAPPO += ["--eval-every", "60", "--eval-episodes", "2", "--n-epochs", "2", *CART_POLE]


def options_of(*arguments):
    """Normalisation, schedule and environment arguments that a command line results in."""
    job = train_arguments.parse(["daappo", *arguments], usage="")
    return job.options.normalize, job.options.learning_rate_schedule, job.env_args


@pytest.mark.parametrize(
    ("preset", "normalize"), [("daa2022", "both"), ("mbma2023", "none"), ("mbma_code", "none")]
)
def test_a_papers_preset_is_its_run_too_and_flags_win(preset, normalize):
    command = ["--preset", preset]
    assert options_of(*command) == (normalize, "linear", {"action_repeat": 4})
    assert options_of(*command, "--env-id", "dmc/walker-walk-v0")[2] == {"action_repeat": 4}
    assert options_of(*command, "--env-id", "Pendulum-v1")[2] == {}
    flags = ["--normalize", "rewards", "--learning-rate-schedule", "constant"]
    flags += ["--env-arg", "action_repeat=2", "--env-arg", "render=fast"]
    expected = "rewards", "constant", {"action_repeat": 2, "render": "fast"}
    assert options_of(*command, *flags) == expected


def test_our_own_preset_and_none_are_the_run_of_the_defaults():
    for command in ([], ["--preset", "recommended"]):
        assert options_of(*command) == ("both", "constant", {})


def test_the_authors_code_is_trained_without_normalisation_at_a_falling_rate():
    command = ["daappo", "--preset", "mbma_code", "--dynamics-width", "8", *CART_POLE]
    job = train_arguments.parse(command, usage="")
    env, eval_env = job.environments()
    assert unwrap_vec_normalize(env) is None and unwrap_vec_normalize(eval_env) is None
    agent = job.algorithm(env)
    assert [agent.lr_schedule(progress) for progress in (1.0, 0.5, 0.0)] == [3e-4, 1.5e-4, 0.0]


@pytest.fixture(scope="module")
def dreamer_run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    train.main([*DREAMER, "--runs", str(runs), "--name", "run", "--save-replay"])
    return runs / "run"


def test_a_dreamer_run_leaves_everything(dreamer_run):
    names = {path.name for path in dreamer_run.iterdir()}
    expected = {"config.json", "model.zip", "progress.csv", "evaluations.json", "summary.json"}
    expected |= {"learning_curve.png", "rollout.gif", "replay.npz", "open_loop.png"}
    assert expected <= names
    evaluations = json.loads((dreamer_run / "evaluations.json").read_text())
    assert evaluations["timesteps"] == [60, 100, 120]
    assert np.isfinite(json.loads((dreamer_run / "summary.json").read_text())["final_return"])


def test_a_run_from_pixels_is_evaluated_resumed_and_filmed(tmp_path, capsys):
    pytest.importorskip("dm_control")
    pixels = ["--env-id", "dm_control/pendulum-swingup-v0"]
    for argument in ("observation=pixels", "render=fast", "action_repeat=50"):
        pixels += ["--env-arg", argument]
    train.main([*DREAMER, *pixels, "--runs", str(tmp_path), "--name", "run"])
    train.main(["--resume", str(tmp_path / "run"), "--total-timesteps", "160"])
    evaluations = json.loads((tmp_path / "run" / "evaluations.json").read_text())
    assert evaluations["timesteps"] == [60, 100, 120, 160]
    assert {"rollout.gif", "open_loop.gif"} <= {p.name for p in (tmp_path / "run").iterdir()}
    evaluate.main([str(tmp_path / "run"), "--episodes", "2"])
    assert "return" in capsys.readouterr().out


def test_a_world_model_is_taken_from_a_run(dreamer_run, tmp_path, capsys):
    train.main(
        [*DREAMER, "--runs", str(tmp_path), "--name", "b", "--pretrained-world-model",
         str(dreamer_run), "--estimator", "rp"]
    )  # fmt: skip
    assert "Next:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        train.main([*DREAMER, "--runs", str(tmp_path), "--pretrained-world-model", "no/such/run"])
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert "does not exist" in error.splitlines()[-1] and error.count("error:") == 1


DIAGNOSE = ["--horizons", "2", "4", "--starts", "2", "--repeats", "4", "--trajectories", "8"]
DIAGNOSE += ["--threads", "1", "--estimators"]


def test_diagnose_measures_names_and_draws(dreamer_run, tmp_path, capsys):
    diagnose.main([str(dreamer_run), *DIAGNOSE, "rp", "lr", "tpx", "--out", str(tmp_path / "d")])
    output = capsys.readouterr().out
    assert "Most accurate gradient for this model" in output and "| `rp` |" in output
    found = json.loads((tmp_path / "d" / "results.json").read_text())
    assert {"accuracy.png", "table.md"} <= {path.name for path in (tmp_path / "d").iterdir()}
    assert "tpx" in json.dumps(found)


def test_diagnose_needs_no_saved_replay_and_may_let_the_actors_input_have_a_gradient(
    dreamer_run, tmp_path
):
    """The newest checkpoint has the same model and replay. The flag changes the gradient."""
    found, advised = [], []
    for name in ("stop-grad", "no-stop-grad"):
        copy = shutil.copytree(dreamer_run, tmp_path / name)
        if name == "no-stop-grad":
            (copy / "replay.npz").unlink()
        diagnose.main([str(copy), *DIAGNOSE, "rp", f"--{name}-actor-input"])
        found.append(json.loads((copy / "diagnosis" / "results.json").read_text())["results"]["rp"])
        advised.append((copy / "diagnosis" / "table.md").read_text())
    diagnose.main([str(tmp_path / "no-stop-grad"), *DIAGNOSE, "rp"])  # as in training: blocked
    trained = json.loads((tmp_path / "no-stop-grad" / "diagnosis" / "results.json").read_text())
    assert trained["results"]["rp"] == found[0] != found[1]
    assert ["Compare with --no-stop-grad" in text for text in advised] == [True, False]


def test_diagnose_measures_the_agent_as_it_is(dreamer_run, tmp_path, monkeypatch):
    """The agent's own baseline is used, and a compiled model is not compiled again."""
    seen, update = [], agent_problems.DreamerUpdate

    def spy(policy, settings):
        seen.append(settings)
        return update(policy, settings)

    agent = DreamerTPX.load(dreamer_run / "model.zip", baseline="critic")
    agent._update.settings = dataclasses.replace(agent._update.settings, compile=True)
    monkeypatch.setattr(diagnose, "_load", lambda run: agent)
    start, _ = agent.policy.initial_state(1)
    monkeypatch.setattr(diagnose, "encoded_starts", lambda agent, n, seed: [start] * n)
    monkeypatch.setattr(agent_problems, "DreamerUpdate", spy)
    diagnose.main([str(dreamer_run), *DIAGNOSE, "rp", "tpx", "--out", str(tmp_path)])
    assert len(seen) == 4
    for settings in seen:
        assert settings.estimator.baseline is estimators.baselines.critic
        assert not settings.compile and not settings.cuda_graph


def test_diagnose_leaves_the_entropy_bonus_out(dreamer_run, tmp_path, monkeypatch):
    """It is nearly free of noise and common to all: with it, ratios of any size are the same."""
    found = []
    for scale in (0.0, 1e6):
        agent = diagnose._load(RunFolder.open(dreamer_run))
        imagination = dataclasses.replace(agent._update.settings.imagination, entropy_scale=scale)
        settings = dataclasses.replace(agent._update.settings, imagination=imagination)
        monkeypatch.setattr(agent._update, "settings", settings)
        monkeypatch.setattr(diagnose, "_load", lambda run, agent=agent: agent)
        out = tmp_path / str(scale)
        diagnose.main([str(dreamer_run), *DIAGNOSE, "rp", "lr", "--out", str(out)])
        found.append(json.loads((out / "results.json").read_text())["results"])
        monkeypatch.undo()
    assert found[0] == found[1]
    assert found[0]["rp"]["2"]["snr_median"] != found[0]["lr"]["2"]["snr_median"]


def test_diagnose_says_that_nothing_was_learned_yet(tmp_path, capsys):
    short = ["--total-timesteps", "20", "--save-replay"]
    train.main([*DREAMER, "--runs", str(tmp_path), "--name", "run", *short])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        diagnose.main([str(tmp_path / "run"), *DIAGNOSE, "rp"])
    error = capsys.readouterr().err
    assert "learned nothing after 20 steps" in error and "--resume" in error
    assert error.count("\n") == 1


def test_diagnose_says_which_are_equal_and_which_are_wrong():
    """Toy of 10 starts: `a` is precise and right, `b` precise with the wrong sign, `lr` noisy."""
    noise = torch.randn(3, 10, 10, 5, generator=torch.Generator().manual_seed(0))
    toys = {"a": 3 + 0.1 * noise[0], "b": -3 + 0.1 * noise[1], "lr": 3 + noise[2]}
    results = {
        name: {15: diagnose.Measured(statistics_of(g), mean_difference(g, toys["lr"]))}
        for name, g in toys.items()
    }
    text = diagnose.advice(results)
    best, other = ("a", "b") if results["a"][15].snr > results["b"][15].snr else ("b", "a")
    assert f"horizon 15: `{best}` (not distinguishable: `{other}`)" in text
    assert "The mean of `b` at horizon 15 differs" in text
    table = diagnose.table(results)
    assert " to " in table and "in standard errors" in table


@pytest.mark.parametrize("source", ["none", "dynamics", "q", "states", "rewind"])
def test_a_daappo_run_leaves_everything_and_evaluates(source, tmp_path, capsys):
    train.main([*DAAPPO, "--runs", str(tmp_path), "--action-source", source])
    (folder,) = tmp_path.iterdir()
    assert source in folder.name
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "model.zip",
        "progress.csv",
        "learning_curve.png",
        "rollout.gif",
    } <= names
    capsys.readouterr()
    evaluate.main([str(folder), "--episodes", "2", "--no-gif"])
    assert "over 2 episodes" in capsys.readouterr().out


class Line(gym.Env):
    """x' = x + a; reward x' on arriving."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-100, 100, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = 1.0
        return np.array([self.x], np.float32), {}

    def step(self, action):
        self.x += float(action[0])
        return np.array([self.x], np.float32), self.x, False, False, {}

    def get_state(self):
        return {"x": self.x}

    def set_state(self, state):
        self.x = state["x"]


def line_sampler(std=1e-6, **changes):
    """Its policy has the mean 2 x + 0.5."""
    options = {"seed": 0, "steps": 3, "rollouts": 2, "horizon": 4, "gamma": 0.5, "trajectories": 20}
    env = DummyVecEnv([lambda: Rewindable(Line())])
    torch.manual_seed(0)
    how = {"net_arch": {"pi": [], "vf": []}}
    policy = ActorCriticPolicy(env.observation_space, env.action_space, lambda _: 0.0, **how)
    with torch.no_grad():
        policy.action_net.weight.fill_(2.0)
        policy.action_net.bias.fill_(0.5)
        policy.log_std.fill_(math.log(std))
    return variance.Sampler(env, policy, SimpleNamespace(**{**options, **changes}))


def test_values_of_variance_are_discounted_returns():
    sampler = line_sampler()
    sampler._method("reset", seed=0)
    start = sampler._method("snapshot")
    x, expected = 1.0 + 0.25, 0.0
    for step in range(4):
        expected += 0.5**step * x
        x += 2 * x + 0.5
    assert sampler._value(start, torch.tensor([0.25])) == pytest.approx(expected, rel=1e-4)


def test_the_gradients_of_variance_are_values_times_scores(monkeypatch):
    sampler, values, actions = line_sampler(std=0.3, steps=1), [], []
    value, draw = sampler._value, sampler._draw
    monkeypatch.setattr(sampler, "_value", lambda *args: values.append(value(*args)) or values[-1])
    monkeypatch.setattr(sampler, "_draw", lambda state: actions.append(draw(state)) or actions[-1])
    found = sampler.trajectory()
    assert found.shape == (1, 2, 2, 3)  # [T, 2, K, P]: log_std, weight, bias
    parameters = list(sampler.actor.parameters())
    for i in range(2):
        mean, log_std = sampler.actor(torch.ones(1, 1))
        density = torch.distributions.Normal(mean[0], log_std.exp()).log_prob(actions[i]).sum()
        score = torch.cat([g.flatten() for g in torch.autograd.grad(density, parameters)])
        for j in range(2):
            torch.testing.assert_close(found[0, i, j], values[2 * i + j] * score)


def test_updates_of_variance_ascend(monkeypatch):
    sampler = line_sampler()
    before = torch.nn.utils.parameters_to_vector(sampler.actor.parameters()).detach().clone()
    made = iter([torch.ones(1, 2, 2, 3), 3 * torch.ones(1, 2, 2, 3)])
    monkeypatch.setattr(sampler, "trajectory", lambda: next(made))
    sampler.update(0.25)
    after = torch.nn.utils.parameters_to_vector(sampler.actor.parameters())
    torch.testing.assert_close(after, before + 0.25 * 2)


def test_variance_prints_the_table_and_the_advice(tmp_path, capsys):
    command = ["--env-id", "totalprop/CartPoleSwingUp-v0", "--trajectories", "6", "--steps", "5"]
    command += ["--horizon", "3", "--json", str(tmp_path / "v.json")]
    variance.main(command)
    output = capsys.readouterr().out
    assert "Policy-dependent variance" in output and "policy-dependent share" in output
    assert "more trajectories at the same cost" in output  # not longer ones: they begin with resets
    is_decided = "Best at the cost of" in output
    assert is_decided != ("within its noise" in output)
    first = json.loads((tmp_path / "v.json").read_text())
    low, high = first["intervals"]["policy_share"]
    assert f"share: {first['policy_share']:.1%} [{low:.1%}, {high:.1%}]" in output
    assert set(first) == {*first["intervals"], "intervals", "options"}
    variance.main(command)
    assert json.loads((tmp_path / "v.json").read_text()) == first  # the same seed, the same result
    assert int(output.split("; ")[1].split(" steps in all")[0]) == 6 * 5 * (2 * 2 * 3 + 1)


def test_rollouts_that_value_an_action_have_noise_of_their_own(monkeypatch):
    """Rollouts of one noisy step differ, although a snapshot alone would repeat the noise."""
    seen, step = [], variance.Sampler._step

    def spy(sampler, action):
        found = step(sampler, action)
        seen.append(tuple(found[0]))
        return found

    monkeypatch.setattr(variance.Sampler, "_step", spy)
    command = ["--env-id", "totalprop/CartPoleSwingUp-v0", "--trajectories", "2", "--steps", "2"]
    command += ["--horizon", "1", "--rollouts", "5", "--env-arg"]
    for noise, differing in (("noise=4", 5), ("noise=0", 1)):
        runs = []
        for _ in range(2):
            seen.clear()
            variance.main([*command, noise])
            runs.append(list(seen))
        assert runs[0] == runs[1] and len(seen) == 2 * 2 * (2 * 5 + 1)  # same seed, same steps
        for i in range(0, len(seen), 11):  # five per action, and the step of the trajectory
            first, second = seen[i : i + 5], seen[i + 5 : i + 10]
            assert len(set(first)) == len(set(second)) == differing
            assert (seen[i + 10] in first) == (noise == "noise=0")


def test_variance_takes_an_episode_to_its_last_step(capsys):
    command = ["--env-id", "totalprop/CartPoleSwingUp-v0", "--trajectories", "2", "--steps", "30"]
    variance.main([*command, "--horizon", "1"])
    assert "2 trajectories of 30 steps" in capsys.readouterr().out


def test_variance_shows_a_trained_policy_what_it_was_trained_on(tmp_path, monkeypatch):
    train.main([*DAAPPO, "--runs", str(tmp_path), "--name", "run"])
    statistics = json.loads((tmp_path / "run" / "vec_normalize.json").read_text())["observation"]
    pairs, state_of = [], variance.Sampler._state

    def spy(sampler, observation):
        state = state_of(sampler, observation)
        pairs.append((np.asarray(observation), state.numpy()))
        return state

    monkeypatch.setattr(variance.Sampler, "_state", spy)
    sizes = ["--trajectories", "2", "--steps", "3", "--horizon", "2"]
    variance.main([str(tmp_path / "run"), *sizes])
    mean, deviation = np.array(statistics["mean"]), np.sqrt(np.array(statistics["var"]) + 1e-8)
    assert len(pairs) > 20
    for observation, state in pairs:
        expected = np.clip((observation - mean) / deviation, -10, 10)
        np.testing.assert_allclose(state, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--delta", "0"], 2, "--delta must be above 0 and at most 1e+300, got 0"),
        (["--rollouts", "1"], 2, "--rollouts must be at least 2, got 1"),
        (["--env-id", "InvertedPendulum-v5"], 1, "rewound"),
        (["--env-id", "totalprop/CartPoleSwingUp-v0", "--steps", "31"], 1, "before --steps 31"),
        (["no/such/run"], 1, "no/such/run"),
    ],
)
def test_variance_says_what_is_wrong(arguments, code, text, capsys):
    with pytest.raises(SystemExit) as stop:
        variance.main(arguments)
    assert stop.value.code == code
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("pipps --repeats -1", "--repeats must be at least 1, got -1"),
        ("ppo --repeats 0", "--repeats must be at least 1, got 0"),
        ("pipps --points 30 0", "--points must be at least 1, got 0"),
        ("dreamer --batch 0", "--batch must be at least 1, got 0"),
        ("dreamer --horizons 1", "--horizons must be at least 2, got 1"),
        ("pipps --device cuda", "--device and --modes are for dreamer; pipps is timed on the CPU"),
        ("ppo --device cuda", "--device and --modes are for dreamer; ppo is timed on the CPU"),
        ("checkpoint --device cuda", "for dreamer; checkpoint is timed on the CPU"),
        ("dreamer --device foo", "a GPU that PyTorch sees, got 'foo'"),
        ("dreamer --device cuda:99", "a GPU that PyTorch sees, got 'cuda:99'"),
        ("dreamer --device meta", "--device must be cpu or cuda, got 'meta'"),
        ("dreamer --modes cuda_graph", "--modes cuda_graph needs --device cuda"),
    ],
)
def test_bench_refuses_before_it_times_anything(arguments, text, capsys, monkeypatch):
    for name in ("pipps", "pilco", "ppo", "svg", "checkpoint", "dreamer"):
        monkeypatch.setattr(bench, f"bench_{name}", None)
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and text in error and "Traceback" not in error


def test_bench_writes_what_was_timed_where(tmp_path, monkeypatch):
    repeats = []
    monkeypatch.setattr(bench, "bench_ppo", lambda n: repeats.append(n) or {"ratio": 1.0})
    bench.main(["ppo", "--json", str(tmp_path / "a.json"), "--threads", "1"])
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["what"] == "ppo" and record["device"] == "cpu" and repeats == [5]


def test_bench_of_ppo_gives_ratios(monkeypatch):
    tiny = {"action_source": "dynamics", "n_steps": 16, "batch_size": 16, "n_epochs": 1,
            "dynamics_width": 8, "policy_kwargs": {"net_arch": [8]}}  # fmt: skip
    monkeypatch.setitem(AGENTS["daappo"].presets, "recommended", tiny)
    row = bench_ppo.bench_ppo(1)
    assert len(row) == 6 and all(value > 0 for value in row.values())


def test_normalised_runs_are_evaluated_in_the_trainings_units(tmp_path, capsys):
    train.main([*DAAPPO, "--runs", str(tmp_path), "--name", "n", "--normalize", "both"])
    statistics = json.loads((tmp_path / "n" / "vec_normalize.json").read_text())
    assert statistics["observation"]["count"] > 100 and statistics["return"]["var"] > 0
    env = make_env("totalprop/CartPoleSwingUp-v0", {}, seed=0)
    env = normalisation.normalise_like(env, tmp_path / "n" / "vec_normalize.json")
    raw = np.array([[1.0, 2.0, 3.0, 4.0]])
    mean, var = np.array(statistics["observation"]["mean"]), statistics["observation"]["var"]
    np.testing.assert_allclose(env.normalize_obs(raw), (raw - mean) / np.sqrt(var), rtol=1e-5)
    assert not env.training and not env.norm_reward
    evaluate.main([str(tmp_path / "n"), "--episodes", "2", "--no-gif"])
    assert "return -" in capsys.readouterr().out


def test_normalising_for_an_agent_that_scales_itself_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main([*DREAMER, "--runs", str(tmp_path), "--normalize", "both"])
    assert "pass the environment without VecNormalize" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_sweep_varies_any_flag_and_draws_any_column(tmp_path, monkeypatch, capsys, sweep_by_fork):
    sweep_by_fork()
    command = ["sweep", "daappo", "--vary", "action-source", "--values", "none", "q"]
    command += ["--seeds", "0", "1", "--runs", str(tmp_path / "r"), "--out", str(tmp_path / "out")]
    flags = ["--", *DAAPPO[1:-5], *CART_POLE[:2]]
    monkeypatch.setattr("sys.argv", [*command, "--jobs", "1", "--watch", "train/loss", *flags])
    sweep.main()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["results"]) == ["none", "q"] and "--vary action-source" in found["command"]
    table = (tmp_path / "out" / "table.md").read_text()
    average = [np.mean(found["results"]["q"][s]["returns"]) for s in ("0", "1")]
    assert f"| {np.mean(average):.2f} ±" in table
    watched = found["results"]["q"]["1"]["train/loss"]
    assert watched["timesteps"][-1] == 120 and np.isfinite(watched["values"]).all()
    monkeypatch.setattr("sys.argv", [*command, "--watch", "train/los", *flags])
    with pytest.raises(SystemExit, match="1"):
        sweep.main()
    assert "no column 'train/los'; close to it: train/loss" in capsys.readouterr().err


def test_a_sweep_goes_on_where_only_its_results_are(tmp_path, monkeypatch, capsys, sweep_by_fork):
    """On another machine: what results.json has of the same flags is kept, the rest is trained."""
    sweep_by_fork()
    out = tmp_path / "out"

    def swept(seeds, machine, *flags):
        command = ["sweep", "daappo", "--vary", "action-source", "--values", "none", "--seeds"]
        command += [*seeds, "--runs", str(tmp_path / machine), "--out", str(out), "--jobs", "1"]
        monkeypatch.setattr("sys.argv", [*command, "--", *DAAPPO[1:-5], *CART_POLE[:2], *flags])
        sweep.main()
        return json.loads((out / "results.json").read_text())["results"]["none"]

    first = swept(["0"], "a")
    both = swept(["0", "1"], "b")
    assert both["0"] == first["0"] and list(both) == ["0", "1"]
    assert [path.name for path in (tmp_path / "b").glob("*/")] == ["none_seed1"]
    assert swept(["1"], "c") == both and not (tmp_path / "c" / "none_seed1").exists()
    with pytest.raises(SystemExit, match="1"):
        swept(["0"], "c", "--gamma", "0.9")
    assert "another sweep; choose another --out" in capsys.readouterr().err
    (out / "results.json").write_text('{"results": {}}')
    with pytest.raises(SystemExit, match="1"):
        swept(["0"], "d")
    assert "results.json was not written by a sweep" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["gone", "cut", "foreign"])
def test_a_normalised_run_without_its_statistics_is_not_evaluated(damage, tmp_path, capsys):
    """Without them the policy's inputs, and so the return, would differ from training."""
    train.main([*DAAPPO, "--runs", str(tmp_path), "--name", "n", "--normalize", "both"])
    path = tmp_path / "n" / "vec_normalize.json"
    text = {"gone": None, "cut": path.read_text()[:30], "foreign": '{"norm_obs": true}'}[damage]
    path.unlink() if text is None else path.write_text(text)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(tmp_path / "n"), "--episodes", "2", "--no-gif"])
    said = capsys.readouterr()
    assert stop.value.code != 0 and "return" not in said.out
    error = said.err + str(stop.value.code)
    assert "vec_normalize.json" in error and "Traceback" not in error


def test_bench_runs_its_peer_in_an_environment_of_its_own(tmp_path, monkeypatch):
    peer = tmp_path / "python"
    monkeypatch.setattr(sheeprl_peer, "PYTHON", peer)
    with pytest.raises(ImportError, match="make bench-peer"):
        sheeprl_peer.start_update(horizon=3)
    peer.write_text('#!/bin/sh\necho ready\nwhile read -r line; do echo >> "$0.log"; echo; done\n')
    peer.chmod(0o700)
    update = sheeprl_peer.start_update(horizon=3)
    for updates in (1, 2):
        update()
        assert (tmp_path / "python.log").read_text() == updates * "\n"  # done when it returns
    peer.write_text("#!/bin/sh\necho another version\n")
    with pytest.raises(ImportError, match="another version"):
        sheeprl_peer.start_update(horizon=3)
    peer.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(RuntimeError, match="exit code 3"):
        sheeprl_peer.start_update(horizon=3)
