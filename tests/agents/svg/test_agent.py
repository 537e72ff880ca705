"""SVG as an agent: what it draws, stores and learns; that it learns is tested on `Regulator`."""

import math
import warnings
from collections import defaultdict

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from tests.agents.svg.tasks import STEPS, CostRegulator, Regulator
from totalprop import estimators
from totalprop.agents.svg.agent import SVG, Batch
from totalprop.agents.svg.networks import Critic
from totalprop.agents.svg.policy import SVGPolicy

SIZES = {
    "policy_kwargs": {"net_arch": [32]}, "value_hidden": (64,), "model_hidden": (10,),
    "batch_size": 64, "horizon": 100, "gamma": 0.9, "seed": 0, "device": "cpu",
}  # fmt: skip
FEW = {"model_updates": 2, "value_updates": 2, "policy_updates": 2, "learning_starts": 0}


def vector(kind=Regulator, n=4, **how):
    return DummyVecEnv([lambda: Monitor(kind(**how)) for _ in range(n)])


def make(env=None, **changes):
    return SVG("MlpPolicy", vector() if env is None else env, **{**SIZES, **FEW, **changes})


# The policy


def policy(**how):
    torch.manual_seed(0)
    box = spaces.Box(np.float32([-2, 0]), np.float32([4, 1]))
    made = SVGPolicy(spaces.Box(-9, 9, (3,)), box, net_arch=[8], **how)
    made.scale.update(np.random.default_rng(0).normal(1, 2, (50, 3)))
    return made


def test_densities_are_those_of_the_drawn_actions_before_they_are_clipped():
    made, seen = policy(log_std_init=0.5), np.random.default_rng(1).normal(size=(500, 3))
    actions, log_probs = made.draw(seen, torch.Generator().manual_seed(0))
    assert (np.abs(actions) > 1).mean() > 0.2
    mean, std = made.zeta({}, made.scale(torch.as_tensor(seen)))
    assert torch.allclose(std, torch.tensor(math.exp(0.5)))
    expected = torch.distributions.Normal(mean, std).log_prob(torch.as_tensor(actions)).sum(-1)
    torch.testing.assert_close(torch.as_tensor(log_probs), expected.detach())
    sent = made.to_env(actions)
    inside = (np.abs(actions) < 1).all(1)
    np.testing.assert_allclose(sent[inside, 0], 1 + 3 * actions[inside, 0], rtol=1e-5, atol=1e-5)
    assert all(made.action_space.contains(action) for action in sent)
    assert {-2, 4} <= set(sent[:, 0].tolist())


def test_parameters_given_by_name_replace_the_policys_own():
    made = policy(learn_std=True)
    assert set(made.last_layer) == {"mean.2.weight", "mean.2.bias"}
    states = torch.randn(5, 3)
    other = {name: torch.zeros_like(p) for name, p in made.learned.items()}
    mean, std = made.zeta(other, states)
    assert (mean == 0).all() and (std == 1).all()
    mean, _ = made.zeta({}, states)
    assert (mean != 0).any()
    assert "log_std" in made.learned and "log_std" not in policy().learned


# What is stored and learned


@pytest.mark.parametrize("terminates", [True, False])
def test_time_limits_are_not_stored_as_ends(terminates):
    agent = make(vector(terminates=terminates)).learn(4 * STEPS)
    assert agent.replay_buffer.terminated[: 4 * STEPS].sum() == (4 if terminates else 0)
    assert len(agent.replay_buffer) == 4 * STEPS


def test_transitions_are_those_of_the_environment():
    agent = make(vector(n=2)).learn(2 * STEPS)
    rows = agent.replay_buffer.take(np.arange(2 * STEPS))
    moved = rows["next_states"] - rows["states"] - np.clip(rows["actions"], -1, 1)
    assert np.abs(moved).max() < 0.1  # the noise of 0.02
    assert (np.abs(rows["actions"]) > 1).any()
    np.testing.assert_allclose(
        rows["rewards"], -(rows["next_states"].astype(float) ** 2).sum(1), rtol=1e-5
    )
    np.testing.assert_array_equal(rows["next_states"][:-2:2], rows["states"][2::2])


def test_episodes_become_paths():
    agent = make(vector(n=3), variant="inf")
    agent.learn(3 * STEPS - 3)  # not yet complete
    batch = agent.replay_buffer
    assert batch.finished == [] and agent._n_updates == 0
    seen = []
    agent._improve_policy = lambda log: seen.append(agent._paths())
    agent.learn(3, reset_num_timesteps=False)
    [paths] = seen
    assert paths.states.shape == (STEPS + 1, 3, 2) and paths.is_alive.shape == (STEPS, 3)
    assert (paths.is_alive == 1).all()
    rows = agent.replay_buffer.take(np.arange(3 * STEPS))
    scaled = agent.policy.scale(torch.as_tensor(rows["states"])).reshape(STEPS, 3, 2)
    torch.testing.assert_close(paths.states[:-1], scaled)
    np.testing.assert_array_equal(paths.actions.reshape(-1, 2), rows["actions"])


def test_target_is_copied_every_so_many_updates():
    agent = make(target_interval=5, value_updates=4, variant="0").learn(4 * STEPS)
    critic = agent.critic
    old = [p.clone() for p in critic.target.parameters()]
    assert any((a != b).any() for a, b in zip(old, critic.network.parameters(), strict=True))
    agent.learn(4 * STEPS, reset_num_timesteps=False)  # the 5th of 8 updates
    assert any((a != b).any() for a, b in zip(old, critic.target.parameters(), strict=True))
    assert agent._n_value_updates == 8


def test_critic_loss_and_unit_by_hand():
    critic = Critic(2, 0, hidden=(4,), activation="tanh")
    critic.see(np.array([1.0, 3.0]), gamma=0.9)  # deviation 1, horizon 10
    assert float(critic.unit) == pytest.approx(10)
    states, targets = torch.randn(3, 2), torch.tensor([5.0, -5.0, 20.0])
    weights = torch.tensor([1.0, 0.0, 5.0])
    errors = (targets - critic(states)) / 10
    torch.testing.assert_close(
        critic.loss(targets, weights, states), (weights * errors.square() / 2).mean()
    )
    assert not critic.of_target(states).requires_grad
    torch.testing.assert_close(critic.of_target(states), critic(states).detach())


def test_gradient_norm_is_limited_and_importance_weights_are_truncated(monkeypatch):
    agent = make(max_grad_norm=1e-3, max_weight=0.7, policy_updates=1)
    norms = []
    step = torch.optim.Adam.step

    def look(optimizer, *args, **kwargs):
        if optimizer is agent.policy_optimizer:
            grads = [p.grad for p in agent.policy.learned.values()]
            norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", look)
    agent.learn(4 * STEPS)
    assert norms == [pytest.approx(1e-3, rel=1e-3)]
    batch = agent._draw()
    assert agent._weights(batch).max() <= 0.7
    agent.max_weight = 5.0
    assert agent._weights(batch).max() > 0.7


def test_kl_of_policies_by_hand_and_it_keeps_the_policy_near():
    agent = make().learn(4 * STEPS)
    start = {name: p.detach() + 0.01 for name, p in agent.policy.learned.items()}
    states = torch.randn(6, 2)
    (a, std), (b, _) = agent.policy.zeta({}, states), agent.policy.zeta(start, states)
    expected = ((a - b) / std).square().sum(-1).mean() / 2
    torch.testing.assert_close(agent._kl_from(start, states), expected)
    moved = []
    for weight in (0.0, 1e4):
        agent = make(kl_weight=weight, policy_updates=30, learning_rate=1e-2)
        before = agent.policy.zeta({}, states)[0].detach()
        agent.learn(4 * STEPS)
        moved.append(float((agent.policy.zeta({}, states)[0] - before).detach().abs().mean()))
    assert moved[1] < 0.3 * moved[0]


# The environment's cost


def test_the_environments_cost_is_used_where_there_is_one():
    agent = make(vector(CostRegulator))
    agent.learn(4 * STEPS)
    x = torch.randn(7, 2, requires_grad=True)
    found = agent._reward_of(x, torch.zeros(7, 2), x)
    states = agent.policy.scale.inverse(x.detach())
    torch.testing.assert_close(found, -states.square().sum(-1).float(), check_dtype=False)
    (slope,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(slope, (-2 * states * agent.policy.scale.std).float())
    learned = make(vector(CostRegulator), reward="learned").learn(4 * STEPS)
    assert learned._cost is None and make(vector(CostRegulator), variant="0")._cost is None
    given = make(cost_fn=lambda states: states[..., 0] ** 2).learn(4 * STEPS)
    found = given._reward_of(x, torch.zeros(7, 2), x)
    torch.testing.assert_close(found, -(given.policy.scale.inverse(x)[:, 0] ** 2).float())


@pytest.mark.parametrize("variant", ["0", "1", "1-er", "inf", "dpg"])
def test_a_cost_of_ones_own_is_what_critic_and_policy_learn(variant):
    """Or the policy would follow one problem for a step, and the value of another from there."""

    def cost(states):
        return 1e4 + states[..., 0] ** 2

    agent = make(vector(n=2), variant=variant, cost_fn=cost).learn(4 * STEPS)
    batch = agent._draw()
    states = agent.policy.scale.inverse(batch.next_states)
    torch.testing.assert_close(batch.rewards, -cost(states).float())
    if variant != "inf":
        assert agent.critic.rewards.mean == pytest.approx(-1e4, rel=1e-3)
    if variant in ("1", "1-er", "inf"):
        assert agent.world_model.reward.rewards.mean == pytest.approx(-1e4, rel=1e-3)


class Penalised(CostRegulator):
    """Its last reward is lower by 100, of which its cost says nothing."""

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward - 100 * (terminated or truncated), terminated, truncated, info


@pytest.mark.parametrize("variant", ["1", "1-er", "inf"])
@pytest.mark.parametrize("terminates", [True, False])
def test_rewards_beyond_the_environments_own_cost_reach_the_critic(variant, terminates):
    """What an end is worth has no gradient at its own step, but the steps before it learn of it."""
    agent = make(vector(Penalised, n=2, terminates=terminates), variant=variant)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agent.learn(8 * STEPS)
    assert agent._draw().rewards.min() < -90
    found = [w for w in caught if "rewards are not minus its own `cost`" in str(w.message)]
    # Of an end that terminates, a return with a critic tells the steps before.
    assert len(found) == (variant == "inf" or not terminates)
    agent = make(vector(CostRegulator, n=2, terminates=terminates), variant=variant)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        agent.learn(4 * STEPS)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"cost_fn": torch.sum, "reward": "learned"}, "reward='learned'.*leave one out"),
        ({"nodes": "both", "variant": "0"}, "variant '0' has no model"),
        ({"nodes": "both", "variant": "dpg"}, "variant 'dpg' has no model"),
    ],
)
def test_arguments_that_would_have_no_effect_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        make(**changes)


@pytest.mark.parametrize("name", ["ivw", "lr-first-order", "safe", "aobg", "ddcg"])
def test_an_estimator_of_several_passes_is_tried_with_the_samples_there_are(name):
    """One environment gives "inf" one sample, of which no baseline can leave one out."""
    with pytest.raises(ValueError, match=r"1 sample\(s\) \(environments\)"):
        make(vector(n=1), variant="inf", estimator=name)


def test_a_file_does_not_hold_cost_fn(tmp_path):
    def cost(states):
        return states.square().sum(-1)

    make(cost_fn=cost).learn(4 * STEPS).save(tmp_path / "agent")
    loaded = SVG.load(tmp_path / "agent", env=vector(), device="cpu")
    with pytest.raises(ValueError, match=r"made with a cost_fn, .*pass it again"):
        loaded.learn(4 * STEPS)
    SVG.load(tmp_path / "agent", env=vector(), device="cpu", cost_fn=cost).learn(4 * STEPS)


# Estimators


@pytest.mark.parametrize("variant", ["0", "1-er", "inf"])
def test_every_registered_estimator_makes_a_finite_step(variant):
    for name in estimators.names():
        agent = make(
            vector(n=6), variant=variant, estimator=name, batch_size=16, policy_updates=1,
            policy_kwargs={"net_arch": [4], "learn_std": True},
        )  # fmt: skip
        before = [p.clone() for p in agent.policy.learned.values()]
        agent.learn(6 * STEPS)
        after = list(agent.policy.learned.values())
        assert all(torch.isfinite(p).all() for p in after), name
        assert any((a != b).any() for a, b in zip(after, before, strict=True)), name


@pytest.mark.parametrize("variant", ["0", "1", "1-er"])
@pytest.mark.parametrize("name", ["rp", "lr", "tpx"])
def test_extra_actions(variant, name):
    agent = make(variant=variant, estimator=name, n_extra_actions=3).learn(8 * STEPS)
    assert agent._n_updates == 4 and all(torch.isfinite(p).all() for p in agent.policy.parameters())


WRONG = {
    "train_freq must be 0": {"variant": "inf", "train_freq": 5},
    "buffer_size must hold two episodes": {"variant": "inf", "buffer_size": 799},
    "'dpg' has no noise": {"variant": "dpg", "estimator": "lr"},
    "'dpg' has no noise to": {"variant": "dpg", "n_extra_actions": 2},
    "n_extra_actions must be 0": {"variant": "inf", "n_extra_actions": 2},
    "n_extra_actions must be 0, or": {"estimator": "tpg", "n_extra_actions": 2},
    "nodes='both' needs n_extra_actions=0": {"nodes": "both", "n_extra_actions": 2},
    "nodes='both' needs": {"nodes": "both", "estimator": "safe"},
    r"does not work with 1 sample\(s\) \(batch_size\)": {"estimator": "lr", "batch_size": 1},
    "needs value": {"variant": "inf", "estimator": estimators.make("lr", baseline="critic")},
    "model_hidden must be hidden units per layer": {"model_hidden": (0,)},
    "net_arch must be hidden units": {"policy_kwargs": {"net_arch": []}},
    "activation is that of all networks": {"policy_kwargs": {"activation": "relu"}},
    "variant must be one of 0, 1, 1-er, inf, dpg": {"variant": "2"},
}


@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("variant", ["0", "1", "1-er", "inf"])
def test_k_and_the_gauges_are_logged(variant, extra):
    """k is 0, 1 or between, however many nodes there are, and measuring changes no gradient."""
    changes = {"variant": variant, "n_extra_actions": extra if variant != "inf" else 0}
    for name, low, high in (("rp", 0, 0), ("lr", 1, 1), ("tpx", 1e-6, 0.99), ("ivw", 1e-6, 0.99)):
        if name == "ivw" and extra:  # it compares transitions
            continue
        agent, equal = make(estimator=name, **changes), []
        gradient = agent._policy_gradient

        def both(objective, *, measure, gradient=gradient, equal=equal):
            plain, found = (gradient(objective, measure=m) for m in (False, measure))
            equal.extend(map(torch.equal, plain.gradients, found.gradients))
            return found

        agent._policy_gradient = both
        agent.learn(4 * STEPS, log_interval=10)
        found = agent.logger.name_to_value
        assert low <= found["train/k"] <= high, name
        assert 0 < found["train/z"] < math.inf
        assert ("train/node_snr" in found) == (name != "ivw")
        assert "z/step_01" not in found
        assert equal and all(equal), name


def test_dpg_has_no_node_to_measure():
    agent = make(variant="dpg")
    agent.learn(4 * STEPS, log_interval=10)
    assert not {"train/k", "train/z"} & set(agent.logger.name_to_value)
    assert agent._n_updates > 0


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_one_sentence(words):
    with pytest.raises(ValueError, match=words) as error:
        make(**WRONG[words])
    assert "\n" not in str(error.value)


def test_episodes_are_the_samples_of_inf(tmp_path):
    with pytest.raises(ValueError, match=r"does not work with 1 sample\(s\) \(environments\)"):
        make(vector(n=1), variant="inf", estimator="lr")
    agent = make(vector(n=2), variant="inf", estimator="lr").learn(2 * STEPS)
    agent.save(tmp_path / "agent")
    SVG.load(tmp_path / "agent", device="cpu").predict(np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="does not work with 1 sample"):
        SVG.load(tmp_path / "agent", env=vector(n=1), device="cpu")


# One step of each part, by hand


def five_transitions():
    """Two of them terminate, and actions lie beyond the bounds."""
    source = torch.Generator().manual_seed(1)
    states, actions, following = (torch.randn(5, 2, generator=source) for _ in range(3))
    rewards, densities = torch.randn(5, generator=source), torch.zeros(5)
    ends = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0])
    return Batch(states, 2 * actions, rewards, following, ends, densities)


@pytest.mark.parametrize("variant", ["0", "1", "1-er", "dpg"])
def test_what_the_critic_is_fitted_to(variant, monkeypatch):
    """Heess et al. 2015, Alg. 4: y = r + γ V'(s'), weighted for states of another policy."""
    agent = make(variant=variant).learn(4 * STEPS)
    batch, seen, loss = five_transitions(), [], agent.critic.loss
    now = agent.policy.log_prob(batch.states, batch.actions).detach()
    batch = batch._replace(log_probs=now - torch.tensor([3.0, 0.5, 0.0, -0.5, -2.0]))
    monkeypatch.setattr(agent, "_draw", lambda **how: batch)
    monkeypatch.setattr(agent.critic, "loss", lambda *args: seen.append(args) or loss(*args))
    weights = torch.ones(5)
    if variant in ("1", "1-er"):
        value = agent.critic.of_target(batch.next_states)
        weights = torch.tensor([3.0, 0.5, 0.0, -0.5, -2.0]).exp().clamp(max=5)
    else:
        mean, std = agent.policy.zeta({}, batch.next_states)
        noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(7))
        then = mean if variant == "dpg" else mean + std * noise
        value = agent.critic.of_target(batch.next_states, then.detach().clamp(-1, 1))
    agent._generator.manual_seed(7)
    agent._update_critic(defaultdict(list))
    ((targets, given, *inputs),) = seen
    expected = batch.rewards + 0.9 * torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]) * value
    torch.testing.assert_close(targets, expected.detach())
    torch.testing.assert_close(given, weights)
    assert torch.equal(inputs[0], batch.states)
    assert len(inputs) == 1 or torch.equal(inputs[1], batch.actions.clamp(-1, 1))


class Uneven(Regulator):
    """Its episodes end after this many steps."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def step(self, action):
        observation, reward, *_ = super().step(action)
        return observation, reward, False, self.time >= self.length, {}


def test_episodes_of_unequal_length_are_padded_with_their_last_state(monkeypatch):
    env = DummyVecEnv([lambda n=n: Monitor(Uneven(n)) for n in (3, 5)])
    agent, seen = make(env, variant="inf"), []
    original = agent._paths

    def spy():
        paths = original()
        episodes = [agent._to_batch(rows) for rows in agent.replay_buffer.episodes()]
        seen.append((paths, episodes))
        return paths

    monkeypatch.setattr(agent, "_paths", spy)
    agent.learn(10)
    paths, episodes = seen[0]
    lengths = [len(episode.states) for episode in episodes]
    assert sorted(lengths) == [3, 5] and paths.states.shape == (6, 2, 2)
    for i, (episode, n) in enumerate(zip(episodes, lengths, strict=True)):
        assert torch.equal(paths.is_alive[:, i], (torch.arange(5) < n).float())
        assert torch.equal(paths.states[:n, i], episode.states)
        assert torch.equal(paths.states[n:, i], episode.next_states[-1].expand(6 - n, -1))
        assert torch.equal(paths.actions[:n, i], episode.actions)
        assert not paths.actions[n:, i].any()


@pytest.mark.parametrize("variant", ["0", "1", "1-er", "dpg"])
def test_only_replay_improves_the_policy_on_earlier_rounds(variant, monkeypatch):
    agent, asked = make(variant=variant).learn(4 * STEPS), []
    monkeypatch.setattr(
        agent, "_draw", lambda *, recent=False: asked.append(recent) or five_transitions()
    )
    agent._objective(defaultdict(list))
    assert asked == [variant != "1-er"]


@pytest.mark.parametrize("of", ["_predict_next", "_reward_of", "_action_value"])
def test_beyond_the_bounds_an_action_has_no_gradient(of):
    agent = make(variant="0" if of == "_action_value" else "1").learn(4 * STEPS)
    states = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))

    def value(actions):
        args = (states, actions, states) if of == "_reward_of" else (states, actions)
        found = getattr(agent, of)(*args)
        return (found[0] if of == "_predict_next" else found).sum()

    for scale, inside in ((0.5, True), (2.0, False)):
        actions = torch.full((3, 2), scale, requires_grad=True)
        (gradient,) = torch.autograd.grad(value(actions), actions)
        assert gradient.any() == inside
    assert torch.equal(value(torch.full((3, 2), 2.0)), value(torch.ones(3, 2)))


# Learning


@pytest.mark.parametrize("variant", ["1-er", "inf"])
def test_it_learns_to_regulate(variant):
    """From a return of about -20 to more than -6; the best is about -0.4."""
    is_inf = variant == "inf"
    agent = SVG(
        "MlpPolicy", vector(), 1e-2 if is_inf else 3e-3, variant=variant, model_updates=60,
        value_updates=60, policy_updates=1 if is_inf else 10, model_learning_rate=5e-3,
        value_learning_rate=5e-3, learning_starts=240, target_interval=20, **SIZES,
    )  # fmt: skip
    test_env = vector(n=1)
    test_env.seed(100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = evaluate_policy(agent, test_env, 10)[0]
        agent.learn(10 * 4 * STEPS)
        after = evaluate_policy(agent, test_env, 10)[0]
    assert before < -15 and after > -6


class Bandit(Regulator):
    """Its episodes end with the first step."""

    def step(self, action):
        observation, reward, *_ = super().step(action)
        return observation, reward, True, False, {}


@pytest.mark.parametrize("variant", ["0", "1"])
def test_an_estimator_that_needs_more_samples_than_a_round_has_is_refused(variant):
    with pytest.raises(ValueError, match=r"with 1 sample\(s\) \(steps of the first update"):
        make(vector(n=1), variant=variant, estimator="tpx", train_freq=1)
    make(vector(n=2), variant=variant, estimator="tpx", train_freq=1)


def test_the_replay_has_to_hold_enough_samples_at_the_first_update():
    few = {"variant": "1-er", "estimator": "tpx", "train_freq": 1}
    with pytest.raises(ValueError, match=r"with 1 sample\(s\) \(steps of the first update"):
        make(vector(n=1), **few)
    agent = make(vector(n=1), **few | {"learning_starts": 2})
    agent.learn(4)
    assert agent._n_updates == 3 * FEW["policy_updates"]


@pytest.mark.parametrize("estimator", estimators.names())
def test_episodes_of_one_step_are_gathered_until_the_estimator_has_enough(estimator):
    agent = make(vector(Bandit, n=1), variant="1", estimator=estimator)
    agent.learn(13)
    assert agent._rounds == 2


def test_a_reward_that_is_known_is_not_learned():
    agent = make(vector(CostRegulator), variant="1-er", cost_fn=lambda s: s.square().sum(-1))
    before = [p.clone() for p in agent.world_model.reward.parameters()]
    agent.learn(2 * 4 * STEPS)
    assert all(map(torch.equal, before, agent.world_model.reward.parameters()))
    assert "train/reward_loss" not in agent.logger.name_to_value


def test_observations_of_bool_are_scaled():
    made = SVGPolicy(spaces.Box(0, 1, (3,), bool), spaces.Box(-1, 1, (1,)), net_arch=[8])
    action, _ = made.predict(np.array([True, False, True]))
    assert action.shape == (1,)
