"""`totalprop export`: files that other programs run, and that act as the agent does."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from totalprop.agents import DAAPPO, DreamerTPX
from totalprop.agents.dreamer.deployment import RecurrentDeployed
from totalprop.scripts import export

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def run(tmp_path):
    """A finished run of DAAPPO, whose observations are normalised."""
    return shutil.copytree(GOLDEN / "finished" / "daappo", tmp_path / "run")


def test_both_files_act_as_the_agent_does(run, capsys):
    export.main([str(run), "--steps", "30"])
    out = capsys.readouterr().out
    assert "observation [n, 3] float32 -> action [n, 1] float32" in out
    assert out.count("largest difference") == 2

    statistics = export.statistics_of(export.RunFolder(run), export.RunFolder(run).read_config())
    env = export.normalise_like(export.make_env("Pendulum-v1", {}, seed=0), statistics)
    seen = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    agent = DAAPPO.load(run / "model.zip", device="cpu")
    expected, _ = agent.predict(env.normalize_obs(seen), deterministic=True)
    program = torch.export.load(run / "policy.pt2").module()
    np.testing.assert_allclose(program(torch.as_tensor(seen)).detach(), expected, atol=1e-6)
    session = onnxruntime.InferenceSession(run / "policy.onnx")
    (found,) = session.run(["action"], {"observation": seen})
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_recurrent_policy_on_a_dictionary_with_an_image():
    agent = DreamerTPX.load(GOLDEN / "models" / "dreamer_dict.zip", device="cpu")
    module = RecurrentDeployed(agent.policy, agent.observation_space)
    program = export.trace(module)
    calls = [
        export.call_of_pt2(export.to_pt2(program)),
        export.call_of_onnx(export.to_onnx(program, module)),
    ]
    states = [[part.numpy() for part in module.initial_state(2)]] * 2
    memory, is_first = None, np.ones(2, dtype=bool)
    for _ in range(5):
        seen = {name: part.numpy().copy() for name, part in module.example(2).items()}
        seen["camera"] += np.random.default_rng(0).integers(99, size=(2, 20, 24), dtype=np.uint8)
        expected, memory = agent.predict(seen, memory, is_first, deterministic=True)
        for i, call in enumerate(calls):
            action, *states[i] = call((seen, *states[i], is_first))
            np.testing.assert_allclose(action, expected, atol=1e-5)
        is_first = np.array([False, True])


def test_a_file_that_acts_otherwise_is_not_written(run, monkeypatch, capsys):
    class Another(export.Deployed):
        def forward(self, observation):
            return super().forward(observation) + 0.01

    entry = dataclasses.replace(export.AGENTS["daappo"], deployed=Another)
    monkeypatch.setattr(export, "AGENTS", {"daappo": entry})
    with pytest.raises(SystemExit, match="1"):
        export.main([str(run), "--pt2", "--steps", "5"])
    assert "was not written: its actions differ" in capsys.readouterr().err
    assert not (run / "policy.pt2").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--pt2", "policy.zip"], "must be a file name that ends in .pt2"),
        (["--pt2", "nowhere/policy.pt2"], "nowhere is not a folder"),
        (["--onnx"], "install 'totalprop[export]', or pass --pt2 alone"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(run, flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(SystemExit, match="1"):
        export.main([str(run), *flags])
    err = capsys.readouterr().err
    assert sentence in err and len(err.splitlines()) == 1
