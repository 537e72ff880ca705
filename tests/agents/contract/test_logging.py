"""What is logged where: keys, intervals, outputs, TensorBoard's folders."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3.common.logger import configure

from tests.agents.contract.environments import LENGTH, RETURN
from tests.agents.contract.probes import logged

PAGES = Path(__file__).parents[3] / "docs" / "agents"

KEYS = {
    "rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps", "time/total_timesteps",
    "time/time_elapsed", "train/learning_rate", "train/n_updates",
}  # fmt: skip


def test_the_keys_of_stable_baselines3_are_logged(make):
    agent = make()
    dumps = logged(agent)
    agent.learn(28)
    agent.dump_logs()
    known = {key for values, _ in dumps for key in values}
    assert known >= KEYS
    last = dumps[-2][0]
    assert last["rollout/ep_rew_mean"] == RETURN and last["rollout/ep_len_mean"] == LENGTH
    assert last["time/total_timesteps"] == dumps[-2][1] > 0
    for values, _ in dumps:
        numbers = [v for v in values.values() if isinstance(v, int | float | np.number)]
        assert np.isfinite(numbers).all()


def test_the_number_of_updates_is_printed_and_no_curve(make, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    agent = make()
    agent.set_logger(configure(str(tmp_path), ["csv", "tensorboard"]))
    agent.learn(28)
    agent.dump_logs()
    agent.logger.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    with (tmp_path / "progress.csv").open() as file:
        columns = next(csv.reader(file))
    assert "train/n_updates" in columns and "train/n_updates" not in events


def test_the_success_rate_is_logged(make):
    """The infos of the environment report `is_success` at the end of an episode."""
    agent = make()
    dumps = logged(agent)
    agent.learn(28)
    rates = [values.get("rollout/success_rate") for values, _ in dumps]
    assert rates[-1] == 0.5  # CountingEnv: every second episode


@pytest.mark.parametrize("interval", [2, 3])
def test_log_interval_counts_rollouts(make, interval):
    found = {}
    for every in (1, interval):
        agent = make()
        dumps = logged(agent)
        agent.learn(49, log_interval=every)
        found[every] = [step for _, step in dumps]
    assert found[interval] == found[1][interval - 1 :: interval]
    assert len(found[1]) >= 5


def test_without_an_interval_nothing_is_logged_until_it_is_asked_for(make):
    agent = make()
    dumps = logged(agent)
    agent.learn(21, log_interval=None)
    assert dumps == []
    agent.dump_logs()
    assert [step for _, step in dumps] == [21]


def test_logs_are_written_at_the_same_steps_however_learning_is_cut(make):
    found = []
    for budgets in ([56], [28, 28]):
        agent = make()
        dumps = logged(agent)
        for budget in budgets:
            agent.learn(budget, log_interval=3, reset_num_timesteps=False)
        found.append([step for _, step in dumps])
    assert found[0] == found[1] and found[0]


def test_verbose_says_something_and_silence_says_nothing(make, capsys):
    make(verbose=0).learn(14)
    assert capsys.readouterr().out == ""
    make(verbose=1).learn(14)
    out = capsys.readouterr().out
    assert "Using cpu device" in out and "ep_rew_mean" in out and "total_timesteps" in out


def test_every_output_format_can_be_written(make, tmp_path, capsys):
    agent = make(verbose=1)
    agent.set_logger(configure(str(tmp_path), ["stdout", "log", "csv", "json", "tensorboard"]))
    agent.learn(21)
    agent.logger.close()
    assert "ep_rew_mean" in capsys.readouterr().out
    assert "train/n_updates" in (tmp_path / "progress.csv").read_text().splitlines()[0]
    rows = [json.loads(row) for row in (tmp_path / "progress.json").read_text().splitlines()]
    assert rows[-1]["rollout/ep_rew_mean"] == RETURN
    assert "ep_len_mean" in (tmp_path / "log.txt").read_text()
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_tensorboard_has_a_folder_per_run(make, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    agent = make(tensorboard_log=str(tmp_path)).learn(14)
    name = make.cls.__name__
    agent.learn(7, reset_num_timesteps=False)
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}_1"]
    agent.learn(14)
    agent.learn(7, tb_log_name="mine")
    agent.logger.close()
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}_1", f"{name}_2", "mine_1"}
    events = event_accumulator.EventAccumulator(str(tmp_path / f"{name}_1"))
    events.Reload()
    assert "rollout/ep_rew_mean" in events.Tags()["scalars"]
    steps = [event.step for event in events.Scalars("rollout/ep_rew_mean")]
    assert steps == sorted(steps) and steps[-1] == 21


def test_without_tensorboard_no_figure_is_drawn(make):
    agent = make()
    dumps = logged(agent)
    agent.learn(28)
    assert not any(name.startswith("figures") for values, _ in dumps for name in values)


def keys_explained(page: str) -> set[str]:
    """The keys in the first column of the tables of a page."""
    cells = re.findall(
        r"^\| (`\w+/.*?) \|", (PAGES / page).read_text(encoding="utf-8"), re.MULTILINE
    )
    return {key for cell in cells for key in re.findall(r"`(\w+/\w+)`", cell)}


def is_explained(key: str, pages: set[str]) -> bool:
    """Capital letters in a page's key stand for numbers, as in k/step_XX."""
    return any(re.fullmatch(re.sub(r"[A-Z]+", r"\\d+", known), key) for known in pages)


def test_every_logged_key_is_explained_on_the_page_of_the_agent(make, tmp_path):
    agent = make(tensorboard_log=str(tmp_path))
    dumps = logged(agent)
    agent.learn(49)
    found = {key for values, _ in dumps for key in values}
    known = keys_explained("index.md") | keys_explained(f"{make.name}.md")
    assert {key for key in found if not is_explained(key, known)} == set()


def test_keys_that_nothing_logs_are_not_explained():
    root = PAGES.parents[1]
    folders = ("agents", "world_models")
    source = "".join(p.read_text() for f in folders for p in sorted((root / f).rglob("*.py")))
    source += "time/iterations"  # by stable-baselines3's PPO
    for page in sorted(PAGES.glob("*.md")):
        for key in keys_explained(page.name):
            last = re.split(r"_?[A-Z]", key.split("/")[1])[0].removeprefix("node_")
            assert re.search(rf"\b{last.removesuffix('_gradient_norm')}", source), (page.name, key)
    assert is_explained("k/step_07", {"k/step_XX"}) and not is_explained("k/step_x", {"k/step_XX"})
