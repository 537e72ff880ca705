"""Evaluation of the policy while an agent learns."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import (
    VecEnv,
    VecMonitor,
    is_vecenv_wrapped,
    unwrap_vec_normalize,
)
from tqdm import tqdm

from totalprop.agents.core.validation import is_finite, is_whole
from totalprop.agents.persistence import env_state, safe_file

MAX_STEPS = 10_000  # of an episode of an evaluation


@dataclass(frozen=True)
class Episodes:
    """Episodes of an evaluation, in the order in which they ended.

    Attributes:
        returns: raw return of each, with the rewards that a Monitor saw.
        lengths: steps of each.
        n_cut: how many were cut; their returns are up to there.
    """

    returns: list[float]
    lengths: list[int]
    n_cut: int

    def describe_cut(self, max_steps: int, by: str = "max_steps, --eval-max-steps") -> str:
        """A sentence on the episodes that were cut, and by which argument or flag."""
        return (
            f"{self.n_cut} of {len(self.returns)} evaluation episodes had not ended after "
            f"{max_steps} steps and were cut there ({by}); "
            "gymnasium.make(..., max_episode_steps=N) gives the environment a time limit"
        )


def evaluate(
    agent: PolicyPredictor, env: VecEnv, n_episodes: int, *, max_steps: int = MAX_STEPS
) -> Episodes:
    """Evaluate the deterministic policy, like SB3's `evaluate_policy`, but to an end in any case.

    Each environment plays its share of the episodes, or short ones would be too many. Once an
    episode is cut, its environment waits until the others have played theirs: vector environments
    are reset together.

    Args:
        agent: what has the method `predict`.
        env: vector environment.
        n_episodes: episodes to play, at least 1.
        max_steps: steps after which an episode is cut.
    """
    n_envs = env.num_envs
    left = np.array([(n_episodes + i) // n_envs for i in range(n_envs)])
    normalised = unwrap_vec_normalize(env)
    is_monitored = is_vecenv_wrapped(env, VecMonitor) or env.env_is_wrapped(Monitor)[0]
    returns: list[float] = []
    lengths: list[int] = []
    n_cut = 0
    while left.any():
        observations, states = env.reset(), None
        plays, starts = left > 0, np.ones(n_envs, dtype=bool)
        total, length = np.zeros(n_envs), np.zeros(n_envs, dtype=int)
        while plays.any():
            actions, states = agent.predict(
                observations,  # type: ignore[arg-type]
                state=states,
                episode_start=starts,
                deterministic=True,
            )
            observations, rewards, starts, infos = env.step(actions)
            total += rewards if normalised is None else normalised.get_original_reward()
            length += 1
            for i in np.flatnonzero(plays & (starts | (length >= max_steps))):
                is_cut = not starts[i]
                # A Monitor's sums are those of the environment itself. Without any, the end is one
                # that a wrapper outside of it made up, of a life for example.
                seen = infos[i].get("episode")
                if seen is None and is_monitored and length[i] < max_steps:
                    continue
                returns.append(float(total[i] if seen is None else seen["r"]))
                lengths.append(int(length[i] if seen is None else seen["l"]))
                left[i] -= 1
                n_cut += int(is_cut)
                plays[i] = left[i] > 0 and not is_cut
                total[i], length[i] = 0.0, 0
    return Episodes(returns, lengths, n_cut)


class Evaluation(BaseCallback):
    """Callback that evaluates the policy in environments that are used for nothing else.

    Parmas et al. 2018, Sec. 4.2: "Each trial was evaluated by running the policy 30 times".

    Args:
        eval_env: vector environment. If the agent learns in a VecNormalize, it has to be in one too
            (training=False), which gets the statistics of the agent's before each evaluation.
        n_episodes: episodes per evaluation.
        every: steps between evaluations; 0 evaluates before each rollout whose policy is new
            (for PIPPS, after each policy search). The final policy is always evaluated.
        max_steps: steps after which an episode that goes on is cut; said once.
        path: JSON file, rewritten after every evaluation: {"timesteps": [k], "returns": [k][n]}.
        verbose: 1 prints a line per evaluation.
        quantity: what that line gives, an episode's "return" or its "cost" (-return).
        unit: what the steps are, for that line.
        on_new_best: called with the agent after each evaluation whose mean return is above all
            before it: to save it, as SB3's `best_model_save_path` does.
    """

    def __init__(
        self,
        eval_env: VecEnv,
        *,
        n_episodes: int = 30,
        every: int = 0,
        max_steps: int = MAX_STEPS,
        path: Path | None = None,
        verbose: int = 0,
        quantity: Literal["return", "cost"] = "return",
        unit: str = "real steps",
        on_new_best: Callable[[BaseAlgorithm], object] = lambda agent: None,
    ) -> None:
        super().__init__(verbose)
        self.quantity, self.unit = quantity, unit
        self.eval_env, self.n_episodes, self.path = eval_env, n_episodes, path
        self.every, self.max_steps, self.on_new_best = every, max_steps, on_new_best
        self._said_cut = False
        self._evaluated = -1  # number of updates of the policy evaluated last
        self._last = 0  # steps at the last evaluation
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
        if self._last > self.num_timesteps:  # a new `learn` counts steps from 0
            self._last = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        is_due = self.num_timesteps - self._last >= self.every
        if self.model._n_updates > 0 and is_due:  # `evaluate` skips a policy it has seen
            self.evaluate()

    def _on_training_end(self) -> None:
        self.evaluate()

    def state_dict(self) -> dict[str, Any]:
        """Return the evaluations so far and the state of the environments, for a checkpoint."""
        is_table = len({len(returns) for returns in self.returns}) == 1
        return {
            "timesteps": self.timesteps,
            # An array, for the JSON of a checkpoint has a bound on its values.
            "returns": np.array(self.returns) if is_table else self.returns,
            "evaluated": self._evaluated,
            "environments": env_state.snapshot(self.eval_env),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: it is not that; a file may hold anything.
        """
        steps, returns = state["timesteps"], state["returns"]
        returns = returns.tolist() if isinstance(returns, np.ndarray) else returns
        is_right = len(steps) == len(returns) and all(map(is_whole, [*steps, state["evaluated"]]))
        if not (is_right and all(returns) and all(is_finite(x) for row in returns for x in row)):
            raise ValueError("it does not hold steps and returns of evaluations")
        self.timesteps, self.returns = list(steps), returns
        self._evaluated = state["evaluated"]
        self._last = self.timesteps[-1] if self.timesteps else 0
        env_state.restore(self.eval_env, state["environments"])

    def evaluate(self) -> None:
        """Run, log and write an evaluation, unless this policy has had one."""
        if self._evaluated == self.model._n_updates:
            return
        self._evaluated, self._last = self.model._n_updates, self.num_timesteps
        self._copy_statistics()
        # Deterministic: a recurrent policy then draws no random number that learning would miss.
        found = evaluate(self.model, self.eval_env, self.n_episodes, max_steps=self.max_steps)
        if found.n_cut and not self._said_cut:
            self._said_cut = True
            tqdm.write(found.describe_cut(self.max_steps))
        returns = found.returns
        self.timesteps.append(self.num_timesteps)
        self.returns.append(np.asarray(returns, dtype=float).tolist())
        mean, std = float(np.mean(returns)), float(np.std(returns))
        self.logger.record("eval/mean_reward", mean)
        self.logger.record("eval/std_reward", std)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)  # after the last evaluation no other dump follows
        if self.verbose:
            shown = f"{self.quantity} {-mean if self.quantity == 'cost' else mean:8.2f} ± {std:.2f}"
            tqdm.write(f"{self.num_timesteps:6d} {self.unit}: {shown}")
        if self.path is not None:
            record = {"timesteps": self.timesteps, "returns": self.returns}
            safe_file.write_text(self.path, json.dumps(record) + "\n")
        if mean > max((float(np.mean(row)) for row in self.returns[:-1]), default=-np.inf):
            self.on_new_best(self.model)

    def _copy_statistics(self) -> None:
        """Copy VecNormalize's statistics, whatever the other wrappers are; SB3's wants the same."""
        ours, theirs = map(unwrap_vec_normalize, (self.eval_env, self.training_env))
        if ours is not None and theirs is not None:
            if theirs.norm_obs:
                ours.obs_rms = copy.deepcopy(theirs.obs_rms)
            ours.ret_rms = copy.deepcopy(theirs.ret_rms)
