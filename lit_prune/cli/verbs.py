"""The verbs that read a folder or begin other verbs; each is a function, its arguments are the command line's."""

from pathlib import Path
from typing import Any

from lit_prune.cli.parsing import one_line
from lit_prune.cli.recipes import find_recipe
from lit_prune.progress import terminal


def demo(run_dir: str = "runs/demo", options: list[str] = []) -> Any:  # noqa: B006
    """Trains, watches, cuts, repairs and hands over a ResNet-20 on real digit images; minutes on a CPU.

    Args:
        run_dir: folder for everything that the run writes; a demo that was stopped there goes on.
        options: further command line arguments of `fit`, such as `["--trainer.max_epochs", "4"]`.
    """
    from lit_prune.cli.prune_cli import build_cli

    build_cli(["fit", "-c", str(find_recipe("demo")), "--run_dir", run_dir, *options])
    report(run_dir)


def report(run_dir: str) -> None:
    """Draws the report page of a run folder.

    Args:
        run_dir: folder that a verb wrote.
    """
    from lit_prune.lab import sections as _lab_sections  # noqa: F401  (they register with the report)
    from lit_prune.report import result_table, write_report

    page = write_report(Path(run_dir))
    if (Path(run_dir) / "compact" / "report.json").exists():
        terminal().print(result_table(Path(run_dir)))
    print(f"report: {page}")


def export(
    run_dir: str,
    formats: list[str] = ["onnx", "torch_export"],  # noqa: B006
    to: str | None = None,
    trust: list[str] = [],  # noqa: B006
    normalisation: str = "outside",
    int8: bool = False,
    calibration: str | None = None,
) -> None:
    """Exports the compact model of a run folder and verifies each file against the module.

    Args:
        run_dir: run folder with `compact/`, or a compact folder itself.
        formats: `onnx` (needs the extra `export`) and `torch_export`.
        to: folder for the files; default: `export/` in the run folder.
        trust: import paths `package.module:callable` that the folder may name as its backbone.
        normalisation: `outside`, or `inside`: the files take images on the scale 0..1 and normalise them themselves.
        int8: also write `model.int8.onnx`, quantised on calibration images, with accuracy and time beside the float.
        calibration: folder of images to quantise on; default: the calibration images of the run's own data.
    """
    from lit_prune.cli.quantising import quantise
    from lit_prune.export import ExportError, export_compact
    from lit_prune.structure.axes import EVEN

    folder = Path(run_dir)
    compact = folder / "compact" if (folder / "compact").is_dir() else folder
    try:
        target = Path(to) if to else folder / "export"
        results = export_compact(compact, target, tuple(formats), trust=trust, normalisation=normalisation)
    except ExportError as error:
        raise SystemExit(f"error: {one_line(str(error))}") from None  # exit code 1: the input was right
    for name, result in results.items():
        print(f"{name}: {result['file']}, largest difference {result['max_abs_difference']:.2e}")
        if uneven := result.get("uneven_convolutions"):
            print(
                f"{uneven} convolutions have widths that are no multiple of {EVEN}, which ONNX Runtime may run more "
                f"slowly than wider ones: `lit-prune latency` shows it, round_to={EVEN} avoids it"
            )
        if "openvino_max_abs_difference" in result:
            print(f"OpenVINO reads it: largest difference {result['openvino_max_abs_difference']:.2e}")
    if int8:
        print(quantise(folder, compact, target / "model.onnx", normalisation, calibration))


def latency(
    run_dir: str,
    batch_sizes: list[int] = [1, 64],  # noqa: B006
    device: str = "cpu",
    threads: int | None = None,
    rounds: int = 20,
    trust: list[str] = [],  # noqa: B006
) -> None:
    """Times the dense and the compact network, in eager PyTorch and in ONNX Runtime, in turns.

    Args:
        run_dir: run folder with `compact/`, or a compact folder itself; `latency.json` is written there.
        batch_sizes: images in a pass, one row each.
        device: of the eager networks, such as `cuda:0`; ONNX Runtime is timed on the CPU.
        threads: of both; default: all.
        rounds: timed passes at the least.
        trust: import paths `package.module:callable` that the folder may name as its backbone.
    """
    from lit_prune.deployment import Setting, latency_table, measure_deployment

    found = measure_deployment(run_dir, Setting(tuple(batch_sizes), device, threads, rounds), trust)
    terminal().print(latency_table(found))


def predict(compact: str, images: list[str], top: int = 5, trust: list[str] = []) -> None:  # noqa: B006
    """Names the likeliest classes of image files, prepared as the compact folder says.

    Args:
        compact: compact folder, such as runs/demo/compact.
        images: files; they may also simply stand at the end of the command line.
        top: classes an image.
        trust: import paths `package.module:callable` that the folder may name as its backbone.
    """
    from lit_prune.predict import predict_compact

    for file, guesses in predict_compact(compact, images, top, trust).items():
        print(f"{file}: " + ", ".join(f"{guess.label} {guess.probability:.1%}" for guess in guesses))


def suite(
    base: dict,  # not dict[str, Any]: jsonargparse would fill in the defaults of every class it names
    networks: dict,
    seeds: list[int],
    run_dir: str = "runs/suite",
    options: list[str] = [],  # noqa: B006
    then: dict = {},  # noqa: B006
    dry_run: bool = False,
    devices: int | None = None,
    runs_per_device: int = 1,
    part: int = 0,
    parts: int = 1,
) -> None:
    """Trains networks × seeds, each in a folder of its own; finished runs are skipped, interrupted ones go on.

    Args:
        base: configuration of every `fit`.
        networks: by name, what is added to `base` for that network.
        seeds: one run of every network for each.
        run_dir: a run's folder in it is `NETWORK/seed=SEED`; the results of all go to `suite.parquet`.
        options: further command line arguments of every verb, such as `["--data.root", "DATA"]`.
        then: verbs that follow each `fit` in its folder (analyze, lesion, sensitivity, sweep, reduce, report), each
            with what is added to its configuration.
        dry_run: print what would be done and its estimated cost, and do nothing.
        devices: devices to spread the runs over, one process each; default: all CUDA devices, one process on the CPU.
        runs_per_device: runs at the same time on each.
        part: number of this process among `parts` that share the suite, such as the tasks of a SLURM job.
        parts: processes that share the suite.
    """
    from lit_prune.cli.prune_cli import fit_parts
    from lit_prune.lab.suite.suite import Suite, device_slots, preview, run_suite

    asked = Suite(Path(run_dir), base, networks, tuple(seeds), tuple(options), then)
    slots = device_slots(devices, runs_per_device)
    table = preview(asked, len(slots), fit_parts) if dry_run else run_suite(asked, slots, part, parts)
    terminal().print(table)
