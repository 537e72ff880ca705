"""The page on a folder of results of `totalprop gpu`, made from the JSON files in it."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from totalprop.scripts.commands import GPU_STEPS

_TEST = re.compile(r"^(\S*::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b")


def test_results(lines: Sequence[str]) -> dict[str, Any]:
    """Count pytest's verdicts in its verbose output, which a stopped process leaves, too."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    wrong = []
    for line in lines:
        if (match := _TEST.match(line)) is None:
            continue
        name, verdict = match.groups()
        key = {"PASSED": "passed", "SKIPPED": "skipped"}.get(verdict, "failed")
        counts[key] += 1
        if key == "failed":
            wrong.append(name)
    collected = re.search(r"(\d+)(?:/\d+)? tests? collected", "\n".join(lines))
    return {**counts, "failures": wrong} | ({"collected": int(collected[1])} if collected else {})


def summary(folder: Path) -> str:
    """The text of README.md."""
    found = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in GPU_STEPS
        if (path := folder / f"{name}.json").exists()
    }
    parts = {"tests": _tests, "bench": _bench, "train": _train}
    lines = [
        "# What a GPU showed",
        "",
        "Written by `make gpu`; the raw numbers are in the JSON files.",
    ]
    for name, record in found.items():
        lines += ["", f"## {name.capitalize()}", "", _device(record), ""]
        if record["status"] == "stopped":
            lines += ["Stopped when its share of the time was up; what was measured is below.", ""]
        if record["status"] == "failed":
            lines += [
                f"Failed with exit code {record.get('exit_code', 1)}:",
                "",
                "```",
                *record.get("output", [])[-8:],
                "```",
                "",
            ]
        lines += parts[name](record, folder)
    return "\n".join(lines).rstrip("\n") + "\n"


def _device(record: dict[str, Any]) -> str:
    device = record["device"]
    own = [device["name"]]
    if "memory_gib" in device:
        own += [f"{device['memory_gib']:g} GiB", f"driver {device['driver']}"]
    own += [f"PyTorch {device['torch']}", f"Python {device['python']}", f"{device['cores']} cores"]
    own += [f"commit {device['commit']}", device["date"], f"{record['seconds']:.0f} s"]
    return ", ".join(own)


def _tests(record: dict[str, Any], folder: Path) -> list[str]:
    if "collected" in record and not record["passed"] + record["failed"]:
        return [f"{record['collected']} tests collected, none run."]
    line = "{passed} passed, {failed} failed, {skipped} skipped.".format(**record)
    return [line, *(f"- `{name}`" for name in record["failures"])]


def _bench(record: dict[str, Any], folder: Path) -> list[str]:
    if "updates" not in record:
        return []
    peaks = ", ".join(f"{name} {rate:.4g}" for name, rate in record["peak_tflops"].items())
    lines = [
        f"One update of DreamerV1's sizes on {record['batch']} sequences of {record['length']} "
        f"images, medians of {record['repeats']}. Each row was timed in turns with the eager "
        f"update. The peak is that of a large matrix product, measured here: {peaks} TFLOP/s.",
        "",
        "| update | seconds | x eager | TFLOP/s | % of the peak | peak memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in record["updates"].items():
        cells = [name, f"{row['seconds']:.4g}", f"{row['times_eager']:.2f}", "", "", ""]
        if "tflops" in row:
            cells[3:5] = [f"{row['tflops']:.3g}", f"{100 * row['share_of_peak']:.2g}"]
        if row.get("peak_memory_gb") is not None:
            cells[5] = f"{row['peak_memory_gb']:.2f}"
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, *(f"\nLeft out: {reason}" for reason in record["left_out"])]


def _train(record: dict[str, Any], folder: Path) -> list[str]:
    if "env_id" not in record:
        return [record.get("note", "")]
    facts = [f"{record['decisions']} decisions"]
    for key, text in (
        ("updates", "{} updates"),
        ("updates_per_second", "{:.3g} updates/s"),
        ("fps", "{:.3g} decisions/s in all"),
    ):
        if key in record:
            facts.append(text.format(record[key]))
    task = f"`{record['preset']}` on `{record['env_id']}` {record['env_args']}"
    lines = [f"{task}: {', '.join(facts)}."]
    if returns := record.get("final_returns"):
        spread = statistics.pstdev(returns)
        lines.append(
            f"Return at the end: {statistics.mean(returns):.1f} ± {spread:.1f} over "
            f"{len(returns)} episodes."
        )
    if table := record.get("evaluations"):
        means = [statistics.mean(row) for row in table["returns"]]
        lines += ["", "| decisions | " + " | ".join(map(str, table["decisions"])) + " |"]
        lines += ["|---" * (len(means) + 1) + "|"]
        lines += ["| mean return | " + " | ".join(f"{mean:.0f}" for mean in means) + " |"]
    for name, text in (
        ("learning_curve.png", "Learning curve"),
        ("open_loop.gif", "Truth, open-loop prediction after 5 steps, error"),
        ("open_loop.png", "Open-loop prediction"),
    ):
        if (folder / name).exists():
            lines += ["", f"![{text}]({name})"]
    return [*lines, "", "```bash", f"{_shell(record['command'])}", "```"]


def _shell(command: Sequence[str]) -> str:
    return " ".join(word if re.fullmatch(r"[\w./=:,-]+", word) else repr(word) for word in command)
