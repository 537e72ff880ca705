"""The settings of PILCO's sources, and ours: constructor arguments and tasks, each number cited.

`PILCO("RBFPolicy", env, **PRESETS["pilco2011"])`, or `--preset pilco2011` on the command line,
where RUNS sets the task. The numbers are those of the authors' MATLAB code for the cart-pole
(scenarios/cartPole/settings_cp.m), where the paper of 2011 has none; the comparison of Parmas et
al. 2018 (PIPPS) has other ones.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Deisenroth & Rasmussen 2011, "PILCO: a model-based and data-efficient approach"
    "pilco2011": {
        "policy_kwargs": {"n_centres": 10},  # nc = 10; 50 in Parmas et al. 2018, Sec. 4.2.1
        "angle_dims": (1,),  # angi, dyni and poli: sine and cosine in place of the angle
        "optimizer": "quasi-newton",  # minimize.m, BFGS
        "gradient_steps": 150,  # opt.length, of line searches; here evaluations
        "horizon": 30,  # the task's 3 s at 10 Hz (Parmas et al. 2018, Sec. 4.2); T = 4 s in code
        "random_trials": 1,  # J = 1
        "process_noise": False,  # propagate.m adds none
        "gp_evaluations": 300,  # trainOpt(1), of line searches; here evaluations
        "exploration": 0.0,  # cost.expl = 0
    },
    # Parmas et al. 2018, the baseline "PILCO" of Table 2
    "pipps2018": {
        "policy_kwargs": {"n_centres": 50},  # Sec. 4.2.1: 50 basis functions
        "angle_dims": (1,),  # as PILCO, "x including sine and cosine" with the Tip Cost
        "optimizer": "quasi-newton",
        "gradient_steps": 150,  # not stated; that of PILCO's code
        "horizon": 30,  # Sec. 4.2: 3 s at 10 Hz
        "random_trials": 1,  # Sec. 4.2: 1 random trial (cart-pole), then 15 learned ones
        "process_noise": True,  # Sec. 2.4.1: the prediction's variance is σ_f² + σ_n²
    },
    # Ours, for second-order systems whose environment declares its velocities: PIPPS's
    # "recommended" with moments in place of particles
    "recommended": {
        "policy_kwargs": {"n_centres": 50},
        "speed_integration": "auto",
        "optimizer": "quasi-newton",
        "gradient_steps": 250,  # 50 and 150 stop far from the optimum
        "horizon": 30,
    },
    # Ours, for the unicycle
    "recommended-unicycle": {
        "policy": "LinearPolicy",
        "speed_integration": "auto",  # roll, yaw and pitch from their rates
        "optimizer": "quasi-newton",
        "gradient_steps": 150,
        "horizon": 20,
        "random_trials": 5,
        "random_scale": 0.2,
        "termination": "ignore",
    },
}

_CART_POLE = "totalprop/CartPoleSwingUp-v0"
RUNS: dict[str, dict[str, Any]] = {
    # The tip cost of width 0.25 m, S0 = 0.1² I; its noise of 0.01 (m, rad, m/s, rad/s) is between
    # the multipliers 0.01 and 1 of the environment's, in whose units the velocities' is larger.
    "pilco2011": {"env_id": _CART_POLE, "env_arg": ("cost=tip", "noise=0.01", "initial_std=0.1")},
    # Table 2: the Tip Cost at the base noise
    "pipps2018": {"env_id": _CART_POLE, "env_arg": ("cost=tip", "noise=1")},
    "recommended": {"env_id": _CART_POLE, "env_arg": ("cost=angle", "noise=1")},
    # 5 + 10 trials of 20 steps, of which falls cut some
    "recommended-unicycle": {"env_id": "totalprop/Unicycle-v0", "total_timesteps": 300},
}
