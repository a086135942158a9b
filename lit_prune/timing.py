"""Times that say what they are worth: median, spread, device, threads, date, and whether the machine was busy."""

import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

NOISY = 0.2  # share of the median by which quartiles may lie apart before it is said
ROUNDS, SECONDS, WARM_UP = 20, 0.5, 3
FEWEST, MOST = 6, 500  # rounds of `best_times`


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, from passes taken in turns with those that it is compared with.

    Attributes:
        median: milliseconds.
        spread: interquartile range, milliseconds.
        passes: timed.
        noisy: whether the spread is so large that the median says little.
    """

    median: float
    spread: float
    passes: int
    noisy: bool = field(default=False)

    def __str__(self) -> str:
        """Median, spread, and a warning where it is noisy."""
        warning = ", NOISY: another process was busy?" if self.noisy else ""
        return f"{self.median:.3g} ms (quartiles {self.spread:.2g} apart, {self.passes} passes{warning})"

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """From the seconds of passes, by the statistics of torch.utils.benchmark.

        >>> Timing.of([0.002, 0.002, 0.002, 0.002]).median
        2.0
        """
        # It looks for compilers and warns where CUDA's has no device: not for whoever only loads, and nobody's concern.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from torch.utils.benchmark import Measurement, TaskSpec

        measured = Measurement(1, list(seconds), TaskSpec("pass", "", num_threads=torch.get_num_threads()))
        median, spread = measured.median, measured.iqr
        return cls(1000 * median, 1000 * spread, len(seconds), spread > NOISY * median)


def time_runs(runs: Sequence[Callable[[], Any]], rounds: int = ROUNDS, seconds: float = SECONDS) -> list[Timing]:
    """Times of functions that take turns, so that whatever else the machine does falls on all of them alike.

    Args:
        runs: each does the work and waits for its end.
        rounds: timed rounds at the least; three more are run first and not timed.
        seconds: further rounds are run until so much time has passed.
    """
    taken: list[list[float]] = []
    begin = time.perf_counter()
    while len(taken) < rounds + WARM_UP or time.perf_counter() - begin < seconds:
        taken.append([_timed(run) for run in runs])
    return [Timing.of(passes) for passes in zip(*taken[WARM_UP:], strict=True)]


@dataclass(frozen=True)
class Best:
    """Seconds of the quickest of some passes: what the work takes where nothing else runs.

    Attributes:
        seconds: of the quickest.
        spread: by how much the quickest of either half of the passes differ, relative to it.
    """

    seconds: float
    spread: float

    @classmethod
    def of(cls, passes: Sequence[float]) -> "Best":
        """From the seconds of two passes at least.

        >>> Best.of([0.4, 0.2, 0.25, 0.3])
        Best(seconds=0.2, spread=0.25)
        """
        halves = min(passes[: len(passes) // 2]), min(passes[len(passes) // 2 :])
        return cls(min(halves), round(abs(halves[0] - halves[1]) / min(halves), 6))


def best_times(runs: Sequence[Callable[[], Any]], seconds: float) -> list[Best]:
    """The quickest passes of functions that take turns; one more of each is run first and not timed.

    Args:
        runs: as in `time_runs`.
        seconds: rounds are run until so much time has passed, 6 at the least and 500 at the most.
    """
    for run in runs:
        run()
    taken: list[list[float]] = []
    begin = time.perf_counter()
    while len(taken) < FEWEST or (len(taken) < MOST and time.perf_counter() - begin < seconds):
        taken.append([_timed(run) for run in runs])
    return [Best.of(passes) for passes in zip(*taken, strict=True)]


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def circumstances(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What times hold for: device, threads, date, and the load of the machine (processes that wanted to run)."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (platform.processor() or platform.machine())
    return {
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": _load(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def busy(said: dict[str, Any]) -> bool:
    """Whether more processes wanted to run than there were cores beside the threads that were measured."""
    load, cores = said.get("load"), said.get("cores")
    return bool(load and cores and load > cores + 0.5)


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):  # not on every system
        return None
