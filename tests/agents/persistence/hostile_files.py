"""Makes broken, foreign and hostile model files from a good one: name -> (path, expected words).

`python -m tests.agents.persistence.hostile_files FOLDER` writes all, to be tried on other loaders.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import safetensors.torch
import torch
from stable_baselines3 import PPO

import totalprop.envs  # noqa: F401
from totalprop.agents import PIPPS

DAMAGED = "truncated or corrupted"
Parts = tuple[dict[str, Any], dict[str, torch.Tensor]]


class Payload:
    """Unpickled, it writes a file: the proof that code was executed."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.proof, "owned")


def good_agent() -> PIPPS:
    """A small trained agent."""
    env = gym.make("totalprop/CartPoleSwingUp-v0")
    settings = {"n_particles": 6, "gradient_steps": 1, "gp_evaluations": 3, "seed": 0}
    agent = PIPPS("RBFPolicy", env, policy_kwargs={"n_centres": 4}, device="cpu", **settings)
    return agent.learn(60)


def take_apart(path: Path) -> Parts:
    """(document, tensors) of a file."""
    with zipfile.ZipFile(path) as file:
        tensors = safetensors.torch.load(file.read("tensors.safetensors"))
        return json.loads(file.read("data")), tensors


def put_together(path: Path, document: Any, tensors: dict[str, torch.Tensor] | bytes) -> None:
    """A file of these parts, whatever they are."""
    content = tensors if isinstance(tensors, bytes) else safetensors.torch.save(tensors)
    text = document if isinstance(document, str) else json.dumps(document)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data", text)
        file.writestr("tensors.safetensors", content)


def make_all(good: Path, folder: Path, proof: Path) -> dict[str, tuple[Path, str]]:
    """Write every file; the words are a regular expression that the error has to match."""
    maker = _Maker(good, folder, proof)
    maker.bytes_()
    maker.members()
    maker.documents()
    maker.attributes()
    maker.weights()
    maker.meanings()
    maker.sizes()
    return maker.made


class _Maker:
    """What is changed in the good file, from the outside in.

    Args:
        proof: where the payload of the pickles would write.
    """

    def __init__(self, good: Path, folder: Path, proof: Path) -> None:
        self.folder, self.proof = folder, proof
        self.pickled = pickle.dumps(Payload(proof))
        self.content = good.read_bytes()
        self.document, self.tensors = take_apart(good)
        self.key = next(iter(self.document["values"]["parameters"]["policy"]))
        self.made: dict[str, tuple[Path, str]] = {}

    def add(self, name: str, words: str, write: Callable[[Path], object]) -> None:
        """One file."""
        path = self.folder / f"{name}.zip"
        write(path)
        self.made[name] = path, words

    def changed(self, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> Any:
        """Writes the good file after a change of its document or tensors."""

        def write(path: Path) -> None:
            document = json.loads(json.dumps(self.document))
            tensors = {name: value.clone() for name, value in self.tensors.items()}
            change(document, tensors)
            put_together(path, document, tensors)

        return write

    def attribute(self, name: str, value: Any) -> Any:
        """Writes it with another attribute of the agent."""
        return self.changed(lambda d, t: d["values"]["attributes"].__setitem__(name, value))

    def tensor(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """Writes it with another first parameter of the policy."""

        def apply(d: dict[str, Any], t: dict[str, torch.Tensor]) -> None:
            name = d["values"]["parameters"]["policy"][self.key]["$tensor"]
            t[name] = change(t[name])

        return self.changed(apply)

    def bytes_(self) -> None:
        """Damaged and foreign files, and pickles."""
        content = self.content
        self.add("empty", DAMAGED, lambda p: p.write_bytes(b""))
        self.add("text", DAMAGED, lambda p: p.write_text("no model"))
        for share in (1, 10, 25, 50, 75, 90, 99):
            end = len(content) * share // 100
            self.add(f"truncated_{share}", DAMAGED, lambda p, end=end: p.write_bytes(content[:end]))
        for share in (5, 30, 60, 90):
            self.add(
                f"flipped_{share}", ".", lambda p, s=share: p.write_bytes(_flipped(content, s))
            )
        self.add(
            "appended_pickle",
            ".",
            lambda p: p.write_bytes(self.pickled + content[9:]),
        )
        self.add("pickle", DAMAGED, lambda p: p.write_bytes(self.pickled))
        self.add("torch", "pickles|members", lambda p: torch.save({"a": Payload(self.proof)}, p))
        PPO("MlpPolicy", "Pendulum-v1", n_steps=8, device="cpu").save(self.folder / "sb3")
        self.made["stable_baselines3"] = self.folder / "sb3.zip", "holds pickles.*stable-baselines3"

    def members(self) -> None:
        """Broken zip containers."""
        bomb = {"data": b" " * 2**27, "tensors.safetensors": b""}
        self.add("no_members", "its members are", _members())
        self.add("other_members", "its members are", _members(readme=b"hello"))
        self.add("one_more_member", "its members are", _members(**bomb | {"data": b"{}"}, more=b""))
        traversal = {"../../escape": b"x", "data": b"{}", "tensors.safetensors": b""}
        self.add("path_traversal", "its members are", _members(**traversal))
        self.add("absolute_path", "its members are", _members(**{"/tmp/escape": b"x"}))
        self.add(
            "pickled_member",
            "holds pickles",
            _members(**{"policy.pth": self.pickled}),
        )
        self.add("big_document", "more than any model needs", _members(**bomb))
        self.add("zip_bomb", "compressed", _zip_bomb)
        self.add("duplicate_members", "its members are", _duplicate)

    def documents(self) -> None:
        """Broken JSON documents."""
        for name, text in {
            "json_list": "[]", "json_number": "3", "json_null": "null", "json_cut": '{"format": 2',
            "json_deep": "[" * 100_000, "json_objects_deep": '{"a":' * 50_000,
            "json_digits": '{"format": ' + "9" * 5000 + "}", "json_not_utf8": "\udcff",
        }.items():  # fmt: skip
            data = text.encode(errors="surrogateescape")
            self.add(name, ".", _members(**{"data": data, "tensors.safetensors": self.content[:8]}))
        self.add("no_format", "names no format", self.changed(lambda d, t: d.pop("format")))
        self.add(
            "newer_format", "upgrade totalprop", self.changed(lambda d, t: d.update(format=999))
        )
        self.add("format_0", "unknown format", self.changed(lambda d, t: d.update(format=0)))
        self.add("format_text", "names no format", self.changed(lambda d, t: d.update(format="2")))
        self.add(
            "other_agent",
            "holds a DreamerTPX",
            self.changed(lambda d, t: d.update(kind="DreamerTPX model")),
        )
        self.add("no_values", DAMAGED, self.changed(lambda d, t: d.pop("values")))
        self.add("values_list", DAMAGED, self.changed(lambda d, t: d.update(values=[])))
        self.add(
            "no_parameters",
            "no attributes or no",
            self.changed(lambda d, t: d["values"].pop("parameters")),
        )

    def attributes(self) -> None:
        """Broken attributes of the agent."""
        for name, value, words in (
            ("unknown_tag", {"$exec": "os.system"}, "unknown '.exec'"),
            ("class_os", {"$class": "os.system"}, "not known here"),
            ("class_builtin", {"$class": "builtins.eval"}, "not known here"),
            ("class_no_policy", {"$class": "torch.nn.ReLU"}, "not a policy"),
            ("tag_twice", {"$tensor": "0", "$class": "x"}, DAMAGED),
            ("tensor_unknown", {"$tensor": "9999"}, DAMAGED),
            ("tensor_list", {"$tensor": ["0"]}, DAMAGED),
            ("number_object", {"$number": ["O", 1]}, "."),
            ("estimator_unknown", {"$estimator": ["no", ["score"], "none", False]}, "."),
            ("estimator_short", {"$estimator": ["tpx"]}, DAMAGED),
            ("deque_text", {"$deque": [], "maxlen": "x"}, DAMAGED),
            ("items_bad", {"$items": [[1]]}, DAMAGED),
            ("items_unhashable", {"$items": [[[], 1]]}, DAMAGED),
            ("device_bad", {"$device": "quantum"}, DAMAGED),
            ("missing", {"$missing": "a.UserPolicy"}, "pass it again"),
            ("null", None, "not a policy"),
        ):
            self.add(f"policy_class_{name}", words, self.attribute("policy_class", value))
        self.add(
            "attribute_unknown", "unknown attributes: __class__", self.attribute("__class__", "x")
        )
        self.add("attribute_method", "unknown attributes: predict", self.attribute("predict", "x"))
        self.add("attribute_type", "n_particles", self.attribute("n_particles", "many"))
        self.add("attribute_range", "horizon", self.attribute("horizon", -3))
        self.add("attribute_estimator", "estimator", self.attribute("estimator", "os.system"))
        huge = {"n_centres": 10**13}
        self.add("huge_network", "cannot load", self.attribute("policy_kwargs", huge))
        self.add(
            "kwargs_unknown", "cannot load", self.attribute("policy_kwargs", {"command": "rm"})
        )
        self.add(
            "no_space",
            "cannot load",
            self.changed(lambda d, t: d["values"]["attributes"].pop("action_space")),
        )
        box = self.document["values"]["attributes"]["observation_space"]["$box"]
        self.add(
            "space_type",
            "cannot load",
            self.attribute("observation_space", {"$box": [*box[:2], "|O"]}),
        )
        self.add("space_text", "cannot load", self.attribute("observation_space", "Box"))

    def weights(self) -> None:
        """Broken parameters, and a broken file of tensors."""
        self.add("nan_weights", "NaN or infinity", self.tensor(lambda x: x * torch.nan))
        self.add("infinite_weights", "NaN or infinity", self.tensor(lambda x: x + torch.inf))
        self.add("single_precision", "float32 in the file", self.tensor(lambda x: x.float()))
        self.add("integers", "int64 in the file", self.tensor(lambda x: x.long()))
        self.add("other_shape", "in the file", self.tensor(lambda x: torch.zeros(3, 3, 3).double()))
        self.add("parameter_lacking", "the file lacks", self.changed(
            lambda d, t: d["values"]["parameters"]["policy"].pop(self.key)
        ))  # fmt: skip
        self.add("parameter_more", "the file has", self.changed(
            lambda d, t: d["values"]["parameters"]["policy"].update(more=_one_more(t))
        ))  # fmt: skip
        self.add("module_more", "expected", self.changed(
            lambda d, t: d["values"]["parameters"].update(env={"a": _one_more(t)})
        ))  # fmt: skip
        self.add("state_text", "not a state dict", self.changed(
            lambda d, t: d["values"]["parameters"].update(policy="x")
        ))  # fmt: skip
        plain = safetensors.torch.save(self.tensors)
        size = struct.unpack("<Q", plain[:8])[0]
        for name, data in {
            "tensors_empty": b"", "tensors_cut": plain[: len(plain) // 2],
            "tensors_header_huge": struct.pack("<Q", 2**62) + plain[8:],
            "tensors_header_short": struct.pack("<Q", size - 7) + plain[8:],
            "tensors_overlap": _overlapping(), "tensors_pickle": self.pickled,
        }.items():  # fmt: skip
            self.add(name, DAMAGED, lambda p, data=data: put_together(p, self.document, data))

    def meanings(self) -> None:
        """Values of the right type that no agent has."""
        ten = {"$number": ["<i8", 10]}
        for name, value, words in (
            ("num_timesteps", "x", "num_timesteps must be at least 0"),
            ("num_timesteps", -1, "num_timesteps must be at least 0"),
            ("seed", "x", "seed must be a whole number"),
            ("verbose", [1], "verbose must be a whole number"),
            ("angle_dims", {"$tuple": ["x"]}, "angle_dims must be a tuple"),
            ("momentum", float("nan"), "momentum must be"),
            ("noise_multiplier", 2**70, "noise_multiplier must be at most"),
            ("learning_rate", {"$linear": [0.1, -0.1, 1.0]}, "learning_rate must be a schedule"),
            ("learning_rate", {"$linear": [0.1, 0.0, 0.0]}, "linear schedule"),
            ("ep_info_buffer", {"$deque": [{"r": "x", "l": 1}], "maxlen": 9}, "ep_info_buffer"),
            ("ep_success_buffer", None, "only one of ep_info_buffer"),
            ("_start_observations", [ten], "_start_observations"),
            ("_last_obs", [1.0], "_last_obs is not one observation"),
            ("n_envs", 3, "_last_obs is not one observation of each of 3"),
            ("_last_episode_starts", None, "_last_episode_starts"),
            ("_current_progress_remaining", None, "_current_progress_remaining"),
            ("policy_kwargs", [4], "policy_kwargs must be a dict"),
            ("action_space", {"$box": [0, 1, "<f4"]}, "a Box without bounds"),
        ):
            number = len(self.made)
            self.add(f"meaning_{number}_{name}", words, self.attribute(name, value))
        for name in ("inputs", "targets"):
            self.add(f"gp_{name}_shorter", "inputs and targets in 'dynamics' differ in length",
                     self.changed(lambda d, t, name=name: _halve(d, t, name)))  # fmt: skip

    def sizes(self) -> None:
        """Small files of what would be large agents."""
        twice = {key: {"$tensor": "0"} for key in ("a", "b")}
        self.add("tensor_used_twice", "used twice", self.attribute("policy_kwargs", twice))
        legs = ["tpx", ["score"] * 40, "none", False]
        self.add("many_legs", "40 legs", self.attribute("estimator", {"$estimator": legs}))
        width = {"n_centres": 10**8}
        self.add("wide_network", "larger than those it holds",
                 self.attribute("policy_kwargs", width))  # fmt: skip
        text = '{"format": 2, "kind": "PIPPS model", "values": [' + "{}," * (10**7) + "{}]}"
        self.add("many_values", "values, more than", _members(
            **{"data": text.encode(), "tensors.safetensors": self.content[:8]}
        ))  # fmt: skip
        self.add("void_number", "not a number",
                 self.attribute("seed", {"$number": ["|V1000000000", 1]}))  # fmt: skip


def _halve(document: dict[str, Any], tensors: dict[str, torch.Tensor], name: str) -> None:
    """Half of the GP's data of one kind."""
    key = document["values"]["parameters"]["dynamics"][name]["$tensor"]
    tensors[key] = tensors[key][: len(tensors[key]) // 2].clone()


def _one_more(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Adds a tensor, and refers to it."""
    tensors["more"] = torch.zeros(1)
    return {"$tensor": "more"}


def _members(**contents: bytes) -> Callable[[Path], None]:
    """Writes a zip of these members."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name, data in contents.items():
                file.writestr(name, data)

    return write


def _flipped(content: bytes, share: int) -> bytes:
    place = len(content) * share // 100
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def _zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("data", "tensors.safetensors"):
            with file.open(name, "w") as member:
                for _ in range(64):
                    member.write(bytes(2**20))


def _duplicate(path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in ("data", "datA", "tensors.safetensors"):
            file.writestr(name, "{}")
    path.write_bytes(buffer.getvalue().replace(b"datA", b"data"))


def _overlapping() -> bytes:
    entry = {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}
    header = json.dumps({"0": entry, "1": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(8)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    good_agent().save(target / "good.zip")
    files = make_all(target / "good.zip", target, target / "owned")
    print(f"{len(files)} files in {target}")
