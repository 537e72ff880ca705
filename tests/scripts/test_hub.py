"""Runs on the Hub. What the library would send is kept in a folder, which stands for the server."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from totalprop.scripts import evaluate, push
from totalprop.scripts.run.arguments import parse

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run whose observations are normalised, beside what is nobody's business."""
    monkeypatch.chdir(tmp_path)
    found = shutil.copytree(GOLDEN / "finished" / "daappo", tmp_path / "run")
    for name in ("model.zip", "vec_normalize.json"):
        shutil.copy(found / name, found / f"best_{name}")
    (found / "checkpoints").mkdir(exist_ok=True)
    (found / "events.out").write_text("not to be pushed")
    return found


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Folder of the repositories."""
    root = tmp_path / "server"

    def create_repo(self, repo_id, *, private, exist_ok):
        (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def create_commit(self, repo_id, operations, *, commit_message):
        for operation in operations:
            with operation.as_file() as file:
                (root / repo_id / operation.path_in_repo).write_bytes(file.read())
        return f"server/{repo_id}"

    def snapshot_download(repo_id, *, local_dir, allow_patterns):
        if not (root / repo_id).exists():
            raise huggingface_hub.errors.OfflineModeIsEnabled("no such repository")
        names = [path.name for path in (root / repo_id).iterdir()]
        local_dir.mkdir(parents=True, exist_ok=True)
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(root / repo_id / name, local_dir)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


def test_a_pushed_run_is_evaluated_and_repeated_from_the_hub(run, server, capsys):
    push.main([str(run), "me/pendulum"])
    names = {path.name for path in (server / "me/pendulum").iterdir()}
    assert names == {
        "config.json", "model.zip", "vec_normalize.json", "summary.json", "evaluations.json",
        "best_model.zip", "best_vec_normalize.json", "README.md",
    }  # fmt: skip

    (server / "me/pendulum" / "evil.pkl").write_text("never downloaded")
    for flags in ([], ["--best"]):
        evaluate.main(["hf://me/pendulum", "--episodes", "2", "--no-gif", *flags])
        here = capsys.readouterr().out.splitlines()[-1]
        evaluate.main([str(run), "--episodes", "2", "--no-gif", *flags])
        assert here.split(": ")[1] == capsys.readouterr().out.splitlines()[-1].split(": ")[1]
    assert {path.name for path in Path("runs/hub/me/pendulum").iterdir()} == {
        "config.json", "model.zip", "vec_normalize.json", "best_model.zip",
        "best_vec_normalize.json",
    }  # fmt: skip
    own = json.loads((run / "config.json").read_text())["arguments"]
    repeated = parse(["--config", "hf://me/pendulum", "--seed", "7"], usage="").arguments
    assert {**repeated, "seed": own["seed"]}.items() >= {
        name: tuple(value) if isinstance(value, list) else value for name, value in own.items()
    }.items()


def test_the_model_card_names_the_result_and_how_to_load(run, server):
    push.main([str(run), "me/pendulum"])
    card = huggingface_hub.ModelCard((server / "me/pendulum" / "README.md").read_text())
    (result,) = card.data.eval_results
    summary = json.loads((run / "summary.json").read_text())
    assert (result.dataset_name, result.metric_value) == ("Pendulum-v1", summary["final_return"])
    assert card.data.library_name == "totalprop" and "Pendulum-v1" in card.data.tags
    assert 'DAAPPO.load(hf_hub_download("me/pendulum", "model.zip"))' in card.text
    assert "hf://me/pendulum" in card.text and "{" not in card.text


def test_a_strangers_module_is_not_imported(run, server, capsys):
    config = json.loads((run / "config.json").read_text())
    config["env_id"] = config["options"]["env_id"] = "antigravity:Env-v0"
    shutil.copytree(run, server / "me/evil")
    (server / "me/evil" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(["hf://me/evil"])
    assert "add --import antigravity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "arguments", "sentence"),
    [
        (push.main, ["run", "pendulum"], "a repository of the Hub is ORG/NAME"),
        (push.main, ["run", "../../x"], "a repository of the Hub is ORG/NAME"),
        (push.main, ["unfinished", "me/x"], "unfinished is not finished; continue it with"),
        (evaluate.main, ["hf://me/nothing"], "cannot download hf://me/nothing: no such"),
        (evaluate.main, ["hf://../x"], "a repository of the Hub is ORG/NAME"),
    ],
)
def test_what_fails_is_one_sentence(main, arguments, sentence, run, server, capsys):
    shutil.copytree(run, "unfinished", ignore=shutil.ignore_patterns("summary.json"))
    with pytest.raises(SystemExit, match="1"):
        main(arguments)
    err = capsys.readouterr().err
    assert sentence in err and len(err.splitlines()) == 1
    assert not (server / "me/x").exists()
