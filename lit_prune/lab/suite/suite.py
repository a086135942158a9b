"""The verb `suite`: networks × seeds, each a `fit` and what follows it, on however many devices there are."""

import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from os import environ, getpid
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from rich.table import Table

from lit_prune.arguments import check_at_once
from lit_prune.errors import InputError
from lit_prune.files import LOCK, alone, write_json, write_parquet
from lit_prune.lab.suite.estimate import Estimate, estimate_fit
from lit_prune.lab.suite.runs import FOLLOWING, Run, merge
from lit_prune.processes import PARENT
from lit_prune.progress import bars, terminal
from lit_prune.report.event_files import read_scalars

NAME = r"(?!\.)[\w.+=-]+"
LOG = "log.txt"
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Suite:
    """What belongs to a suite.

    Attributes:
        run_dir: each run has the folder `NETWORK/seed=SEED` in it.
        base: configuration of every `fit`, as in its YAML file.
        networks: by name, what is added to `base` for that network.
        seeds: one run of every network for each.
        options: further command line arguments of every `fit` and every verb after it but `report`.
        then: verbs that follow each `fit` in its folder, in this order, each with what is added to its configuration.
    """

    run_dir: Path
    base: dict[str, Any]
    networks: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    options: tuple[str, ...] = ()
    then: dict[str, dict[str, Any]] = field(default_factory=dict)

    def runs(self) -> list[Run]:
        """All runs, seed after seed, so that a suite cut short has whole seeds.

        Raises:
            InputError: no network or no seed, or one that is given twice; a verb that cannot follow a `fit`.
        """
        if not self.networks or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(
                f"suite needs networks and distinct seeds, got networks={list(self.networks)}, seeds={list(self.seeds)}"
            )
        unfit = next((name for name in self.networks if not re.fullmatch(NAME, str(name))), None)
        if unfit is not None:
            raise InputError(
                f"suite: network name {unfit!r} would be the name of a folder; use letters, digits and . _ - + ="
            )
        unknown = next((verb for verb in self.then if verb not in FOLLOWING), None)
        if unknown is not None:
            raise InputError(f"suite: then: {unknown!r} cannot follow a fit; use {', '.join(FOLLOWING)}")
        return [self._run(name, seed) for seed in self.seeds for name in self.networks]

    def _run(self, network: str, seed: int) -> Run:
        config = merge(merge(self.base, self.networks[network]), {"seed_everything": seed})
        fit = Run(network, seed, self.run_dir / network / f"seed={seed}", config, self.options)
        later = (replace(fit, verb=verb, config=merge(config, more or {})) for verb, more in self.then.items())
        return replace(fit, then=tuple(later))


def device_slots(devices: int | None, runs_per_device: int) -> list[dict[str, str]]:
    """Environment of each run that may go on at the same time; on the CPU a device is a process.

    Raises:
        InputError: fewer than one run at a time, or more CUDA devices than there are.
    """
    found = torch.cuda.device_count()
    if runs_per_device < 1 or (devices is not None and not 1 <= devices <= (found or devices)):
        raise InputError(
            f"suite: devices={devices} with runs_per_device={runs_per_device} is not possible on {found} CUDA "
            "device(s); leave devices out to use all, and give at least 1"
        )
    at_once = (devices or found or 1) * runs_per_device
    check_at_once(f"suite: devices={devices} with runs_per_device={runs_per_device}, {at_once} runs,", at_once)
    if not found:
        return [{}] * at_once
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(found)]
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names[: devices or found] for _ in range(runs_per_device)]


def run_suite(suite: Suite, slots: Sequence[dict[str, str]], part: int = 0, parts: int = 1) -> Table:
    """Carries out the runs that are not finished and returns the table of all that are.

    Args:
        suite: what belongs to it.
        slots: environment of each run that may go on at the same time.
        part: number of this process among `parts` that share the suite.
        parts: processes that share the suite, each on its own devices.

    Raises:
        InputError: a folder holds another run, or a run failed; the others are carried out before.
    """
    runs = suite.runs()
    if not 0 <= part < parts:
        raise InputError(f"suite: part={part} must lie in 0 to parts - 1, parts={parts}")
    with alone(suite.run_dir, LOCK if parts == 1 else f"{LOCK}.{part}"):
        for run in runs[part::parts]:
            run.write_config()
        failed = _execute([run.left for run in runs[part::parts] if run.left], slots)
        table = result_frame(runs)
        write_parquet(suite.run_dir / "suite.parquet", table)
    if failed:
        logs = ", ".join(str(run.folder / LOG) for run in failed)
        raise InputError(f"{len(failed)} of {len(runs)} runs failed, see {logs}; the same command goes on from there")
    return suite_table(table, len(runs))


def _execute(runs: Sequence[Sequence[Run]], slots: Sequence[dict[str, str]]) -> list[Run]:
    """Runs all, each step by step, as many at a time as there are slots; returns the steps that failed.

    Stops them when it is stopped.
    """
    waiting, free = deque(runs), list(slots)
    running: dict[subprocess.Popen, tuple[Sequence[Run], dict[str, str], float]] = {}
    failed: list[Run] = []
    with bars(shown=sys.stderr.isatty()) as progress:
        task = progress.add_task("runs", total=len(runs))
        try:
            while waiting or running:
                while waiting and free:
                    steps, slot = waiting.popleft(), free.pop()
                    running[_start(steps[0], slot)] = steps, slot, time.monotonic()
                for process in [process for process in running if process.poll() is not None]:
                    (run, *rest), slot, began = running.pop(process)
                    free.append(slot)
                    broken = _finish(run, process.returncode, time.monotonic() - began)
                    failed += broken
                    if rest and not broken:
                        waiting.appendleft(rest)
                    else:
                        progress.advance(task)
                time.sleep(POLL_SECONDS)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    return failed


def _start(run: Run, slot: dict[str, str]) -> subprocess.Popen:
    with open(run.folder / LOG, "ab") as log:
        command = [sys.executable, "-m", "lit_prune", *run.arguments]
        own = {name: value for name, value in environ.items() if not name.startswith("SLURM_")}  # it is one process
        own[PARENT] = str(getpid())
        return subprocess.Popen(command, env={**own, **slot}, stdout=log, stderr=subprocess.STDOUT)


def _finish(run: Run, code: int, seconds: float) -> list[Run]:
    """Marks a run that ended; returns it where it failed."""
    finished = code == 0 and run.reached_end
    if finished:
        write_json(run.marker, {"seconds": seconds})
    named = f"{run.network} seed {run.seed}" + ("" if run.verb == "fit" else f" {run.verb}")
    terminal().print(f"{named}: {'finished' if finished else 'failed'} after {seconds:.0f} s")
    return [] if finished else [run]


def result_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Network, seed, last validation accuracy and folder of each finished run."""
    rows = []
    for run in (run for run in runs if run.finished):
        scalars = read_scalars(run.folder / "tensorboard")
        accuracy = float(scalars["val/accuracy"]["value"].iloc[-1]) if "val/accuracy" in scalars else float("nan")
        rows.append((run.network, run.seed, accuracy, str(run.folder)))
    return pd.DataFrame(rows, columns=["network", "seed", "accuracy", "run_dir"])


def suite_table(results: pd.DataFrame, total: int) -> Table:
    """Accuracy by network, mean and standard deviation over seeds."""
    table = Table("network", "runs", "accuracy", title=f"Suite: {len(results)} of {total} runs finished")
    for network, rows in results.groupby("network", sort=False):
        spread = f" ± {rows['accuracy'].std():.2%}" if len(rows) > 1 else ""
        table.add_row(str(network), str(len(rows)), f"{rows['accuracy'].mean():.2%}{spread}")
    return table


def preview(suite: Suite, slots: int, load: Callable[[list[str]], tuple[Any, Any, dict[str, Any]]]) -> Table:
    """What the suite will do and what it will cost; trains nothing and writes nothing.

    Args:
        suite: what belongs to it.
        slots: runs at the same time.
        load: model, data and trainer settings of a `fit` command line.
    """
    estimates: dict[str, Estimate] = {}
    table = Table("run", "state", "epochs left", "PFLOP left", "hours left", title=f"Suite in {suite.run_dir}")
    flops = hours = 0.0
    for run in suite.runs():
        if run.network not in estimates:
            estimates[run.network] = _estimate(run, load)
        estimate, done = estimates[run.network], run.epochs_done
        left = 0 if run.finished else estimate.epochs - done
        cost = estimate.petaflop * left / estimate.epochs, estimate.seconds * left / estimate.epochs / 3600
        flops, hours = flops + cost[0], hours + cost[1]
        state = "finished" if run.finished else f"goes on at epoch {done}" if done else "to do"
        table.add_row(f"{run.network} seed {run.seed}", state, str(left), f"{cost[0]:.3g}", f"{cost[1]:.3g}")
    table.caption = f"{flops:.4g} PFLOP of training; {hours / slots:.3g} hours with {slots} run(s) at a time"
    if suite.then:
        table.caption += f"; after each fit, not estimated: {', '.join(suite.then)}"
    return table


def _estimate(run: Run, load: Callable[[list[str]], tuple[Any, Any, dict[str, Any]]]) -> Estimate:
    """Estimate of one network, from its configuration in a file that is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fit.yaml"
        file.write_text(yaml.safe_dump(run.config, sort_keys=False))
        return estimate_fit(*load(["fit", "-c", str(file), "--run_dir", folder, *run.options]))
