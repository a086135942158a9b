"""The command line as processes that can be killed; a server that has imported everything starts each at once."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

TINY = str(Path(__file__).with_name("tiny_run.yaml"))
LIMIT_SECONDS = 300
TIMES = ("seconds", "latency", "throughput", "per_second", "noisy")
"""Parts of the names of values that no two runs have in common."""
IDENTITIES = ("run", "checksum", "program", "versions", "commit", "timing")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lit_prune.cli.prune_cli", "lit_prune.cli.verbs", "lit_prune.lab.suite.suite"])


def start(arguments: list[str], log: Path) -> BaseProcess:
    """The command line as a process and group of its own; what it prints goes to `log`."""
    process = SERVER.Process(target=_carry_out, args=(list(arguments), str(log)))
    process.start()
    return process


def _carry_out(arguments: list[str], log: str) -> None:
    os.setsid()
    printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(printed, stream)
    from lit_prune.cli.main import main

    main(arguments)


def exit_code(process: BaseProcess) -> int | None:
    """Of a process that ends within the limit; None where it hangs, and then it is killed."""
    process.join(LIMIT_SECONDS)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code


def finish(arguments: list[str], log: Path) -> float:
    """Carries the command line out to its end; seconds that it took."""
    began = time.monotonic()
    code = exit_code(start(arguments, log))
    assert code == 0, f"exit {code}: {log.read_text()[-3000:]}"
    return time.monotonic() - began


def interrupt(arguments: list[str], log: Path, seconds: float, number: int) -> int | None:
    """Sends a signal after so many seconds; how the process ended."""
    process = start(arguments, log)
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, number)
    return exit_code(process)


def wait_for(happened: Callable[[], Any], seconds: float = LIMIT_SECONDS) -> None:
    """Returns as soon as something is so."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def partial_files(folder: Path) -> list[Path]:
    """What was left half-written."""
    return [path for path in folder.rglob("*") if path.name.endswith(".partial")]


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a run folder by its name: what it says, without times and places."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    kept = (path for path in files if "tensorboard" not in path.parts and path.name not in (".lock", "log.txt"))
    return {str(path.relative_to(folder)): _content(path, str(folder)) for path in kept}


def _content(path: Path, folder: str) -> Any:
    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
        return _plain({name: table[name].tolist() for name in table}, folder)
    if path.suffix in (".json", ".jsonl"):
        return [_plain(json.loads(line), folder) for line in _documents(path)]
    if path.suffix == ".ckpt":
        saved = torch.load(path, weights_only=True)
        return _plain({key: saved.get(key) for key in ("state_dict", "optimizer_states", "epoch")}, folder)
    if path.suffix == ".safetensors":
        return path.read_bytes()
    return path.suffix  # pictures and pages: that they are there


def _documents(path: Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _plain(value: Any, folder: str) -> Any:
    """A value that compares by `==`: undefined numbers are equal, times and names of runs are left out."""
    if isinstance(value, dict):
        return {key: _plain(one, folder) for key, one in value.items() if not _differs(str(key))}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(one, folder) for one in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, float) and value != value:
        return None
    return value.replace(folder, "FOLDER") if isinstance(value, str) else value


def _differs(key: str) -> bool:
    return key in IDENTITIES or any(part in key for part in TIMES)


def kill(process: BaseProcess) -> None:
    """Ends a process as the system would that has no memory left."""
    os.kill(process.pid, signal.SIGKILL)
    process.join()
