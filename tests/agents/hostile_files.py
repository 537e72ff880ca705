"""Makes broken, foreign and hostile model files from a good one: name -> (path, expected words).

python -m tests.agents.hostile_files FOLDER writes them all, to be tried on other loaders.
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

import envs  # noqa: F401
from agents import PIPPS

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
    made: dict[str, tuple[Path, str]] = {}

    def add(name: str, words: str, write: Callable[[Path], object]) -> None:
        path = folder / f"{name}.zip"
        write(path)
        made[name] = path, words

    content = good.read_bytes()
    damaged = "truncated or corrupted"
    add("empty", damaged, lambda p: p.write_bytes(b""))
    add("text", damaged, lambda p: p.write_text("no model"))
    for share in (1, 10, 25, 50, 75, 90, 99):
        end = len(content) * share // 100
        add(f"truncated_{share}", damaged, lambda p, end=end: p.write_bytes(content[:end]))
    for share in (5, 30, 60, 90):
        add(f"flipped_{share}", ".", lambda p, s=share: p.write_bytes(_flipped(content, s)))
    add("appended_pickle", ".", lambda p: p.write_bytes(pickle.dumps(Payload(proof)) + content[9:]))
    add("pickle", damaged, lambda p: p.write_bytes(pickle.dumps(Payload(proof))))
    add("torch", "pickles|members", lambda p: torch.save({"a": Payload(proof)}, p))
    PPO("MlpPolicy", "Pendulum-v1", n_steps=8, device="cpu").save(folder / "sb3")
    made["stable_baselines3"] = folder / "sb3.zip", "holds pickles.*stable-baselines3"

    def members(**contents: bytes) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            with zipfile.ZipFile(path, "w") as file:
                for name, data in contents.items():
                    file.writestr(name, data)

        return write

    bomb = {"data": b" " * 2**27, "tensors.safetensors": b""}
    add("no_members", "its members are", members())
    add("other_members", "its members are", members(readme=b"hello"))
    add("one_more_member", "its members are", members(**bomb | {"data": b"{}"}, more=b""))
    traversal = {"../../escape": b"x", "data": b"{}", "tensors.safetensors": b""}
    add("path_traversal", "its members are", members(**traversal))
    add("absolute_path", "its members are", members(**{"/tmp/escape": b"x"}))
    add("pickled_member", "holds pickles", members(**{"policy.pth": pickle.dumps(Payload(proof))}))
    add("big_document", "more than any model needs", members(**bomb))
    add("zip_bomb", "compressed", _zip_bomb)
    add("duplicate_members", "its members are", _duplicate)

    document, tensors = take_apart(good)

    def changed(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> Any:
        def write(path: Path) -> None:
            d, t = json.loads(json.dumps(document)), {k: v.clone() for k, v in tensors.items()}
            change(d, t)
            put_together(path, d, t)

        return write

    def attribute(name: str, value: Any) -> Any:
        return changed(lambda d, t: d["values"]["attributes"].__setitem__(name, value))

    def parameter(d: dict[str, Any], key: str) -> str:
        return d["values"]["parameters"]["policy"][key]["$tensor"]

    key = next(iter(document["values"]["parameters"]["policy"]))
    for name, text in {
        "json_list": "[]", "json_number": "3", "json_null": "null", "json_cut": '{"format": 2',
        "json_deep": "[" * 100_000, "json_objects_deep": '{"a":' * 50_000,
        "json_digits": '{"format": ' + "9" * 5000 + "}", "json_not_utf8": "\udcff",
    }.items():  # fmt: skip
        data = text.encode(errors="surrogateescape")
        add(name, ".", members(**{"data": data, "tensors.safetensors": content[:8]}))
    add("no_format", "names no format", changed(lambda d, t: d.pop("format")))
    add("newer_format", "upgrade totalprop", changed(lambda d, t: d.update(format=999)))
    add("format_0", "unknown format", changed(lambda d, t: d.update(format=0)))
    add("format_text", "names no format", changed(lambda d, t: d.update(format="2")))
    add(
        "other_agent", "holds a DreamerTPX", changed(lambda d, t: d.update(kind="DreamerTPX model"))
    )
    add("no_values", damaged, changed(lambda d, t: d.pop("values")))
    add("values_list", damaged, changed(lambda d, t: d.update(values=[])))
    add("no_parameters", "no attributes or no", changed(lambda d, t: d["values"].pop("parameters")))
    for name, value, words in (
        ("unknown_tag", {"$exec": "os.system"}, "unknown '.exec'"),
        ("class_os", {"$class": "os.system"}, "not known here"),
        ("class_builtin", {"$class": "builtins.eval"}, "not known here"),
        ("class_no_policy", {"$class": "torch.nn.ReLU"}, "not a policy"),
        ("tag_twice", {"$tensor": "0", "$class": "x"}, damaged),
        ("tensor_unknown", {"$tensor": "9999"}, damaged),
        ("tensor_list", {"$tensor": ["0"]}, damaged),
        ("number_object", {"$number": ["O", 1]}, "."),
        ("estimator_unknown", {"$estimator": ["no", ["score"], "none", False]}, "."),
        ("estimator_short", {"$estimator": ["tpx"]}, damaged),
        ("deque_text", {"$deque": [], "maxlen": "x"}, damaged),
        ("items_bad", {"$items": [[1]]}, damaged),
        ("items_unhashable", {"$items": [[[], 1]]}, damaged),
        ("device_bad", {"$device": "quantum"}, damaged),
        ("missing", {"$missing": "a.UserPolicy"}, "pass it again"),
        ("null", None, "not a policy"),
    ):
        add(f"policy_class_{name}", words, attribute("policy_class", value))
    add("attribute_unknown", "unknown attributes: __class__", attribute("__class__", "x"))
    add("attribute_method", "unknown attributes: predict", attribute("predict", "x"))
    add("attribute_type", "n_particles", attribute("n_particles", "many"))
    add("attribute_range", "horizon", attribute("horizon", -3))
    add("attribute_estimator", "estimator", attribute("estimator", "os.system"))
    huge = {"n_centres": 10**13}
    add("huge_network", "cannot load", attribute("policy_kwargs", huge))
    add("kwargs_unknown", "cannot load", attribute("policy_kwargs", {"command": "rm"}))
    add(
        "no_space",
        "cannot load",
        changed(lambda d, t: d["values"]["attributes"].pop("action_space")),
    )
    box = document["values"]["attributes"]["observation_space"]["$box"]
    add("space_type", "cannot load", attribute("observation_space", {"$box": [*box[:2], "|O"]}))
    add("space_text", "cannot load", attribute("observation_space", "Box"))

    def tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def apply(d: dict[str, Any], t: dict[str, torch.Tensor]) -> None:
            t[parameter(d, key)] = change(t[parameter(d, key)])

        return changed(apply)

    add("nan_weights", "NaN or infinity", tensor(lambda x: x * torch.nan))
    add("infinite_weights", "NaN or infinity", tensor(lambda x: x + torch.inf))
    add("single_precision", "float32 in the file", tensor(lambda x: x.float()))
    add("integers", "int64 in the file", tensor(lambda x: x.long()))
    add("other_shape", "in the file", tensor(lambda x: torch.zeros(3, 3, 3).double()))
    add("parameter_lacking", "the file lacks", changed(
        lambda d, t: d["values"]["parameters"]["policy"].pop(key)
    ))  # fmt: skip
    add("parameter_more", "the file has", changed(
        lambda d, t: d["values"]["parameters"]["policy"].update(more={"$tensor": "0"})
    ))  # fmt: skip
    add("module_more", "expected", changed(
        lambda d, t: d["values"]["parameters"].update(env={"a": {"$tensor": "0"}})
    ))  # fmt: skip
    add("state_text", "no state dict", changed(
        lambda d, t: d["values"]["parameters"].update(policy="x")
    ))  # fmt: skip
    plain = safetensors.torch.save(tensors)
    size = struct.unpack("<Q", plain[:8])[0]
    for name, data in {
        "tensors_empty": b"", "tensors_cut": plain[: len(plain) // 2],
        "tensors_header_huge": struct.pack("<Q", 2**62) + plain[8:],
        "tensors_header_short": struct.pack("<Q", size - 7) + plain[8:],
        "tensors_overlap": _overlapping(), "tensors_pickle": pickle.dumps(Payload(proof)),
    }.items():  # fmt: skip
        add(name, damaged, lambda p, data=data: put_together(p, document, data))
    return made


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
