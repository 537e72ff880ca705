"""Write the tables of the preset `recommended` from the raw numbers beside this file.

python results/dreamer/tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).parent
REPEATS = {
    "cartpole-swingup": 4, "walker-walk": 2, "cheetah-run": 4, "pendulum-swingup": 4,
    "cartpole-balance": 4, "reacher-easy": 4, "finger-spin": 2,
}  # fmt: skip
ENTROPY_SCALES = {"0.002": "recommended", "0.0005": "recommended_little_entropy"}
# On these tasks seeds from 100 on chose settings: of the preset; of the preset with 0.0005.
CHOSEN_ON = {
    "0.002": {*REPEATS} - {"finger-spin"},
    "0.0005": {*REPEATS} - {"finger-spin", "reacher-easy"},
}


def read(path: Path, name: str) -> dict[str, dict[str, Any]]:
    """The runs of an estimator or a peer, by seed in order."""
    runs = json.loads(path.read_text(encoding="utf-8"))["results"][name]
    return dict(sorted(runs.items(), key=lambda entry: int(entry[0])))


def rows() -> list[dict[str, str]]:
    """One row for each task and entropy scale that has runs; values by column."""
    published = json.loads((HERE / "published.json").read_text(encoding="utf-8"))["states"]
    found = []
    for task, repeat in REPEATS.items():
        for scale, folder in ENTROPY_SCALES.items():
            runs = read(HERE / folder / task / "results.json", "tpx")
            returns = [run["returns"] for run in runs.values()]
            last_fifths = [of_seed[len(of_seed) * 4 // 5 :] for of_seed in returns]
            sac = read(HERE / "recommended" / task / "sac.json", "sac")
            found.append({
                "task": task,
                "link": f"[{task}]({folder}/{task}/table.md)"
                + ("" if task in CHOSEN_ON[scale] else " *"),
                "action repeat": str(repeat),
                "`entropy_scale`": scale,
                "seeds": ", ".join(runs),
                "after 100,000 frames": joined(of_seed[-1] for of_seed in returns),
                "best evaluation": joined(map(max, returns)),
                "worst of the last fifth": joined(map(min, last_fifths)),
                "SAC here": joined(run["returns"][-1] for run in sac.values()),
                "published": joined(map(fmean, published[task].values())),
            })  # fmt: skip
    return found


def joined(numbers: Any) -> str:
    """Rounded, with commas."""
    return ", ".join(f"{number:.0f}" for number in numbers)


# Of each document: the table's header, the keys of its columns, and the entropy scales shown.
TABLES = {
    HERE.parents[1] / "README.md": (
        "| task | DreamerTPX | stable-baselines3's SAC | published: TD-MPC2, SAC, DreamerV3 |",
        ("task", "after 100,000 frames", "SAC here", "published"),
        {"0.002"},
    ),
    HERE / "README.md": (
        "| task | action repeat | `entropy_scale` | seeds | after 100,000 frames | best evaluation "
        "| worst of the last fifth | SAC here, by seed | published: TD-MPC2, SAC, DreamerV3 |",
        ("link", "action repeat", "`entropy_scale`", "seeds", "after 100,000 frames",
         "best evaluation", "worst of the last fifth", "SAC here", "published"),
        {*ENTROPY_SCALES},
    ),
    HERE.parents[1] / "docs" / "results.md": (
        "| task | `entropy_scale` | after 100,000 frames | worst of the last fifth "
        "| SB3's SAC here | published: TD-MPC2, SAC, DreamerV3 |",
        ("task", "`entropy_scale`", "after 100,000 frames", "worst of the last fifth", "SAC here",
         "published"),
        {*ENTROPY_SCALES},
    ),
}  # fmt: skip


def updated(document: Path) -> str:
    """The document's text with the table as the raw numbers have it."""
    header, columns, scales = TABLES[document]
    before, _, rest = document.read_text(encoding="utf-8").partition(header + "\n")
    rule, _, rest = rest.partition("\n")
    _, _, after = rest.partition("\n\n")
    shown = [row for row in rows() if row["`entropy_scale`"] in scales]
    table = ["| " + " | ".join(row[column] for column in columns) + " |" for row in shown]
    return "\n".join((before + header, rule, *table)) + "\n\n" + after


if __name__ == "__main__":
    for document in TABLES:
        document.write_text(updated(document), encoding="utf-8")
        print(f"written: {document}")
