"""Push a trained run to the Hugging Face Hub, from where one flag loads it.

totalprop push runs/pipps_CartPoleSwingUp-v0_tpx_seed0 me/swing-up     # after: hf auth login
totalprop evaluate hf://me/swing-up

It uploads the model (JSON and safetensors, no pickles), config.json, the statistics of
VecNormalize, the evaluations, the learning curve and the GIF, and a model card. It needs the extra
`hub`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from totalprop.agents import AGENTS
from totalprop.agents.core.validation import is_finite
from totalprop.agents.persistence.safe_file import in_one_line
from totalprop.scripts.commands import parser_of
from totalprop.scripts.run import hub
from totalprop.scripts.run.environments import import_flag
from totalprop.scripts.run.errors import UserError, ending_with_a_sentence
from totalprop.scripts.run.folder import RunFolder, read_json

CARD = """\
# {name} on {env_id}

An agent of totalprop, of the preset {preset} at commit {commit}. Mean {quantity} of the last
evaluation: {mean:.2f} ± {std:.2f}.
{picture}
```bash
totalprop evaluate hf://{repo_id}{flag}
totalprop train --config hf://{repo_id}{flag}    # the same settings again
```

```python
from huggingface_hub import hf_hub_download
from totalprop import {name}

model = {name}.load(hf_hub_download("{repo_id}", "model.zip"))
```

`model.zip` holds JSON and safetensors: loading it executes nothing. `config.json` holds every
setting.{normalised}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = parser_of("push").parse_args(arguments)
    with ending_with_a_sentence():
        push(options)


def push(options: argparse.Namespace) -> None:
    """Upload the files of a finished run, and its model card, in one commit."""
    repo_id = hub.check_name(options.repo_id)
    library = hub.library()
    folder = RunFolder.open(options.run, imports=options.imports)
    env_id = folder.read_config()["env_id"]
    if not (folder.summary.exists() and folder.model.exists()):
        raise UserError(
            f"{folder.path} is not finished; continue it with totalprop train --resume "
            f"{folder.quoted}{import_flag(env_id)}"
        )
    files = [folder.path / name for name in (*hub.READ, *hub.SHOWN)]
    files = [path for path in files if path.exists()]
    contents: dict[str, Any] = {path.name: path for path in files}
    contents["README.md"] = card(folder, repo_id).encode()
    operations = [library.CommitOperationAdd(name, content) for name, content in contents.items()]
    api = library.HfApi()
    try:
        api.create_repo(repo_id, private=options.private, exist_ok=True)
        url = api.create_commit(
            repo_id, operations, commit_message=f"Push {folder.path.resolve().name}"
        )
    except Exception as error:  # of the network, in classes of several libraries
        status = getattr(getattr(error, "response", None), "status_code", None)
        log_in = "log in first: hf auth login"
        remedy = log_in if status in (401, 403) else f"check the network; if it is there, {log_in}"
        raise UserError(f"cannot push to {repo_id}: {in_one_line(error)}; {remedy}") from error
    print(
        f"{', '.join(contents)}: {url}\n"
        f"Next: totalprop evaluate {hub.PREFIX}{repo_id}{import_flag(env_id)}"
    )


def card(folder: RunFolder, repo_id: str) -> str:
    """The model card: Markdown after a block of YAML that the Hub reads."""
    library = hub.library()
    config, summary = folder.read_config(), read_json(folder.summary)
    entry, env_id = AGENTS[config["agent"]], config["env_id"]
    name, quantity = entry.cls.__name__, entry.quantity
    mean: Any = summary.get(f"final_{quantity}")
    std: Any = summary.get(f"final_{quantity}_std")
    if not (is_finite(mean) and is_finite(std)):
        raise UserError(f"{folder.summary} lacks final_{quantity} and final_{quantity}_std")
    data = library.ModelCardData(
        library_name="totalprop",
        tags=["reinforcement-learning", "deep-reinforcement-learning", env_id],
        model_name=name,
        eval_results=[
            library.EvalResult(
                task_type="reinforcement-learning", dataset_type=env_id, dataset_name=env_id,
                metric_type="mean_reward", metric_value=-mean if quantity == "cost" else mean,
            )
        ],
    )  # fmt: skip
    text = CARD.format(
        name=name, env_id=env_id, quantity=quantity, mean=mean, std=std, repo_id=repo_id,
        preset=config.get("preset") or "(none)", commit=config.get("commit", "unknown"),
        flag=import_flag(env_id),
        picture="\n![One episode](rollout.gif)\n" if folder.video.exists() else "",
        normalised=(
            " Observations are normalised by `vec_normalize.json`." * folder.vec_normalize.exists()
        ),
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


if __name__ == "__main__":
    main()
