"""Callbacks that know the phases of our agents."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from tqdm import tqdm

from totalprop.agents.persistence import env_state, safe_file


class Evaluation(BaseCallback):
    """Evaluate the policy on environments that learning never sees.

    Parmas et al. 2018, Sec. 4.2: "Each trial was evaluated by running the policy 30 times".

    Args:
        eval_env: vector environment used for nothing else; wrapped in VecNormalize (training=False)
            where the training's is, whose statistics it then gets.
        n_episodes: rollouts per evaluation.
        every: steps between evaluations; 0: whenever the policy has changed before a rollout
            (PIPPS: after each trial's policy search). The final policy is always evaluated.
        path: JSON file, rewritten after every evaluation: {"timesteps": [k], "returns": [k][n]}.
        verbose: 1 prints a line per trial.
    """

    def __init__(
        self,
        eval_env: VecEnv,
        *,
        n_episodes: int = 30,
        every: int = 0,
        path: Path | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.eval_env, self.n_episodes, self.path = eval_env, n_episodes, path
        self.every = every
        self._evaluated = -1  # updates of the policy that was evaluated last
        self._last = 0  # steps when it was
        self.timesteps: list[int] = []
        self.returns: list[list[float]] = []

    def _init_callback(self) -> None:
        normalised = [
            unwrap_vec_normalize(env) is not None for env in (self.training_env, self.eval_env)
        ]
        if normalised[0] != normalised[1]:
            raise ValueError(
                "wrap both the training and the evaluation environment in VecNormalize, or neither"
            )

    def _on_training_start(self) -> None:
        if self._last > self.num_timesteps:  # steps are counted anew
            self._last = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        is_due = self.num_timesteps - self._last >= self.every
        if self.model._n_updates > 0 and is_due:  # the policy has changed
            self.evaluate()

    def _on_training_end(self) -> None:
        self.evaluate()

    def state_dict(self) -> dict[str, Any]:
        """For `persistence.checkpoint`: the evaluations so far, and where the environments are."""
        return {
            "timesteps": self.timesteps,
            "returns": self.returns,
            "evaluated": self._evaluated,
            "environments": env_state.snapshot(self.eval_env),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.timesteps, self.returns = state["timesteps"], state["returns"]
        self._evaluated = state["evaluated"]
        self._last = self.timesteps[-1] if self.timesteps else 0
        env_state.restore(self.eval_env, state["environments"])

    def evaluate(self) -> None:
        """Run the rollouts, unless this policy was evaluated already; record and write them."""
        if self._evaluated == self.model._n_updates:
            return
        self._evaluated, self._last = self.model._n_updates, self.num_timesteps
        self._copy_statistics()
        returns, _ = evaluate_policy(
            self.model, self.eval_env, self.n_episodes, return_episode_rewards=True, warn=False
        )  # deterministic: a recurrent policy draws no random number then, and training is the same
        self.timesteps.append(self.num_timesteps)
        self.returns.append(np.asarray(returns, dtype=float).tolist())
        mean, std = float(np.mean(returns)), float(np.std(returns))
        self.logger.record("eval/mean_reward", mean)
        self.logger.record("eval/std_reward", std)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)  # who knows whether another dump follows
        if self.verbose:
            tqdm.write(f"{self.num_timesteps:6d} real steps: return {mean:8.2f} ± {std:.2f}")
        if self.path is not None:
            record = {"timesteps": self.timesteps, "returns": self.returns}
            safe_file.write_text(self.path, json.dumps(record) + "\n")

    def _copy_statistics(self) -> None:
        """Of VecNormalize; stable-baselines3's own asks for the same wrappers around it, too."""
        ours, theirs = map(unwrap_vec_normalize, (self.eval_env, self.training_env))
        if ours is not None and theirs is not None:
            if theirs.norm_obs:
                ours.obs_rms = copy.deepcopy(theirs.obs_rms)
            ours.ret_rms = copy.deepcopy(theirs.ret_rms)
