r"""Reproduce a figure or table of a paper, and decide each of its claims.

    totalprop reproduce                            # the names, their claims, costs and verdicts
    totalprop reproduce pipps-fig3                 # minutes; others take hours, see the list
    totalprop reproduce tpx-fig3 --from results    # from measurements that are there already
    totalprop reproduce tpx-fig8 --seeds 3 4 5     # more seeds, for a narrower interval
    totalprop reproduce daa-fig3 --scale paper -- --device cuda

NAME's studies and sweeps are run one after the other, each a command of its own that is printed.
Stopped, the same command continues: finished runs are not repeated, others are resumed. --scale
small is a protocol for a small machine, --scale paper that of the paper. Flags of `totalprop train`
after -- count in all runs.

--from FOLDER takes what a folder laid out as this project's results/ holds of the same protocol,
and measures the rest; with --report-only, what is there is reported. A file of another protocol is
refused. Verdicts on a part of the measurements say "so far".

--out/NAME (NAME_paper at that scale) gets the figures as PNG and SVG, numbers.json with the numbers
behind them, verdicts.json, and table.md with the claims and the published numbers beside ours.

A claim is about one or more numbers, its parts, with 95 % intervals. It is reproduced if the
intervals of all parts (of more than half of them, where the claim is about most tasks) lie where it
says. It is not reproduced if that is contradicted: an interval lies elsewhere (half of them do), at
a level that accounts for the number of parts. All else is not decidable at this scale.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from totalprop.agents.core import figures
from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts.commands import COMMANDS, REPRODUCTIONS, parser_of
from totalprop.scripts.flag_types import split_flags
from totalprop.scripts.reproduce import many_actions, pipps, svg, tpx
from totalprop.scripts.reproduce.coverage import coverage
from totalprop.scripts.reproduce.protocol import Claim, Data, Missing, Reproduction, Scale, Step
from totalprop.scripts.reproduce.verdicts import LEVEL, Part, Verdict, decide
from totalprop.scripts.run.errors import UsageError, UserError, ending_with_a_sentence
from totalprop.scripts.run.folder import read_json
from totalprop.scripts.run.program import current_commit

T = TypeVar("T")

ENTRIES: dict[str, Reproduction] = {
    name: entry
    for module in (tpx, pipps, many_actions, svg)
    for name, entry in module.ENTRIES.items()
}
ENTRIES = {name: ENTRIES[name] for name in REPRODUCTIONS}
VERDICTS, NUMBERS = "verdicts.json", "numbers.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own, extra = split_flags(arguments)
    options = parse(own)
    with ending_with_a_sentence():
        if options.name is None or options.list:
            print(listing(options.out, [options.name] if options.name else list(ENTRIES)))
            return
        reproduce(options, extra, shlex.join(["totalprop", "reproduce", *arguments]))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; on wrong usage, exit with code 2."""
    parser = parser_of("reproduce")
    options = parser.parse_args(arguments)
    if options.source is not None and not options.source.is_dir():
        parser.error(f"--from {options.source} is no folder; results is that of a checkout")
    return options


def folder_of(out: Path, name: str, scale: str) -> Path:
    """Where a reproduction's results go."""
    return out / (name if scale == "small" else f"{name}_{scale}")


def reproduce(options: argparse.Namespace, extra: Sequence[str], command: str) -> None:
    """Run what is missing, then decide the claims and write the folder."""
    entry = ENTRIES[options.name]
    scale = entry.scales[options.scale]
    check(options, extra, scale)
    out, data = folder_of(options.out, options.name, options.scale), Data()
    missing: list[str] = []
    failed: list[str] = []
    commands = {step: command_of(step, options, scale, extra) for step in scale.steps}
    # Before anything is measured: files of another protocol are refused, and nothing is prepared
    # for a step that is there.
    files = {step.name: _file(step, words, out, options) for step, words in commands.items()}
    for step, words in commands.items():
        path, known = out / step.name / step.file, files[step.name]
        is_whole = known is not None and not _lacks(step, words, known)
        nothing_new = options.report_only and not _has_finished_runs(step, options)
        if is_whole or nothing_new or files.get(step.prepares):
            if known is not None:
                print(f"{step.name}: from {known}", flush=True)
                data[step.name] = known
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            if known not in (None, path):
                write_text(path, known.read_text())  # it is added to, and --from stays as it is
            print(f"{step.name}: totalprop {shlex.join(words)}", flush=True)
            if not _run(step, words):
                failed.append(step.name)
            if path.is_file():
                data[step.name] = path
        if not step.prepares:
            lack = _lacks(step, words, data[step.name]) if step.name in data else step.name
            missing += [lack] if lack else []
    if not data:
        raise UserError(f"nothing was measured in {out}; run without --report-only first")
    write(out, options, entry, data, command, missing)
    if failed:
        raise SystemExit(
            f"error: not all runs of {', '.join(failed)} succeeded; the report covers the others, "
            "and the same command tries them again"
        )


def check(options: argparse.Namespace, extra: Sequence[str], scale: Scale) -> None:
    """Raise a UsageError or UserError for options that would have no effect at a scale."""
    trained = [step for step in scale.steps if step.trains]
    if (extra or options.seeds) and not trained:
        what = "flags after --" if extra else "--seeds"
        raise UsageError(f"{options.name} trains nothing, so it takes no {what}")
    if options.seeds and all(step.seeds for step in trained):
        raise UsageError(f"the seeds of {options.name} are part of its protocol: leave out --seeds")
    kept = [step.committed for step in scale.steps if step.committed]
    if options.source and not any((options.source / path).is_file() for path in kept):
        raise UserError(
            f"--from {options.source} holds nothing of {options.name} at this scale, "
            + (f"such as {', '.join(kept)}" if kept else "of which no measurements are kept")
            + "; leave --from out, or name a folder that is laid out as this project's results/"
        )


def _file(step: Step, words: Sequence[str], out: Path, options: argparse.Namespace) -> Path | None:
    """The measurements of a step that are there: a whole file if there is one, or its own."""
    own, kept = out / step.name / step.file, None
    if options.source and step.committed:
        kept = options.source / step.committed
    found = [path for path in (own, kept) if path is not None and path.is_file()]
    if step.resumes and not step.trains and not options.report_only:
        found = [path for path in found if path != own]  # it may not be whole
    return min(found, key=lambda path: bool(_lacks(step, words, path)), default=None)


def _lacks(step: Step, words: Sequence[str], path: Path) -> str:
    """The runs that a file does not hold, as text; empty if it is whole."""
    if not step.trains or step.prepares:
        return ""
    found, wanted = coverage(step.command, words[len(step.command.split()) :], path)
    return f"{wanted - found} of {wanted} runs of {step.name}" if found < wanted else ""


def command_of(
    step: Step, options: argparse.Namespace, scale: Scale, extra: Sequence[str]
) -> list[str]:
    """A step's command line, after `totalprop`."""
    out = folder_of(options.out, options.name, options.scale)
    words = [word.format(out=out / step.name, runs=options.runs) for word in step.arguments]
    if step.trains:
        seeds = step.seeds or options.seeds or scale.seeds
        words += ["--seeds", *map(str, seeds), "--jobs", str(options.jobs)]
        words += ["--out", str(out / step.name), "--runs", str(_runs(step, options))]
        words += ["--report-only"] if options.report_only else []
        if flags := [*step.flags, *extra]:
            words += ["--", *flags]
    return [*step.command.split(), *words]


def _runs(step: Step, options: argparse.Namespace) -> Path:
    """The folder of the runs of a step that trains."""
    out = folder_of(options.out, options.name, options.scale)
    folder: Path = options.runs / (step.runs or f"{out.name}_{step.name}")
    return folder


def _has_finished_runs(step: Step, options: argparse.Namespace) -> bool:
    return step.trains and any(_runs(step, options).glob("*/summary.json"))


def _run(step: Step, words: Sequence[str]) -> bool:
    """Run a command in this process; whether all its runs succeeded.

    Raises:
        SystemExit: it was interrupted, or could not start.
    """
    arguments = words[len(step.command.split()) :]
    main_of = import_module(f"totalprop.scripts.{COMMANDS[step.command].module}").main
    with _named(f"totalprop {step.command}"):
        try:
            main_of(arguments)
        except SystemExit as error:
            if not isinstance(error.code, str):
                raise
            print(error.code, file=sys.stderr, flush=True)  # some runs failed, and it has reported
            return False
    return True


@contextlib.contextmanager
def _named(program: str) -> Iterator[None]:
    """Set the program name that argparse prints."""
    before, sys.argv[0] = sys.argv[0], program
    try:
        yield
    finally:
        sys.argv[0] = before


# ---------------------------------------------------------------------------- report


def judged(entry: Reproduction, data: Data) -> list[dict[str, Any]]:
    """The verdict on each claim, with its parts, as verdicts.json has them."""
    found = []
    for claim in entry.claims:
        parts = parts_of(claim, data)
        found.append({
            "key": claim.key, "claim": claim.text, "place": claim.place, "test": claim.test,
            "rule": str(claim.rule), "verdict": decide(parts, claim.rule).value,
            "parts": [
                {"what": p.what, "estimate": _json(p.estimate),
                 "interval": [_json(end) for end in p.interval(LEVEL)],
                 "agrees": claim.rule.of_interval(p.interval(LEVEL)).value}
                for p in parts
            ],
        })  # fmt: skip
    return found


def parts_of(claim: Claim, data: Data) -> Sequence[Part]:
    """The parts of a claim; none if they have not been measured."""
    try:
        return claim.parts(data)
    except Missing:
        return []


def _json(value: float) -> float | None:
    """A number of JSON, which has no infinity."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def write(
    out: Path, options: argparse.Namespace, entry: Reproduction, data: Data, command: str,
    missing: Sequence[str],
) -> None:  # fmt: skip
    """Write figures, numbers.json, verdicts.json and table.md, and print the last."""
    out.mkdir(parents=True, exist_ok=True)
    claims = judged(entry, data)
    record = {
        "name": options.name, "scale": options.scale, "command": command,
        "commit": current_commit(), "source": entry.source,
        "differs": entry.scales[options.scale].differs, "missing": list(missing), "claims": claims,
    }  # fmt: skip
    write_text(out / VERDICTS, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    numbers = [
        {"what": number.what, "published": number.published, "ours": str(ours)}
        for number in entry.numbers
        if (ours := _or_none(number.ours, data)) is not None
    ]
    raw = {
        "from": {step: str(path) for step, path in data.items()},
        "published beside ours": numbers,
        "raw": _or_none(entry.raw, data),
    }
    write_text(out / NUMBERS, json.dumps(raw, indent=1, ensure_ascii=False) + "\n")
    drawn = []
    for name, figure in entry.figures.items():
        try:
            picture = figure(data)
        except Missing:
            continue
        drawn.append(name)
        for suffix in (".png", ".svg"):
            figures.save(picture, out / f"{name}{suffix}", dpi=150)
    text = page(options.name, record, entry, numbers, drawn)
    write_text(out / "table.md", text)
    pictures = "".join(f"{name}.png, {name}.svg, " for name in drawn)
    print(f"{text}\nwritten to {out}: {pictures}{NUMBERS}, {VERDICTS}, table.md")
    if missing:
        same = "without --report-only" if options.report_only else "again"
        print(f"Next: the same command {same} measures what is missing: {', '.join(missing)}")


def _or_none(number: Callable[[Data], T], data: Data) -> T | None:
    """A number of the data, or None where they do not have it."""
    try:
        return number(data)
    except Missing:
        return None


def page(
    name: str, record: Mapping[str, Any], entry: Reproduction, numbers: Sequence[Mapping[str, str]],
    drawn: Sequence[str],
) -> str:  # fmt: skip
    """table.md."""
    title = entry.title[0].upper() + entry.title[1:]
    lines = [f"# {name}: {entry.title}", "", f"{entry.source}, at the scale `{record['scale']}`."]
    if record["differs"]:
        lines[-1] += f" Differs from the paper: {record['differs']}."
    if record["missing"]:
        lines[-1] += f" Not measured yet: {', '.join(record['missing'])}."
    lines += ["", f"`{record['command']}`, commit {record['commit']}.", ""]
    lines += [line for figure in drawn for line in (f"![{title}]({figure}.png)", "")]
    lines += ["## Claims", "", "| claim | where | verdict |", "|---|---|---|"]
    lines += [
        f"| {claim['claim']} | {claim['place']} | **{verdict}** |"
        for claim, verdict in zip(record["claims"], shown_verdicts(record).values())
    ]
    for claim in record["claims"]:
        if not claim["parts"]:
            continue
        lines += ["", f"### {claim['claim']}", "", f"{claim['verdict'].capitalize()}. "
                  f"Test: {claim['test']}.", "", "| | estimate | 95 % interval | agrees |",
                  "|---|---|---|---|"]  # fmt: skip
        for part in claim["parts"]:
            low, high = map(_shown, part["interval"])
            lines.append(
                f"| {part['what']} | {_shown(part['estimate'])} | {low} to {high} "
                f"| {AGREES[part['agrees']]} |"
            )
    if numbers:
        lines += [
            "",
            "## Published numbers, and ours",
            "",
            "| | published | ours |",
            "|---|---|---|",
        ]
        lines += [f"| {n['what']} | {n['published']} | {n['ours']} |" for n in numbers]
    return "\n".join(lines) + "\n"


AGREES = {
    Verdict.REPRODUCED.value: "yes",
    Verdict.NOT_REPRODUCED.value: "no",
    Verdict.NOT_DECIDABLE.value: "?",
}


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


# ---------------------------------------------------------------------------- list


def listing(out: Path, names: Sequence[str]) -> str:
    """The names with their claims, costs, and the verdicts that are in a folder."""
    lines = []
    for name in names:
        entry = ENTRIES[name]
        costs = ", ".join(f"{s} {_hours(own.hours)}" for s, own in entry.scales.items())
        lines += [f"{name}: {entry.title}", f"  {entry.source}; core hours: {costs}"]
        for scale in entry.scales:
            verdicts = _verdicts(folder_of(out, name, scale) / VERDICTS)
            if scale == "small" or verdicts:
                suffix = "" if scale == "small" else f" ({scale})"
                lines += [
                    f"  {verdicts.get(claim.key, Verdict.NOT_MEASURED.value)}{suffix}: {claim.text}"
                    for claim in entry.claims
                ]
        lines.append("")
    return "\n".join([*lines, f"Verdicts are those in {out}. Next: totalprop reproduce NAME"])


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:g}"


def shown_verdicts(record: Mapping[str, Any]) -> dict[str, str]:
    """Key of a claim -> its verdict as it is shown: "so far" where measurements are missing."""
    suffix = " so far" if record.get("missing") else ""
    return {
        claim["key"]: claim["verdict"]
        + (suffix if claim["verdict"] != Verdict.NOT_MEASURED.value else "")
        for claim in record["claims"]
    }


def _verdicts(path: Path) -> dict[str, str]:
    """Key of a claim -> its verdict, of a verdicts.json if it is there."""
    if not path.is_file():
        return {}
    try:
        return shown_verdicts(read_json(path))
    except (LookupError, TypeError) as error:
        raise UserError(f"{path} was not written by totalprop reproduce ({error!r})") from error


if __name__ == "__main__":
    main()
