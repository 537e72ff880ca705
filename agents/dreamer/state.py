"""DreamerTPX's replay, and what its checkpoints hold beside networks and optimisers."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalprop.agents.dreamer.replay import SequenceReplay
from totalprop.agents.persistence.segments import RingFiles
from totalprop.world_models.latent.model import State

if TYPE_CHECKING:
    from totalprop.agents.dreamer.agent import DreamerTPX


def new_replay(agent: DreamerTPX) -> SequenceReplay:
    """An empty replay for the agent's environments, and the files that checkpoints keep it in."""
    assert agent.env is not None
    n_envs, dtype = agent.env.num_envs, agent.observation_space.dtype
    assert dtype is not None
    agent._replay_files = [RingFiles(f"replay{env}") for env in range(n_envs)]
    return SequenceReplay(
        agent.buffer_size,
        agent.policy.model_input_shape,
        dtype,
        agent.policy.n_actions,
        n_envs,
        device=agent.device,
        storage=agent.storage,
        folder=tempfile.gettempdir(),
    )


def load_replay(agent: DreamerTPX, path: Any) -> None:
    """Read a saved replay in place of the agent's, whose episodes end with it."""
    if agent.env is None:
        raise ValueError("set an environment first: load(path, env=...) or set_env(env)")
    if agent.replay_buffer is not None:  # before it is lost
        agent.replay_buffer.check(path)
    agent._last_obs = agent._memory = agent.replay_buffer = None  # frees a GPU's before the next
    agent.replay_buffer = new_replay(agent)
    agent.replay_buffer.load(path)


def take(agent: DreamerTPX, folder: Path) -> dict[str, Any]:
    """Generators, the filter's memory of the running episodes, and the replay's segments."""
    memory = None if agent._memory is None else [*agent._memory[0], agent._memory[1]]
    state: dict[str, Any] = {
        "generator": agent._generator.get_state(),
        "rng": agent._rng.bit_generator.state,
        "memory": memory,
        "replay": None,
    }
    replay = agent.replay_buffer
    if replay is not None:
        state["replay"] = [
            files.save(folder, count, replay.ring, partial(replay.rows, env))
            for env, (files, count) in enumerate(zip(agent._replay_files, replay.counts))
        ]
        state["files"] = [name for segments in state["replay"] for *_, name in segments]
    return state


def put(agent: DreamerTPX, state: dict[str, Any], folder: Path) -> None:
    """Put back what `take` returned."""
    agent._generator.set_state(state["generator"])
    agent._rng.bit_generator.state = state["rng"]
    if state["memory"] is not None:
        deter, stoch, action = (tensor.to(agent.device) for tensor in state["memory"])
        agent._memory = State(deter, stoch), action
    if state["replay"] is None:
        return
    replay = agent.replay_buffer = new_replay(agent)
    if len(state["replay"]) != replay.n_envs:
        raise ValueError(
            f"the checkpoint is of {len(state['replay'])} environments, here are {replay.n_envs}"
        )
    for env, (files, segments) in enumerate(zip(agent._replay_files, state["replay"])):
        files.load(folder, segments, replay.ring, partial(replay.put_rows, env))
