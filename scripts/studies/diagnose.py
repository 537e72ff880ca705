"""Measure which estimator gives the most accurate policy gradient on a trained world model.

    totalprop diagnose runs/dreamer_cartpole-balance-v0_tpx_seed0
    totalprop diagnose RUN --estimators rp lr tpx tpg --horizons 15 60 --starts 50

Loads a trained DreamerTPX with its replay, encodes sequences from it, and evaluates the policy
gradient of every estimator repeatedly from the same encoded states. Reports the expected
signal-to-noise ratio (ESNR; higher is better) and the gradient's variance, within and between start
states, at every horizon. The replay comes from the newest checkpoint, or from the file that
`totalprop train --save-replay` writes, which remains if the checkpoints are deleted.

Parmas et al. 2023 (TPX), App. C.2, Eq. 18 and 19. The paper uses 50 states x 50 gradients of 2500
trajectories each; the defaults here are smaller.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import totalprop.estimators as estimators
from totalprop.agents import AGENTS, DreamerTPX
from totalprop.agents.core import figures
from totalprop.agents.dreamer.imagination import ImaginationNoise
from totalprop.agents.dreamer.update import DreamerUpdate
from totalprop.agents.persistence.checkpoint import Checkpoints
from totalprop.agents.persistence.safe_file import write_text
from totalprop.estimators.analysis.diagnostics import GradientStatistics, statistics_of
from totalprop.scripts.run.errors import UserError, ending_with_a_sentence
from totalprop.scripts.run.folder import RunFolder, add_import, make_env
from totalprop.world_models.latent.model import State

BLOCKED = """Caution: as in DreamerV1, no gradient passed through the policy's input. RP and LR then
estimate different gradients (compare their norms above), and a signal-to-noise ratio cannot show
which of them is right. Compare with --no-stop-grad-actor-input.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder of totalprop train dreamer")
    parser.add_argument(
        "--estimators",
        nargs="+",
        default=["rp", "lr", "tps", "tpx", "tpg"],
        metavar="NAME",
        help="estimators to compare (default: rp lr tps tpx tpg); rp is plain backpropagation, lr "
        "the likelihood-ratio gradient, and the others mix the two",
    )
    parser.add_argument(
        "--horizons",
        nargs="+",
        type=int,
        default=[2, 5, 15, 30, 60],
        metavar="H",
        help="imagination horizons (default: 2 5 15 30 60)",
    )
    parser.add_argument(
        "--starts",
        type=int,
        default=10,
        help="encoded states to start from (default: 10; the paper uses 50)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=10,
        help="gradients per state (default: 10; the paper uses 50)",
    )
    parser.add_argument(
        "--trajectories",
        type=int,
        default=250,
        help="imagined trajectories per gradient (default: 250; the paper uses 2500)",
    )
    parser.add_argument(
        "--stop-grad-actor-input", action=argparse.BooleanOptionalAction, default=None,
        help="stop gradients at the policy's input (default: as in training)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="CPU threads of PyTorch (default: PyTorch's own choice)",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the results (default: RUN/diagnosis)"
    )
    add_import(parser)
    options = parser.parse_args(arguments)
    for name, least in (("starts", 1), ("repeats", 2), ("trajectories", 8), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if min(options.horizons) < 2:
        parser.error(f"--horizons must be at least 2, got {min(options.horizons)}")
    with ending_with_a_sentence(ValueError):
        diagnose(options)


def diagnose(options: argparse.Namespace) -> None:
    """Measure, then write the table, the figure and the advice, and print the results."""
    torch.set_num_threads(options.threads)
    for name in options.estimators:
        estimators.make(name)
    agent = _load(RunFolder.open(options.run, imports=options.imports))
    starts = encoded_starts(agent, options.starts, options.seed)
    results: dict[str, dict[int, GradientStatistics]] = {name: {} for name in options.estimators}
    total = len(options.horizons) * len(options.estimators)
    with tqdm(total=total, desc="gradients", leave=False) as bar:
        for horizon in sorted(options.horizons):
            for name in options.estimators:
                gradients = measure(agent, name, horizon, starts, options)
                results[name][horizon] = statistics_of(gradients)
                bar.update()
    out = options.out or options.run / "diagnosis"
    out.mkdir(parents=True, exist_ok=True)
    text = f"{table(results)}\n{advice(results)}\n"
    if is_blocked(agent, options):
        text += BLOCKED
    write_text(out / "table.md", text)
    write_text(out / "results.json", json.dumps(_record(results, options), indent=1) + "\n")
    figures.save(figure(results), out / "accuracy.png", dpi=150)
    print(f"{text}Results in {out}/: accuracy.png, table.md, results.json.")


def _load(folder: RunFolder) -> DreamerTPX:
    """Load the trained agent with its saved replay, or else from its newest checkpoint."""
    config = folder.read_config()
    env = make_env(config["env_id"], config["env_args"], seed=0)
    if AGENTS[config["agent"]].cls is not DreamerTPX:
        raise UserError(
            f"{folder.path} is a run of {config['agent']}; totalprop diagnose needs one of dreamer"
        )
    if folder.replay.is_file():
        agent = folder.load_agent(env)
        assert isinstance(agent, DreamerTPX)
        agent.load_replay_buffer(folder.replay)
        return agent
    newest = Checkpoints(folder.checkpoints).load(DreamerTPX, env)
    if newest is None:
        raise UserError(
            f"{folder.path} has neither {folder.replay.name} nor a checkpoint; train with "
            "--save-replay"
        )
    return newest


def encoded_starts(agent: DreamerTPX, n: int, seed: int) -> list[State]:
    """Draw n posterior states of replayed sequences, among those that imagination starts from.

    Args:
        agent: an agent with a replay.
        n: number of states.
        seed: seed of the sequences, the steps and the posterior's noise.
    Returns:
        n states, each [1, ...].
    """
    assert agent.replay_buffer is not None
    length, rng = agent.sequence_length, np.random.default_rng(seed)
    batch = agent.replay_buffer.sample(n, length, rng)
    generator = torch.Generator(agent.device).manual_seed(seed)
    rssm = agent.policy.model.rssm
    noise = torch.randn((length, n, rssm.stoch_size), generator=generator, device=generator.device)
    with torch.no_grad():
        embeds = agent.policy.model.encoder(batch.observation)
        states, _, _ = rssm.observe(embeds, batch.action, batch.is_first, noise)
    steps = rng.integers(agent._update.possible_starts(length), size=n)
    return [
        State(states.deter[t, i : i + 1], states.stoch[t, i : i + 1]) for i, t in enumerate(steps)
    ]


def is_blocked(agent: DreamerTPX, options: argparse.Namespace) -> bool:
    """Whether gradients stop at the actor's input: as asked for, or else as in training."""
    asked = options.stop_grad_actor_input
    return agent.stop_grad_actor_input if asked is None else asked


def measure(
    agent: DreamerTPX, name: str, horizon: int, starts: list[State], options: argparse.Namespace
) -> Tensor:
    """Evaluate the policy gradient of one estimator; the noise is the same for all estimators.

    Returns:
        [S, M, P] gradients, M repeats from each of S starts.
    """
    trained = agent._update.settings
    imagination = dataclasses.replace(
        trained.imagination, stop_grad_actor_input=is_blocked(agent, options)
    )
    settings = dataclasses.replace(
        trained,
        estimator=estimators.make(name, baseline=trained.estimator.baseline),
        horizon=horizon,
        imagination=imagination,
        compile=False,  # if the agent compiles, its model is compiled already
        cuda_graph=False,
    )
    update = DreamerUpdate(agent.policy, settings)
    n, rows = options.trajectories, []
    sizes = (horizon, n, agent.policy.n_actions, agent.policy.model.rssm.stoch_size)
    for s, start in enumerate(starts):
        many = State(start.deter.expand(n, -1), start.stoch.expand(n, -1))
        generator = torch.Generator(agent.device).manual_seed(options.seed + 1 + s)
        row = []
        for _ in range(options.repeats):
            noise = ImaginationNoise.draw(*sizes, generator)
            gradient, _ = update.actor_gradient(many, noise)
            row.append(torch.cat([g.flatten() for g in gradient.gradients]).cpu())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def table(results: dict[str, dict[int, GradientStatistics]]) -> str:
    """Markdown tables: ESNR (the best of a row in bold), variance and norm of the gradient."""
    horizons = list(next(iter(results.values())))
    head = ["| horizon | " + " | ".join(f"`{name}`" for name in results) + " |"]
    head.append("|---" * (1 + len(results)) + "|")

    def block(title: str, cells: Callable[[list[GradientStatistics]], list[str]]) -> str:
        rows = [[str(h), *cells([results[name][h] for name in results])] for h in horizons]
        return "\n".join([title, "", *head, *(f"| {' | '.join(row)} |" for row in rows), ""])

    def esnr(row: list[GradientStatistics]) -> list[str]:
        best = max(s.esnr for s in row)
        return [f"**{s.esnr:.3g}**" if s.esnr == best else f"{s.esnr:.3g}" for s in row]

    return "\n".join(
        [
            block("ESNR (Parmas et al. 2023, Eq. 19), higher is better:", esnr),
            block(
                "Variance of the gradient: within a start / between starts (Eq. 18):",
                lambda row: [f"{s.within:.2e} / {s.between:.2e}" for s in row],
            ),
            block(
                "Norm of the mean gradient:",
                lambda row: [f"{float(s.mean.norm()):.2e}" for s in row],
            ),
        ]
    )


def advice(results: dict[str, dict[int, GradientStatistics]]) -> str:
    """The most accurate estimator at each horizon, and the safest choice for all of them."""
    horizons = list(next(iter(results.values())))
    best = {h: max(results, key=lambda name, h=h: results[name][h].esnr) for h in horizons}  # type: ignore[misc]
    parts = []
    for name in dict.fromkeys(best.values()):
        where = ", ".join(str(h) for h in horizons if best[h] == name)
        parts.append(f"`{name}` at horizon {where}")
    shares = {
        name: min(max(results[name][h].esnr, 0.0) / results[best[h]][h].esnr for h in horizons)
        for name in results
    }
    safest = max(shares, key=lambda name: shares[name])
    return (
        f"Most accurate gradient for this model: {'; '.join(parts)}. Safest at all horizons: "
        f"`{safest}`, with an ESNR of at least {shares[safest]:.0%} of the best."
    )


def figure(results: dict[str, dict[int, GradientStatistics]]) -> Figure:
    """Plot ESNR and the variance within a start against the horizon."""
    picture = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = picture.subplots(1, 2)
    for i, (name, by_horizon) in enumerate(results.items()):
        h = list(by_horizon)
        # Later lines are thinner, so that estimators that coincide all remain visible.
        style = {"marker": "o", "color": f"C{i}", "lw": 3.5 - 0.5 * i, "ms": 8 - i}
        left.plot(h, [s.esnr for s in by_horizon.values()], label=name, **style)
        right.plot(h, [s.within for s in by_horizon.values()], **style)
    left.set(xlabel="imagination horizon", ylabel="expected signal-to-noise ratio", yscale="log")
    right.set(xlabel="imagination horizon", ylabel="gradient variance within a start", yscale="log")
    left.legend(frameon=False)
    return picture


def _record(
    results: dict[str, dict[int, GradientStatistics]], options: argparse.Namespace
) -> dict[str, Any]:
    numbers = {
        name: {
            str(h): {
                "esnr": s.esnr,
                "within": s.within,
                "between": s.between,
                "norm_of_mean": float(s.mean.norm()),
            }
            for h, s in by_horizon.items()
        }
        for name, by_horizon in results.items()
    }
    names = ("starts", "repeats", "trajectories", "stop_grad_actor_input", "seed")
    protocol = {k: getattr(options, k) for k in names}
    return {"run": str(options.run), **protocol, "results": numbers}


if __name__ == "__main__":
    main()
