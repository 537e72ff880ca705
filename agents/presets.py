"""Named settings of the papers: keyword arguments for the agents' constructors, each number cited.

`PIPPS("RBFPolicy", env, **presets.PIPPS["tpx2023"])`, or `--preset tpx2023` on the command line.
DAAPPO_RUNS holds what of a run the constructor does not take; the command line sets that, too.
"""

from __future__ import annotations

from typing import Any

from torch import nn

PIPPS: dict[str, dict[str, Any]] = {
    # Parmas et al. 2023, "Model-based RL with scalable composite policy gradient estimators" (TPX)
    "tpx2023": {
        "n_particles": 300,  # App. B.1: "number of particles [...] was N = 300"
        "horizon": 30,  # App. B.1: "prediction horizon was 30 steps"
        "gradient_steps": 250,  # App. B.1: "policy gradient steps per episode was 250"
        "optimizer": "adam",  # App. B.1: Adam instead of the RMSprop-like optimiser
        "learning_rate": 0.01,  # App. B.1: plotted rate, the best of RP; the best of TP: 0.03-0.06
        "adam_eps": 1e-4,  # the authors' demo code, not in the paper
        "random_trials": 1,  # App. B.1: "starts by collecting 1 episode with random actions"
        "policy_kwargs": {"n_centres": 50},  # App. B.1: "about 250 parameters": 50 centres give 254
        "leg": "score",  # App. B.1: no batch importance weighting
    },
    # Parmas et al. 2018, "PIPPS: flexible model-based policy search robust to the curse of chaos"
    "pipps2018": {
        "n_particles": 300,  # Sec. 4.2: P = 300
        "horizon": 30,  # Sec. 4.2: 3 s at 10 Hz
        "gradient_steps": 600,  # Sec. 4.2: 600 policy evaluations between trials
        "optimizer": "rmsprop2018",  # Sec. 3.3
        "learning_rate": 5e-4,  # Sec. 4.2: alpha
        "momentum": 0.9,  # Sec. 4.2: gamma
        "random_trials": 1,  # Sec. 4.2: 1 random trial (cart-pole), then 15 learned ones
        "policy_kwargs": {"n_centres": 50},  # Sec. 4.2.1: 50 basis functions
        "leg": "biw",  # Sec. 3.2: batch importance weighting in LR and TP
    },
}

DREAMER: dict[str, dict[str, Any]] = {
    # Hafner et al. 2020, "Dream to control" (DreamerV1); numbers of danijar/dreamer, dreamer.py.
    # Its frames are decisions x action repeat 2: 1000 frames are 500 decisions.
    "dreamer2020": {
        "estimator": "rp",  # Hafner et al. 2020, Sec. 3: analytic gradients
        "horizon": 15,
        "gamma": 0.99,
        "lam": 0.95,
        "discount_weights": True,
        "stop_grad_actor_input": True,
        "learning_rate": 8e-5,
        "model_learning_rate": 6e-4,
        "adam_eps": 1e-7,  # TensorFlow's default
        "max_grad_norm": 100.0,
        "batch_size": 50,
        "sequence_length": 50,
        "imagination_starts": 0,
        "learning_starts": 2500,  # prefill of 5000 frames
        "train_freq": 500,  # train_every 1000 frames
        "gradient_steps": 100,
        "exploration_noise": 0.3,
        "kl_scale": 1.0,
        "free_nats": 3.0,
        "free_nats_per_step": False,
    },
    # Parmas et al. 2023 (TPX), Sec. 6: "a greatly modified version" of yusukeurakami's PyTorch
    # Dreamer. Its 5-bit images and its replay across episode ends are not reproduced.
    "tpx2023": {
        "estimator": "tpx",  # Sec. 4
        "horizon": 15,  # Sec. 6.2: H in {15, 60}
        "discount_weights": False,  # App. C.1, Eq. 17: all returns are averaged alike
        "stop_grad_actor_input": True,  # App. C.1
        "learning_rate": 8e-5,  # yusukeurakami/dreamer-pytorch, main.py
        "model_learning_rate": 1e-3,  # same
        "free_nats_per_step": True,  # same, main.py:384
        "policy_kwargs": {"width": 200},  # same: hidden-size
        "learning_starts": 2500,  # same: 5 seed episodes
        "train_freq": 500,  # same: once per episode
        "gradient_steps": 100,  # Sec. 6: "repeat the process for 100 iterations"
    },
    # Ours: small networks and batches, more updates per step, for 2 CPU cores (results/dreamer/).
    "laptop": {
        "learning_rate": 3e-4,
        "model_learning_rate": 1e-3,
        "adam_eps": 1e-5,
        # A handful of state entries carry little information: 3 free nats a step would leave the
        # prior, which imagination runs on, all but untrained.
        "free_nats": 0.0,
        "entropy_scale": 0.03,  # or the actor saturates before the model has learned anything
        "batch_size": 16,
        "sequence_length": 32,
        "imagination_starts": 256,
        "buffer_size": 100_000,
        "learning_starts": 1000,
        "train_freq": 20,
        "gradient_steps": 10,
        "policy_kwargs": {
            "stoch": 16,
            "deter": 100,
            "hidden": 100,
            "width": 100,
            "conv_depth": 8,
            "vector_std": 0.1,
        },
    },
}

# Images carry more than the state, and the KL term may keep Hafner et al.'s allowance.
DREAMER["laptop-pixels"] = {**DREAMER["laptop"], "free_nats": 3.0}

# What the papers on many actions have in common: PPO of CleanRL, but no advantage normalisation.
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
    "max_grad_norm": 0.5,
    "vf_coef": 0.25,  # 0.5 of half the squared error: stable-baselines3 has no half
    "ent_coef": 0.0,
    "normalize_advantage": False,
    "timeout_bootstrap": False,
    "dynamics_target": "next",
    "dynamics_normalise": False,
}
DAAPPO: dict[str, dict[str, Any]] = {
    # Nauman & Cygan 2022, "On All-Action Policy Gradients", Table 2. Silent: steps of the model's
    # fit (the rule of the 2023 paper's Alg. 1) and warm-up (none).
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
        "n_q": 1,  # Sec. 4.2: one Q-network
        "policy_kwargs": {"net_arch": [512, 512], "activation_fn": nn.ReLU},
    },
    # Nauman & Cygan 2023, "On Many-Actions Policy Gradient", App. C.5. Silent: the model's warm-up
    # (none) and the activation (ReLU).
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
        "n_q": 2,  # the least of two
        "policy_kwargs": {
            "net_arch": {"pi": [512, 512], "vf": [1024, 1024]},
            "activation_fn": nn.ReLU,
        },
    },
    # The authors' code of the 2023 paper: mbma/args.py and mbma/mbma.py. Differs from it: it fits
    # the model from the end of the warm-up on, the first time in 8 x 640 steps, here every rollout
    # fits it; its learning rate begins at the full value and ends above 0, here each update's is
    # that of the next; and it evaluates actions that are sampled.
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
    # Ours (results/daa_ppo/), with observations and rewards normalised (VecNormalize).
    "recommended": {
        "action_source": "dynamics",
        "estimator": "lr",
        "n_steps": 1024,
        "n_extra_actions": 4,
        "simulation_horizon": 8,
        # What critic and model get wrong about a state is the same for all its actions.
        "extra_baseline": "leave-one-out",
        "normalize_advantage": True,
        "clip_range_vf": None,  # 0.2 of a raw return is too little to learn from
        "timeout_bootstrap": True,
        "dynamics_target": "delta",
        "dynamics_normalise": True,
        "dynamics_width": 256,
        "policy_kwargs": {"net_arch": [256, 256], "activation_fn": nn.ReLU},
    },
}
DAAPPO_RUNS: dict[str, dict[str, Any]] = {
    # "Slight modifications" of CleanRL's PPO, which normalises and anneals; Table 2: repeat 4
    "daa2022": {"normalize": "both", "learning_rate_schedule": "linear", "action_repeat": 4},
    # Silent on normalisation: off, as in the authors' code
    "mbma2023": {"normalize": "none", "learning_rate_schedule": "linear", "action_repeat": 4},
    "mbma_code": {"normalize": "none", "learning_rate_schedule": "linear", "action_repeat": 4},
}
