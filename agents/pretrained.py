"""A trained world model for a fresh policy. Parmas et al. 2023 (TPX), App. C.3."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stable_baselines3.common.save_util import load_from_zip_file
from torch import Tensor

if TYPE_CHECKING:
    from world_models.latent_model import LatentModel

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
    where = f"pretrained_world_model='{path}'"
    if not file.exists():
        raise ValueError(f"{where}: {file} does not exist; give a run folder or a saved DreamerTPX")
    try:
        # load_data=False: that part of SB3's format is pickled.
        _, parameters, _ = load_from_zip_file(file, load_data=False)
        policy: dict[str, Tensor] = parameters["policy"]  # type: ignore[assignment]
    except Exception as error:
        raise ValueError(f"{where}: {file} is not a saved DreamerTPX ({error})") from error
    saved = {k.removeprefix(PREFIX): v for k, v in policy.items() if k.startswith(PREFIX)}
    ours = model.state_dict()
    for name in sorted(saved.keys() ^ ours.keys()):
        side = "the file has" if name in saved else "only this agent has"
        raise ValueError(
            f"{where}: {side} '{name}'; use the environment, preset and policy_kwargs of that run"
        )
    for name, value in ours.items():
        if saved[name].shape != value.shape:
            raise ValueError(
                f"{where}: '{name}' is {list(saved[name].shape)} there and {list(value.shape)} "
                "here; use the environment, preset and policy_kwargs of that run"
            )
    model.load_state_dict(saved)
