"""Load the world model of an earlier run. Parmas et al. 2023 (TPX), App. C.3."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from totalprop.agents.core.file_contents import check_state
from totalprop.agents.persistence import safe_file

if TYPE_CHECKING:
    from totalprop.world_models.latent.model import LatentModel

PREFIX = "model."  # of the world model's entries in the policy's state dict
OPTIONAL = "discount_head."  # of entries that only one of the two models may have


def load_world_model(model: LatentModel, path: str | Path) -> None:
    """Copy the world model of a saved DreamerTPX into `model`; nothing in the file is executed.

    The discount head is optional: without one in the file, that of `model` remains as it is.

    Args:
        model: receives the weights.
        path: file that `DreamerTPX.save` wrote, or a folder with one named model.zip.

    Raises:
        ValueError: the file does not exist, is not a saved DreamerTPX, or has networks of other
            sizes.
    """
    path = Path(path)
    file = path / "model.zip" if path.is_dir() else path
    if not file.exists() and not file.suffix:
        file = file.with_suffix(".zip")  # as `save` and `load` do
    where = f"pretrained_world_model='{path}'"
    if not file.exists():
        raise ValueError(f"{where}: {file} does not exist; pass a run folder or a saved DreamerTPX")
    try:
        parameters = safe_file.read(file, "DreamerTPX model")["parameters"]
        policy: dict[str, Tensor] = parameters["policy"]
    except (safe_file.BadFileError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {file} is not a saved DreamerTPX ({error})") from error
    saved = {k.removeprefix(PREFIX): v for k, v in policy.items() if k.startswith(PREFIX)}
    own = {k: v for k, v in model.state_dict().items() if k.startswith(OPTIONAL)}
    if not (own and any(k.startswith(OPTIONAL) for k in saved)):
        saved = {k: v for k, v in saved.items() if not k.startswith(OPTIONAL)} | own
    try:
        check_state("world model", model, saved)
    except ValueError as error:
        raise ValueError(
            f"{where}: {error}; use the environment, preset and policy_kwargs of that run"
        ) from error
    model.load_state_dict(saved)
