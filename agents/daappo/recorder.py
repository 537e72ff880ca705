"""What DAAPPO records of a rollout in addition to stable-baselines3's rollout buffer."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from totalprop.agents.core.validation import check_finite
from totalprop.agents.daappo.sources import ExtraActions, Source


class ManyActionSamples(NamedTuple):
    """stable-baselines3's `RolloutBufferSamples`, and the extra actions of the same states."""

    observations: Tensor  # [B, S]
    actions: Tensor  # [B, A]
    old_values: Tensor  # [B]
    old_log_prob: Tensor  # [B]
    advantages: Tensor  # [B]
    returns: Tensor  # [B]
    extra: ExtraActions | None  # R = B


class ManyActionRolloutBuffer(RolloutBuffer):
    """A rollout buffer whose minibatches carry the extra actions of their states."""

    extra: ExtraActions | None = None

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: VecNormalize | None = None
    ) -> ManyActionSamples:
        samples = super()._get_samples(batch_inds, env)
        extra = None
        if self.extra is not None:
            extra = self.extra.rows(torch.as_tensor(batch_inds, device=self.device))
        return ManyActionSamples(*samples[:6], extra)


class RolloutRecorder(BaseCallback):
    """Checks what the environments return, and gives a source the transitions of a rollout.

    They are in the environments' units.

    VecNormalize keeps an episode's last state only as the policy would see it. Where its clip_obs
    clipped that state, the true one is lost and the transition is not recorded.

    It runs after the user's callbacks, inside stable-baselines3's own collection loop.

    Args:
        source: of the extra actions; None: nothing is recorded.
        timeout_bootstrap: as in DAAPPO.
    """

    model: OnPolicyAlgorithm

    def __init__(self, source: Source | None, *, timeout_bootstrap: bool) -> None:
        super().__init__()
        self.source, self.timeout_bootstrap = source, timeout_bootstrap
        self.states: list[np.ndarray] = []  # [n_envs, S] at each step
        self.is_exact = False  # whether the policy is known to see what varies in the states

    def _on_rollout_start(self) -> None:
        normalizer = self.model.get_vec_normalize_env()
        last: Any = self.model._last_obs if normalizer is None else normalizer.get_original_obs()
        check_finite(self.num_timesteps, last)
        if self.source is None:
            return
        self.states = []
        self._last = self._flat(last)
        self.source.start_rollout(self.training_env)

    def _on_step(self) -> bool:
        normalizer = self.model.get_vec_normalize_env()
        observations, rewards = self.locals["new_obs"], self.locals["rewards"]
        infos, dones = self.locals["infos"], self.locals["dones"]
        if normalizer is not None:
            observations, rewards = normalizer.get_original_obs(), normalizer.get_original_reward()
        check_finite(self.num_timesteps, observations, rewards, infos, dones)
        terminated = np.array(
            [
                done and not info.get("TimeLimit.truncated", False)
                for done, info in zip(dones, infos, strict=True)
            ]
        )
        if not self.timeout_bootstrap:  # the time limit counts as an end
            for i in np.flatnonzero(dones):
                infos[i]["TimeLimit.truncated"] = False
        if self.source is None:
            return True
        observations = self._flat(observations)
        ends, is_known = observations.copy(), np.ones(len(dones), dtype=bool)
        for i in np.flatnonzero(dones):
            end = infos[i]["terminal_observation"]
            if normalizer is not None and normalizer.norm_obs:
                is_known[i] = (np.abs(end) < np.float32(normalizer.clip_obs)).all()
                end = normalizer.unnormalize_obs(end)
            ends[i] = self._flat(end[None])[0]
        actions = self.locals["clipped_actions"]
        self.source.record_step(
            *(x[is_known] for x in (self._last, actions, rewards, ends, terminated))
        )
        self.states.append(self._last)
        self._last = observations
        return True

    def _on_rollout_end(self) -> None:
        normalizer = self.model.get_vec_normalize_env()
        is_normalised = normalizer is not None and normalizer.norm_obs
        if self.source is None or self.is_exact or is_normalised:
            return
        self.is_exact = True
        states = np.concatenate(self.states).astype(np.float64)
        spread, resolution = states.std(0), np.spacing(np.abs(states).max(0).astype(np.float32))
        for i in np.flatnonzero((spread > 0) & (spread < 10 * resolution)):
            warnings.warn(
                f"entry {i} of the observation varies by {spread[i]:.2g} around "
                f"{states[:, i].mean():.6g}, which the policy, in single precision, cannot see; "
                "wrap the environments in VecNormalize (--normalize both), or subtract a constant",
                stacklevel=2,
            )

    def flat_states(self) -> np.ndarray:
        """Raw states [n_envs T, S] in the buffer's flat order, environment by environment."""
        return np.concatenate(np.stack(self.states, 1))

    def _flat(self, observations: Any) -> np.ndarray:
        """[n_envs, ...] -> [n_envs, S]."""
        assert self.source is not None
        dtype = self.source.settings.state_dtype
        return np.asarray(observations, dtype).reshape(len(observations), -1)
