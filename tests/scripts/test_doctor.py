"""`totalprop doctor`: one line per check, a fix if one fails, and no check stops the report."""

import pytest

from totalprop.scripts import doctor


def test_a_healthy_machine(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--runs", str(tmp_path / "not" / "yet")])
    output = capsys.readouterr().out
    assert stop.value.code == 0 and "BAD" not in output
    assert "everything needed for training is available" in output
    for part in ("Python 3", "torch ", "GB free", "is writable", "cores"):
        assert part in output


@pytest.mark.parametrize(
    ("versions", "state", "words"),
    [
        ({"mujoco": "4.0.1"}, "BAD", "known not to work with mujoco 4.0.1"),
        ({"mujoco": None}, "note", "dmc/ tasks are unavailable"),
        ({"torch": None}, "BAD", "torch is missing"),
        ({}, "ok", "dm_control 1, mujoco 3.17.0"),
    ],
)
def test_packages_that_do_not_fit(versions, state, words):
    known = {"mujoco": "3.17.0", **versions}
    findings = doctor.packages(lambda name: known.get(name, "1"))
    (finding,) = [f for f in findings if words in f.what]
    assert finding.state == state and bool(finding.remedy) == (state != "ok")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--runs", str(tmp_path)])
    output = capsys.readouterr().out
    assert stop.value.code == 1 and "Read-only file system" in output and "--runs" in output


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ENOUGH_DISK", 2**70)
    assert [finding.state for finding in doctor.disk(tmp_path)] == ["BAD", "BAD"]


def test_a_wrong_backend_is_named(monkeypatch):
    pytest.importorskip("dm_control")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr("totalprop.envs.mujoco_backend.choose_backend", lambda: "egl")
    monkeypatch.setattr("totalprop.envs.mujoco_backend.check_rendering", lambda: None)
    monkeypatch.setattr("totalprop.envs.mujoco_backend.draws", lambda backend: False)
    (finding,) = doctor.rendering()
    assert finding.state == "BAD" and "unset MUJOCO_GL" in finding.remedy


@pytest.mark.parametrize("is_there", [True, False])
def test_pictures_that_need_pygame_are_noted(is_there, monkeypatch):
    monkeypatch.setattr(doctor, "_has", lambda name: name != "pygame" or is_there)
    states = [finding.state for finding in doctor.pictures()]
    assert states == (["ok"] if is_there else ["ok", "note"])


def test_a_check_that_fails_is_a_finding(monkeypatch, tmp_path):
    def broken():
        raise RuntimeError("boom\nboom")

    monkeypatch.setattr(doctor, "gpu", broken)
    (finding,) = [f for f in doctor.examine(tmp_path) if "boom" in f.what]
    assert finding.state == "BAD" and "\n" not in finding.what
