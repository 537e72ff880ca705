"""The commands and their flags. Nothing here loads PyTorch, so `--help` answers at once.

The flags of `train` are an agent's constructor's arguments: see scripts/run/arguments.py.
"""

from __future__ import annotations

import ast
import os
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from totalprop.agents import AGENTS
from totalprop.scripts.flag_types import Parser, at_least, new_file, new_folder, real, seed

GPU_STEPS = ("tests", "bench", "train")
BENCHMARKS = ("pipps", "pilco", "dreamer", "ppo", "svg", "checkpoint")
PEERS = ("sac", "td3", "ddpg")
PIPPS_TASKS = ("angle", "tip", "unicycle")
PIPPS_METHODS = (
    "PILCO", "RP", "RP-FS", "GR", "GR-FS", "LR", "TP", "TP-sf", "TP+sn", "TPX", "TPG"
)  # fmt: skip
REPRODUCTIONS = (
    "tpx-fig3", "tpx-fig6", "tpx-fig7", "tpx-fig8", "tpx-ablation",
    "pipps-fig2", "pipps-fig3", "pipps-table1", "pipps-table2",
    "daa-table1", "daa-fig1", "daa-fig3", "daa-fig4", "daa-fig5", "daa-fig6", "daa-fig7",
    "svg-fig",
)  # fmt: skip
MODES = ("compile", "cuda_graph", "bf16")  # of the dreamer's benchmark: fields of `UpdateSettings`


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        module: in totalprop.scripts; its docstring heads the command's help.
        text: what the command does, for `totalprop --help`.
        add_flags: adds its flags to a parser; None if the module has them, and loads quickly.
    """

    module: str
    text: str
    add_flags: Callable[[ArgumentParser], None] | None = None


def parser_of(name: str) -> ArgumentParser:
    """The parser of a command in `COMMANDS` that has `add_flags`."""
    command = COMMANDS[name]
    parser = Parser(
        prog=f"totalprop {name}",
        description=docstring(command.module),
        formatter_class=RawDescriptionHelpFormatter,
    )
    assert command.add_flags is not None
    command.add_flags(parser)
    return parser


def train_usage() -> str:
    """The text of `totalprop train --help`."""
    known = ", ".join(AGENTS)
    return (
        f"{docstring('train')}\n\nagents: {known}  (totalprop train AGENT --help lists its flags)"
    )


def docstring(module: str) -> str:
    """Docstring of a script, read from its source: importing it would load PyTorch."""
    path = Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def add_import(
    parser: ArgumentParser,
    text: str = "module that the run's environment, MODULE:ID in its config.json, may import",
) -> None:
    """Add the flag --import, whose values are `imports`, those of `RunFolder.open` by default."""
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE", help=text
    )


def add_best(parser: ArgumentParser) -> None:
    """Add the flag --best, which `RunFolder.load_agent` takes."""
    parser.add_argument(
        "--best", action="store_true",
        help="the agent of the run's best evaluation (best_model.zip), also while it trains, "
        "instead of the last one; the best of many evaluations was partly lucky, so expect less. "
        "What is written is called best_... by default"
    )  # fmt: skip


def _evaluate(parser: ArgumentParser) -> None:
    parser.add_argument(
        "run", help="run folder, as printed by totalprop train, or hf://ORG/NAME of the Hub"
    )
    parser.add_argument(
        "--episodes", type=at_least(1), default=30, help="number of episodes to average"
    )
    parser.add_argument("--seed", type=seed, default=12345, help="seed of the environments")
    parser.add_argument(
        "--gif",
        type=Path,
        default=None,
        help="file for a GIF of one episode (default: RUN/evaluation.gif)",
    )
    parser.add_argument(
        "--max-steps",
        type=at_least(1),
        default=10_000,
        help="steps after which an episode is cut, if the environment has not ended it; a GIF "
        "shows 1000 at most",
    )
    parser.add_argument("--no-gif", action="store_true", help="do not record a GIF")
    add_best(parser)
    add_import(parser)


def _export(parser: ArgumentParser) -> None:
    parser.add_argument(
        "run", help="run folder, as printed by totalprop train, or hf://ORG/NAME of the Hub"
    )
    for kind, reader in (("pt2", "torch.export.load"), ("onnx", "ONNX Runtime and others")):
        parser.add_argument(
            f"--{kind}",
            type=Path,
            nargs="?",
            const=False,
            metavar="FILE",
            help=f"write a file for {reader} (default: RUN/policy.{kind}); without --pt2 and "
            "--onnx, both are written",
        )
    parser.add_argument(
        "--steps",
        type=at_least(1),
        default=300,
        help="steps of the run's environment in which the files are checked",
    )
    parser.add_argument("--seed", type=seed, default=12345, help="seed of the environment")
    add_best(parser)
    add_import(parser)


def _push(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument(
        "repo_id", metavar="ORG/NAME", help="repository of the Hub, made if there is none"
    )
    parser.add_argument(
        "--private", action="store_true", help="make a new repository a private one"
    )
    add_import(parser)


def _diagnose(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder of totalprop train dreamer")
    parser.add_argument(
        "--estimators",
        nargs="+",
        default=["rp", "lr", "tps", "tpx", "tpg"],
        metavar="NAME",
        help="estimators to compare; rp is plain backpropagation, lr the "
        "likelihood-ratio gradient, and the others mix the two",
    )
    parser.add_argument(
        "--horizons",
        nargs="+",
        type=at_least(2),
        default=[2, 5, 15, 30, 60],
        metavar="H",
        help="imagination horizons",
    )
    parser.add_argument(
        "--starts",
        type=at_least(1),
        default=10,
        help="encoded states to start from; the paper uses 50",
    )
    parser.add_argument(
        "--repeats",
        type=at_least(4),
        default=10,
        help="gradients per state, at least 4; the paper uses 50",
    )
    parser.add_argument(
        "--trajectories",
        type=at_least(8),
        default=250,
        help="imagined trajectories per gradient, at least 8; the paper uses 2500",
    )
    parser.add_argument(
        "--stop-grad-actor-input", action=BooleanOptionalAction, default=None,
        help="stop gradients at the policy's input (default: as in training)"
    )  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help="seed of the noise")
    parser.add_argument(
        "--threads",
        type=at_least(1),
        default=None,
        help="CPU threads of PyTorch (default: PyTorch's own choice)",
    )
    parser.add_argument(
        "--out",
        type=new_folder,
        default=None,
        help="folder of the results (default: RUN/diagnosis)",
    )
    add_import(parser)


def _variance(parser: ArgumentParser) -> None:
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        help="run folder of totalprop train daappo; its policy and environment are used",
    )
    parser.add_argument(
        "--env-id", default="dmc/cartpole-swingup-v0", help="environment of a new policy"
    )
    parser.add_argument(
        "--env-arg",
        action="append",
        metavar="NAME=VALUE",
        help="argument of the environment; may be repeated (default for the control suite: the "
        "paper's action_repeat=4)",
    )
    parser.add_argument(
        "--trajectories",
        type=at_least(2),
        default=40,
        help="trajectories to sample; the paper uses 1100",
    )
    parser.add_argument(
        "--steps", type=at_least(1), default=50, help="T, steps per trajectory; the paper uses 100"
    )
    parser.add_argument(
        "--rollouts", type=at_least(2), default=2, help="K, rollouts per action; the paper uses 100"
    )
    parser.add_argument("--horizon", type=at_least(1), default=25, help="steps per rollout")
    parser.add_argument(
        "--updates",
        type=at_least(0),
        default=0,
        help="policy-gradient steps of a new policy; the paper uses 20",
    )
    parser.add_argument(
        "--learning-rate",
        type=real(least=0, most=1e300),
        default=0.1,
        help="step size of --updates",
    )
    parser.add_argument(
        "--gamma", type=real(least=0, most=1), default=0.99, help="discount of the rollouts"
    )
    parser.add_argument(
        "--delta",
        type=real(above=0, most=1e300),
        default=1.0,
        help="cost of an extra action, in units of the cost of an extra state",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed")
    parser.add_argument(
        "--json", type=new_file, default=None, help="also write the components to this file"
    )
    add_import(parser)


def _add_runs(parser: ArgumentParser, of: str, *, seeds: str = "", out: str = "") -> None:
    """The flags of a study that trains several seeds of each value or cell.

    Args:
        parser: gets the flags.
        of: what has several seeds.
        seeds: the default of --seeds in words, for a study that has one.
        out: the default of --out, likewise.
    """
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=seed,
        required=not seeds,
        metavar="SEED",
        help=f"seeds of each {of}" + (f" (default: {seeds})" if seeds else ""),
    )
    parser.add_argument(
        "--out",
        type=new_folder,
        default=Path(out) if out else None,
        required=not out,
        help="folder of the results",
    )
    parser.add_argument(
        "--runs",
        type=new_folder,
        default=None,
        help="folder of the runs (default: runs/NAME, where NAME is the last part of --out)",
    )
    _add_jobs(parser, "runs")
    parser.add_argument(
        "--report-only", action="store_true", help="do not train, only write the report"
    )


def _add_jobs(parser: ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=os.cpu_count(),
        help=f"{what} at the same time, one thread each (default: one per core)",
    )


def _add_measurements(parser: ArgumentParser, out: str) -> None:
    """The flags of a study that measures, without training, and writes figures and tables."""
    parser.add_argument("--out", type=new_folder, default=Path(out), help="folder of the results")
    parser.add_argument(
        "--report-only", action="store_true", help="only write the figures and the table"
    )


def _sweep(parser: ArgumentParser) -> None:
    add = parser.add_argument
    known = ",".join(AGENTS)
    add("agents", nargs="*", metavar="AGENT", help=f"agents to train, of {{{known}}}")
    add("--estimators", nargs="+", metavar="NAME", help="estimators to compare")
    add(
        "--vary",
        action="append",
        metavar="FLAG",
        help="flag of totalprop train to vary, without dashes; several times for a grid (default: "
        "estimator)",
    )
    add(
        "--values",
        action="append",
        default=[],
        nargs="+",
        metavar="VALUE",
        help="values of that flag to compare; true and false are those of a switch",
    )
    add(
        "--grid",
        type=Path,
        metavar="FILE",
        help="YAML with agent, seed and flags by name, each a value or a list of values to compare",
    )
    add(
        "--tune",
        type=at_least(1),
        metavar="N",
        help="search N settings instead, with Optuna: values may be ranges, low..high or "
        "low..high:log; needs seeds from 100 on",
    )
    _add_runs(parser, "setting", seeds="those of --grid")
    parser.set_defaults(jobs=None)
    add(
        "--address",
        default="",
        help="cluster of Ray to train on, such as auto or HOST:6379 (default: this machine); "
        "without --jobs, it has all runs at once",
    )
    add(
        "--cpus-per-run",
        type=real(above=0),
        metavar="N",
        help="cores that a run occupies on Ray or Slurm, on Ray maybe a fraction (default: 1)",
    )
    add(
        "--gpus-per-run",
        type=real(above=0),
        metavar="N",
        help="GPUs that a run occupies, likewise (default: none are assigned)",
    )
    add(
        "--slurm",
        nargs="?",
        const="slurm",
        choices=("slurm", "local"),
        help="submit the runs as Slurm's jobs; local is submitit's stand-in, all runs at once here",
    )
    add(
        "--slurm-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="parameter of submitit's executor, such as slurm_partition=gpu or timeout_min=600 "
        "(default: 1440)",
    )
    parser.add_argument(
        "--watch",
        default="",
        metavar="COLUMN",
        help="column of progress.csv or k.csv to plot as well, such as train/actor_gradient_norm",
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="results of `totalprop peer`, or results.json of other sweeps, to show as well",
    )


def _plot(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN|SWEEP",
        help="run folders, results.json files, or folders that hold either",
    )
    add(
        "--labels",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of the lines, in the order of the legend (default: what differs between them)",
    )
    add(
        "--x",
        choices=["decisions", "frames"],
        default="decisions",
        help="what the horizontal axis counts (default: decisions, with frames above them where "
        "they differ); frames are decisions x action_repeat",
    )
    add(
        "--success",
        type=real(),
        metavar="COST",
        help="cost below which a trial succeeds (default: that of the environment, if it has one)",
    )
    add("--profile", action="store_true", help="draw performance profiles over tasks as well")
    add(
        "--normalise",
        nargs=2,
        type=float,  # plot says what is wrong with the pair
        metavar=("LOW", "HIGH"),
        help="returns that have the scores 0 and 1, with --profile; of costs the worst comes first "
        "(default: 0 1000 in the control suite)",
    )
    add(
        "--out",
        type=new_folder,
        help="folder of the pictures (default: plots/NAME, after the folders of the runs)",
    )


def _reproduce(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "name",
        nargs="?",
        choices=REPRODUCTIONS,
        metavar="NAME",
        help=f"what to reproduce, of {', '.join(REPRODUCTIONS)} (default: list them)",
    )
    add("--list", action="store_true", help="list claims, costs, and the verdicts in --out")
    add("--scale", choices=["small", "paper"], default="small", help="see above")
    add(
        "--from",
        dest="source",
        type=Path,
        metavar="FOLDER",
        help="folder laid out as this project's results/, whose measurements of the same protocol "
        "are read and not made again",
    )
    add(
        "--seeds",
        nargs="+",
        type=seed,
        metavar="SEED",
        help="seeds of what is trained (default: those of the scale)",
    )
    add("--out", type=new_folder, default=Path("results/reproduce"), help="folder of the results")
    add("--runs", type=new_folder, default=Path("runs/reproduce"), help="folder of the runs")
    _add_jobs(parser, "runs")
    add("--report-only", action="store_true", help="measure nothing, only write the report")


def _gradients(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--problems",
        nargs="+",
        metavar="NAME",
        help="problems to measure, kinds of them (smooth, stiff, jump, chaos), or folders of runs "
        "of pipps and dreamer (default: all but runs)",
    )
    add(
        "--estimators",
        nargs="+",
        metavar="ESTIMATOR",
        help="estimators to measure, yours too, some with a leg, such as lr+first-order or, for "
        "runs of dreamer, tpx+lax (default: the best of each family)",
    )
    add_import(parser, "module that registers estimators of yours")
    add(
        "--samples",
        nargs="+",
        type=at_least(5),
        default=[50, 300, 1000, 5000],
        metavar="N",
        help="samples per gradient",
    )
    add(
        "--repeats",
        type=at_least(2),
        default=20,
        help="gradients per point, half of them from 5000 samples on",
    )
    add("--seed", type=seed, default=0, help="seed of the noise")
    _add_jobs(parser, "points")
    _add_measurements(parser, "results/gradients")


def _study_dreamer(parser: ArgumentParser) -> None:
    names = {
        "tasks": ["pendulum", "balance", "swingup"],
        "gates": ["blocked", "open"],
        "gradients": ["rp", "lr, latent", "lr, action", "tpx", "tpg"],
    }
    for name, values in names.items():
        parser.add_argument(
            f"--{name}",
            nargs="+",
            default=values,
            metavar="NAME",
            help=f"{name} to compare (default: {'; '.join(values)})",
        )
    parser.add_argument(
        "--horizons",
        nargs="+",
        type=at_least(1),
        default=[15, 60],
        metavar="H",
        help="imagination horizons",
    )
    _add_runs(parser, "cell")


def _policy_line(parser: ArgumentParser, name: str) -> None:
    """The flags of a study on a line of policies."""
    add = parser.add_argument
    add(
        "--run",
        type=Path,
        default=Path("results/gradients/agents/pipps-300"),
        help="folder of a run of totalprop train pipps, whose policy is moved (default: "
        "results/gradients/agents/pipps-300, which has seen 10 episodes of the cart-pole)",
    )
    add("--direction", type=seed, default=8, help="seed of the line's direction")
    add("--end", type=real(above=0), default=6.0, metavar="Δ", help="end of the line")
    add("--seed", type=seed, default=0, help="seed of the particles' noise")
    _add_measurements(parser, f"results/pipps/{name}")


def _pipps_landscape(parser: ArgumentParser) -> None:
    add = parser.add_argument
    default = ["rp", "lr", "lr+biw", "tp+biw", "tpx", "tpg"]
    add(
        "--estimators",
        nargs="+",
        default=default,
        metavar="ESTIMATOR",
        help="estimators to measure; the gradients of the first four are drawn",
    )
    add(
        "--particles",
        type=at_least(6),
        default=1000,
        help="particles P (default: 1000, as in the paper)",
    )
    add("--points", type=at_least(3), default=25, help="policies on the line")
    add(
        "--box-points", type=at_least(2), default=41, metavar="N",
        help="points on each side of a box"
    )  # fmt: skip
    _policy_line(parser, "landscape")


def _pipps_particles(parser: ArgumentParser) -> None:
    add = parser.add_argument
    default = ["rp", "lr", "lr+biw", "tp", "tp+biw", "tpx", "tpx+biw", "tpg", "tpg+biw", "gr"]
    add(
        "--estimators",
        nargs="+",
        default=default,
        metavar="ESTIMATOR",
        help="estimators to measure",
    )
    add(
        "--particles",
        nargs="+",
        type=at_least(6),
        default=[25, 50, 100, 250],
        metavar="P",
        help="numbers of particles",
    )
    add(
        "--repeats", type=at_least(3), default=30, metavar="R",
        help="gradients of each variance"
    )  # fmt: skip
    _policy_line(parser, "particles")


def _pipps_table(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--scale", choices=["small", "paper"], default="small", help="see above")
    add(
        "--tasks",
        nargs="+",
        choices=PIPPS_TASKS,
        help="tasks (default: angle tip; all with --scale paper)",
    )
    add(
        "--noise",
        nargs="+",
        type=real(least=0),
        metavar="K",
        help="noise multipliers k of the cart-pole (default: 1 16; 0.01 1 4 9 16 with --scale "
        "paper)",
    )
    add(
        "--methods",
        nargs="+",
        choices=PIPPS_METHODS,
        metavar="METHOD",
        help="PILCO RP GR LR TP TPX TPG (default), and with --scale paper RP-FS, GR-FS (fixed "
        "noise), TP-sf (without model uncertainty) and TP+sn (100 times the model's noise)",
    )
    _add_runs(
        parser, "cell", seeds="0 to 4; 0 to 99 with --scale paper", out="results/pipps/success"
    )


def _peer(parser: ArgumentParser) -> None:
    parser.add_argument("algorithm", choices=PEERS, help="algorithm of stable-baselines3")
    parser.add_argument(
        "--env-id", required=True, metavar="ID", help="Gymnasium id of the environment"
    )
    parser.add_argument(
        "--env-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the environment; may be repeated",
    )
    parser.add_argument(
        "--total-timesteps",
        type=at_least(1),
        required=True,
        metavar="N",
        help="decisions to learn for",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=seed, required=True, metavar="SEED", help="seeds to train"
    )
    parser.add_argument(
        "--eval-every",
        type=at_least(1),
        default=1000,
        metavar="N",
        help="decisions between evaluations",
    )
    parser.add_argument(
        "--eval-episodes", type=at_least(1), default=5, metavar="N", help="episodes per evaluation"
    )
    parser.add_argument(
        "--out", type=new_file, required=True, metavar="FILE", help="JSON file of the results"
    )


def _bench(parser: ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="?", default="pipps", choices=list(BENCHMARKS), help="benchmark to run"
    )
    parser.add_argument(
        "--points",
        type=at_least(1),
        nargs="+",
        metavar="N",
        help="pipps, pilco: numbers of data points of the GP (default: 30 150 450; 30 150 300)",
    )
    parser.add_argument(
        "--repeats",
        type=at_least(1),
        help="repeats, of which the median is taken (default: 11 for pipps and pilco, else 5)",
    )
    parser.add_argument(
        "--threads",
        type=at_least(1),
        default=None,
        help="CPU threads of PyTorch (default: PyTorch's own choice)",
    )
    parser.add_argument("--device", default="cpu", help="dreamer: cpu or cuda")
    parser.add_argument(
        "--batch", type=at_least(1), default=50, help="dreamer: sequences per batch"
    )
    parser.add_argument(
        "--length", type=at_least(2), default=50, help="dreamer: steps per sequence"
    )
    parser.add_argument(
        "--horizons",
        type=at_least(2),
        nargs="+",
        default=[15, 60],
        metavar="H",
        help="dreamer: imagination horizons",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        default=[],
        choices=MODES,
        help="dreamer: accelerated modes to time as well (default: none)",
    )
    parser.add_argument(
        "--json", type=new_file, default=None, help="also write the results to this file"
    )


def _kill_test(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--agents",
        nargs="+",
        choices=list(AGENTS),
        default=list(AGENTS),
        help="agents to test (default: all)",
    )
    parser.add_argument(
        "--kills", type=at_least(0), default=20, help="kills at random moments, per agent"
    )
    parser.add_argument(
        "--kills-in-checkpoints",
        type=at_least(0),
        default=5,
        help="kills while a checkpoint is written, per agent",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the moments")
    parser.add_argument(
        "--out",
        type=new_folder,
        default=None,
        help="folder for kill_test.json (default: not written)",
    )


def _kill_sweep(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--agent", choices=list(AGENTS), default="daappo", help="agent to train")
    add("--trials", type=at_least(1), default=12, help="runs of the sweep")
    add("--workers", type=at_least(0), default=2, help="workers of Ray to kill")
    add("--runs", type=at_least(0), default=2, help="training processes to kill")
    add("--drivers", type=at_least(0), default=1, help="kills of the sweep itself")
    add("--seed", type=seed, default=0, help="seed of the moments")
    add("--out", type=new_folder, help="folder for kill_sweep.json (default: not written)")


def _fingerprint(parser: ArgumentParser) -> None:
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--out", type=new_file, help="write the hashes to this file")
    wanted.add_argument("--compare", type=Path, help="compare with the hashes in this file")
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="only settings whose name contains this"
    )


def _soak(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--agents",
        nargs="+",
        choices=list(AGENTS),
        default=list(AGENTS),
        help="agents to train (default: all)",
    )
    parser.add_argument("--minutes", type=real(above=0), default=60, help="minutes to train for")
    parser.add_argument("--every", type=real(above=0), default=10, help="seconds between samples")
    parser.add_argument(
        "--out",
        type=new_folder,
        default=None,
        help="folder of soak.json and soak.png; results of other agents in it are kept",
    )


def _chaos(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--study", choices=["single", "double"], default="single", help="one chain or two")
    add(
        "--betas",
        nargs="+",
        type=real(above=0, most=10),
        help="grid of β_1 (default: 22 values for single, 12 for double)",
    )
    add(
        "--second-betas",
        nargs="+",
        type=real(above=0, most=10),
        help="values of β_2 for --study double (default: 1.5 2.5 3.5)",
    )
    add(
        "--estimators",
        nargs="+",
        metavar="ESTIMATOR",
        help="estimators to measure (default: all that are registered)",
    )
    add("--samples", type=at_least(3), default=1000, help="N, samples per gradient")
    add("--repeats", type=at_least(3), default=40, help="R, gradients per grid point")
    add("--horizon", type=at_least(1), default=100, help="H, steps of a rollout")
    add("--seed", type=seed, default=0, help="seed of the noise")
    add(
        "--redo",
        nargs="+",
        default=[],
        metavar="ESTIMATOR",
        help="estimators to measure again, replacing their rows",
    )
    _add_measurements(parser, "results/chaos")


def _gpu(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--minutes", type=real(above=0), default=9.0, help="minutes that all steps may take")
    add(
        "--steps",
        default=",".join(GPU_STEPS),
        metavar="NAMES",
        help="what to do, in this order, separated by commas",
    )
    add("--out", type=new_folder, default=Path("results/gpu"), help="folder of the results")
    add(
        "--resume",
        type=Path,
        default=None,
        metavar="RUN",
        help="run folder of an earlier call, whose training is continued",
    )
    add(
        "--runs",
        type=new_folder,
        default=Path("runs"),
        help="folder in which a new run's folder is created",
    )
    add("--device", default="cuda", help="cuda or cuda:INDEX; cpu is for tests")
    add("--batch", type=at_least(1), default=50, help="bench: sequences per batch")
    add("--length", type=at_least(2), default=50, help="bench: steps per sequence")
    add("--repeats", type=at_least(1), default=10, help="bench: repeats of an update")


COMMANDS: dict[str, Command] = {
    "train": Command("train", "train an agent, or resume a run"),
    "evaluate": Command(
        "evaluate", "evaluate a trained run and record a GIF of its policy", _evaluate
    ),
    "export": Command(
        "export", "write a trained policy as a .pt2 or ONNX file, and check it", _export
    ),
    "push": Command("push", "push a trained run to the Hugging Face Hub", _push),
    "zoo": Command("zoo", "run RL-Zoo's train and enjoy with our agents"),
    "doctor": Command("doctor", "check versions, rendering, GPU and disk space, and suggest fixes"),
    "diagnose": Command(
        "studies.diagnose", "compare the estimators' accuracy on a trained world model", _diagnose
    ),
    "variance": Command(
        "studies.variance", "decompose DAAPPO's variance: more actions or more states?", _variance
    ),
    "sweep": Command(
        "studies.sweep", "train estimators x seeds; write a table and learning curves", _sweep
    ),
    "plot": Command(
        "studies.plot", "draw any runs in one picture: curves, success rates, profiles", _plot
    ),
    "reproduce": Command(
        "reproduce.command",
        "reproduce a figure or table of a paper, and decide its claims",
        _reproduce,
    ),
    "study gradients": Command(
        "studies.gradients", "measure every estimator's error on 16 kinds of problems", _gradients
    ),
    "study dreamer": Command(
        "studies.dreamer", "train every gradient at every node of a Dreamer", _study_dreamer
    ),
    "study pipps-landscape": Command(
        "studies.pipps_landscape",
        "draw PIPPS's value and gradients along a line of policies",
        _pipps_landscape,
    ),
    "study pipps-particles": Command(
        "studies.pipps_particles",
        "measure PIPPS's gradient variance by number of particles",
        _pipps_particles,
    ),
    "study pipps-table": Command(
        "studies.pipps_table",
        "train PIPPS and PILCO under noise; success rates beside the paper's",
        _pipps_table,
    ),
    "peer": Command(
        "studies.peer", "train SAC, TD3 or DDPG of stable-baselines3 where our agents learn", _peer
    ),
    "chaos": Command(
        "studies.chaos", "measure every estimator's gradient variance on chaotic RNNs", _chaos
    ),
    "bench": Command("bench.pipps", "time gradients and updates against other libraries", _bench),
    "gpu": Command(
        "gpu.session", "test, time and train on a GPU within minutes; write results/gpu", _gpu
    ),
    "kill-test": Command(
        "reliability.kill_test", "kill and resume runs; compare with undisturbed ones", _kill_test
    ),
    "kill-sweep": Command(
        "reliability.kill_sweep", "kill the parts of a sweep on Ray; compare likewise", _kill_sweep
    ),
    "fingerprint": Command(
        "reliability.fingerprint",
        "hash the results of seeded runs, to compare two commits",
        _fingerprint,
    ),
    "soak": Command(
        "reliability.soak", "train for an hour and monitor memory and open files", _soak
    ),
}
