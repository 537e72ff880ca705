"""Peers of stable-baselines3 where our agents learn, and their curves beside those of a sweep."""

import json

import numpy as np
import pytest
from stable_baselines3 import SAC

from totalprop.scripts.run.environments import make_env
from totalprop.scripts.studies import peer, sweep


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What two calls with two and three seeds wrote; SAC updates after its first 100 steps."""
    path = tmp_path_factory.mktemp("peer") / "out" / "sac.json"
    command = ["sac", "--env-id", "Pendulum-v1", "--total-timesteps", "130", "--eval-every", "20"]
    command += ["--eval-episodes", "5", "--out", str(path), "--seeds"]
    peer.main([*command, "0", "1"])
    first = json.loads(path.read_text())
    peer.main([*command, "0", "1", "2"])
    return path, command, first, json.loads(path.read_text())


def test_seeds_that_are_there_are_not_trained_again(trained):
    _, _, first, second = trained
    own = second["results"]["sac"]
    assert list(own) == ["0", "1", "2"]
    assert {seed: own[seed] for seed in ("0", "1")} == first["results"]["sac"]  # seconds, too


def test_it_is_stable_baselines3_s_agent_with_its_defaults(trained):
    """The last evaluation of seed 1, by hand."""
    env = make_env("Pendulum-v1", {}, seed=None)
    agent = SAC("MlpPolicy", env, seed=1, device="cpu").learn(130)
    eval_env = make_env("Pendulum-v1", {}, seed=1100, n_envs=5)
    own = trained[3]["results"]["sac"]["1"]
    for _ in own["timesteps"]:  # the environments go on from evaluation to evaluation
        observations, returns = eval_env.reset(), np.zeros(5)
        for _ in range(200):
            observations, rewards, _, _ = eval_env.step(
                agent.predict(observations, deterministic=True)[0]
            )
            returns += rewards
    assert own["timesteps"][-1] == 130 and len(own["returns"]) == len(own["timesteps"])
    assert own["final_return"] == own["returns"][-1] == pytest.approx(returns.mean(), abs=1e-3)


@pytest.mark.parametrize("algorithm", ["td3", "ddpg"])
def test_a_peer_whose_policy_is_deterministic_explores(algorithm, tmp_path, monkeypatch):
    made, cls = [], peer.ALGORITHMS[algorithm]
    monkeypatch.setitem(
        peer.ALGORITHMS, algorithm, lambda *args, **rest: made.append(cls(*args, **rest)) or made[0]
    )
    command = [algorithm, "--env-id", "Pendulum-v1", "--total-timesteps", "120", "--seeds", "0"]
    peer.main([*command, "--eval-episodes", "2", "--out", str(tmp_path / "out.json")])
    (agent,) = made
    draws = np.array([agent.action_noise() for _ in range(1000)])
    assert draws.shape == (1000, 1) and 0.09 < draws.std() < 0.11  # 4 SE


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (["--total-timesteps", "0"], 2, "--total-timesteps must be at least 1, got 0"),
        (["--eval-every", "-1"], 2, "--eval-every must be at least 1, got -1"),
        (["--eval-episodes", "0"], 2, "--eval-episodes must be at least 1, got 0"),
        (["--seeds", "0", "-1"], 2, "--seeds must be at least 0 and below 2^32, got -1"),
        (["--env-id", "CartPole-v1"], 1, "sac needs actions in a Box; those of CartPole-v1 are"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(changes, code, message, tmp_path, capsys):
    path = tmp_path / "sac.json"
    command = ["sac", "--env-id", "Pendulum-v1", "--total-timesteps", "130", "--seeds", "0"]
    with pytest.raises(SystemExit) as left:
        peer.main([*command, "--out", str(path), *changes])
    said = capsys.readouterr().err
    assert left.value.code == code or message in str(left.value)
    assert message in said + str(left.value) and "Traceback" not in said and not path.exists()


def test_a_file_of_other_runs_is_refused(trained, capsys):
    path, command, *_ = trained
    before = path.read_text()
    with pytest.raises(SystemExit) as error:
        peer.main([*command, "3", "--total-timesteps", "140"])
    assert "holds other runs than these" in str(error.value) + capsys.readouterr().err
    assert path.read_text() == before


def test_a_sweep_shows_its_curves_beside(trained, tmp_path, monkeypatch, sweep_by_fork):
    sweep_by_fork()
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", [
        "sweep", "daappo", "--vary", "action-source", "--values", "none", "--seeds", "0", "--out",
        str(out), "--runs", str(tmp_path / "runs"), "--jobs", "1", "--beside", str(trained[0]),
        "--", "--env-id", "Pendulum-v1", "--total-timesteps", "100", "--n-steps", "50",
        "--batch-size", "50", "--eval-episodes", "2",
    ])  # fmt: skip
    sweep.main()
    table = (out / "table.md").read_text()
    assert "| `none` | 1 |" in table and "| `sac` | 3 |" in table
    record = json.loads((out / "results.json").read_text())
    assert list(record["results"]) == ["none"]  # the peer's numbers stay in its own file
    assert f"--beside {trained[0]}" in record["command"]


def test_what_holds_no_curves_is_not_shown(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"results": {"sac": {"0": {"seconds": 1}}}}')
    with pytest.raises(sweep.UserError, match="holds no returns of sac"):
        sweep._read_others([path], "return", ())


def test_results_of_one_name_do_not_replace_each_other(tmp_path):
    """Two sweeps of the same estimators have the same names."""
    paths = []
    for i, place in enumerate(("first", "second")):
        (tmp_path / place).mkdir()
        paths.append(tmp_path / place / "results.json")
        entry = {"final_return": i, "returns": [i], "timesteps": [9]}
        paths[-1].write_text(json.dumps({"results": {"rp": {"0": entry}, "tpx": {"0": entry}}}))
    found = sweep._read_others(paths, "return", ["tpx"])
    assert {name: seeds["0"]["final_return"] for name, seeds in found.items()} == {
        "rp": 0, "tpx (first)": 0, "rp (second)": 1, "tpx (second)": 1,
    }  # fmt: skip


def test_seeds_of_two_calls_at_once_are_all_kept(tmp_path, monkeypatch):
    """One finishes while the other trains; the second one is of another commit."""
    path = tmp_path / "sac.json"
    command = ["sac", "--env-id", "Pendulum-v1", "--total-timesteps", "130", "--out", str(path)]
    entry = {"final_return": 1.0, "seconds": 1.0, "timesteps": [130], "returns": [1.0]}

    def train(options, seed):
        if seed == 0:
            with monkeypatch.context() as other:
                other.setattr(peer, "current_commit", lambda: "abc")
                peer.main([*command, "--seeds", "1"])
        return entry

    monkeypatch.setattr(peer, "train", train)
    monkeypatch.setattr(peer, "current_commit", lambda: "def")
    peer.main([*command, "--seeds", "0"])
    record = json.loads(path.read_text())
    assert record["results"]["sac"] == {"1": entry, "0": entry}
    assert record["commit"] == "abc, def"
