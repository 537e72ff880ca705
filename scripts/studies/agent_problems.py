"""Trained agents as problems of `totalprop study gradients`: the gradient of their own policy.

What is estimated is the gradient that the agent's next update would use, without its entropy bonus:
that of PIPPS's cost in its Gaussian processes, and that of DreamerTPX's return in its world model,
where gradients pass through the policy's input, since RP and LR otherwise differ in their means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from totalprop.agents import PIPPS, DreamerTPX
from totalprop.agents.dreamer.actions import Choices
from totalprop.agents.dreamer.imagination import ImaginationNoise
from totalprop.agents.dreamer.update import DreamerUpdate
from totalprop.agents.pipps.particles import Noise, policy_gradient, simulate
from totalprop.estimators import Estimator, make
from totalprop.scripts.run.environments import make_env
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.folder import RunFolder
from totalprop.world_models.latent.model import State

SKETCHED = 64  # numbers that stand for a gradient of more parameters
ROLLOUTS, STEPS = 256, 64  # of the states that imagination starts from


def agent_problem(path: Path) -> PIPPSProblem | DreamerProblem:
    """The problem of the agent in a run's folder, which needs its config.json and model.zip.

    Raises:
        UserError: there is none, or the agent learns no model.
    """
    folder = RunFolder.open(path)
    config = folder.read_config()
    agent = folder.load_agent(make_env(config["env_id"], config["env_args"], seed=0))
    if isinstance(agent, PIPPS):
        return PIPPSProblem(str(path), agent)
    if isinstance(agent, DreamerTPX):
        return DreamerProblem(str(path), agent)
    raise UserError(f"{path} is a run of {config['agent']}; choose runs of pipps or dreamer")


class PIPPSProblem:
    """The policy gradient of PIPPS in its particle simulation."""

    kind, exact = "agent", None

    def __init__(self, name: str, agent: PIPPS) -> None:
        self.name, self.policy, self.model = name, agent.policy, agent._particle_model()
        self.state_names = agent._problem.observation_names
        self.horizons = (agent.horizon,)
        self.truth = "tpx"
        self.parameters = list(self.policy.parameters())
        self._sketch = Sketch(self.parameters)

    def draw(self, horizon: int, n: int, seed: int) -> Noise:
        """The noise of n particles, from a seed."""
        generator = torch.Generator(self.model.start_mean.device).manual_seed(seed)
        return Noise.draw(horizon, n, self.model.n_states, generator, resample=False)

    def gradient(self, estimator: Estimator, noise: Noise) -> Tensor:
        """The estimator's gradient, or a sketch of it."""
        found = policy_gradient(self.model, self.policy, noise, estimator)
        return self._sketch(found.gradients)

    def loss(self, noise: Noise) -> Tensor:
        """[] what `gradient` differentiates."""
        return simulate(self.model, self.policy, noise, make("rp"))[0].detach()


class DreamerProblem:
    """The policy gradient of DreamerTPX in its world model.

    Imagination starts from states that the policy reaches in the model, so that the agent needs no
    replay.
    """

    kind, exact = "agent", None

    def __init__(self, name: str, agent: DreamerTPX) -> None:
        self.name, self.agent = name, agent
        self.horizons = (agent.horizon, 4 * agent.horizon)
        rssm, policy = agent.policy.model.rssm, agent.policy
        has_choices = isinstance(policy.actions, Choices)
        # RP is not right where something is chosen.
        self.truth = "lr" if has_choices or agent.policy.sizes["latent"] == "categorical" else "tpx"
        self._has_choices = has_choices
        self.parameters = list(policy.actor.parameters())
        self._sketch = Sketch(self.parameters)
        generator = torch.Generator(agent.device).manual_seed(0)
        state, states = rssm.initial(ROLLOUTS), []
        noise = self._noise(STEPS, ROLLOUTS, generator)
        with torch.no_grad():
            for action_noise, latent_noise in zip(noise.action, noise.latent):
                action, _ = policy.actor.act(policy.actor(state.features), action_noise)
                deter = rssm.recur(state, action)
                state = State(deter, rssm.prior(deter).sample(latent_noise).flatten(1))
                states.append(state)
        self._starts = State(*(torch.cat(parts) for parts in zip(*states)))

    def _noise(self, horizon: int, n: int, generator: torch.Generator) -> ImaginationNoise:
        policy = self.agent.policy
        latents = policy.model.rssm.latents
        return ImaginationNoise.draw(
            horizon, n, policy.n_actions, latents, generator, choices=self._has_choices
        )

    def draw(self, horizon: int, n: int, seed: int) -> tuple[State, ImaginationNoise]:
        """n states to start from and the noise of the imagined steps, from a seed."""
        generator = torch.Generator(self.agent.device).manual_seed(seed)
        many = len(self._starts.deter)
        rows = torch.randint(many, (n,), generator=generator, device=self.agent.device)
        return State(*(x[rows] for x in self._starts)), self._noise(horizon, n, generator)

    def gradient(self, estimator: Estimator, noise: tuple[State, ImaginationNoise]) -> Tensor:
        """The estimator's gradient, or a sketch of it."""
        found, _ = self._update(estimator, noise).actor_gradient(*noise)
        return self._sketch(found.gradients)

    def loss(self, noise: tuple[State, ImaginationNoise]) -> Tensor:
        """[] what `gradient` differentiates."""
        _, imagined = self._update(make("rp"), noise).actor_gradient(*noise)
        return imagined.actor_loss.detach()

    def _update(self, estimator: Estimator, noise: tuple[State, ImaginationNoise]) -> DreamerUpdate:
        return without_bonus(self.agent, estimator, len(noise[1].latent), is_blocked=False)


def without_bonus(
    agent: DreamerTPX, estimator: Estimator, horizon: int, *, is_blocked: bool
) -> DreamerUpdate:
    """An update of the agent's whose actor gradient has no entropy bonus.

    Args:
        agent: its policy and settings are used.
        estimator: of the gradient.
        horizon: H.
        is_blocked: whether gradients stop at the actor's input.
    """
    trained = agent._update.settings
    imagination = dataclasses.replace(
        trained.imagination, stop_grad_actor_input=is_blocked, entropy_scale=0.0
    )
    settings = dataclasses.replace(
        trained,
        estimator=estimator,
        horizon=horizon,
        imagination=imagination,
        compile=False,  # if the agent compiles, its model is compiled already
        cuda_graph=False,
    )
    return DreamerUpdate(agent.policy, settings)


class Sketch:
    """Random projection of gradients of many parameters, to SKETCHED numbers.

    The entries of S are ±1 / √SKETCHED, so that E |S g|² = |g|²: distances between gradients are
    kept within some √(2 / SKETCHED), the same for every estimator (Achlioptas 2003).
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        size = sum(p.numel() for p in parameters)
        self._rows: Tensor | None = None
        if size > SKETCHED:
            generator = torch.Generator().manual_seed(0)
            signs = torch.randint(2, (SKETCHED, size), generator=generator)
            self._rows = (2.0 * signs - 1).double() / SKETCHED**0.5

    def __call__(self, gradients: Iterable[Tensor]) -> Tensor:
        """[P'] from gradients of all parameters."""
        flat = torch.cat([g.detach().flatten() for g in gradients]).cpu().double()
        return flat if self._rows is None else self._rows @ flat
