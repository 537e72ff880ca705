"""Files without code: a zip of one JSON document and one safetensors member.

A file holds plain values, arrays, tensors, spaces and names of registered classes. Reading builds
nothing else, so a file from an untrusted source cannot execute code, and it takes memory in
proportion to the file's size: members are stored, no tensor is used twice, and the JSON has a bound
on its values. Writing is atomic: it replaces the file completely or not at all. What the values
mean is up to the caller.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from gymnasium import spaces
from safetensors import SafetensorError
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import Tensor, nn

import totalprop.estimators as estimators
from totalprop.estimators import Estimator

FORMAT = 2  # 1 was stable-baselines3's, with pickles
DOCUMENT, TENSORS = "data", "tensors.safetensors"  # "data" as in stable-baselines3's files
NOTE = "system_info.txt"  # likewise; for people, never read
MAX_DOCUMENT_BYTES = 2**25
MAX_VALUES = 2**20  # in the JSON; each takes about 100 bytes of memory
MAX_HEADER_BYTES = 2**24  # of the tensors' names, dtypes and shapes
MAX_DEPTH = 64
MAX_LEGS = 3  # of an estimator: the cost of mixing them grows exponentially

# Classes that a file may name. Reading looks names up here and imports nothing.
_CLASSES: dict[str, type] = {
    f"torch.nn.{kind.__name__}": kind
    for kind in (nn.ReLU, nn.Tanh, nn.ELU, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Sigmoid, nn.Softplus,
                 nn.Mish, nn.SELU, nn.Identity)
} | {
    f"torch.optim.{kind.__name__}": kind
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD)
} | {
    f"stable_baselines3.{kind.__name__}": kind
    for kind in (FlattenExtractor, NatureCNN, CombinedExtractor)
}  # fmt: skip
_FORMER_NAMES: dict[str, type] = {}  # names that older files use
_LEGS: dict[Any, str] = {leg: name for name, leg in estimators.legs.LEGS.items()}
_BASELINES: dict[Any, str] = {
    getattr(estimators.baselines, name): name
    for name in ("none", "mean", "leave_one_out", "critic")
}


# What values of a wrong type or size raise where they are used.
UNREADABLE = (
    ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError,
    RuntimeError, MemoryError,
)  # fmt: skip


class NotInFile:
    """Stands for a value that files cannot hold, such as a function or a user's own object."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"NotInFile({self.kind!r})"


class BadFileError(ValueError):
    """The file is not what was expected; the message says what is wrong with it."""


def register_class(kind: type) -> type:
    """Allow files to name a class. They store only its name; reading looks the class up.

    The name is the class's attribute `file_name`, which does not change when the class moves to
    another module, or by default its module and qualified name. The attribute `former_file_names`
    lists names that older files use.
    """
    own = vars(kind)  # `getattr` would give a subclass its parent's name
    _CLASSES[own.get("file_name", f"{kind.__module__}.{kind.__qualname__}")] = kind
    _FORMER_NAMES.update(dict.fromkeys(own.get("former_file_names", ()), kind))
    return kind


def write(
    target: Path | IO[bytes], kind: str, values: Mapping[str, Any], *, note: str = ""
) -> None:
    """Write values under string keys; a path is replaced atomically and durably.

    Args:
        target: path or open binary file.
        kind: what the file is; `read` compares it.
        values: what the file holds.

    Raises:
        ValueError: there are more values than `read` takes.
    """
    tensors: dict[str, Tensor] = {}
    content = {"format": FORMAT, "kind": kind, "values": _encode(dict(values), tensors)}
    document = json.dumps(content, indent=1).encode()
    if excess := _excess(document):  # an older file of this name can be read, so keep it
        raise ValueError(f"cannot write {target}: {excess}")
    if not isinstance(target, Path):
        _write_zip(target, document, tensors, note)
        return
    with atomic_write(target) as file:
        _write_zip(file, document, tensors, note)


class atomic_write:
    """`with atomic_write(path) as file:` replaces a file completely or, on an error, not at all.

    It writes a temporary file in the same folder, then calls fsync, renames it, and calls fsync on
    the folder. A link is replaced, its target left alone. A device or a pipe cannot be replaced; it
    is written to.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.is_replaced = path.is_file() or path.is_dir() or not path.exists()

    def __enter__(self) -> IO[bytes]:
        if not self.is_replaced:
            self.file = open(self.path, "wb")
            return self.file
        # A killed process may have left a file of this name; a stranger, a link to another one.
        self.temporary.unlink(missing_ok=True)
        self.file = open(self.temporary, "xb")
        return self.file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self.is_replaced:
            self.file.close()
            return
        try:
            with self.file:
                if kind is None:
                    self.file.flush()
                    os.fsync(self.file.fileno())
            if kind is None:
                os.replace(self.temporary, self.path)
                sync_folder(self.path.parent)
        finally:
            self.temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, if the operating system supports it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_regular(path: Path) -> None:
    """Raise BadFileError for a pipe, a device or a folder: reading one might never end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise BadFileError(f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file")


def read(source: Path | IO[bytes], kind: str | None = None) -> dict[str, Any]:
    """Read what `write` wrote; tensors are on the CPU.

    Args:
        source: path or open binary file.
        kind: what the file has to be; None accepts any kind.

    Raises:
        BadFileError: the file is truncated, corrupted, foreign, hostile, in a newer format or of
            another kind.
        OSError: the file cannot be read; FileNotFoundError if it does not exist.
    """
    if isinstance(source, Path):
        check_regular(source)
    try:
        with zipfile.ZipFile(source) as file:
            document, tensors = _read_zip(file)
            if kind is not None and document.get("kind") != kind:
                raise BadFileError(f"it holds a {document.get('kind')}, not a {kind}")
            values = _decode(document["values"], tensors, 0)
    except BadFileError:
        raise
    except (
        zipfile.BadZipFile, zipfile.LargeZipFile, SafetensorError, EOFError, *UNREADABLE,
    ) as error:  # fmt: skip
        raise BadFileError(
            f"it is truncated or corrupted ({type(error).__name__}: {in_one_line(error, 150)})"
        ) from error
    if not isinstance(values, dict):
        raise BadFileError("it is truncated or corrupted (no values)")
    return values


_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlevel = 60, 60, 2


def shown(value: object) -> str:
    """A value in a message, which stays short."""
    return _SHORT.repr(value)


def in_one_line(error: Exception, limit: int | None = None) -> str:
    """What an error says, cut, or its type if it says nothing; for messages of one line."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def _write_zip(target: IO[bytes], document: bytes, tensors: dict[str, Tensor], note: str) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as file:
        file.writestr(DOCUMENT, document)
        file.writestr(TENSORS, safetensors.torch.save(tensors))
        if note:
            file.writestr(NOTE, note)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is not a file, not JSON, or holds more values than any of ours.
        OSError: it cannot be read.
    """
    check_regular(path)
    if (size := path.stat().st_size) > MAX_DOCUMENT_BYTES:
        raise BadFileError(f"it takes {size:,} bytes, more than any of ours")
    return parse_json(path.read_bytes())


def parse_json(document: bytes) -> Any:
    """The value of a JSON document; BadFileError, a ValueError, if it would take much memory."""
    if excess := _excess(document):
        raise BadFileError(excess)
    try:
        return json.loads(document)
    except RecursionError as error:
        raise BadFileError("its JSON is nested too deep") from error


def _excess(document: bytes) -> str:
    """What a JSON document has too much of; "" if nothing. Parsing it would show that too late."""
    if len(document) > MAX_DOCUMENT_BYTES:
        return f"its JSON takes {len(document):,} bytes, more than any model needs"
    values = sum(document.count(mark) for mark in (b",", b"[", b"{"))  # those in strings count, too
    if values > MAX_VALUES:
        return f"its JSON has about {values:,} values, more than any model needs"
    return ""


def _read_zip(file: zipfile.ZipFile) -> tuple[dict[str, Any], dict[str, Tensor]]:
    members = file.infolist()
    names = [member.filename for member in members]
    if any(name.endswith((".pth", ".pkl", ".pickle")) for name in names):
        raise BadFileError(
            "it holds pickles, which can execute code: it was written by stable-baselines3, or by "
            "totalprop before format 2 (up to commit edf8eef); load it with what wrote it and "
            "save it again"
        )
    if sorted(names) not in (sorted((DOCUMENT, TENSORS)), sorted((DOCUMENT, TENSORS, NOTE))):
        shown = ", ".join(map(repr, names[:5]))
        raise BadFileError(f"its members are {shown}; expected '{DOCUMENT}' and '{TENSORS}'")
    # Only stored members: a compressed one could unpack to any size.
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise BadFileError("its members are compressed, which this project never writes")
    sizes = dict(zip(names, (member.file_size for member in members), strict=True))
    if sizes[DOCUMENT] > MAX_DOCUMENT_BYTES:
        raise BadFileError(f"its JSON takes {sizes[DOCUMENT]:,} bytes, more than any model needs")
    if any(m.file_size != m.compress_size for m in members):
        raise BadFileError("it is truncated or corrupted (sizes disagree)")
    document = parse_json(file.read(DOCUMENT))
    if not isinstance(document, dict) or not isinstance(document.get("format"), int):
        raise BadFileError("it is not a file of this project (its JSON names no format)")
    if document["format"] > FORMAT:
        raise BadFileError(
            f"it has format {document['format']}, this version reads up to {FORMAT}: upgrade "
            "totalprop"
        )
    if document["format"] < FORMAT:
        raise BadFileError(f"it has the unknown format {document['format']}")
    content = file.read(TENSORS)
    if int.from_bytes(content[:8], "little") > min(MAX_HEADER_BYTES, len(content)):
        raise BadFileError("it is truncated or corrupted (the header of its tensors is too long)")
    return document, safetensors.torch.load(content)


# --------------------------------------------------------------------------------------------
# values <-> JSON; values that JSON cannot express become {"$tag": ...}
# --------------------------------------------------------------------------------------------


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    def keep(tensor: Tensor) -> str:
        name = str(len(tensors))
        tensors[name] = tensor.detach().cpu().contiguous().clone()
        return name

    if value is None or (isinstance(value, bool | int | float | str) and _is_builtin(value)):
        return value
    if isinstance(value, Tensor):
        return {"$tensor": keep(value)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        # from_numpy needs positive strides and native byte order
        return {"$array": keep(torch.from_numpy(np.array(value, value.dtype.newbyteorder("="))))}
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return {"$number": [value.dtype.str, value.item()]}
    if isinstance(value, list):
        return [_encode(entry, tensors) for entry in value]
    if isinstance(value, tuple):
        return {"$tuple": [_encode(entry, tensors) for entry in value]}
    if isinstance(value, deque):
        return {"$deque": [_encode(entry, tensors) for entry in value], "maxlen": value.maxlen}
    if isinstance(value, spaces.Space):
        return _encode_space(value, tensors)
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(entry, tensors) for key, entry in value.items()}
        return {"$items": [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    if isinstance(value, type):
        known = {kind: name for name, kind in _CLASSES.items()}
        return {"$class": known[value]} if value in known else _missing(value)
    if isinstance(value, Estimator):
        return _encode_estimator(value)
    if isinstance(value, FloatSchedule | ConstantSchedule | LinearSchedule):
        return _encode_schedule(value)
    return _missing(value)


def _is_builtin(value: object) -> bool:
    return type(value) in (bool, int, float, str)


def is_held(value: object) -> bool:
    """Whether files hold a value as itself; otherwise it is a `NotInFile` after reading."""
    encoded = _encode(value, {})
    return not (isinstance(encoded, dict) and "$missing" in encoded)


def not_held(value: object, place: str, *, read: bool = False) -> Iterator[tuple[str, str]]:
    """The parts that files do not hold: where they are, such as name['key'][0], and their kind.

    Args:
        value: of any kind, with dictionaries, lists and tuples of others.
        place: what it is called.
        read: whether the value is from a file.
    """
    if isinstance(value, dict):
        for key, part in value.items():
            yield from not_held(part, f"{place}[{key!r}]", read=read)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from not_held(part, f"{place}[{i}]", read=read)
    elif isinstance(value, NotInFile) if read else not is_held(value):
        kind = value.kind if isinstance(value, NotInFile) else _kind(value)
        yield place, kind.removeprefix("builtins.")


def agrees(value: object, read: object) -> bool:
    """Whether a value is what was read from a file, but for the parts that files do not hold."""
    if isinstance(read, NotInFile):
        return True
    if isinstance(read, dict) and isinstance(value, dict):
        return read.keys() == value.keys() and all(agrees(value[k], read[k]) for k in read)
    if isinstance(read, list | tuple) and type(value) is type(read):
        return len(read) == len(value) and all(map(agrees, value, read))
    return value == read


def _kind(value: object) -> str:
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _missing(value: object) -> dict[str, str]:
    return {"$missing": _kind(value)}


def _encode_estimator(value: Estimator) -> Any:
    """Encode an estimator by the names of its parts; it is missing if one is not registered."""
    parts = [_LEGS.get(leg) for leg in value.legs], _BASELINES.get(value.baseline)
    for name in estimators.names():
        plain = estimators.make(name)
        if replace(plain, legs=value.legs, baseline=value.baseline, cross_fit=value.cross_fit) == (
            value
        ):
            if None in parts[0] or parts[1] is None:
                return _missing(value)
            return {"$estimator": [name, *parts, value.cross_fit]}
    return _missing(value)


def _decode_estimator(content: list[Any]) -> Estimator:
    name, leg_names, baseline, cross_fit = content
    if not 1 <= len(leg_names) <= MAX_LEGS:
        raise BadFileError(f"its estimator has {len(leg_names)} legs; expected 1 to {MAX_LEGS}")
    by_name = {text: part for part, text in (*_LEGS.items(), *_BASELINES.items())}
    return estimators.make(
        name,
        legs=tuple(by_name[leg] for leg in leg_names),
        baseline=by_name[baseline],
        cross_fit=bool(cross_fit),
    )


def _encode_schedule(value: Any) -> Any:
    if isinstance(value, FloatSchedule):  # a wrapper, of a plain number too
        inner = value.value_schedule
        return float(inner.val) if isinstance(inner, ConstantSchedule) else _encode_schedule(inner)
    if isinstance(value, ConstantSchedule):
        return {"$constant": float(value.val)}
    if isinstance(value, LinearSchedule):
        return {"$linear": [float(value.start), float(value.end), float(value.end_fraction)]}
    return _missing(value)


def _encode_space(space: spaces.Space, tensors: dict[str, Tensor]) -> Any:
    if isinstance(space, spaces.Box):
        bounds = [_encode(bound, tensors) for bound in (space.low, space.high)]
        return {"$box": [*bounds, np.dtype(space.dtype).str]}
    if isinstance(space, spaces.Discrete):
        return {"$discrete": [int(space.n), int(space.start), np.dtype(space.dtype).str]}
    if isinstance(space, spaces.MultiDiscrete):
        arrays = [_encode(array, tensors) for array in (space.nvec, space.start)]
        return {"$multidiscrete": [*arrays, np.dtype(space.dtype).str]}
    if isinstance(space, spaces.MultiBinary):
        return {"$multibinary": _encode(space.n, tensors)}
    if isinstance(space, spaces.Dict):
        return {"$dict": {k: _encode_space(s, tensors) for k, s in space.spaces.items()}}
    return _missing(space)


def _decode(value: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise BadFileError(f"its JSON is nested more than {MAX_DEPTH} deep")

    def inner(entry: Any) -> Any:
        return _decode(entry, tensors, depth + 1)

    def tensor(name: Any) -> Tensor:
        if not isinstance(name, str) or name not in tensors:
            raise BadFileError(
                f"it is truncated or corrupted (tensor {shown(name)} is not there, or used twice)"
            )
        return tensors.pop(name)  # used twice, a small file would become a large agent

    if isinstance(value, list):
        return [inner(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    tags = [key for key in value if key.startswith("$")]
    if not tags:
        return {key: inner(entry) for key, entry in value.items()}
    (tag,) = tags
    content = value[tag]
    match tag:
        case "$tensor":
            return tensor(content)
        case "$array":
            return tensor(content).numpy()
        case "$number":
            dtype, number = np.dtype(content[0]), content[1]
            if dtype.kind not in "biuf" or not isinstance(number, bool | int | float):
                raise BadFileError(f"its JSON holds {shown(content)}, which is not a number")
            return dtype.type(number)
        case "$tuple":
            return tuple(inner(entry) for entry in content)
        case "$deque":
            return deque([inner(entry) for entry in content], maxlen=value["maxlen"])
        case "$items":
            return {inner(key): inner(entry) for key, entry in content}
        case "$device":
            return torch.device(content)
        case "$class":
            classes = {**_FORMER_NAMES, **_CLASSES}
            if content not in classes:
                raise BadFileError(f"it names the class '{content}', which is not known here")
            return classes[content]
        case "$estimator":
            return _decode_estimator(content)
        case "$linear":
            start, end, fraction = map(float, content)
            if not (math.isfinite(start) and math.isfinite(end) and 0 < fraction <= 1):
                raise BadFileError(f"it holds the linear schedule {shown(content)}")
            return LinearSchedule(start, end, fraction)
        case "$constant":
            if not math.isfinite(float(content)):
                raise BadFileError(f"it holds the constant schedule {shown(content)}")
            return ConstantSchedule(float(content))
        case "$missing":
            return NotInFile(str(content))
        case "$box":
            low, high = inner(content[0]), inner(content[1])
            if not (isinstance(low, np.ndarray) and isinstance(high, np.ndarray)):
                raise BadFileError("it holds a Box without bounds")
            if low.shape != high.shape or not (low <= high).all():  # nor if one is NaN
                raise BadFileError("it holds a Box whose lower bounds are above the upper ones")
            return spaces.Box(low, high, dtype=np.dtype(content[2]).type)
        case "$discrete":
            dtype = np.dtype(content[2] if len(content) > 2 else np.int64).type
            return spaces.Discrete(content[0], start=content[1], dtype=dtype)
        case "$multidiscrete":
            if not isinstance(content, list):  # files of before hold the numbers of options only
                return spaces.MultiDiscrete(inner(content))
            dtype = np.dtype(content[2]).type
            return spaces.MultiDiscrete(inner(content[0]), dtype=dtype, start=inner(content[1]))
        case "$multibinary":
            return spaces.MultiBinary(inner(content))
        case "$dict":
            return spaces.Dict({key: inner(entry) for key, entry in content.items()})
    raise BadFileError(f"its JSON holds the unknown '{tag}'")
