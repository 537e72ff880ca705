"""The hashes of seeded runs: equal for equal runs, and no bit of a run can change unseen."""

import json
import random
from collections import deque

import numpy as np
import pytest
import torch

from totalprop.scripts.reliability import fingerprint as script
from totalprop.scripts.reliability.fingerprint import FORMAT, SETTINGS, differences, fingerprint


def leaves(value):
    return dict(script._leaves(value, "x"))


def changed(before, after):
    return {k for k in {*before, *after} if before.get(k) != after.get(k)}


def test_a_run_ends_in_the_same_bits_and_another_seed_in_others():
    before, again = (fingerprint(SETTINGS["daappo resumed"]) for _ in range(2))
    assert before == again
    other = fingerprint(script.Resumed(lambda: reseeded(SETTINGS["daappo resumed"].make())))
    differing = changed(before, other)
    assert {"generators.torch", "generators.numpy.1", "generators.python"} < differing
    moments = {k for k in before if k.startswith("file.parameters.") and k.endswith(".exp_avg")}
    assert moments
    assert moments < differing


def reseeded(agent):
    agent.set_random_seed(4)
    return agent


def test_all_that_can_change_is_hashed():
    found = fingerprint(SETTINGS["dreamer disk"])
    for name in (
        "file.attributes.gamma", "file.parameters._update.actor_optimizer.state.0.exp_avg",
        "training.rng.state.state", "log.train/model_loss", "generators.python",
        "generators.numpy.1", "generators.numpy.2",  # its keys, and its position in them
        "segments.replay0_000000000000_000000000091.zip.action",
    ):  # fmt: skip
        assert name in found
    assert {found[k] for k in found if "time/" in k} == {"varies"}


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1)])
def test_one_more_draw_from_a_global_generator_is_seen(draw):
    class Run(script.Run):
        def __call__(self, log, folder):
            agent = super().__call__(log, folder)
            draw()
            return agent

    make = SETTINGS["daappo none"]
    differing = changed(fingerprint(make), fingerprint(Run(make)))
    assert differing
    assert all(name.startswith("generators.") for name in differing)


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16)),
        (np.zeros(2, np.float32), np.zeros(2, np.int32)),
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (np.arange(2000.0), np.arange(2000.0) + (np.arange(2000) == 1000)),
        (0.1, 0.1 + 1e-16),
        ((1, 2), (1, 3)),
        (None, 0),
    ],
)
def test_type_shape_and_every_bit_are_in_the_hash(value, other):
    assert script._hash(value) == script._hash(value)
    assert script._hash(value) != script._hash(other)


def test_every_entry_of_a_container_has_its_path():
    tensor, array = torch.ones(1), np.ones(1)
    assert leaves({"a": {"b": [tensor, {"c": 1}]}, "d": deque([{"e": array}])}) == {
        "x.a.b.0": tensor, "x.a.b.1.c": 1, "x.d.0.e": array,
    }  # fmt: skip
    assert leaves({"a": {}, "b": (1, (2.0, None))}) == {"x.a": {}, "x.b": (1, (2.0, None))}


def file(**runs):
    return {"format": FORMAT, "machine": "this one", "runs": runs}


def test_differences_are_told_in_a_few_lines():
    before = {f"k{i:02d}": "0" for i in range(30)}
    assert differences(file(a=before), file(a=before)) == []
    after = {**dict.fromkeys(before, "1"), "new": "0"}
    del after["k29"]
    assert differences(file(a=before, b={}), file(a=after)) == [
        "a, differ: k00, k01, k02, k03, k04 and 24 more",
        "a, only before: k29",
        "a, only after: new",
        "b: only before",
    ]
    elsewhere = {**file(a=after), "machine": "another"}
    assert differences(file(a=before), elsewhere)[-1] == "before: this one; after: another"


def test_the_command_writes_and_compares(tmp_path, capsys):
    path = tmp_path / "before.json"
    script.main(["--out", str(path), "--only", "daappo none"])
    with pytest.raises(SystemExit, match="0"):
        script.main(["--compare", str(path), "--only", "daappo none"])
    assert "1 runs end in the same bits" in capsys.readouterr().out
    values = json.loads(path.read_text())
    values["runs"]["daappo none"]["generators.python"] = "another"
    path.write_text(json.dumps(values))
    with pytest.raises(SystemExit, match="1"):
        script.main(["--compare", str(path), "--only", "daappo none"])
    assert "daappo none, differ: generators.python\n" in capsys.readouterr().out


def test_a_file_of_another_format_is_told_in_one_sentence(tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"pipps rp": {"parameters .policy": "0"}}))
    with pytest.raises(SystemExit, match="2"):
        script.main(["--compare", str(path)])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert f"has format 1 and this is format {FORMAT}" in printed.err


def test_an_unknown_setting_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(["--out", "no.json", "--only", "pips"])
    assert "no setting contains 'pips'" in capsys.readouterr().err
