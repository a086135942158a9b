"""Who carries out the tasks of a sweep: this process, one process a device, or the workers of a Ray cluster.

An executor is a function from tasks to pairs (number of the task, result), in the order in which they are done.
"""

import importlib.util
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from lit_prune.errors import InputError
from lit_prune.lab.sweep.work import Piece, Result, SweepJob, Worker

Execute = Callable[[Sequence[Piece]], Iterator[tuple[int, Result]]]


@contextmanager
def open_executor(job: SweepJob, devices: Sequence[torch.device]) -> Iterator[Execute]:
    """The executor that the job's request asks for; its processes end on exit.

    Args:
        job: sent to every worker once.
        devices: of this machine, for `local`: one process each, in this process where there is one; on the CPU the
            number of processes is `workers`.

    Raises:
        InputError: Ray is asked for and not installed.
    """
    places = list(devices)
    if len(places) == 1 and places[0].type == "cpu":
        places = places * (job.request.workers or 1)
    if job.request.executor == "ray":
        with ray_workers(job) as execute:
            yield execute
    elif len(places) == 1:
        worker = Worker(job, places[0])
        yield lambda tasks: ((number, worker.carry_out(task)) for number, task in enumerate(tasks))
    else:
        with processes(job, places[: job.request.workers]) as execute:
            yield execute


@contextmanager
def processes(job: SweepJob, devices: Sequence[torch.device]) -> Iterator[Execute]:
    """One process a device."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    queue = context.SimpleQueue()
    for device in devices:
        queue.put(str(device))
    payload = pickle.dumps(job)  # tensors by value: shared memory may be small
    pool = ProcessPoolExecutor(len(devices), mp_context=context, initializer=_begin, initargs=(payload, queue))

    def execute(tasks: Sequence[Piece]) -> Iterator[tuple[int, Result]]:
        numbers = {pool.submit(_carry_out, task): number for number, task in enumerate(tasks)}
        for future in as_completed(numbers):
            try:
                yield numbers[future], future.result()
            except BrokenProcessPool:
                raise SystemExit(
                    "error: a worker process ended by itself (out of memory?); start the same command to go on"
                ) from None

    try:
        yield execute
    finally:
        pool.shutdown(cancel_futures=True)


_WORKER: list[Worker] = []  # of a process of the pool


def _begin(payload: bytes, queue: Any) -> None:
    _WORKER.append(Worker(pickle.loads(payload), queue.get()))


def _carry_out(task: Piece) -> Result:
    return _WORKER[0].carry_out(task)


@contextmanager
def ray_workers(job: SweepJob) -> Iterator[Execute]:
    """One actor a GPU of the Ray cluster, or a CPU where it has no GPU, `workers` at the most.

    The cluster is the one that this process or RAY_ADDRESS is connected to; without one, a local one is started.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError("executor: 'ray' needs the package ray; install the extra with pip install 'lit-prune[ray]'")
    import ray
    from ray.util import ActorPool

    started = not ray.is_initialized()
    if started:
        _connect(job.request.workers)
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    count = min(filter(None, (gpus or cpus, job.request.workers)))
    shared = ray.put(pickle.dumps(job))
    actor = ray.remote(num_cpus=0 if gpus else 1, num_gpus=1 if gpus else 0)(RayWorker)
    actors = [actor.remote(shared, "cuda" if gpus else "cpu") for _ in range(count)]
    pool = ActorPool(actors)

    def execute(tasks: Sequence[Piece]) -> Iterator[tuple[int, Result]]:
        yield from pool.map_unordered(lambda one, pair: one.carry_out.remote(*pair), list(enumerate(tasks)))

    try:
        yield execute
    finally:
        for one in actors:
            ray.kill(one)
        if started:
            ray.shutdown()


def _connect(workers: int | None) -> None:
    """Joins the cluster of RAY_ADDRESS, else starts one on this machine with as many CPUs as workers are asked for."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a sweep reports to nobody
    local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
    ray.init(log_to_driver=False, logging_level="error", **local)


class RayWorker:
    """A worker as an actor; numbers travel with the tasks because results come unordered."""

    def __init__(self, payload: bytes, device: str) -> None:
        self._worker = Worker(pickle.loads(payload), device)

    def carry_out(self, number: int, task: Piece) -> tuple[int, Result]:
        """The task's number and result."""
        return number, self._worker.carry_out(task)
