"""DreamerTPX's networks as one stable-baselines3 policy: world model, actor and critic.

`predict` is recurrent. Its state is (deter, stoch, previous action), a tuple of arrays with one row
per environment; `episode_start` resets rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor
from torch.nn.functional import softplus

from totalprop.agents.core.validation import Above, AtLeast, check_values
from totalprop.agents.dreamer.actions import Choices, action_form
from totalprop.agents.dreamer.categorical_actor import (
    ActionNode,
    ActorNetwork,
    CategoricalActor,
)
from totalprop.agents.dreamer.observations import ObservationForm, count, to_tensors
from totalprop.estimators import assign_credit
from totalprop.world_models.latent.distributions import LatentKind
from totalprop.world_models.latent.heads import HeadKind, ScalarHead
from totalprop.world_models.latent.model import LatentModel, State
from totalprop.world_models.latent.networks import initialise
from totalprop.world_models.latent.observations import Observation

Size = Literal["s", "m", "l"]
SIZES: dict[Size, dict[str, int]] = {
    # Ours, for a CPU core.
    "s": {"stoch": 16, "deter": 100, "hidden": 100, "width": 100, "conv_depth": 8},
    # Hafner et al. 2020, App. A (DreamerV1); numbers of danijar/dreamer.
    "m": {"stoch": 30, "deter": 200, "hidden": 200, "width": 400, "conv_depth": 32},
    # Units of DreamerV3's smallest model (Hafner et al. 2023, Table B.1), for a GPU.
    "l": {"stoch": 32, "deter": 512, "hidden": 512, "width": 512, "conv_depth": 32},
}
# Categorical variables and their classes: 32 x 32 in Hafner et al. 2021 (DreamerV2) and 2023 (V3),
# fewer for a CPU core.
CATEGORICALS: dict[Size, dict[str, int]] = {
    "s": {"stoch": 16, "classes": 16},
    "m": {"stoch": 32, "classes": 32},
    "l": {"stoch": 32, "classes": 32},
}
MEAN_SCALE, MIN_STD = 5.0, 1e-4  # danijar/dreamer, models.ActionDecoder
GAUSSIAN_ENTROPY = 0.5 * math.log(2 * math.pi * math.e)  # of a standard normal, nats
RecurrentState = tuple[np.ndarray, ...]


class Actor(ActorNetwork):
    """tanh-Gaussian policy: 4 hidden layers, mean 5 tanh(raw / 5), std softplus(raw + c) + 1e-4.

    The constant c makes the standard deviation `init_std` where the network's output is 0.

    Args:
        features: width F of the state's features.
        actions: A.
        width: units of each hidden layer.
        layers: number of hidden layers.
        layer_norm: as in `mlp`.
        init_std: standard deviation, before the tanh, that the policy starts from.
    """

    def __init__(
        self,
        features: int,
        actions: int,
        *,
        width: int,
        layers: int = 4,
        layer_norm: bool = False,
        init_std: float = 5.0,
    ) -> None:
        super().__init__(features, 2 * actions, width=width, layers=layers, layer_norm=layer_norm)
        self.std_shift = math.log(math.expm1(init_std))

    def noise(self, n: int, *, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """[n, A] standard normal noise for `act`."""
        shape = (n, self.out.out_features // 2)
        return torch.randn(shape, generator=generator, device=device)

    def zeta(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [..., A] of the Gaussian before the tanh."""
        raw_mean, raw_std = raw.chunk(2, -1)
        mean = MEAN_SCALE * (raw_mean / MEAN_SCALE).tanh()
        return mean, softplus(raw_std + self.std_shift) + MIN_STD

    def act(self, raw: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Action [..., A] in [-1, 1] and its entropy [...] in nats; without noise, tanh(mean).

        The entropy is a one-sample estimate: the Gaussian's entropy plus the log-slope of tanh at
        the sample. As a bonus it keeps actions from saturating, where the policy gradient vanishes.
        """
        mean, std = self.zeta(raw)
        u = mean if noise is None else mean + std * noise
        return u.tanh(), (std.log() + _log_slope(u) + GAUSSIAN_ENTROPY).sum(-1)

    def act_at(
        self, node: ActionNode, raw: Tensor, noise: Tensor, credit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Like `act`, but the sample before the tanh is a node; see `CategoricalActor.act_at`."""
        mean, std = self.zeta(raw)
        u, after = node(slice(None), mean, std, noise, credit)
        # The node's sample moves the slope only, so that alone belongs to its return-to-go.
        known = assign_credit((std.log() + GAUSSIAN_ENTROPY).sum(-1), credit)
        return u.tanh(), known + assign_credit(_log_slope(u).sum(-1), after), after


def _log_slope(u: Tensor) -> Tensor:
    """log(1 - tanh² u), without cancelling."""
    return 2 * (math.log(2) - u - softplus(-2 * u))


class DreamerPolicy(BasePolicy):
    """World model, actor and critic, and how they act.

    Args:
        observation_space: an image (Box of uint8, resized to 64x64), a vector, choices (Discrete,
            MultiDiscrete, MultiBinary), or a Dict of these.
        action_space: bounded Box, Discrete or MultiDiscrete.
        lr_schedule: not used; stable-baselines3 passes it to every policy.
        size: of all networks: "s" for a CPU core, "m" as in DreamerV1, "l" for a GPU. Of
            the next seven, all but `latent` set single numbers; None leaves them to the size.
        latent: "gaussian" variables of the stochastic state (DreamerV1), or "categorical" ones
            (DreamerV2 and V3), one-hot.
        stoch: number of these variables: 16, 30 (32 categorical ones) or 32.
        classes: of each categorical variable: 16, 32 or 32.
        deter: size of its deterministic state (the GRU): 100, 200 or 512.
        hidden: units of its other layers: 100, 200 or 512.
        width: units of every layer of actor, critic and the model's heads: 100, 400 or 512.
        conv_depth: feature maps of the first convolution, for images: 8, 32 or 32.
        vector_std: standard deviation of the decoder of vector observations.
        learn_vector_std: learn the standard deviation of each entry, from vector_std on, so that
            it is as precise as the entry can be predicted.
        image_std: standard deviation of the decoder of images, whose pixels are in [-0.5, 0.5].
            With 1 (DreamerV1), something small or thin costs fewer nats to leave out of the
            reconstruction than to remember.
        init_std: standard deviation, before the tanh, that an actor for a Box starts from.
            With DreamerV1's 5 most actions are -1 or 1, where the tanh passes no gradient; with 1
            they are spread almost evenly.
        layer_norm: layer norm and SiLU in every network (DreamerV3) instead of ELU (DreamerV1).
        reward_head: "gaussian" (DreamerV1) or "two-hot", over 255 bins (DreamerV3).
        critic_head: the same for the critic.
        discount_head: predict where episodes end.
        slow_critic: keep a slow copy of the critic, see DreamerTPX's slow_critic_rate.
        slow_actor: keep a slow copy of the actor, which acts, see DreamerTPX's slow_actor_rate.
    """

    OPTIONAL_BUFFERS: ClassVar[tuple[str, ...]] = (
        "return_range",
        *(f"model.{name}" for name in LatentModel.OPTIONAL_BUFFERS),
    )
    return_range: Tensor  # [] average, see DreamerTPX's scale_returns
    percentiles: Tensor  # [2] the ends of that range
    file_name: ClassVar[str] = "totalprop.DreamerPolicy"
    former_file_names: ClassVar[tuple[str, ...]] = ("agents.dreamer_policy.DreamerPolicy",)

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule | None = None,
        *,
        size: Size = "m",
        latent: LatentKind = "gaussian",
        stoch: Annotated[int, AtLeast(1)] | None = None,
        classes: Annotated[int, AtLeast(2)] | None = None,
        deter: Annotated[int, AtLeast(1)] | None = None,
        hidden: Annotated[int, AtLeast(1)] | None = None,
        width: Annotated[int, AtLeast(1)] | None = None,
        conv_depth: Annotated[int, AtLeast(1)] | None = None,
        vector_std: Annotated[float, Above(0)] = 1.0,
        image_std: Annotated[float, Above(0)] = 1.0,
        learn_vector_std: bool = False,
        init_std: Annotated[float, Above(0)] = 5.0,
        layer_norm: bool = False,
        reward_head: HeadKind = "gaussian",
        critic_head: HeadKind = "gaussian",
        discount_head: bool = False,
        slow_critic: bool = False,
        slow_actor: bool = False,
    ) -> None:
        is_box = isinstance(action_space, spaces.Box)
        super().__init__(observation_space, action_space, squash_output=is_box)
        check_values(DreamerPolicy, size=size, latent=latent)
        if latent == "gaussian" and classes is not None:
            raise ValueError(
                f"classes={classes!r} is the number of classes of a categorical variable: pass "
                "latent='categorical', or leave classes out"
            )
        own = {
            "classes": classes, "stoch": stoch, "deter": deter, "hidden": hidden, "width": width,
            "conv_depth": conv_depth,
        }  # fmt: skip
        self.sizes: dict[str, Any] = {
            **SIZES[size],
            **(CATEGORICALS[size] if latent == "categorical" else {}),
            **{name: number for name, number in own.items() if number is not None},
            "vector_std": vector_std,
            "image_std": image_std,
            "learn_vector_std": learn_vector_std,
            "latent": latent,
            "layer_norm": layer_norm,
            "reward_head": reward_head,
            "discount_head": discount_head,
        }
        self.own_sizes = {
            "init_std": init_std, "critic_head": critic_head, "slow_critic": slow_critic,
            "slow_actor": slow_actor,
        }  # fmt: skip
        check_values(DreamerPolicy, **self.sizes, **self.own_sizes)
        self.to_model = ObservationForm(observation_space)
        self.actions = action_form(action_space)
        self.n_actions = self.actions.size  # A
        self.model = LatentModel(self.to_model.entries, self.n_actions, **self.sizes)
        features = self.model.rssm.feature_size
        width = self.sizes["width"]
        self.actor: Actor | CategoricalActor
        if isinstance(self.actions, Choices):
            self.actor = CategoricalActor(
                features, self.actions.sizes, width=width, layer_norm=layer_norm
            )
        else:
            self.actor = Actor(
                features, self.n_actions, width=width, layer_norm=layer_norm, init_std=init_std
            )
        self.critic = ScalarHead(features, width, 3, kind=critic_head, layer_norm=layer_norm)
        initialise(self.critic)
        self.critic.zero_last_layer()
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False) if slow_critic else None
        self.slow_actor = copy.deepcopy(self.actor).requires_grad_(False) if slow_actor else None
        self.register_buffer("return_range", torch.zeros(()))
        # On the device from the start: a CUDA graph cannot copy numbers from the host.
        self.register_buffer("percentiles", torch.tensor([0.05, 0.95]), persistent=False)

    def value(self, features: Tensor) -> Tensor:
        """V(s), [..., F] -> [...]."""
        return self.critic.mean(self.critic(features))

    def target_value(self, features: Tensor) -> Tensor:
        """The value that returns are bootstrapped with: the slow critic's, if there is one."""
        critic = self.critic if self.slow_critic is None else self.slow_critic
        return critic.mean(critic(features))

    @property
    def acting(self) -> Actor | CategoricalActor:
        """The actor that acts outside of imagination: the slow one, if there is one."""
        return self.actor if self.slow_actor is None else self.slow_actor

    @torch.no_grad()
    def follow(self, critic_rate: float, actor_rate: float) -> None:
        """Move the slow critic towards the critic, and the slow actor towards the actor."""
        pairs = (
            (self.slow_critic, self.critic, critic_rate),
            (self.slow_actor, self.actor, actor_rate),
        )
        for slow, fast, rate in pairs:
            if slow is not None:
                for own, other in zip(slow.parameters(), fast.parameters()):
                    own.lerp_(other, rate)

    @torch.no_grad()
    def follow_returns(self, returns: Tensor) -> None:
        """Average the range from the 5th to the 95th percentile of returns, at a rate of 0.01.

        A range that is not finite is left out, as the update that it comes from is.
        """
        low, high = returns.float().flatten().quantile(self.percentiles.float())
        spread = high - low
        self.return_range.lerp_(torch.where(spread.isfinite(), spread, self.return_range), 0.01)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state_dict.setdefault(f"{prefix}return_range", torch.zeros_like(self.return_range))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def initial_state(self, n: int) -> tuple[State, Tensor]:
        """State and previous action at the start of n sequences."""
        state = self.model.rssm.initial(n)
        return state, state.stoch.new_zeros(n, self.n_actions)

    @torch.no_grad()
    def step(
        self,
        observations: Observation,
        state: State,
        action: Tensor,
        is_first: Tensor,
        *,
        deterministic: bool,
        generator: torch.Generator | None = None,
        hold: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """Filter one observation and act.

        Args:
            observations: [n, ...] as `to_model` returns them.
            state: of the previous step.
            action: [n, A] action of the previous step, see `actions`.
            is_first: [n] bool, True where an episode begins.
            deterministic: use the posterior's mode and tanh(mean), or the most likely choice, and
                draw no random number.
            generator: of the noise; None for torch's global one.
            hold: what is made of the action's noise [n, A], see `exploration.HeldNoise`.

        Returns:
            Actions [n, A], scaled to [-1, 1] or one-hot, and the new state.
        """
        keep = (~is_first).to(action.dtype).unsqueeze(-1)
        state, action = State(state.deter * keep, state.stoch * keep), action * keep

        latent_noise = action_noise = None
        if not deterministic:
            shared: dict[str, Any] = {"generator": generator, "device": action.device}
            latent_noise = self.model.rssm.latents.noise(len(action), **shared)
            action_noise = self.actor.noise(len(action), **shared)
            if hold is not None:
                action_noise = hold(action_noise)
        state = self.model.filter(state, action, observations, latent_noise)
        action, _ = self.acting.act(self.acting(state.features), action_noise)
        return action, state

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: RecurrentState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, RecurrentState | None]:
        """Choose actions, and return them with the recurrent state for the next call.

        Args:
            observation: one observation or a batch, or a dictionary of them; images may be channel
                first or last.
            state: what the last call returned; None at the start.
            episode_start: [n] True where an episode begins, which resets that row's state.
            deterministic: draw no random number.

        Returns:
            Actions in the environment's units (whole numbers where they are choices), and the
            recurrent state.

        Raises:
            ValueError: the observation is an (observation, info) tuple, lacks an entry or has
                another shape, or the state is of another batch size.
        """
        self.set_training_mode(False)
        if isinstance(observation, tuple) and len(observation) == 2:
            raise ValueError(
                "predict got a tuple: you are probably mixing Gym API, whose reset() returns "
                "(observation, info), with SB3's VecEnv API; pass the observation alone"
            )
        seen, is_batch = self.to_model.batch(observation)
        n = count(seen)
        latent, action = self.initial_state(n)
        if state is not None:
            if len(state) != 3:
                raise ValueError(
                    f"state must be what predict returned, three arrays, got {len(state)}; pass "
                    "state=None at the start"
                )
            if any(len(part) != n for part in state):
                raise ValueError(
                    f"state is of {len(state[0])} environments, observation of {n}; "
                    "pass state=None when the number of environments changes"
                )
            deter, stoch, action = (
                torch.as_tensor(np.array(part), dtype=torch.float32, device=self.device)
                for part in state
            )
            latent = State(deter, stoch)
        is_first = torch.zeros(n, dtype=torch.bool, device=self.device)
        if episode_start is not None:
            starts = np.asarray(episode_start, dtype=bool).reshape(-1)
            if len(starts) != n:
                raise ValueError(
                    f"episode_start must have one entry for each of {n} observations, got "
                    f"{len(starts)}"
                )
            is_first |= torch.as_tensor(starts, device=self.device)
        tensors = to_tensors(seen, self.device)
        action, latent = self.step(tensors, latent, action, is_first, deterministic=deterministic)
        scaled = action.cpu().numpy()
        actions = self.to_env(scaled)
        memory = (latent.deter.cpu().numpy(), latent.stoch.cpu().numpy(), scaled)
        return (actions if is_batch else actions.squeeze(0)), memory

    def to_env(self, scaled: np.ndarray) -> np.ndarray:
        """Convert actions [n, A] to the action space's units, shape and dtype."""
        return self.actions.to_env(scaled)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        raise NotImplementedError("the policy is recurrent: call predict, which returns its state")

    def forward(self, observation: Tensor) -> Tensor:
        """Not defined for a recurrent policy."""
        return self._predict(observation)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            **self.sizes,
            **self.own_sizes,
        }
