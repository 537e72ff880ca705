"""PILCO beside the contract of tests/agents/contract/: its cost, its search, what it refuses."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.nn.utils import parameters_to_vector

import totalprop.envs  # noqa: F401  (registers the cart-pole)
from tests.agents.contract.probes import logged
from totalprop.agents import PILCO
from totalprop.agents.pilco import agent as module
from totalprop.agents.pilco.presets import PRESETS, RUNS
from totalprop.agents.trials.controllers import ControllerPolicy
from totalprop.agents.trials.saturating_cost import SaturatingCost

CARTPOLE = "totalprop/CartPoleSwingUp-v0"
LENGTH = 7
GOAL = SaturatingCost([1.0, 0.0], [1.0, 0.0])


class Push(gym.Env):
    """Observation (position, velocity): the control accelerates; 7 steps from near (0, 0).

    The cost is 1 - exp(-(position - 1)² / 2), the reward minus that.
    """

    saturating_cost = None

    def __init__(self, terminates=False):
        self.observation_space = spaces.Box(-1e3, 1e3, (2,), np.float32)
        self.action_space = spaces.Box(-2, 2, (1,), np.float32)
        self.terminates = terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.time = 0.05 * self.np_random.normal(size=2), 0
        return self.state.astype(np.float32), {}

    def step(self, action):
        self.time += 1
        velocity = self.state[1] + 0.3 * float(action[0])
        noise = 0.01 * self.np_random.normal(size=2)
        self.state = np.array([self.state[0] + 0.5 * velocity, velocity]) + noise
        cost = 1 - np.exp(-0.5 * (self.state[0] - 1) ** 2)
        done = self.time == LENGTH
        return (
            self.state.astype(np.float32), -float(cost),
            done and self.terminates, done and not self.terminates, {},
        )  # fmt: skip


def make(env=None, **changes):
    settings = {
        "horizon": LENGTH, "gradient_steps": 8, "gp_evaluations": 20, "seed": 0, "device": "cpu",
        "policy_kwargs": {"n_centres": 4}, **changes,
    }  # fmt: skip
    return PILCO(changes.pop("policy", "RBFPolicy"), env or Push(), **{
        k: v for k, v in settings.items() if k != "policy"
    })  # fmt: skip


def costs_of(agent, monkeypatch):
    """Which cost the next search is made with: its name."""
    seen = []
    for name in ("saturating", "minus_reward"):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda x, own=own, name=name: seen.append(name) or own(x))
    agent.learn(2 * LENGTH)
    return seen


# Cost


def test_a_given_cost_comes_first(monkeypatch):
    assert costs_of(make(cost_fn=GOAL), monkeypatch) == ["saturating"] * 2


def test_the_environments_own_cost_is_used(monkeypatch):
    monkeypatch.setattr(
        Push, "saturating_cost", {"target": GOAL.target.numpy(), "weights": GOAL.weights.numpy()}
    )
    assert costs_of(make(), monkeypatch) == ["saturating"] * 2


def test_without_a_cost_a_gp_learns_the_rewards(monkeypatch):
    assert costs_of(make(), monkeypatch) == ["minus_reward"] * 2


def test_a_cost_whose_expectation_is_unknown_is_remarked_on_and_learned(monkeypatch):
    monkeypatch.setattr(Push, "cost", lambda self, states: states[..., 0] ** 2, raising=False)
    with pytest.warns(UserWarning, match="but no `saturating_cost` whose expectation is known"):
        assert costs_of(make(), monkeypatch) == ["minus_reward"] * 2


@pytest.mark.parametrize("cost", [lambda states: states.square().sum(-1), 3.0])
def test_a_cost_of_another_form_is_refused_by_the_constructor(cost):
    with pytest.raises(ValueError, match=r"cost_fn must be a SaturatingCost.*PIPPS takes any"):
        make(cost_fn=cost)


def test_a_cost_of_other_sizes_is_refused_by_the_constructor():
    with pytest.raises(ValueError, match=r"cost_fn is not a cost of states: .* it raised"):
        make(cost_fn=SaturatingCost([0.0], [1.0]))


def test_a_cost_is_asked_for_again_when_a_file_is_read(tmp_path):
    make(cost_fn=GOAL).learn(LENGTH).save(tmp_path / "agent")
    loaded = PILCO.load(tmp_path / "agent", env=Push(), device="cpu")
    with pytest.raises(ValueError, match=r"PILCO.load\(path, env=env, cost_fn=...\)"):
        loaded.learn(LENGTH)
    again = PILCO.load(tmp_path / "agent", env=Push(), device="cpu", cost_fn=GOAL)
    assert again.learn(LENGTH, reset_num_timesteps=False)._n_trials == 2


# Search


@pytest.mark.parametrize("optimizer", ["quasi-newton", "adam"])
@pytest.mark.parametrize("policy", ["RBFPolicy", "LinearPolicy"])
def test_a_search_lowers_the_predicted_cost_and_the_trials_follow(policy, optimizer):
    kwargs = {} if policy == "LinearPolicy" else {"n_centres": 4}
    agent = make(policy=policy, cost_fn=GOAL, optimizer=optimizer, policy_kwargs=kwargs,
                 gradient_steps=25, learning_rate=0.1, gp_evaluations=60)  # fmt: skip
    dumps = logged(agent)
    agent.learn(4 * LENGTH)
    first, last = dumps[0][0], dumps[-1][0]
    assert first["train/loss"] < first["train/loss_first"]
    assert last["train/loss"] < 0.9 * first["train/loss_first"]
    episodes = [-info["r"] for info in agent.ep_info_buffer]
    assert min(episodes[1:]) < episodes[0]
    # What was predicted is what it costs.
    assert episodes[-1] == pytest.approx(dumps[-2][0]["train/loss"], abs=0.5)


@pytest.mark.parametrize("rate", [1.0, 100.0])
def test_a_search_never_ends_worse_than_it_began(rate):
    """The first policy is kept where Adam's steps lead uphill."""
    agent = make(cost_fn=GOAL, optimizer="adam", learning_rate=rate)
    dumps = logged(agent)
    agent.learn(3 * LENGTH)
    for values, _ in dumps:
        assert values["train/loss"] <= values["train/loss_first"]


def test_the_search_draws_nothing():
    agent = make(cost_fn=GOAL)
    state = agent._generator.get_state()
    agent.learn(2 * LENGTH)
    assert torch.equal(agent._generator.get_state(), state)


def test_options_reach_the_prediction(monkeypatch):
    seen, own = [], module.predict

    def spy(model, policy, horizon):
        seen.append((model, horizon, agent._start()))
        return own(model, policy, horizon)

    monkeypatch.setattr(module, "predict", spy)
    agent = make(cost_fn=GOAL, exploration=0.5, process_noise=False, gradient_steps=1)
    agent.learn(LENGTH)
    model, horizon, (mean, std) = seen[0]
    assert (model.exploration, model.process_noise, horizon) == (0.5, False, LENGTH)
    assert torch.equal(model.start.mean, mean)
    torch.testing.assert_close(model.start.covariance, std.square().diag())


def test_positions_are_integrated_from_each_of_several_starts():
    """The median of a linear map of Gaussians is that of their means: q' = q + T/2 (q̇ + q̇')."""
    starts = ((0.0, 0.0), (0.5, 1.0))
    agent = make(
        speed_integration="on", integrated_dims=((0, 1),), time_step=0.5, start_means=starts
    ).learn(2 * LENGTH)
    assert agent.dynamics.targets.shape == (2 * LENGTH, 1)
    paths = np.median(agent._predicted.reshape(LENGTH + 1, 2, module.QUANTILES, 2), 2)  # [t, M, S]
    np.testing.assert_allclose(paths[0], starts, atol=1e-12)
    q, v = paths[..., 0], paths[..., 1]
    np.testing.assert_allclose(q[1:], q[:-1] + 0.25 * (v[:-1] + v[1:]), atol=1e-9)


def test_the_figure_of_a_trial_has_the_predicted_quantiles():
    agent = make(cost_fn=GOAL).learn(LENGTH)
    with torch.no_grad():
        found = module.predict(agent._moment_model(), agent.policy, LENGTH)
    predicted = torch.as_tensor(agent._predicted)
    assert predicted.shape == (LENGTH + 1, module.QUANTILES, 2)
    torch.testing.assert_close(predicted.mean(1), found.means, rtol=0, atol=1e-12)
    spread = found.covariances.diagonal(dim1=1, dim2=2).sqrt()
    low, high = (predicted - found.means[:, None]).quantile(torch.tensor([0.16, 0.84]).double(), 1)
    torch.testing.assert_close(high, spread, rtol=0.05, atol=0)
    torch.testing.assert_close(low, -spread, rtol=0.05, atol=0)


def test_a_model_without_a_finite_gradient_is_one_sentence(monkeypatch):
    def broken(model, policy, horizon):
        return own(model, policy, horizon)._replace(
            loss=sum(p.sum() for p in policy.parameters()) * np.nan
        )

    own = module.predict
    monkeypatch.setattr(module, "predict", broken)
    with pytest.raises(FloatingPointError, match="policy gradients was finite; choose a shorter"):
        make(cost_fn=GOAL).learn(LENGTH)


# What it cannot do


def test_terminated_episodes_are_reported_once_unless_meant():
    with pytest.warns(UserWarning, match="predictions go on beyond the end") as said:
        make(Push(terminates=True), cost_fn=GOAL).learn(3 * LENGTH)
    assert sum("beyond the end" in str(w.message) for w in said) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*beyond the end")
        make(Push(terminates=True), cost_fn=GOAL, termination="ignore").learn(2 * LENGTH)


def test_a_termination_function_is_refused():
    with pytest.raises(ValueError, match="termination must be one of ignore"):
        make(termination=lambda states: states[..., 0] > 1)


def test_a_policy_without_moments_is_refused_by_the_constructor():
    class Mine(ControllerPolicy):
        pass

    with pytest.raises(ValueError, match="Mine has no `match`; choose 'RBFPolicy'"):
        make(policy=Mine)


def test_it_has_no_estimator():
    with pytest.raises(TypeError, match="estimator"):
        make(estimator="tpx")
    assert not hasattr(make(), "estimator")


# Presets and logs


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_their_tasks(name):
    env_id = RUNS[name]["env_id"]
    agent = PILCO(env=env_id, **PRESETS[name], device="cpu")
    assert agent.horizon == gym.spec(env_id).max_episode_steps
    assert agent._problem.saturating_cost is not None
    for key, value in PRESETS[name].items():
        assert key == "policy" or getattr(agent, key) == value


def test_scalars_are_logged():
    agent = make(cost_fn=GOAL)
    dumps = logged(agent)
    agent.learn(2 * LENGTH)
    keys = {key for values, _ in dumps for key in values}
    assert keys >= {
        "train/loss", "train/loss_first", "train/gradient_norm", "train/skipped_steps",
        "prediction/last_std_0", "prediction/last_std_1", "gp/data",
        "model_fit/standardised_error", "rollout/ep_rew", "time/trials",
    }  # fmt: skip


def test_max_points_bounds_the_data():
    agent = make(cost_fn=GOAL, max_points=10).learn(3 * LENGTH)
    assert agent.world_model.n_points == 10


def test_the_policys_parameters_are_the_files(tmp_path):
    agent = make(cost_fn=GOAL, angle_dims=(0,)).learn(2 * LENGTH)
    agent.save(tmp_path / "agent")
    loaded = PILCO.load(tmp_path / "agent", device="cpu")
    assert loaded.angle_dims == (0,)
    assert torch.equal(
        parameters_to_vector(loaded.policy.parameters()),
        parameters_to_vector(agent.policy.parameters()),
    )


def test_it_learns_on_the_unicycle_with_the_environments_cost_start_and_invariances():
    """Inputs: 10 observations without the yaw, and 2 torques; targets: all 10 differences."""
    agent = PILCO(
        "LinearPolicy", "totalprop/Unicycle-v0", horizon=20, gradient_steps=2, gp_evaluations=5,
        random_scale=0.2, termination="ignore", seed=0, device="cpu",
    )  # fmt: skip
    before = parameters_to_vector(agent.policy.parameters()).clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent.learn(20)
    model = agent.world_model
    assert model.gp.inputs.shape == (20, 11) and model.gp.targets.shape == (20, 10)
    assert not torch.equal(parameters_to_vector(agent.policy.parameters()), before)
    assert agent._problem.saturating_cost is not None


def test_the_logged_loss_is_the_expected_cost_and_the_objective_is_beside_it():
    agent = make(cost_fn=GOAL, exploration=-0.5)
    dumps = logged(agent)
    agent.learn(2 * LENGTH)
    values = [values for values, _ in dumps if "train/loss" in values][-1]
    with torch.no_grad():
        found = module.predict(agent._moment_model(), agent.policy, LENGTH)
    assert values["train/loss"] == pytest.approx(float(found.costs.sum()))
    assert values["train/objective"] == pytest.approx(float(found.loss))
    assert values["train/objective"] < values["train/loss"]
    assert "train/learning_rate" not in values


def test_adam_logs_its_step_size():
    agent = make(cost_fn=GOAL, optimizer="adam", learning_rate=0.25)
    dumps = logged(agent)
    agent.learn(LENGTH)
    assert [v["train/learning_rate"] for v, _ in dumps if "train/learning_rate" in v] == [0.25]
