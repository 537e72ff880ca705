"""Runs on the Hugging Face Hub, where hf://ORG/NAME stands for a run's folder."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from totalprop.agents.persistence.safe_file import in_one_line
from totalprop.scripts.run.errors import UserError

PREFIX = "hf://"
READ = (  # what commands need of a run
    "config.json", "model.zip", "vec_normalize.json", "best_model.zip", "best_vec_normalize.json",
)  # fmt: skip
SHOWN = ("summary.json", "evaluations.json", "learning_curve.png", "rollout.gif")
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def local(run: str, root: Path = Path("runs/hub")) -> Path:
    """The folder of a run; of hf://ORG/NAME, its files are downloaded to root/ORG/NAME first.

    Nothing but the files in READ is downloaded, and nothing in them is executed.

    Raises:
        UserError: there is no such run, or it cannot be downloaded.
    """
    if not run.startswith(PREFIX):
        return Path(run)
    repo_id = check_name(run.removeprefix(PREFIX))
    hub, folder = library(), root / repo_id
    try:
        hub.snapshot_download(repo_id, local_dir=folder, allow_patterns=[*READ])
    except Exception as error:  # of the network, in classes of several libraries
        raise UserError(f"cannot download {run}: {in_one_line(error)}") from error
    return folder


def check_name(repo_id: str) -> str:
    """The name itself, which becomes a path.

    Raises:
        UserError: it is not ORG/NAME.
    """
    if not _NAME.fullmatch(repo_id):
        raise UserError(
            f"a repository of the Hub is ORG/NAME, for example me/swing-up: '{repo_id}'"
        )
    return repo_id


def library() -> ModuleType:
    """huggingface_hub.

    Raises:
        UserError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            "the Hugging Face Hub needs huggingface_hub: pip install 'totalprop[hub]'"
        ) from None
    return huggingface_hub
