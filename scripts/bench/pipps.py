"""Time gradients and updates, as ratios to another library measured in the same run.

    totalprop bench pipps                  # seconds per policy gradient, against GPyTorch
    totalprop bench pipps --json bench.json
    totalprop bench dreamer                # seconds per update, against sheeprl
    totalprop bench dreamer --device cuda --modes compile cuda_graph
    totalprop bench ppo                    # DAAPPO, against stable-baselines3's PPO
    totalprop bench pilco                  # seconds per policy gradient, against nrontsis/PILCO's
    totalprop bench svg                    # SVG, against stable-baselines3's DDPG
    totalprop bench checkpoint             # cost of a checkpoint

Every number is a median over interleaved repeats, so that a temporary slowdown of the machine
affects all tasks alike. A library that is not installed is skipped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

import totalprop.envs  # noqa: F401  (registers our environments)
import totalprop.estimators as estimators
from totalprop.agents.core.memory import keep_freed_memory
from totalprop.agents.persistence.safe_file import write_text
from totalprop.agents.pipps.particles import Noise, ParticleModel, policy_gradient
from totalprop.agents.trials.controllers import RBFPolicy
from totalprop.scripts.bench.checkpoint import bench_checkpoint
from totalprop.scripts.bench.dreamer import bench_dreamer
from totalprop.scripts.bench.pilco import HORIZON as PILCO_HORIZON
from totalprop.scripts.bench.pilco import bench_pilco
from totalprop.scripts.bench.ppo import ENV_ID, bench_ppo
from totalprop.scripts.bench.svg import ENV_ID as SVG_ENV_ID
from totalprop.scripts.bench.svg import bench_svg
from totalprop.scripts.bench.timing import interleaved_medians
from totalprop.scripts.commands import parser_of
from totalprop.world_models.gp_dynamics import GPDynamics, Prediction

HORIZON, PARTICLES = 30, 300  # Parmas et al. 2023, App. B.1
POINTS = {"pipps": [30, 150, 450], "pilco": [30, 150, 300]}  # of the GP, by default
ESTIMATORS = ("rp", "lr", "tpx", "tpx-guarded", "tp", "tpg")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = parser_of("bench")
    options = parser.parse_args(arguments)
    check(parser, options)
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = True  # as in totalprop train
    if options.what == "pipps":
        rows = [bench_pipps(n, options.repeats) for n in options.points]
        title = f"one policy gradient: {PARTICLES} particles, horizon {HORIZON}"
    elif options.what == "pilco":
        rows = [bench_pilco(n, options.repeats) for n in options.points]
        title = f"one policy gradient of the cart-pole, horizon {PILCO_HORIZON}"
    elif options.what == "svg":
        rows = [bench_svg(options.repeats)]
        title = f"episodes and updates on {SVG_ENV_ID}"
    elif options.what == "checkpoint":
        rows = bench_checkpoint(options.repeats)
        title = "a checkpoint of each agent"
    elif options.what == "ppo":
        rows = [bench_ppo(options.repeats)]
        title = f"rollouts and updates on {ENV_ID}"
    else:
        rows = [
            bench_dreamer(
                options.repeats,
                batch=options.batch,
                length=options.length,
                horizons=tuple(options.horizons),
                device=options.device,
                modes=options.modes,
            )
        ]
        title = f"one update: {options.batch} sequences of {options.length} images"
    print(f"{title}, {options.device}, {options.threads} threads")
    width = 16 if "agent" in rows[0] else 9
    for name in rows[0]:
        cells = [row[name] for row in rows]
        texts = [x if isinstance(x, str) else f"{x:.4g}" for x in cells]
        print(f"{name:>36} " + " ".join(text.rjust(width) for text in texts))
    if options.json is not None:
        record = {"what": options.what, "device": options.device, "threads": options.threads}
        record |= {"torch": torch.__version__, "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.json, json.dumps(record, indent=1) + "\n")
        print(f"written to {options.json}")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Set defaults that depend on the benchmark, and reject invalid values in one line each."""
    if options.threads is None:
        options.threads = torch.get_num_threads()
    if options.repeats is None:
        options.repeats = 11 if options.what in POINTS else 5
    if options.points is None:
        options.points = POINTS.get(options.what, [])
    if options.what != "dreamer" and (options.device != "cpu" or options.modes):
        parser.error(f"--device and --modes are for dreamer; {options.what} is timed on the CPU")
    try:
        kind = torch.empty(0, device=options.device).device.type
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        parser.error(
            f"--device must be cpu or a GPU that PyTorch sees, got '{options.device}' ({reason})"
        )
    if kind not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got '{options.device}'")
    if kind == "cpu" and "cuda_graph" in options.modes:
        parser.error("--modes cuda_graph needs --device cuda")


def bench_pipps(points: int, repeats: int) -> dict[str, float]:
    """Time one policy gradient, as ratios to `rp`, to GPyTorch and to the bare matrix products."""
    keep_freed_memory()  # as PIPPS does
    model, policy = random_problem(points)
    noise = Noise.draw(HORIZON, PARTICLES, 4, torch.Generator().manual_seed(0), resample=False)

    def timed(name: str, model: ParticleModel = model) -> Callable[[], object]:
        estimator = estimators.make(name)
        return lambda: policy_gradient(model, policy, noise, estimator)

    k, precision = torch.rand(4, PARTICLES, points).double(), torch.rand(4, points, points).double()

    def floor() -> None:
        for _ in range(HORIZON):
            torch.bmm(k, precision)

    tasks = {name: timed(name) for name in ESTIMATORS}
    tasks["floor"] = floor
    gpytorch_model = _gpytorch_model(model)
    if gpytorch_model is not None:
        tasks["gpytorch"] = timed("rp", gpytorch_model)
    seconds = interleaved_medians(tasks, repeats)
    ratios = {f"{name} / rp": seconds[name] / seconds["rp"] for name in ESTIMATORS[1:]}
    row = {"GP data points": points, "seconds (rp)": seconds["rp"], **ratios}
    row["rp / matrix-product floor"] = seconds["rp"] / seconds["floor"]
    if "gpytorch" in seconds:
        row["GPyTorch / rp (speed-up)"] = seconds["gpytorch"] / seconds["rp"]
    return row


def random_problem(points: int) -> tuple[ParticleModel, RBFPolicy]:
    """Make a random policy, and a model fitted to cart-pole data from random actions."""
    env = gym.make("totalprop/CartPoleSwingUp-v0")
    env.action_space.seed(0)
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    observation, _ = env.reset(seed=0)
    while len(inputs) < points:
        action = env.action_space.sample()
        new, _, _, truncated, _ = env.step(action)
        inputs.append(np.concatenate((observation, action)))
        targets.append(new - observation)
        observation = env.reset()[0] if truncated else new
    dynamics = GPDynamics(4, 1)
    dynamics.gp.set_data(torch.as_tensor(np.array(inputs)), torch.as_tensor(np.array(targets)))
    dynamics.fit()
    torch.manual_seed(0)
    policy = RBFPolicy(env.observation_space, env.action_space)  # type: ignore[arg-type]
    mean, std = map(torch.as_tensor, env.get_wrapper_attr("initial_distribution"))
    policy.place(mean, torch.ones_like(mean))
    own_cost = env.get_wrapper_attr("cost")
    return ParticleModel(dynamics, mean, std, lambda states, actions: own_cost(states)), policy


def _gpytorch_model(model: ParticleModel) -> ParticleModel | None:
    """The same GP in GPyTorch, or None if GPyTorch is not installed."""
    try:
        import gpytorch
    except ImportError:
        print("GPyTorch is not installed and therefore skipped; pip install gpytorch to compare")
        return None
    ours = model.dynamics.gp
    batch = torch.Size([ours.targets.shape[1]])

    class Exact(gpytorch.models.ExactGP):
        def __init__(self, x: Tensor, y: Tensor, likelihood: object) -> None:
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ZeroMean(batch_shape=batch)
            kernel = gpytorch.kernels.RBFKernel(ard_num_dims=x.shape[-1], batch_shape=batch)
            self.covar_module = gpytorch.kernels.ScaleKernel(kernel, batch_shape=batch)

        def forward(self, x: Tensor) -> object:
            mean, covariance = self.mean_module(x), self.covar_module(x)
            return gpytorch.distributions.MultivariateNormal(mean, covariance)

    likelihood = gpytorch.likelihoods.GaussianLikelihood(
        batch_shape=batch, noise_constraint=gpytorch.constraints.GreaterThan(1e-12)
    ).double()
    inputs = ours.inputs.expand(*batch, *ours.inputs.shape)
    exact = Exact(inputs, ours.targets.T.contiguous(), likelihood).double()
    exact.covar_module.base_kernel.lengthscale = ours.log_lengthscale.exp().unsqueeze(1)
    exact.covar_module.outputscale = (2 * ours.log_signal).exp()
    likelihood.noise = (2 * ours.log_noise).exp().unsqueeze(1)
    exact.eval()
    likelihood.eval()

    class Peer:
        noise, predicted_dims = ours.noise, model.dynamics.predicted_dims
        complete = model.dynamics.complete

        def predict(self, states: Tensor, controls: Tensor) -> Prediction:
            inputs = torch.cat((states, controls), -1)
            delta = exact(inputs.expand(*batch, *inputs.shape))
            variance = delta.variance.T
            return Prediction(states + delta.mean.T, variance, variance, variance)

    return ParticleModel(Peer(), model.start_mean, model.start_std, model.cost)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
