"""A trained world model for a fresh policy. Parmas et al. 2023 (TPX), App. C.3."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from totalprop.agents.core.algorithm import check_state
from totalprop.agents.persistence import safe_file

if TYPE_CHECKING:
    from totalprop.world_models.latent.model import LatentModel

PREFIX = "model."  # of the world model's weights among the policy's


def load_world_model(model: LatentModel, path: str | Path) -> None:
    """Copy the world model of a saved DreamerTPX into this one; nothing of the file is executed.

    Args:
        path: a file of `DreamerTPX.save`, or a folder that holds it as model.zip.
    Raises:
        ValueError: no such file, not a DreamerTPX, or networks of other sizes.
    """
    path = Path(path)
    file = path / "model.zip" if path.is_dir() else path
    if not file.exists() and not file.suffix:
        file = file.with_suffix(".zip")  # as `save` and `load`
    where = f"pretrained_world_model='{path}'"
    if not file.exists():
        raise ValueError(f"{where}: {file} does not exist; give a run folder or a saved DreamerTPX")
    try:
        parameters = safe_file.read(file, "DreamerTPX model")["parameters"]
        policy: dict[str, Tensor] = parameters["policy"]
    except (safe_file.BadFileError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {file} is not a saved DreamerTPX ({error})") from error
    saved = {k.removeprefix(PREFIX): v for k, v in policy.items() if k.startswith(PREFIX)}
    try:
        check_state("world model", model, saved)
    except ValueError as error:
        raise ValueError(
            f"{where}: {error}; use the environment, preset and policy_kwargs of that run"
        ) from error
    model.load_state_dict(saved)
