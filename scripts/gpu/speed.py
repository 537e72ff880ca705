"""Time DreamerTPX's updates on a GPU: every mode beside the eager one, sheeprl, and the peak.

The peak is the rate of a large matrix product, measured in the same process. Each figure is
written to a file as soon as it is there, so that a process which is stopped leaves what it has.
Started by `totalprop gpu` as `python -m totalprop.scripts.gpu.speed SETTINGS`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from totalprop.agents.dreamer.cuda_graph import EAGER_CALLS
from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts.bench import sheeprl_peer
from totalprop.scripts.bench.dreamer import ACTIONS, make_update, synthetic_batch
from totalprop.scripts.bench.timing import interleaved_medians

HORIZONS = (15, 60)  # Parmas et al. 2023, Sec. 6.2
EAGER = "rp, H=15"


@dataclasses.dataclass(frozen=True)
class SpeedSettings:
    """What to time, and where the figures go."""

    out: str
    device: str
    batch: int
    length: int
    repeats: int


def main() -> None:
    """Entry point."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as in totalprop train
    measure(SpeedSettings(**json.loads(sys.argv[1])))


def tasks(device: str) -> dict[str, tuple[str, int, tuple[str, ...]]]:
    """What is timed beside the eager update, the most telling first: estimator, H and modes."""
    graph = ("cuda_graph",)
    modes: list[tuple[str, ...]] = [("bf16",)]
    if device != "cpu":
        modes = [graph, (*graph, "bf16"), *modes]
    found = {f"{EAGER}, {' + '.join(mode)}": ("rp", HORIZONS[0], mode) for mode in modes}
    if device == "cpu":
        return found
    for name, horizon in (("tpx", HORIZONS[0]), ("rp", HORIZONS[1]), ("tpx", HORIZONS[1])):
        found[f"{name}, H={horizon}, cuda_graph"] = (name, horizon, graph)
    for mode in (("compile",), (*graph, "compile"), (*graph, "compile", "bf16")):
        found[f"{EAGER}, {' + '.join(mode)}"] = ("rp", HORIZONS[0], mode)
    return found


def measure(settings: SpeedSettings) -> dict[str, Any]:
    """Measure everything, and write the record after each figure."""
    device, path = settings.device, Path(settings.out)
    record: dict[str, Any] = {
        "batch": settings.batch, "length": settings.length, "repeats": settings.repeats,
        "peak_tflops": {}, "updates": {}, "left_out": [],
    }  # fmt: skip

    def write() -> None:
        write_text(path, json.dumps(record, indent=1) + "\n")

    for name, dtype in (("tf32", torch.float32), ("bf16", torch.bfloat16)):
        record["peak_tflops"][name] = matrix_rate(dtype, device) / 1e12
        print(f"{name} matrix products: {record['peak_tflops'][name]:.4g} TFLOP/s", flush=True)
        write()
    data = synthetic_batch(settings.batch, settings.length, device)
    memory = PeakMemory(device)
    eager = make_update("rp", HORIZONS[0], data, device=device)
    work = {("rp", HORIZONS[0]): count_flop(eager)}

    def add(name: str, seconds: dict[str, float], flop: float = 0.0, precision: str = "") -> None:
        own = seconds.get(name, seconds[EAGER])
        row: dict[str, Any] = {"seconds": own, "times_eager": seconds[EAGER] / own}
        if flop:
            rate = flop / own / 1e12
            share = rate / record["peak_tflops"][precision]
            row |= {"tflop": flop / 1e12, "tflops": rate, "share_of_peak": share}
            row["peak_memory_gb"] = memory.gigabytes()
        record["updates"][name] = row
        shown = f"{100 * row['share_of_peak']:.2g} % of the peak" if flop else ""
        print(f"{name}: {own:.4g} s, {row['times_eager']:.3g} x eager {shown}", flush=True)
        write()

    def timed(name: str, task: Callable[[], object], warm_up: int = 1) -> dict[str, float]:
        both = {EAGER: eager, name: task}
        return interleaved_medians(both, settings.repeats, device=device, warm_up=warm_up)

    add(EAGER, timed(EAGER, eager), work["rp", HORIZONS[0]], "tf32")
    try:
        sheeprl = sheeprl_peer.start_update(
            batch=settings.batch, length=settings.length, horizon=HORIZONS[0], actions=ACTIONS,
            device=device,
        )  # fmt: skip
        add("sheeprl", timed("sheeprl", sheeprl))
    except (ImportError, RuntimeError) as error:
        record["left_out"].append(str(error).removeprefix("left out: "))
        print(record["left_out"][-1], flush=True)
    for name, (estimator, horizon, modes) in tasks(device).items():
        memory.reset()
        try:
            if (estimator, horizon) not in work:
                plain = make_update(estimator, horizon, data, device=device)
                work[estimator, horizon] = count_flop(plain)
                del plain
                memory.reset()
            task = make_update(estimator, horizon, data, modes, device=device)
            seconds = timed(name, task, EAGER_CALLS + 1 if "cuda_graph" in modes else 1)
        except Exception as error:  # the next mode may work, and GPU time is dear
            record["left_out"].append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            print(record["left_out"][-1], flush=True)
            write()
            continue
        add(name, seconds, work[estimator, horizon], "bf16" if "bf16" in modes else "tf32")
        del task
    write()
    return record


class PeakMemory:
    """The most GPU memory that tensors took since the last `reset`, the eager update's included."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Count from here."""
        if self.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def gigabytes(self) -> float | None:
        """None on the CPU."""
        if self.device == "cpu":
            return None
        return torch.cuda.max_memory_allocated(self.device) / 1e9


def matrix_rate(dtype: torch.dtype, device: str, *, repeats: int = 10) -> float:
    """FLOP/s of a product of two square matrices of normal numbers, 8192 (on a CPU 512) wide."""
    n = 512 if device == "cpu" else 8192
    source = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=source, device=device).to(dtype) for _ in "ab")
    out = torch.empty_like(a)

    def wait() -> float:
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(3):
        torch.mm(a, b, out=out)
    began = wait()
    for _ in range(repeats):
        torch.mm(a, b, out=out)
    return 2 * n**3 * repeats / (wait() - began)


def count_flop(update: Callable[[], object]) -> float:
    """Floating-point operations of the products and convolutions of one update."""
    counter = FlopCounterMode(display=False, custom_mapping=_ONEDNN)
    with counter:
        update()
    return float(counter.get_total_flops())


def _linear_flop(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight[0]


# What linear layers call on a CPU; PyTorch does not count it.
_ONEDNN: dict[Any, Any] = (
    {torch.ops.mkldnn._linear_pointwise: _linear_flop}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else {}
)


if __name__ == "__main__":
    main()
