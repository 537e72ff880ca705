"""Arguments that are set as attributes count as if they had been passed, or are refused."""

import functools
from typing import Any

import pytest
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback

from tests.agents.contract.conftest import SIZES, Maker
from tests.agents.contract.environments import CountingEnv
from tests.agents.contract.probes import logged
from totalprop.agents import AGENTS
from totalprop.agents.core.validation import constructor_hints
from totalprop.agents.trials.saturating_cost import SaturatingCost

# What is no setting of the method: stable-baselines3's own behaviour.
NOT_SETTINGS = {
    "policy", "env", "tensorboard_log", "verbose", "seed", "device", "stats_window_size",
    "group", "_init_setup_model",
}  # fmt: skip
# A value of every argument that is neither its default nor that of the small sizes.
OTHERS: dict[str, dict[str, Any]] = {
    "pipps": {
        "learning_rate": 0.5, "estimator": "lr", "leg": "biw", "cross_fit": True, "horizon": 4,
        "n_particles": 8, "gradient_steps": 3, "optimizer": "rmsprop2018", "adam_eps": 0.1,
        "momentum": 0.5, "random_trials": 2, "model_uncertainty": False, "noise_multiplier": 3.0,
        "gp_evaluations": 5, "max_points": 9, "angle_dims": (1,), "policy_kwargs": {"n_centres": 5},
        "invariant_dims": (2,), "random_scale": 0.5, "speed_integration": "on",
        "integrated_dims": ((0, 1),), "time_step": 0.5, "kernel": "rbf+linear", "dropout": 0.5,
        "noise_stop": 2.0, "keep_best": True,
        "start_means": ((0.5, 0.0, 0.0, 0.0), (-0.5, 1.0, 0.0, 0.0)),
        "termination": lambda states: states[..., 1] > 3, "termination_cost": 2.0,
        "cost_fn": lambda states: states.sum(-1),
    },
    "pilco": {
        "learning_rate": 0.5, "optimizer": "quasi-newton", "horizon": 4, "gradient_steps": 3,
        "random_trials": 2, "cost_fn": SaturatingCost([0.0] * 4, [1.0, 0.1, 0.0, 0.0]),
        "exploration": -0.5, "termination": None, "angle_dims": (1,), "process_noise": False,
        "gp_evaluations": 5, "max_points": 9, "policy_kwargs": {"n_centres": 5},
        "invariant_dims": (2,), "random_scale": 0.5, "speed_integration": "on",
        "integrated_dims": ((0, 1),), "time_step": 0.5,
        "start_means": ((0.5, 0.0, 0.0, 0.0), (-0.5, 1.0, 0.0, 0.0)),
    },
    "dreamer": {
        "learning_rate": 0.5, "estimator": "lr", "node": "both", "credit": "own",
        "baseline": "critic", "leg": "lax", "horizon": 4, "stop_grad_actor_input": False,
        "gamma": 0.5, "lam": 0.5, "discount_weights": False, "entropy_scale": 0.5,
        "scale_returns": True, "slow_critic_rate": 0.1, "slow_actor_rate": 0.1,
        "representation_scale": 0.3, "model_learning_rate": 0.1,
        "adam_eps": 0.1, "max_grad_norm": 0.1, "batch_size": 4, "sequence_length": 4,
        "imagination_starts": 5, "buffer_size": 300, "storage": "device",
        "learning_starts": 21, "train_freq": 3, "gradient_steps": 2, "replay_ratio": 6.5,
        "exploration_noise": 0.9, "hold_exponent": 1.5, "kl_scale": 0.5, "free_nats": 0.0,
        "free_nats_per_step": True, "decoded_share": 0.25, "discount_head": False,
        "discount_scale": 3.0, "pretrained_world_model": "model.zip", "nonfinite": "skip",
        "bf16": True, "compile": True, "cuda_graph": True, "policy_kwargs": {"deter": 6},
    },
    "daappo": {
        "learning_rate": 0.1, "n_steps": 14, "batch_size": 4, "n_epochs": 2, "gamma": 0.5,
        "gae_lambda": 0.5, "clip_range": 0.01, "clip_range_vf": 0.01, "normalize_advantage": False,
        "ent_coef": 0.1, "vf_coef": 0.1, "max_grad_norm": 0.01, "target_kl": 1e-9,
        "action_source": "none", "n_extra_actions": 3, "simulation_horizon": 1,
        "grow_fraction": 0.5, "estimator": "rp", "real_advantage": "matched_horizon",
        "extra_baseline": "leave-one-out", "timeout_bootstrap": False, "separate_grad_clip": True,
        "dynamics_target": "next", "dynamics_normalise": False, "dynamics_width": 4,
        "dynamics_activation": "leaky_relu", "dynamics_learning_rate": 0.1, "dynamics_eps": 0.1,
        "dynamics_batch_size": 3, "dynamics_steps": 3, "dynamics_buffer_size": 8,
        "dynamics_warmup": 8, "n_q": 1, "q_learning_rate": 0.1, "q_target": "advantage",
        "value_clipping": "max", "use_sde": True, "sde_sample_freq": 2,
        "rollout_buffer_class": RolloutBuffer, "rollout_buffer_kwargs": {"a": 1},
        "policy_kwargs": {"net_arch": [4]},
    },
    "svg": {
        "learning_rate": 0.1, "variant": "0", "estimator": "lr", "nodes": "both",
        "n_extra_actions": 2, "gamma": 0.5, "train_freq": 5, "horizon": 5, "learning_starts": 10,
        "policy_updates": 3, "value_updates": 3, "model_updates": 3, "batch_size": 5,
        "buffer_size": 9, "max_weight": 0.1, "kl_weight": 1.0, "max_grad_norm": 0.01,
        "target_interval": 1, "value_learning_rate": 0.1, "model_learning_rate": 0.1,
        "adam_eps": 0.1, "value_hidden": (4,), "model_hidden": (5,), "activation": "relu",
        "reward": "learned", "cost_fn": lambda states: states.square().sum(-1),
        "policy_kwargs": {"net_arch": [4]},
    },
}  # fmt: skip


# Where an argument alone changes nothing that is learned: others, with which it does.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    # Ratios are 1 in the first update.
    ("daappo", "clip_range"): {"n_epochs": 2, "batch_size": 3},
    ("daappo", "clip_range_vf"): {"n_epochs": 2, "batch_size": 3},
    ("daappo", "target_kl"): {"n_epochs": 2, "batch_size": 3},
    ("daappo", "grow_fraction"): {"n_extra_actions": 3},
    ("daappo", "q_learning_rate"): {"action_source": "q"},
    ("daappo", "sde_sample_freq"): {"use_sde": True, "action_source": "none"},
    ("dreamer", "kl_scale"): {"free_nats": 0.0},
    ("dreamer", "representation_scale"): {"free_nats": 0.0},
    ("dreamer", "free_nats_per_step"): {"free_nats": 0.3},
    ("pipps", "momentum"): {"optimizer": "rmsprop2018"},
    ("pipps", "termination_cost"): {"termination": lambda states: (states[..., 1] - 1).sigmoid()},
}
# What changes nothing in so short a run, and is tested by the agent's own tests.
WITHOUT_EFFECT = {
    ("daappo", "timeout_bootstrap"),  # episodes end by themselves
    ("dreamer", "cuda_graph"), ("dreamer", "nonfinite"),
    ("dreamer", "decoded_share"),  # of images
    ("dreamer", "scale_returns"),  # by max(1, their range), which is below 1
    ("pilco", "termination"), ("svg", "reward"),  # the environment has neither this nor a cost
    ("pipps", "keep_best"),  # the last policy is the best
}  # fmt: skip


@pytest.mark.parametrize("agent", AGENTS)
def test_every_argument_has_another_value(agent):
    arguments = set(constructor_hints(AGENTS[agent].cls)) - NOT_SETTINGS
    assert set(OTHERS.get(agent, {})) == arguments, f"complete OTHERS in {__file__}"


@pytest.mark.parametrize(
    ("agent", "name"), [(agent, name) for agent in SIZES for name in OTHERS.get(agent, {})]
)
@pytest.mark.filterwarnings("ignore:the environment terminates episodes")
def test_an_attribute_that_is_set_counts_as_if_it_had_been_passed(agent, name):
    """After the same steps the parameters are the same, bit for bit; or a sentence says why not."""
    make, value, beside = Maker(agent), OTHERS[agent][name], BESIDE.get((agent, name), {})
    late = make(**beside)
    setattr(late, name, value)
    if name in make.cls.fixed_arguments:
        with pytest.raises(ValueError, match=f"^{name} cannot be changed any more: the agent was"):
            late.learn(28)
        return
    late.learn(28)  # at once: DAAPPO draws from the global generator, which `make` seeds
    passed = make(**beside, **{name: value}).learn(28)
    assert_same(late, passed)
    before = parameters(make(**beside).learn(28)) if beside else by_default(agent)
    has_effect = not torch.equal(before, parameters(passed))
    assert has_effect == ((agent, name) not in WITHOUT_EFFECT)


@pytest.mark.parametrize("agent", SIZES)
def test_a_setting_may_change_between_two_calls_of_learn(agent):
    make = Maker(agent)
    first, second = make().learn(14), make().learn(14)
    second.learning_rate = 0.5
    for each in (first, second):
        each.learn(14, reset_num_timesteps=False)
    assert not torch.equal(parameters(first), parameters(second))


@pytest.mark.parametrize("agent", SIZES)
def test_a_wrong_value_that_is_set_is_the_constructor_s_sentence(agent):
    made = Maker(agent)(CountingEnv())
    made.learning_rate = -1.0
    with pytest.raises(ValueError, match=r"^learning_rate must be .* got -1\.0$"):
        made.learn(28)
    assert made.num_timesteps == 0


@functools.cache
def by_default(agent):
    return parameters(Maker(agent)().learn(28))


def parameters(agent):
    return torch.nn.utils.parameters_to_vector(agent.policy.parameters()).detach().clone()


def assert_same(agent, other):
    assert agent.num_timesteps == other.num_timesteps == 28
    assert torch.equal(parameters(agent), parameters(other))


class _SetRate(BaseCallback):
    """Sets an attribute at a step."""

    def __init__(self, step: int, name: str, value: Any) -> None:
        super().__init__()
        self.step, self.name, self.value = step, name, value

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            setattr(self.model, self.name, self.value)
        return True


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", 0.125), ("lr_schedule", lambda progress: 0.125)]
)
@pytest.mark.parametrize("agent", SIZES)
def test_a_learning_rate_that_a_callback_sets_counts_from_the_next_round_on(agent, name, value):
    made = Maker(agent)()
    dumps = logged(made)
    made.learn(56, callback=_SetRate(29, name, value))
    rates = [
        values["train/learning_rate"] for values, _ in dumps if "train/learning_rate" in values
    ]
    if agent != "pilco":  # whose line search has none
        assert rates[0] != 0.125 and rates[-1] == 0.125
