"""DAAPPO's settings in its papers and our own, by name: constructor arguments, each number cited.

`DAAPPO("MlpPolicy", env, **PRESETS["recommended"])`, or `--preset recommended` on the command line.
RUNS holds the options of a run that are not constructor arguments; `--preset` sets these, too.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# Common to the papers on many actions: CleanRL's PPO without advantage normalisation.
_MANY_ACTIONS: dict[str, Any] = {
    "action_source": "dynamics",
    "estimator": "lr",
    "batch_size": 64,
    "n_epochs": 10,
    "learning_rate": 3e-4,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "clip_range": 0.2,
    "clip_range_vf": 0.2,
    "value_clipping": "max",  # CleanRL's
    "max_grad_norm": 0.5,
    "vf_coef": 0.25,  # 0.5 of half the squared error: stable-baselines3 has no half
    "ent_coef": 0.0,
    "normalize_advantage": False,
    "timeout_bootstrap": False,
    "dynamics_target": "next",
    "dynamics_normalise": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    # Nauman & Cygan 2022, "On All-Action Policy Gradients", Table 2. The paper does not state the
    # steps of the model's fit (here the rule of the 2023 paper's Alg. 1) or a warm-up (none here).
    "daa2022": {
        **_MANY_ACTIONS,
        "n_steps": 1024,  # the text and all captions; Table 2 says 2048
        "n_extra_actions": 4,
        "simulation_horizon": 8,
        "dynamics_width": 512,
        "dynamics_learning_rate": 7e-4,
        "dynamics_eps": 1e-5,
        "dynamics_batch_size": 256,
        "dynamics_buffer_size": 50_000,
        "n_q": 1,  # Sec. 5: "the Q-network is a two-layer MLP"
        "q_learning_rate": 3e-4,
        "q_target": "advantage",  # Sec. 5: "with TD(λ) advantages as targets"
        "policy_kwargs": {"net_arch": [512, 512], "activation_fn": nn.ReLU},
    },
    # Nauman & Cygan 2023, "On Many-Actions Policy Gradient", App. C.5. The paper does not state
    # the model's warm-up (none here) or the activation (ReLU here).
    "mbma2023": {
        **_MANY_ACTIONS,
        "n_steps": 2048,
        "n_extra_actions": 8,
        "simulation_horizon": 10,
        "grow_fraction": 0.15,  # "until 150k step" of 1M
        "dynamics_width": 1024,
        "dynamics_learning_rate": 3e-4,
        "dynamics_eps": 1e-5,
        "dynamics_batch_size": 128,
        "dynamics_buffer_size": 25_000,
        "dynamics_steps": 320,  # Alg. 1: epochs x minibatches
        "n_q": 2,  # the smaller of two values
        "q_target": "return",
        "policy_kwargs": {
            "net_arch": {"pi": [512, 512], "vf": [1024, 1024]},
            "activation_fn": nn.ReLU,
        },
    },
    # The authors' code of the 2023 paper: mbma/args.py and mbma/mbma.py. Their code differs from
    # ours in two ways. It first fits the model after the warm-up, in 8 x 640 steps; ours fits it
    # after every rollout. It evaluates with sampled actions.
    "mbma_code": {
        **_MANY_ACTIONS,
        "policy": "TanhMeanPolicy",
        "n_steps": 2048,
        "n_extra_actions": 8,
        "simulation_horizon": 8,
        "grow_fraction": 0.15,
        "dynamics_width": 1024,
        "dynamics_activation": "leaky_relu",
        "dynamics_learning_rate": 3e-4,
        "dynamics_eps": 1e-8,
        "dynamics_batch_size": 128,
        "dynamics_buffer_size": 200_000,
        "dynamics_steps": 640,
        "dynamics_warmup": 40_000,
        "policy_kwargs": {"net_arch": [512, 512], "activation_fn": nn.LeakyReLU},
    },
    # Our own (results/daa_ppo/), for observations and rewards normalised by VecNormalize.
    "recommended": {
        "action_source": "dynamics",
        "estimator": "lr",
        "n_steps": 1024,
        "n_extra_actions": 4,
        "simulation_horizon": 8,
        # Errors of critic and model that all actions of a state share cancel.
        "extra_baseline": "leave-one-out",
        "normalize_advantage": True,
        "clip_range_vf": None,  # 0.2 is too small a step for values of unscaled returns
        "timeout_bootstrap": True,
        "dynamics_target": "delta",
        "dynamics_normalise": True,
        "dynamics_width": 256,
        "policy_kwargs": {"net_arch": [256, 256], "activation_fn": nn.ReLU},
    },
}
RUNS: dict[str, dict[str, Any]] = {
    # "Slight modifications" of CleanRL's PPO, which normalises and anneals; action repeat: Table 2
    "daa2022": {"normalize": "both", "learning_rate_schedule": "linear", "action_repeat": 4},
    # The paper does not mention normalisation: off, as in the authors' code
    "mbma2023": {"normalize": "none", "learning_rate_schedule": "linear", "action_repeat": 4},
    "mbma_code": {"normalize": "none", "learning_rate_schedule": "linear", "action_repeat": 4},
}
