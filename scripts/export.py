"""Write a trained policy as one file that runs without this package: PyTorch's .pt2 or ONNX.

totalprop export runs/pipps_CartPoleSwingUp-v0_tpx_seed0                 # both files, in the folder
totalprop export runs/dreamer_Pendulum-v1_tpx_seed0 --onnx pendulum.onnx # this one alone

The file is the deterministic policy, from observations as the environment returns them, statistics
of VecNormalize applied, to actions in its units. The batch size is free. A recurrent policy
(dreamer) takes its state and `is_first`, and returns the next state after the action.

Before a file is written, it acts beside the agent's own `predict` in the run's environment. The
largest difference, as a share of the actions' range, and the median time of a call on one thread
are printed; a difference above 1e-4 is an error. ONNX needs the extra `export`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from totalprop.agents import AGENTS
from totalprop.agents.core.deployment import Deployed
from totalprop.agents.persistence.safe_file import atomic_write
from totalprop.scripts.commands import parser_of
from totalprop.scripts.run.environments import make_env
from totalprop.scripts.run.errors import UserError, ending_with_a_sentence
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.run.hub import local
from totalprop.scripts.run.normalisation import normalise_like, statistics_of

TOLERANCE = 1e-4  # of the range of the actions: single precision, accumulated over an episode
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# (observation, *state, is_first), or the observation alone -> (action, *next state), as arrays
Call = Callable[[tuple[Any, ...]], Sequence[np.ndarray]]


class Episode(NamedTuple):
    """What `predict` saw and did, one entry per step, and the time of its calls."""

    observations: list[Any]
    is_first: list[np.ndarray]
    actions: list[np.ndarray]
    seconds: list[float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = parser_of("export")
    options = parser.parse_args(arguments)
    with ending_with_a_sentence():
        export(options)


def export(options: argparse.Namespace) -> None:
    """Load the agent, trace its policy, and check and write the files."""
    folder = RunFolder.open(local(options.run), imports=options.imports)
    is_both = options.pt2 is None and options.onnx is None
    paths = {
        kind: path or folder.written(f"policy.{kind}", best=options.best)
        for kind, path in (("pt2", options.pt2), ("onnx", options.onnx))
        if is_both or path is not None
    }
    check_paths(paths)
    folder.check_model(best=options.best)
    config = folder.read_config()
    env = make_env(config["env_id"], config["env_args"], seed=options.seed)
    normalised = normalise_like(env, statistics_of(folder, config, best=options.best))
    agent = folder.load_agent(normalised, device="cpu", best=options.best)
    torch.set_num_threads(1)
    statistics = unwrap_vec_normalize(normalised)
    agent.policy.set_training_mode(False)
    module = AGENTS[config["agent"]].deployed(agent.policy, env.observation_space, statistics)
    see = (lambda x: x) if statistics is None else statistics.normalize_obs
    episode = act(agent.predict, see, env, options.steps)
    program = trace(module)
    print(describe(module, program))
    print(f"  {'predict':12} {1e3 * np.median(episode.seconds):8.3f} ms")
    for kind, path in paths.items():
        content = to_pt2(program) if kind == "pt2" else to_onnx(program, module)
        call = call_of_pt2(content) if kind == "pt2" else call_of_onnx(content)
        difference, seconds = compare(call, module, episode, env.action_space)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{path} was not written: its actions differ from those of predict by "
                f"{difference:.1e} of their range, more than {TOLERANCE:g}, within "
                f"{options.steps} steps; please report it, with {folder.config}"
            )
        with atomic_write(path) as file:
            file.write(content)
        print(
            f"  {path.name:12} {1e3 * seconds:8.3f} ms, largest difference {difference:.1e} of the "
            f"actions' range in {options.steps} steps: {path}"
        )


def check_paths(paths: dict[str, Path]) -> None:
    """Raise a UserError if a file cannot be written, or a package is missing."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if "onnx" in paths and missing:
        raise UserError(
            f"ONNX needs {', '.join(missing)}: pip install 'totalprop[export]', or pass --pt2 alone"
        )
    for kind, path in paths.items():
        if path.suffix != f".{kind}":
            raise UserError(f"--{kind} must be a file name that ends in .{kind}, got '{path}'")
        if not path.parent.is_dir():
            raise UserError(f"cannot write {path}: {path.parent} is not a folder; create it")


def act(predict: Callable[..., Any], see: Callable[[Any], Any], env: VecEnv, steps: int) -> Episode:
    """Let the agent act for some steps.

    Args:
        predict: the agent's.
        see: normalises observations.
        env: one environment, not normalised.
        steps: how many.
    """
    episode = Episode([], [], [], [])
    observation, state, is_first = env.reset(), None, np.ones(1, dtype=bool)
    for _ in range(steps):
        started = time.perf_counter()
        action, state = predict(see(observation), state, is_first, deterministic=True)
        episode.seconds.append(time.perf_counter() - started)
        episode.observations.append(observation)
        episode.is_first.append(is_first)
        episode.actions.append(action)
        observation, _, is_first, _ = env.step(action)
    return episode


def inputs_of(module: Deployed, observation: Any, state: Sequence[Any], is_first: Any) -> Any:
    """What the module is called with; only a recurrent one asks where an episode begins."""
    if isinstance(observation, dict):  # vector environments give an OrderedDict
        observation = dict(observation)
    return (observation, *state, is_first) if module.state_names else (observation,)


@torch.no_grad()
def trace(module: Deployed) -> ExportedProgram:
    """The module as a graph of any batch size."""
    first = torch.ones(2, dtype=torch.bool)
    examples = inputs_of(module, module.example(2), module.initial_state(2), first)
    free = tree_map(lambda _: {0: Dim("batch")}, examples)
    with quiet():
        program = torch.export.export(module, examples, dynamic_shapes=(free[0], *free[1:]))
    for node in program.graph.nodes:  # it would tell where this package is installed
        node.meta.pop("stack_trace", None)
    return program


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without PyTorch's remarks on its own parts, and without checks of distributions."""
    is_checked = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)  # cannot be traced
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        torch.distributions.Distribution.set_default_validate_args(is_checked)


def to_pt2(program: ExportedProgram) -> bytes:
    """A file for `torch.export.load`."""
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer)
    return buffer.getvalue()


def to_onnx(program: ExportedProgram, module: Deployed) -> bytes:
    """A file for ONNX Runtime and others."""
    names = ["action", *(f"next_{name}" for name in module.state_names)]
    with quiet():
        found = torch.onnx.export(program, dynamo=True, output_names=names, verbose=False)
    assert found is not None
    content: bytes = found.model_proto.SerializeToString()
    return content


def call_of_pt2(content: bytes) -> Call:
    """The program of a .pt2 file."""
    program = torch.export.load(io.BytesIO(content)).module()

    @torch.no_grad()
    def call(inputs: tuple[Any, ...]) -> Sequence[np.ndarray]:
        found = program(*tree_map(torch.as_tensor, inputs))
        return [x.numpy() for x in tree_leaves(found)]

    return call


def call_of_onnx(content: bytes) -> Call:
    """The program of an .onnx file, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def call(inputs: tuple[Any, ...]) -> Sequence[np.ndarray]:
        found: Sequence[np.ndarray] = session.run(None, dict(zip(names, tree_leaves(inputs))))
        return found

    return call


def compare(
    call: Call, module: Deployed, episode: Episode, space: spaces.Space
) -> tuple[float, float]:
    """Act on the same observations, from a state of its own.

    Returns:
        The largest difference of an action, as a share of the range of a Box, and the median time
        of a call in s.
    """
    span = space.high - space.low if isinstance(space, spaces.Box) else 1
    state: Sequence[np.ndarray] = [part.numpy() for part in module.initial_state(1)]
    seconds, largest = [], 0.0
    for observation, is_first, expected in zip(*episode[:3]):
        started = time.perf_counter()
        action, *state = call(inputs_of(module, observation, state, is_first))
        seconds.append(time.perf_counter() - started)
        largest = max(largest, float(np.max(np.abs(action - expected) / span)))
    return largest, float(np.median(seconds))


def describe(module: Deployed, program: ExportedProgram) -> str:
    """Inputs and outputs, with their shapes for n rows."""
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    wanted = set(program.graph_signature.user_inputs)
    inputs = [f"{n.name} {_shape(n.meta['val'])}" for n in nodes if n.name in wanted]
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    names = ["action", *(f"next_{name}" for name in module.state_names)]
    outputs = [f"{name} {_shape(n.meta['val'])}" for name, n in zip(names, output.args[0])]
    return f"{', '.join(inputs)} -> {', '.join(outputs)}"


def _shape(x: Tensor) -> str:
    sizes = ", ".join(["n", *map(str, x.shape[1:])])
    return f"[{sizes}] {str(x.dtype).removeprefix('torch.')}"


if __name__ == "__main__":
    main()
