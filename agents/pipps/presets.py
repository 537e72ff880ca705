"""The settings of PIPPS's papers, and ours: constructor arguments and tasks, each number cited.

`PIPPS(env=env, **PRESETS["tpx2023"])`, or `--preset tpx2023` on the command line, where RUNS sets
the task.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Parmas et al. 2023, "Model-based RL with scalable composite policy gradient estimators" (TPX)
    "tpx2023": {
        "estimator": "tpx-unclipped",  # Eq. 8; App. B.1 compares it with RP, LR and TP
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
        "estimator": "tp",  # Alg. 2, the paper's own: TP combined BIW-LR and RP (Sec. 4.1.2)
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
    # The same paper's other task: balancing a unicycle
    "pipps2018-unicycle": {
        "policy": "LinearPolicy",  # Sec. 4.2.1: "The controller is linear"
        "estimator": "tp",  # Table 1: TP 0.94 of the runs succeed, RP 0.80, LR 0.47
        "n_particles": 300,  # Sec. 4.2: P = 300
        "horizon": 20,  # Sec. 4.2: 2 s at 10 Hz
        "gradient_steps": 600,  # Sec. 4.2: 600 policy evaluations between trials
        "optimizer": "rmsprop2018",  # Sec. 3.3
        "learning_rate": 5e-4,  # Sec. 4.2: alpha
        "momentum": 0.9,  # Sec. 4.2: gamma
        "random_trials": 5,  # Sec. 4.2: 5 random trials, then 30 learned ones
        "random_scale": 0.2,  # PILCO's unicycle_learn.m: maxU / 5; not in the paper
        "termination": "ignore",  # PILCO's simulations go on beyond a fall; not in the paper
        "leg": "biw",  # Sec. 3.2: batch importance weighting in LR and TP
    },
    # Ours, for second-order systems whose environment declares its velocities: of what MC-PILCO has
    # (Amadio et al. 2022), the part that earned its place (results/pipps/README.md)
    "recommended": {
        "estimator": "tpx",
        "speed_integration": "auto",  # a third to a half of the one-step errors of positions
        "n_particles": 300,
        "horizon": 30,
        "gradient_steps": 250,
        "learning_rate": 0.03,
        "policy_kwargs": {"n_centres": 50},
    },
    # Ours, for the unicycle: the search of "recommended" on the task of "pipps2018-unicycle"
    "recommended-unicycle": {
        "policy": "LinearPolicy",
        "estimator": "tpx",
        "speed_integration": "auto",  # roll, yaw and pitch from their rates
        "n_particles": 300,
        "horizon": 20,
        "gradient_steps": 250,
        "learning_rate": 0.01,  # at 0.03, later searches step off a cliff
        "keep_best": True,
        "random_trials": 5,
        "random_scale": 0.2,
        "termination": "ignore",
    },
}

_CART_POLE = "totalprop/CartPoleSwingUp-v0"
RUNS: dict[str, dict[str, Any]] = {
    # App. B.1: "We used the Tip Cost described in the original work", "noise multiplier 1"
    "tpx2023": {"env_id": _CART_POLE, "env_arg": ("cost=tip", "noise=1")},
    # Table 2: the Angle Cost at five noise multipliers and the Tip Cost at two; 1 is the base noise
    "pipps2018": {"env_id": _CART_POLE, "env_arg": ("cost=angle", "noise=1")},
    # 5 + 30 trials of 20 steps; those that end with a fall are shorter, so that there are more
    "pipps2018-unicycle": {"env_id": "totalprop/Unicycle-v0", "total_timesteps": 700},
    "recommended": {"env_id": _CART_POLE, "env_arg": ("cost=angle", "noise=1")},
    # 5 + 10 trials of 20 steps, of which falls cut some
    "recommended-unicycle": {"env_id": "totalprop/Unicycle-v0", "total_timesteps": 300},
}
