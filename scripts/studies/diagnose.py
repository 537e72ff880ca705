"""Measure which estimator gives the most accurate policy gradient on a trained world model.

    totalprop diagnose runs/dreamer_cartpole-balance-v0_tpx_seed0
    totalprop diagnose RUN --estimators rp lr tpx tpg --horizons 15 60 --starts 50

Loads a trained DreamerTPX with its replay, encodes sequences from it, and evaluates the policy
gradient of every estimator repeatedly from the same encoded states. At every horizon it reports

- the signal-to-noise ratio of each start state (higher is better), as the median over the states
  with a 95 % interval, and the mean, which is the paper's ESNR;
- how far the mean gradient is from LR's, in standard errors, since a precise gradient may be wrong;
- the gradient's variance, within and between start states, and the norm of its mean.

The entropy bonus is left out of the gradient: it is the same in every estimator and nearly free of
noise, so that it would hide the difference. The replay comes from the newest checkpoint, or from
the file that `totalprop train --save-replay` writes, which remains if the checkpoints are deleted.

Parmas et al. 2023 (TPX), App. C.2, Eq. 18 and 19. The paper uses 50 states x 50 gradients of 2500
trajectories each; the defaults here are smaller.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

import totalprop.estimators as estimators
from totalprop.agents import DreamerTPX
from totalprop.agents.core import figures
from totalprop.agents.dreamer.actions import Choices
from totalprop.agents.dreamer.imagination import ImaginationNoise
from totalprop.agents.persistence.checkpoint import Checkpoints
from totalprop.agents.persistence.safe_file import write_text
from totalprop.estimators.analysis.diagnostics import (
    GradientStatistics,
    mean_difference,
    median_interval,
    statistics_of,
)
from totalprop.scripts.commands import parser_of
from totalprop.scripts.run.environments import make_env
from totalprop.scripts.run.errors import UserError, ending_with_a_sentence
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.run.progress import counted
from totalprop.scripts.studies.agent_problems import without_bonus
from totalprop.scripts.studies.styles import style_of
from totalprop.world_models.latent.model import State

BLOCKED = """Caution: as in DreamerV1, no gradient passed through the policy's input. RP and LR then
estimate different gradients, and a signal-to-noise ratio cannot show which of them is right.
Compare with --no-stop-grad-actor-input.
"""
DIFFERENT = 4.0  # standard errors from LR's mean that we call a difference


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = parser_of("diagnose")
    options = parser.parse_args(arguments)
    if options.threads is None:
        options.threads = torch.get_num_threads()
    with ending_with_a_sentence(ValueError):
        diagnose(options)


@dataclass(frozen=True)
class Measured:
    """What was found out about one estimator at one horizon.

    Attributes:
        statistics: of its gradient.
        from_lr: distance of its mean from LR's, in standard errors; None if LR was not measured.
    """

    statistics: GradientStatistics
    from_lr: float | None

    @property
    def snr(self) -> float:
        """The median signal-to-noise ratio."""
        return median_interval(self.statistics.snr).median


Results = dict[str, dict[int, Measured]]


def diagnose(options: argparse.Namespace) -> None:
    """Measure, then write the table, the figure and the advice, and print the results."""
    torch.set_num_threads(options.threads)
    for name in options.estimators:
        estimators.make(name)
    agent = _load(RunFolder.open(options.run, imports=options.imports))
    starts = encoded_starts(agent, options.starts, options.seed)
    results: Results = {name: {} for name in options.estimators}
    horizons = sorted(set(options.horizons))
    with counted(len(horizons) * len(results), "gradient estimates") as advance:
        for horizon in horizons:
            gradients = {}
            for name in results:
                gradients[name] = measure(agent, name, horizon, starts, options)
                advance()
            for name, found in gradients.items():
                distance = mean_difference(found, gradients["lr"]) if "lr" in gradients else None
                results[name][horizon] = Measured(statistics_of(found), distance)
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
    if (name := config["agent"]) != "dreamer":
        tool = "totalprop variance" if name == "daappo" else "totalprop evaluate"
        raise UserError(
            f"{folder.path} is a run of {name}, and diagnose measures gradients in DreamerTPX's "
            f"model; use {tool} {folder.quoted}"
        )
    env = make_env(config["env_id"], config["env_args"], seed=0)
    if folder.replay.is_file():
        agent = folder.load_agent(env)
        assert isinstance(agent, DreamerTPX)
        agent.load_replay_buffer(folder.replay)
    elif (newest := Checkpoints(folder.checkpoints).load(DreamerTPX, env)) is not None:
        agent = newest
    else:
        raise UserError(
            f"{folder.path} has neither {folder.replay.name} nor a checkpoint; train with "
            "--save-replay"
        )
    if agent._n_updates == 0:  # the critic is still zero, and so is the gradient
        raise UserError(
            f"{folder.path} has learned nothing after {agent.num_timesteps} steps, so there is "
            "no gradient to measure; train for longer: totalprop train --resume "
            f"{folder.quoted} --total-timesteps N"
        )
    return agent


def encoded_starts(agent: DreamerTPX, n: int, seed: int) -> list[State]:
    """Draw n posterior states of replayed sequences, among those that imagination starts from.

    Args:
        agent: an agent with a replay.
        n: number of states.
        seed: seed of the sequences, the steps and the posterior's noise.
    Returns:
        n states, each [1, ...].
    Raises:
        UserError: there are not as many steps in the replay.
    """
    assert agent.replay_buffer is not None
    if n > (stored := len(agent.replay_buffer)):
        raise UserError(f"--starts must be at most {stored}, the steps in the replay, got {n}")
    length, rng = agent.sequence_length, np.random.default_rng(seed)
    batch = agent.replay_buffer.sample(n, length, rng)
    generator = torch.Generator(agent.device).manual_seed(seed)
    rssm = agent.policy.model.rssm
    noise = rssm.latents.noise(length, n, generator=generator)
    with torch.no_grad():
        embeds = agent.policy.model.embed(batch.observation)
        states, _, _ = rssm.observe(embeds, batch.action, batch.is_first, noise)
    alive = (~batch.is_terminal).cpu().numpy()
    steps = [rng.choice(np.flatnonzero(alive[:, i])) for i in range(n)]
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
    """Evaluate the policy gradient of one estimator, without the entropy bonus.

    The noise is the same for all estimators.

    Returns:
        [S, M, P] gradients, M repeats from each of S starts.
    """
    estimator = estimators.make(name, baseline=agent._update.settings.estimator.baseline)
    update = without_bonus(agent, estimator, horizon, is_blocked=is_blocked(agent, options))
    n, rows = options.trajectories, []
    sizes = (horizon, n, agent.policy.n_actions, agent.policy.model.rssm.latents)
    choices = isinstance(agent.policy.actions, Choices)
    for s, start in enumerate(starts):
        many = State(start.deter.expand(n, -1), start.stoch.expand(n, -1))
        generator = torch.Generator(agent.device).manual_seed(options.seed + 1 + s)
        row = []
        for _ in range(options.repeats):
            noise = ImaginationNoise.draw(*sizes, generator, choices=choices)
            gradient, _ = update.actor_gradient(many, noise)
            row.append(torch.cat([g.flatten() for g in gradient.gradients]).cpu())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def table(results: Results) -> str:
    """Markdown tables of signal-to-noise ratios, distances from LR, variances and norms."""
    horizons = list(next(iter(results.values())))
    head = ["| horizon | " + " | ".join(f"`{name}`" for name in results) + " |"]
    head.append("|---" * (1 + len(results)) + "|")

    def block(title: str, cells: Callable[[list[Measured]], list[str]]) -> str:
        rows = [[str(h), *cells([results[name][h] for name in results])] for h in horizons]
        return "\n".join([title, "", *head, *(f"| {' | '.join(row)} |" for row in rows), ""])

    def each(cell: Callable[[Measured], str]) -> Callable[[list[Measured]], list[str]]:
        return lambda row: [cell(found) for found in row]

    def snr(row: list[Measured]) -> list[str]:
        best, cells = max(found.snr for found in row), []
        for found in row:
            median, low, high = median_interval(found.statistics.snr)
            text = f"**{median:.3g}**" if median == best else f"{median:.3g}"
            cells.append(text if math.isinf(low) else f"{text} ({low:.3g} to {high:.3g})")
        return cells

    blocks = [
        block("Signal-to-noise ratio, higher is better: median over starts (95 % interval):", snr),
        block(
            "Its mean over starts (ESNR; Parmas et al. 2023, Eq. 19):",
            each(lambda found: f"{found.statistics.esnr:.3g}"),
        ),
        block(
            "Variance of the gradient: within a start / between starts (Eq. 18):",
            each(lambda f: f"{f.statistics.within:.2e} / {f.statistics.between:.2e}"),
        ),
        block(
            "Norm of the mean gradient:",
            each(lambda found: f"{float(found.statistics.mean.norm()):.2e}"),
        ),
    ]
    if "lr" in results:
        distances = block(
            f"Distance from the mean of `lr`, in standard errors (0 ± 1 if equal, above "
            f"{DIFFERENT:.0f} they differ):",
            each(lambda found: f"{found.from_lr:.1f}"),
        )
        blocks.insert(2, distances)
    return "\n".join(blocks)


def advice(results: Results) -> str:
    """The most accurate estimator at each horizon, those that equal it, and the safest choice."""
    horizons = list(next(iter(results.values())))
    best = {h: max(results, key=lambda name, h=h: results[name][h].snr) for h in horizons}  # type: ignore[misc]
    sentences = []
    for h in horizons:
        winner = results[best[h]][h].statistics.snr
        equal = [
            f"`{name}`"
            for name in results
            if name != best[h]
            and median_interval(winner - results[name][h].statistics.snr).low <= 0
        ]
        rest = f" (not distinguishable: {', '.join(equal)})" if equal else ""
        sentences.append(f"horizon {h}: `{best[h]}`{rest}")
    shares = {
        name: min(max(results[name][h].snr, 0.0) / results[best[h]][h].snr for h in horizons)
        for name in results
    }
    safest = max(shares, key=lambda name: shares[name])
    text = (
        f"Most accurate gradient for this model, by the median: {'; '.join(sentences)}. "
        f"Safest at all horizons: `{safest}`, with at least {shares[safest]:.0%} of the best ratio."
    )
    different = [
        f"`{name}` at horizon {', '.join(map(str, where))}"
        for name, by_horizon in results.items()
        if (where := [h for h, f in by_horizon.items() if abs(f.from_lr or 0.0) > DIFFERENT])
    ]
    if different:
        text += (
            f" The mean of {' and of '.join(different)} differs from that of `lr`, which no "
            "gradient of the model can bias: there a high ratio may be precise and wrong."
        )
    return text


def figure(results: Results) -> Figure:
    """Plot the signal-to-noise ratio and the variance within a start against the horizon."""
    picture = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = picture.subplots(1, 2)
    for i, (name, by_horizon) in enumerate(results.items()):
        found = [each.statistics for each in by_horizon.values()]
        ratios = [median_interval(statistics.snr) for statistics in found]
        # Estimators that coincide remain visible: later lines are thinner and moved a little.
        style = {"marker": "o", "lw": max(3.5 - 0.5 * i, 1), "ms": max(8 - i, 3), **style_of(name)}
        h = [horizon * 1.01 ** (i - (len(results) - 1) / 2) for horizon in by_horizon]
        left.plot(h, [ratio.median for ratio in ratios], label=name, **style)
        if has_intervals := math.isfinite(ratios[0].low):
            left.vlines(
                h, [r.low for r in ratios], [r.high for r in ratios], color=style["color"], lw=1
            )
        right.plot(h, [statistics.within for statistics in found], **style)
    spread = ", 95 % interval" if has_intervals else ""
    left.set(ylabel=f"signal-to-noise ratio of a start:\nmedian{spread}", yscale="log")
    right.set(ylabel="gradient variance within a start", yscale="log")
    ticks = list(next(iter(results.values())))
    for axes in (left, right):
        low, high = axes.get_ylim()
        if high < 20 * low:  # or one label, or none, would remain
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:.3g}")
        axes.set(xlabel="imagination horizon", xscale="log")
        axes.set_xticks(ticks, [str(h) for h in ticks])
        axes.minorticks_off()
    left.legend(frameon=False)
    return picture


def _record(results: Results, options: argparse.Namespace) -> dict[str, Any]:
    def numbers(found: Measured) -> dict[str, Any]:
        s, ratio = found.statistics, median_interval(found.statistics.snr)
        return {
            "snr_median": ratio.median,
            "snr_interval": None if math.isinf(ratio.low) else [ratio.low, ratio.high],
            "esnr": s.esnr,
            "snr": s.snr.tolist(),
            "standard_errors_from_lr": found.from_lr,
            "within": s.within,
            "between": None if math.isnan(s.between) else s.between,
            "norm_of_mean": float(s.mean.norm()),
        }

    names = ("starts", "repeats", "trajectories", "stop_grad_actor_input", "seed")
    return {
        "run": str(options.run),
        **{k: getattr(options, k) for k in names},
        "results": {
            name: {str(h): numbers(found) for h, found in by_horizon.items()}
            for name, by_horizon in results.items()
        },
    }


if __name__ == "__main__":
    main()
