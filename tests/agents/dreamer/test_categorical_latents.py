"""DreamerTPX with categorical latents: the model, imagination, the agent and its files."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from torch.distributions import Independent, OneHotCategorical

from tests.estimators.conftest import gram_by_hand
from totalprop import estimators
from totalprop.agents.core.validation import WrongArgumentError
from totalprop.agents.dreamer import imagination
from totalprop.agents.dreamer.agent import DreamerTPX
from totalprop.agents.dreamer.imagination import (
    ImaginationNoise,
    ImaginationSettings,
    imagine,
)
from totalprop.agents.dreamer.open_loop import predict_sequences
from totalprop.agents.dreamer.policy import DreamerPolicy
from totalprop.estimators.probes import gram
from totalprop.world_models.latent.distributions import CategoricalLatents
from totalprop.world_models.latent.model import ModelLossSettings, _kl_penalty
from totalprop.world_models.latent.rssm import State

F64 = torch.float64
H, N, A, G, C, DETER = 3, 6, 2, 3, 4, 5
T, B, S = 5, 3, 3
SIZES = {"latent": "categorical", "stoch": G, "classes": C, "deter": DETER, "hidden": 5, "width": 5}
SETTINGS = ImaginationSettings(
    gamma=0.875, lam=0.8, stop_grad_actor_input=False, discount_weights=True, entropy_scale=0.0
)
LOSS = ModelLossSettings(
    kl_scale=0.7, representation_scale=1.0, free_nats=0.0, free_nats_per_step=False, gamma=0.9,
    discount_scale=4.0,
)  # fmt: skip


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(shape, dtype=F64, generator=generator(seed))


def make_policy(**changes):
    """A policy with weights and biases of about 0.5, and action stds of about 0.7."""
    observation, action = spaces.Box(-1, 1, (S,)), spaces.Box(-1, 1, (A,))
    policy = DreamerPolicy(observation, action, **{**SIZES, **changes}).double()
    with torch.no_grad():
        for i, p in enumerate(policy.parameters()):
            p.copy_(0.5 * randn(*p.shape, seed=100 + i))
        policy.actor.out.bias[A:] -= 5
    return policy


def starts(policy):
    latents = policy.model.rssm.latents
    stoch = latents(randn(N, latents.outputs, seed=2)).mode
    return State(randn(N, DETER, seed=1).tanh(), stoch)


def draw(policy, seed=3):
    noise = ImaginationNoise.draw(H, N, A, policy.model.rssm.latents, generator(seed))
    return ImaginationNoise(*(x.double() for x in noise))


def sequences(policy, seed=1):
    is_first = torch.zeros(T, B, dtype=torch.bool)
    is_first[0] = is_first[3, 1] = True
    noise = policy.model.rssm.latents.noise(T, B, generator=generator(seed))
    found = (
        randn(T, B, S, seed=seed), randn(T, B, A, seed=seed + 1).tanh(), randn(T, B, seed=seed + 2),
        is_first, torch.zeros(T, B, dtype=torch.bool), noise,
    )  # fmt: skip
    return tuple(x if x.dtype == torch.bool else x.float() for x in found)


# The policy's arguments


def test_thirty_two_by_thirty_two_is_the_default():
    box = spaces.Box(-1, 1, (S,))
    rssm = DreamerPolicy(box, box, latent="categorical").model.rssm
    assert (rssm.latents.stoch, rssm.latents.classes, rssm.stoch_size) == (32, 32, 1024)
    assert rssm.prior_out.out_features == rssm.posterior_out.out_features == 1024
    assert rssm.input_layer.in_features == 1024 + S
    small = DreamerPolicy(box, box, size="s", latent="categorical", classes=5).model.rssm.latents
    assert (small.stoch, small.classes) == (16, 5)


def test_wrong_arguments_are_one_sentence():
    box = spaces.Box(-1, 1, (S,))
    with pytest.raises(ValueError, match=r"classes=8 .* pass latent='categorical', or leave"):
        DreamerPolicy(box, box, classes=8)
    with pytest.raises(WrongArgumentError, match=r"latent must be .*gaussian.*got 'discrete'"):
        DreamerPolicy(box, box, latent="discrete")
    with pytest.raises(WrongArgumentError, match=r"classes must be at least 2, .* got 1"):
        DreamerPolicy(box, box, latent="categorical", classes=1)


# The world model


def test_the_loss_equals_torch_distributions():
    policy = make_policy().float()  # the encoder of vectors converts to float32
    data = sequences(policy)
    loss, states = policy.model.loss(*data, LOSS)
    rssm, (observations, actions, _, is_first, _, noise) = policy.model.rssm, data
    deter, stoch = torch.zeros(B, DETER), torch.zeros(B, G * C)
    embeds, kls = policy.model.embed(observations), []
    for t in range(T):
        keep = (~is_first[t]).float().unsqueeze(-1)
        deter = rssm.recur(State(deter * keep, stoch * keep), actions[t] * keep)
        prior, posterior = (
            (0.99 * out.unflatten(-1, (G, C)).softmax(-1) + 0.01 / C).log()
            for out in (
                rssm.prior_out(rssm.prior_activation(rssm.prior_hidden(deter))),
                rssm.posterior_out(rssm.posterior_activation(
                    rssm.posterior_hidden(torch.cat((deter, embeds[t]), -1)))),
            )
        )  # fmt: skip
        p = posterior.softmax(-1)
        hard = torch.nn.functional.one_hot((posterior + noise[t]).argmax(-1), C)
        stoch = (hard + p - p.detach()).flatten(1)
        torch.testing.assert_close(states.stoch[t], stoch)
        torch.testing.assert_close(states.deter[t], deter)
        q, p = (Independent(OneHotCategorical(logits=x), 1) for x in (posterior, prior))
        kls.append(torch.distributions.kl_divergence(q, p))
    kl = torch.stack(kls).mean()
    torch.testing.assert_close(loss.kl, kl)
    torch.testing.assert_close(loss.total, 0.7 * kl + loss.observation + loss.reward)
    parameters = [p for name, p in policy.model.named_parameters() if "discount" not in name]
    features = torch.cat((states.stoch, states.deter), -1)
    observation = -policy.model.decoder.log_prob(features, observations) / (T * B)
    expected = 0.7 * kl + observation + loss.reward
    found = [torch.autograd.grad(x, parameters, retain_graph=True) for x in (loss.total, expected)]
    torch.testing.assert_close(*found)
    assert all(g.any() for g in found[0])


@pytest.mark.parametrize("per_step", [False, True])
def test_balance_and_free_nats_are_those_of_gaussians(per_step):
    """Below the free nats no gradient; above, the posterior's is scaled, the prior's is not."""
    raw, latents = [randn(T, B, G * C, seed=i) for i in (1, 2)], CategoricalLatents(G, C)

    def gradients(scale, free_nats):
        leaves = [x.clone().requires_grad_() for x in raw]
        settings = LOSS._replace(
            representation_scale=scale, free_nats=free_nats, free_nats_per_step=per_step
        )
        penalty, kl = _kl_penalty(*(latents(x) for x in leaves), settings)
        return torch.autograd.grad(penalty, leaves), float(penalty), float(kl)

    plain, _, kl = gradients(1.0, 0.0)
    (posterior, prior), penalty, _ = gradients(0.2, 0.0)
    torch.testing.assert_close((posterior, prior), (0.2 * plain[0], plain[1]))
    assert penalty == pytest.approx(1.2 * kl) and plain[0].any() and plain[1].any()
    (posterior, prior), penalty, _ = gradients(0.2, 100.0)
    assert not posterior.any() and not prior.any() and penalty == pytest.approx(120.0)


def test_a_deterministic_filter_takes_the_mode():
    policy = make_policy().float()
    state = State(*(x.float() for x in starts(policy)))
    action, observation = randn(N, A, seed=4).tanh().float(), randn(N, S, seed=5).float()
    found = policy.model.filter(state, action, observation, None)
    rssm = policy.model.rssm
    posterior = rssm.posterior(rssm.recur(state, action), policy.model.embed(observation))
    best = posterior.logits.argmax(-1)
    assert torch.equal(found.stoch, torch.nn.functional.one_hot(best, C).flatten(1).float())


def test_open_loop_samples_one_hot_states():
    policy = make_policy().float()
    observations, actions, _, is_first, *_ = sequences(policy)
    seen = []
    policy.model.decoder.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
    found = policy.model.open_loop(
        observations, actions, is_first, context=2, generator=generator(1)
    )
    assert found.shape == observations.shape
    z = seen[0][..., : G * C].unflatten(-1, (G, C))
    assert set(z.unique().tolist()) == {0.0, 1.0} and torch.equal(z.sum(-1), torch.ones(T, B, G))


# Imagination


def plain_imagination(policy, start, noise):
    """The rollout without nodes: straight-through samples; (loss, logits, costs-to-go)."""
    rssm, state, logits, features = policy.model.rssm, start, [], []
    for action_noise, latent_noise in zip(*noise):
        action, _ = policy.actor.act(policy.actor(state.features), action_noise)
        deter = rssm.recur(state, action)
        prior = rssm.prior(deter)
        state = State(deter, prior.sample(latent_noise))
        logits.append(prior.logits)
        features.append(state.features)
    features = torch.stack(features)
    returns = imagination.lambda_returns(
        policy.model.reward(features), policy.value(features), 0.875, 0.8
    )
    weights = 0.875 ** torch.arange(H - 1, dtype=F64).unsqueeze(1)
    return -(weights * returns).mean(), logits, features


def actor_gradient(policy, start, noise, estimator, **kwargs):
    loss = imagine(policy, start, noise, estimator, SETTINGS, **kwargs).actor_loss
    return torch.autograd.grad(loss, list(policy.actor.parameters()))


def test_rp_is_straight_through_backpropagation():
    policy = make_policy()
    start, noise = starts(policy), draw(policy)
    loss, _, features = plain_imagination(policy, start, noise)
    expected = torch.autograd.grad(loss, list(policy.actor.parameters()))
    found = imagine(policy, start, noise, estimators.make("rp"), SETTINGS)
    torch.testing.assert_close(found.features, features)
    torch.testing.assert_close(
        actor_gradient(policy, start, noise, estimators.make("rp")), expected
    )
    assert all(g.any() for g in expected)


def test_lr_is_the_score_of_the_logits_and_the_paths_around_them():
    """Against a surrogate: Σ log p(z_t)·(costs after it), z_t fixed; h is differentiated."""
    policy = make_policy()
    start, noise = starts(policy), draw(policy)
    rssm, state, log_probs, features = policy.model.rssm, start, [], []
    for action_noise, latent_noise in zip(*noise):
        action, _ = policy.actor.act(policy.actor(state.features), action_noise)
        deter = rssm.recur(state, action)
        logits = rssm.prior(deter).logits
        z = torch.nn.functional.one_hot((logits + latent_noise).argmax(-1), C).double()
        log_probs.append(Independent(OneHotCategorical(logits=logits), 1).log_prob(z))
        state = State(deter, z.flatten(1))
        features.append(state.features)
    features = torch.stack(features)
    rewards, values = policy.model.reward(features), policy.value(features)
    loss = torch.zeros((), dtype=F64)
    inputs = []  # [H, N] the share of each imagined state's reward and value in the loss
    r, v = (x.detach().clone().requires_grad_() for x in (rewards, values))
    weights = 0.875 ** torch.arange(H - 1, dtype=F64).unsqueeze(1)
    total = -(weights * imagination.lambda_returns(r, v, 0.875, 0.8)).mean()
    by_reward, by_value = torch.autograd.grad(total, [r, v])
    inputs = (by_reward * r + by_value * v).detach()  # the loss is linear in both
    loss = (by_reward * rewards + by_value * values).sum()
    for t in range(H):
        to_go = inputs[t:].sum(0)
        advantage = to_go - (to_go.sum() - to_go) / (N - 1)
        loss = loss + (advantage * log_probs[t]).sum()
    expected = torch.autograd.grad(loss, list(policy.actor.parameters()))
    torch.testing.assert_close(
        actor_gradient(policy, start, noise, estimators.make("lr")), expected
    )


@pytest.mark.parametrize("discount_head", [False, True])
@pytest.mark.parametrize("name", [name for name in estimators.names() if name != "ddcg"])
def test_every_estimator_imagines_with_a_meter(name, discount_head):
    policy = make_policy(discount_head=discount_head)
    start, noise = starts(policy), draw(policy)
    meter = torch.zeros(H, G, C, dtype=F64, requires_grad=True)
    found = estimators.gradient(
        lambda e, tap: imagine(policy, start, noise, e, SETTINGS, tap=tap, meter=meter).actor_loss,
        list(policy.actor.parameters()),
        estimators.make(name),
        samples=N,
        tap_size=imagination.last_layer_size(policy.actor),
        meter=meter,
    )
    assert all(g.isfinite().all() and g.any() for g in found.gradients)
    assert found.k.shape == (H, G, C)
    if name in ("rp", "lr", "lr-first-order"):
        assert torch.equal(found.k, torch.full_like(found.k, float(name != "rp")))
    elif name != "tpx-unclipped":
        assert ((found.k >= 0) & (found.k <= 1)).all()
        assert ((found.k > 0) & (found.k < 1)).any() or name in (
            "aobg", "safe", "rp-cut"
        )  # fmt: skip


def test_the_probe_is_the_gradient_of_the_last_layer():
    policy = make_policy()
    state, action_noise = starts(policy), randn(N, A, seed=6)
    hidden = policy.actor.hidden(state.features)
    raw = policy.actor.output(hidden)
    probe = imagination._last_layer_probe(policy, state, hidden, raw, action_noise)
    cotangents = randn(3, N, G, C, seed=7)

    def explicit(cotangent):
        rows = []
        for i in range(N):
            action, _ = policy.actor.act(policy.actor(state.features), action_noise)
            logits = policy.model.rssm.prior(policy.model.rssm.recur(state, action)).logits
            inner = (logits[i] * cotangent[i]).sum()
            g = torch.autograd.grad(inner, list(policy.actor.out.parameters()))
            rows.append(torch.cat([one.flatten() for one in g]))
        return torch.stack(rows)

    torch.testing.assert_close(probe((cotangents[0],)), explicit(cotangents[0]))
    b = torch.stack([explicit(c) for c in cotangents])
    torch.testing.assert_close(gram(probe, (cotangents,)), gram_by_hand(b))


def test_the_critic_s_baseline_is_the_value_at_the_probabilities():
    policy = make_policy()
    start, noise, seen = starts(policy), draw(policy), []

    def baseline(returns, value):
        seen.append(value)
        return estimators.baselines.critic(returns, value)

    actor_gradient(policy, start, noise, estimators.make("lr", baseline=baseline))
    _, logits, features = plain_imagination(policy, start, noise)
    first = torch.cat((logits[0].exp().flatten(1), features[0][:, G * C :]), -1)
    torch.testing.assert_close(seen[-1], policy.value(first).detach())


def test_compiled_imagination_equals_eager():
    policy = make_policy()
    start, noise = starts(policy), draw(policy)
    tpx = estimators.make("tpx")

    def loss(noise):
        return imagine(policy, start, noise, tpx, SETTINGS).actor_loss

    torch._dynamo.reset()
    found, expected = (
        torch.autograd.grad(f(noise), list(policy.actor.parameters()))
        for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# The agent

SMALL = {
    "policy_kwargs": SIZES, "sequence_length": 5, "batch_size": 3, "imagination_starts": 6,
    "horizon": 3, "learning_starts": 20, "train_freq": 10, "gradient_steps": 1,
    "buffer_size": 200, "seed": 0, "device": "cpu",
}  # fmt: skip


def make_agent(**changes):
    return DreamerTPX("DreamerPolicy", gym.make("Pendulum-v1"), **{**SMALL, **changes})


@pytest.mark.parametrize("name", estimators.names())
def test_every_estimator_learns(name):
    if name == "ddcg":
        with pytest.raises(ValueError, match="needs Gaussian nodes, got categorical ones; use"):
            make_agent(estimator=name)
        return
    agent = make_agent(estimator=name, free_nats=0.0, representation_scale=0.2)
    before = {n: p.clone() for n, p in agent.policy.named_parameters()}
    agent.learn(40)
    assert agent._n_updates == 3
    for part in ("model.rssm.prior_out.weight", "model.rssm.posterior_out.weight",
                 "actor.out.weight", "critic.0.weight"):  # fmt: skip
        after = dict(agent.policy.named_parameters())[part]
        assert after.isfinite().all() and not torch.equal(after, before[part]), part


def test_a_leg_of_gaussians_is_refused_by_the_constructor():
    with pytest.raises(ValueError, match=r"'biw' needs a Gaussian .* use estimator 'tpx'") as found:
        make_agent(estimator=estimators.make("tpx", legs="biw"))
    assert "\n" not in str(found.value)


def test_saved_loaded_and_predicting_alike(tmp_path):
    agent = make_agent(estimator="tpg").learn(30)
    agent.save(tmp_path / "agent.zip")
    loaded = DreamerTPX.load(tmp_path / "agent.zip", device="cpu")
    assert loaded.policy.sizes == agent.policy.sizes
    observation = np.random.default_rng(0).uniform(-1, 1, (4, 3)).astype(np.float32)
    state = other = None
    for _ in range(3):
        action, state = agent.predict(observation, state, deterministic=True)
        again, other = loaded.predict(observation, other, deterministic=True)
        assert np.array_equal(action, again)
    z = state[1].reshape(4, G, C)
    assert set(np.unique(z)) == {0.0, 1.0} and (z.sum(-1) == 1).all()


def test_the_world_model_of_other_latents_is_refused(tmp_path):
    make_agent().save(tmp_path / "categorical.zip")
    gaussian = {k: v for k, v in SIZES.items() if k not in ("latent", "classes")}
    with pytest.raises(ValueError, match="use the environment, preset and policy_kwargs of"):
        make_agent(policy_kwargs=gaussian, pretrained_world_model=str(tmp_path / "categorical.zip"))
    make_agent(pretrained_world_model=str(tmp_path / "categorical.zip"))


def test_open_loop_pictures_of_a_trained_agent():
    truth, model = predict_sequences(make_agent().learn(30), 2)
    assert truth.shape == model.shape == (5, 2, 3) and np.isfinite(model).all()


@pytest.mark.parametrize("node", ["latent", "both"])
def test_k_is_logged_by_variable_and_for_32_at_most(node):
    """The mean over classes; of 40 variables the first 32, and the action's own."""
    agent = make_agent(
        policy_kwargs={**SIZES, "stoch": 40, "classes": 2}, estimator="tpx", node=node,
        train_freq=20,
    )  # fmt: skip
    logged, found = {}, []
    actor_gradient, dump = agent._update.actor_gradient, agent.dump_logs

    def spy(*args, **kwargs):
        found.append(actor_gradient(*args, **kwargs))
        return found[-1]

    agent._update.actor_gradient = spy
    agent.dump_logs = lambda: (logged.update(agent.logger.name_to_value), dump())
    agent.learn(20)
    k = found[0][0].k
    if node == "both":
        assert logged["k/action_00"] == pytest.approx(float(k[:, 0].mean()))
        k = k[:, 1:].view(3, 40, 2)
    lines = [name for name in logged if name.startswith("k/coordinate_")]
    assert len(lines) == 32 and "k/coordinate_31" in lines
    assert k.shape == (3, 40, 2)
    assert logged["k/coordinate_05"] == pytest.approx(float(k[:, 5].mean()))
    if node == "latent":
        assert logged["k/step_02"] == pytest.approx(float(k[1].mean()))
        assert logged["train/k"] == pytest.approx(float(k.mean()))


def test_files_of_gaussians_name_no_classes():
    kwargs = {k: v for k, v in SIZES.items() if k not in ("latent", "classes")}
    constructor = make_agent(policy_kwargs=kwargs).policy._get_constructor_parameters()
    assert constructor["latent"] == "gaussian" and "classes" not in constructor


class PointEnv(gym.Env):
    """A point on a line that actions move; the reward is -x², the best return about -0.3."""

    observation_space = spaces.Box(-2, 2, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-1, 1), 0
        return np.array([self.x], np.float32), {}

    def step(self, action):
        self.x = float(np.clip(self.x + 0.3 * float(action[0]), -1.5, 1.5))
        self.t += 1
        return np.array([self.x], np.float32), -(self.x**2), False, self.t == 15, {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rp", "lr", "tpx", "tpg"])
def test_a_point_is_held_after_500_decisions(name):
    """Seeds 100 and 101: from returns of -22 to -27 to -1.2 to -2.3 (measured)."""
    agent = DreamerTPX(
        "DreamerPolicy", PointEnv(), estimator=name, seed=100, device="cpu", horizon=6, gamma=0.9,
        learning_rate=2e-3, model_learning_rate=3e-3, adam_eps=1e-5, free_nats=1.0,
        representation_scale=0.2, entropy_scale=0.01, batch_size=8, sequence_length=12,
        imagination_starts=64, learning_starts=200, train_freq=10, gradient_steps=5,
        buffer_size=5000, exploration_noise=0.2,
        policy_kwargs={
            "latent": "categorical", "stoch": 6, "classes": 6, "deter": 16, "hidden": 16,
            "width": 32, "vector_std": 0.1, "init_std": 1.0,
        },
    )  # fmt: skip
    agent.learn(500)
    mean, _ = evaluate_policy(agent, Monitor(PointEnv()), 20)
    assert mean > -5
