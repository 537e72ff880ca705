"""Commands of ours in processes forked from one that has imported everything, which saves seconds.

A process of its own is what these tests need: it hangs, is killed, or holds a lock. That Python
starts and finds the command is tested elsewhere.
"""

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def run(module: str, arguments: list[str]) -> subprocess.CompletedProcess:
    """Call `module.main(arguments)` in a process of its own.

    Returns:
        As of `subprocess.run(..., capture_output=True, text=True)`.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("stdout", "stderr")]
        process = context.Process(target=_main, args=(module, arguments, paths))
        process.start()
        process.join(120)
        assert process.exitcode is not None, f"{module} {arguments} has not ended in 120 s"
        output = [path.read_text() for path in paths]
    return subprocess.CompletedProcess(arguments, process.exitcode, *output)


def _main(module: str, arguments: list[str], paths: list[Path]) -> None:
    for descriptor, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    importlib.import_module(module).main(arguments)
    sys.stdout.flush()
