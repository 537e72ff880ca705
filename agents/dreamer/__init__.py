"""DreamerTPX: a latent world model with imagined policy gradients. Read agent.py, update.py."""

from totalprop.agents.core.entry import AgentEntry
from totalprop.agents.dreamer.agent import DreamerTPX
from totalprop.agents.dreamer.deployment import RecurrentDeployed
from totalprop.agents.dreamer.open_loop import OpenLoopPictures, write_picture
from totalprop.agents.dreamer.presets import PRESETS

ENTRY = AgentEntry(
    DreamerTPX,
    run={
        "env_id": "dmc/cartpole-balance-v0",
        "total_timesteps": 20_000,
        "eval_episodes": 5,
        "eval_every": 2_500,
    },
    presets=PRESETS,
    policy_flags=(
        "size", "latent", "stoch", "classes", "deter", "hidden", "width", "conv_depth",
        "vector_std", "learn_vector_std", "image_std", "init_std", "layer_norm", "reward_head",
        "critic_head",
    ),
    callbacks=lambda steps: {"pictures": OpenLoopPictures(max(steps // 10, 1))},
    pictures=write_picture,
    deployed=RecurrentDeployed,
    small_run={
        "preset": "recommended", "total_timesteps": 300, "learning_starts": 60,
        "sequence_length": 8, "batch_size": 4, "imagination_starts": 8, "replay_ratio": 2.9,
        "eval_every": 40,
        "buffer_size": 200, "env_id": "totalprop/CartPoleSwingUp-v0",
    },
    kill_test_factor=16,
    long_run={
        "preset": "recommended", "env_id": "dm_control/cheetah-run-v0",
        "env_arg": ["observation=pixels", "render=fast", "action_repeat=4"],
        "total_timesteps": 1_000_000, "buffer_size": 1000, "learning_starts": 500,
        "eval_every": 1000, "eval_episodes": 2,
    },
)  # fmt: skip

__all__ = ["ENTRY", "DreamerTPX"]
