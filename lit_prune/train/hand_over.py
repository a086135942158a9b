"""What a pruned run leaves in its folder: the teacher's weights, the stages, the compact network."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lit_prune.errors import InputError, first_line
from lit_prune.files import read_json, whole_file, write_json
from lit_prune.models.weights import load_state
from lit_prune.report import result_table
from lit_prune.structure import Plan, apply_plan
from lit_prune.structure.compact import REPORT, save_compact
from lit_prune.structure.example import Example
from lit_prune.structure.latency import compare_profiles, own_tensors
from lit_prune.structure.record import Record, check_inputs, example_input, rebuild_inputs, record_of
from lit_prune.structure.tracing import copy_network
from lit_prune.tensor_files import write_safetensors
from lit_prune.timing import circumstances
from lit_prune.train.locate import prefix_of
from lit_prune.train.run_record import write_stages
from lit_prune.train.stage_record import figures_of

PROGRAM = "program.pt2"
TEACHER = Path("teacher") / "model.safetensors"


def save_teacher(run_dir: Path, network: nn.Module) -> None:
    """Keeps the weights of the dense network for the phases to come, of a resumed run too."""
    file = run_dir / TEACHER
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as partial:
        write_safetensors(partial, own_tensors(network))


def load_teacher(run_dir: Path, network: nn.Module) -> nn.Module:
    """The given network of the dense structure with the weights of the teacher.

    Raises:
        InputError: they are not there, or do not fit.
    """
    file = run_dir / TEACHER
    if not file.is_file():
        raise InputError(f"teacher missing: {file} is no file; it is written before the first stage of a run")
    weights = load_file(file)
    wrong = sorted(own_tensors(network).keys() ^ weights.keys())
    try:
        load_state(network, weights, strict=False)
    except RuntimeError as error:
        wrong.append(str(error).splitlines()[-1].strip())
    if wrong:
        raise InputError(f"teacher: {file} does not fit the dense network: see {wrong[0]}")
    return network


def run_of(run_dir: Path) -> str | None:
    """Identifier of the run that handed over the `compact/` of a folder; None where nothing says it."""
    report = run_dir / "compact" / REPORT
    return read_json(report).get("run") if report.is_file() else None


def set_aside(run_dir: Path, run: str) -> None:
    """Moves what an earlier run handed over out of the way of the fresh one `run`; nothing where there is none."""
    compact, earlier = run_dir / "compact", run_of(run_dir)
    if not compact.is_dir() or earlier == run:
        return
    aside = run_dir / f"compact-{earlier or 'earlier'}"
    if aside.exists():
        shutil.rmtree(aside)
    compact.rename(aside)
    (run_dir / "stages.jsonl").unlink(missing_ok=True)


def stage_profiles(dense: nn.Module, inputs: Mapping[str, Any], first: dict[str, Any], records: list[dict[str, Any]]):
    """Measured figures of the dense network, of each stage's network and of the compact one.

    Latency and throughput depend on the structure alone, so the intermediate networks are rebuilt with random weights;
    all are measured here, in turns in one process. A stage's figure is the one after recalibration and before repair;
    the compact network's is the one after the last repair.

    Returns:
        `{"dense": figures, "compact": figures, "stages": [{"name": ..., figures}], "timing": what times hold for}`;
        figures as `structure.profile`.
    """
    example = example_input(rebuild_inputs(inputs))
    models, values = [dense], [first["value"]]
    for record in records:
        models.append(apply_plan(models[-1], Plan.from_dict(record["plan"]), example))
        values.append(figures_of(record)["after_recalibration"])
    measured = compare_profiles(models, example, values)
    name = first["metric"]["name"]
    for figures in measured:  # the first key is the figure
        value = figures.pop("accuracy")
        figures |= {name: value}
    stages = [{"name": r["name"], **figures} for r, figures in zip(records, measured[1:], strict=True)]
    compact = {**measured[-1], name: figures_of(records[-1])["after_repair"]}
    times = circumstances(next(dense.parameters(), torch.empty(0)).device)
    return {"metric": first["metric"], "dense": measured[0], "compact": compact, "stages": stages, "timing": times}


def write_compact(
    run_dir: Path, network: nn.Module, dense: nn.Module, first: dict[str, Any], records: list[dict[str, Any]], run: str
) -> Table:
    """Hands over `compact/` (weights, structure, report) and returns the final table for the terminal.

    Args:
        run_dir: the run folder.
        network: the pruned network, with its record.
        dense: a network of the dense structure, on the CPU.
        first: figures of the dense network.
        records: of the stages.
        run: identifier of the run.
    """
    record = record_of(network)
    dense = dense.to(next(network.parameters()).device)  # times are those of the device that it was trained on
    report = {"run": run, **stage_profiles(dense.eval(), check_inputs(record.inputs), first, records)}
    write_stages(run_dir, records)
    folder = run_dir / "compact"
    if record.backbone is not None:
        save_compact(folder, network, report=report)
        return result_table(report)
    save_compact(folder, network, report={key: value for key, value in report.items() if key != "run"})
    program = write_program(network, record, folder / PROGRAM)  # whoever has not got the class can run it all the same
    write_json(folder / REPORT, {**report, "program": program})  # says the run last: without, it is handed over again
    return result_table(report)


def write_program(network: nn.Module, record: Record, file: Path) -> str:
    """Writes the network as a torch.export program, which runs without its class; says how, or why there is none.

    The batch size is free where the network allows it. `torch.export.load(file).module()(*inputs)` runs it.
    """
    model = copy_network(network).cpu().eval().requires_grad_(False)
    example = doubled(rebuild_inputs(record.inputs))

    def axis(value: Any) -> dict[int, Any] | None:
        batched = isinstance(value, Tensor) and value.ndim and len(value) == 2
        return {0: torch.export.Dim("batch")} if batched else None

    for free in (True, False):
        shapes = tree_map(axis, (*example.args, *example.kwargs.values())) if free else None
        try:
            program = torch.export.export(model, example.args, example.kwargs, dynamic_shapes=shapes)
            with whole_file(file) as partial, partial.open("wb") as opened:  # a file by name is to end in .pt2
                torch.export.save(program, opened)
            return f"{file.name}: for {'any number of' if free else 'batches of 2'} samples"
        except Exception as error:  # the exporter has many families of errors
            reason = first_line(error)
    return f"none: torch.export cannot write this network ({reason})"


def doubled(example: Example) -> Example:
    """The arguments with two samples in the place of one."""

    def twice(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim and len(value) == 1 else value

    return Example(*tree_map(twice, (example.args, example.kwargs)))


def weights_of(checkpoint: Path, path: str) -> dict[str, torch.Tensor]:
    """Weights of the network at `path` in a Lightning checkpoint, under the network's own names."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    prefix = prefix_of(path)
    return {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
