"""The verb `sweep`: cells computed once whatever happens, alike for every executor, honest about failures."""

import importlib.util
import json
from collections import Counter

import pandas as pd
import pytest
import torch

from lit_prune.cli.main import main
from lit_prune.cli.trainer import Trainer
from lit_prune.data import DigitsData
from lit_prune.errors import InputError
from lit_prune.lab.sweep import fill
from lit_prune.lab.sweep.recovery import recover
from lit_prune.lab.sweep.request import SweepRequest
from lit_prune.replace import Replacement, replace_mechanisms
from lit_prune.report import write_report
from lit_prune.structure import Plan, apply_plan, cost
from lit_prune.train.batchnorm import recalibrate_batchnorm
from lit_prune.train.classifier import LitClassifier
from lit_prune.train.evaluation import evaluate

REQUEST = {"methods": ("magnitude", "composite_ix"), "sparsities": (0.3, 0.6), "max_batches": 2, "limit_test": 40}


def digits() -> DigitsData:
    return DigitsData(resolution=8, train_size=96, calibration_size=48, batch_size=32, pad=1)


def module() -> LitClassifier:
    torch.manual_seed(3)
    built = LitClassifier("cifar_resnet20", 10, digits().image_shape)
    built.is_trained = True
    return built


def sweep(run_dir, checkpoints=None, **changes) -> pd.DataFrame:
    """A sweep of a network with seeded weights on digits; returns its table."""
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=run_dir, enable_progress_bar=False)
    trainer.sweep(module(), digits(), SweepRequest(**{**REQUEST, **changes}), checkpoints)
    return pd.read_parquet(run_dir / "sweep.parquet")


def same(first: pd.DataFrame, second: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(first.drop(columns="seconds"), second.drop(columns="seconds"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> pd.DataFrame:
    """The table of an undisturbed sweep in one process."""
    return sweep(tmp_path_factory.mktemp("reference"), seeds=(0, 1))


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """Counts how often each cell is computed; `calls.limit` stops the process as a kill would."""
    counter, original = Counter(), fill.run_cell
    counter.limit = None

    def counted(place, cell, plan):
        if counter.limit is not None and sum(counter.values()) >= counter.limit:
            raise KeyboardInterrupt
        counter[cell] += 1
        return original(place, cell, plan)

    monkeypatch.setattr(fill, "run_cell", counted)
    return counter


def test_a_killed_sweep_resumes_with_equal_tables_and_computes_no_cell_twice(tmp_path, reference, calls):
    calls.limit = 5
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, seeds=(0, 1))
    assert not (tmp_path / "sweep.parquet").exists()
    plans = {file: file.stat().st_mtime_ns for file in (tmp_path / "sweep" / "plans").iterdir()}
    calls.limit = None
    same(sweep(tmp_path, seeds=(0, 1)), reference)
    assert len(calls) == len(reference) == 8 and set(calls.values()) == {1}
    assert {file: file.stat().st_mtime_ns for file in plans} == plans
    assert not list(tmp_path.rglob("*.partial"))


def test_another_method_adds_its_own_cells_alone_and_another_protocol_starts_anew(tmp_path, calls):
    first = sweep(tmp_path)
    calls.clear()
    wider = sweep(tmp_path, methods=("magnitude", "fpgm", "composite_ix"))
    assert {cell.method for cell in calls} == {"fpgm"} and sum(calls.values()) == 2
    same(wider[wider["method"] != "fpgm"].reset_index(drop=True), first)
    calls.clear()
    sweep(tmp_path, max_batches=1)
    assert len(calls) == 4
    calls.clear()
    same(sweep(tmp_path), first)
    assert not calls


def test_a_failing_cell_is_recorded_the_others_go_on_and_the_next_start_tries_it_again(tmp_path, monkeypatch, calls):
    whole = fill.run_cell

    def failing(place, cell, plan):
        if (cell.method, cell.sparsity) == ("magnitude", 0.6):
            raise RuntimeError("no memory\nleft")
        return whole(place, cell, plan)

    monkeypatch.setattr(fill, "run_cell", failing)
    with pytest.raises(SystemExit) as exit_:
        sweep(tmp_path)
    assert "1 of 4 cells failed" in str(exit_.value) and "RuntimeError: no memory left" in str(exit_.value)
    table = pd.read_parquet(tmp_path / "sweep.parquet").set_index(["method", "sparsity"])
    assert table["error"].notna().sum() == 1 and sum(calls.values()) == 3
    assert table.loc[("magnitude", 0.6), "error"] == "RuntimeError: no memory left"
    assert table["accuracy_after"].isna().sum() == 1
    monkeypatch.setattr(fill, "run_cell", whole)
    calls.clear()
    assert sweep(tmp_path)["error"].isna().all()
    assert [(cell.method, cell.sparsity) for cell in calls] == [("magnitude", 0.6)]


def test_the_command_exits_with_1_when_a_cell_fails(tmp_path, monkeypatch, capsys):
    config = "tests/tiny_run.yaml"
    torch.save(module().backbone.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr(fill, "run_cell", lambda place, cell, plan: 1 / 0)
    command = ["sweep", "-c", config, "--run_dir", str(tmp_path), "--checkpoints", f"[{tmp_path}/weights.pth]"]
    command += ["--request.methods", "[magnitude]", "--request.sparsities", "[0.5]", "--request.limit_test", "20"]
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert "ZeroDivisionError" in str(exit_.value.code)  # Python prints it and exits with 1


def test_two_processes_compute_what_one_does(tmp_path, reference):
    same(sweep(tmp_path, seeds=(0, 1), workers=2), reference)


@pytest.mark.slow  # starting Ray takes longer than the sweep
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`")
def test_two_ray_workers_compute_what_one_process_does(tmp_path, reference):
    same(sweep(tmp_path, seeds=(0, 1), executor="ray", workers=2), reference)


def test_ray_without_its_package_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="extra with pip install"):
        sweep(tmp_path, executor="ray")


def test_seeds_draw_their_own_data_and_random_scores_but_share_what_is_fixed(reference):
    one, other = (reference[reference["seed"] == seed].reset_index(drop=True) for seed in (0, 1))
    fixed = one["method"] == "magnitude"
    assert (one["macs"] == other["macs"])[fixed].all() and (one["accuracy_before"] == other["accuracy_before"])[
        fixed
    ].all()
    assert (reference["unit_kind"] == "draw").all() and set(reference["unit"]) == {"0", "1"}
    assert reference["accuracy_dense"].nunique() == 1 and (reference["test_images"] == 40).all()
    batches = [next(iter(digits().redrawn(seed).train_dataloader()))[1].tolist() for seed in (0, 1)]
    assert batches[0] != batches[1]


def test_the_accuracy_at_a_check_is_that_of_a_recovery_of_so_many_batches(tmp_path):
    long = sweep(tmp_path / "long", max_batches=5, recovery_checks=(2,), recoveries=("sgd", "adam"))
    short = sweep(tmp_path / "short", max_batches=2, recoveries=("sgd", "adam"))
    assert long["accuracy_batches_2"].tolist() == short["accuracy_after"].tolist()
    assert (long["batches"] == 5).all() and (short["batches"] == 2).all()
    budgets = pd.read_parquet(tmp_path / "long" / "sweep" / "recovery.parquet")
    assert set(budgets["batches"]) == {0, 2, 5}


def test_no_recovery_leaves_the_pruned_network_as_it_is(tmp_path):
    table = sweep(tmp_path, recoveries=("none",))
    assert (table["accuracy_after"] == table["accuracy_before"]).all() and (table["batches"] == 0).all()


def test_a_repair_without_training_comes_first_and_is_what_training_goes_on_from(tmp_path):
    kinds = ("none", "recalibrate", "recalibrate_sgd", "refit", "refit_sgd")
    table = sweep(tmp_path, methods=("magnitude",), sparsities=(0.6,), limit_test=400, recoveries=kinds)
    table = table.set_index("recovery").loc[list(kinds)]
    assert table["accuracy_before"].nunique() == 1 and table["first"].tolist() == [k.split("_")[0] for k in kinds]
    for kind in ("recalibrate", "refit"):
        assert table.loc[kind, "accuracy_repaired"] == table.loc[kind, "accuracy_after"]
        assert table.loc[f"{kind}_sgd", "accuracy_repaired"] == table.loc[kind, "accuracy_after"]
    assert table["batches"].tolist() == [0, 0, 2, 0, 2] and table["macs"].nunique() == 1
    data, model, example = digits(), module().backbone.eval(), torch.zeros(1, *digits().image_shape)
    data.setup()
    plans = json.loads(next((tmp_path / "sweep" / "plans").glob("magnitude-*.json")).read_text())["plans"]
    plan = Plan.from_dict(plans[0]["plan"])
    settings = Replacement(unsupported="delete", towards="weights", noise=0.1)
    solved = replace_mechanisms(model, plan, data.calibration_dataloader(), "refit", example, settings=settings).model
    recalibrated = apply_plan(model, plan, example)
    recalibrate_batchnorm(recalibrated, data.recalibration_dataloader())
    for kind, network in (("refit", solved), ("recalibrate", recalibrated)):
        found = evaluate(network, data.subset_dataloader("test", 400)).figure
        assert table.loc[kind, "accuracy_after"] == pytest.approx(found, abs=0.006)


def test_costs_and_plans_are_those_of_physical_removal(tmp_path):
    table = sweep(tmp_path, methods=("fpgm",), recoveries=("none",), allocations=("uniform",)).iloc[1]
    plans = json.loads(next((tmp_path / "sweep" / "plans").glob("fpgm-*.json")).read_text())["plans"]
    backbone, example = module().backbone, torch.zeros(1, *digits().image_shape)
    small = apply_plan(backbone, Plan.from_dict(plans[1]["plan"]), example)
    assert table["macs"] == cost(small, example).macs and table["params"] == cost(small, example).params
    assert table["macs_removed"] == pytest.approx(1 - table["macs"] / cost(backbone, example).macs)
    assert table["channels_removed"] == pytest.approx(0.6, abs=0.01)


def test_hybrid_allocation_takes_widths_from_taylor_and_channels_from_the_method(tmp_path):
    sweep(tmp_path, methods=("taylor", "magnitude"), recoveries=("none",), allocations=("global", "hybrid"))
    plans = {}
    for method in ("taylor", "magnitude"):
        entries = json.loads(next((tmp_path / "sweep" / "plans").glob(f"{method}-*.json")).read_text())["plans"]
        plans |= {(method, e["allocation"], e["sparsity"]): e["plan"]["keep_channels"] for e in entries}
    for sparsity in REQUEST["sparsities"]:
        taylor, hybrid = plans["taylor", "global", sparsity], plans["magnitude", "hybrid", sparsity]
        assert {g: len(kept) for g, kept in hybrid.items()} == {g: len(kept) for g, kept in taylor.items()}
        assert hybrid != taylor and plans["taylor", "hybrid", sparsity] == taylor
    rules = pd.read_parquet(tmp_path / "sweep" / "rules.parquet").set_index(["method", "allocation"])["mean"]
    assert rules["taylor", "global"] == rules["taylor", "hybrid"]


@pytest.mark.usefixtures("without_drawing")
def test_masks_are_labelled_keep_the_parameters_and_count_multiply_adds_as_if_removed(tmp_path):
    table = sweep(tmp_path, methods=("fpgm", "magnitude"), recoveries=("none",), removals=("physical", "mask"))
    physical, masked = (table[table["removal"] == removal].reset_index(drop=True) for removal in ("physical", "mask"))
    assert (masked["params"] == masked["params_dense"]).all() and (physical["params"] < physical["params_dense"]).all()
    assert (masked["macs_removed"] > 0).all() and (masked["macs"] != physical["macs"]).any()
    assert masked["channels_removed"].to_numpy() == pytest.approx(masked["sparsity"], abs=0.01)
    write_report(tmp_path)
    assert "global, masked (not removed), no recovery" in (tmp_path / "report.html").read_text()
    assert {"sweep.svg", "sweep_gaps.svg"} & {file.name for file in (tmp_path / "figures").iterdir()}


def test_several_checkpoints_are_model_seeds(tmp_path):
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        files.append(str(tmp_path / f"{seed}.pth"))
        torch.save(LitClassifier("cifar_resnet20", 10, digits().image_shape).backbone.state_dict(), files[-1])
    table = sweep(tmp_path / "run", files, recoveries=("none",))
    assert table.groupby("unit", sort=False).size().to_dict() == {file: 4 for file in files}
    assert (table["unit_kind"] == "model").all() and not set(files) - set(table["checkpoint"])
    gaps = pd.read_parquet(tmp_path / "run" / "sweep" / "gaps.parquet")
    assert (gaps["units"] == 2).all()


def test_recovery_trains_with_the_optimizer_of_the_protocol(tmp_path):
    fields = SweepRequest(**REQUEST).recovery_fields("sgd") | {"max_batches": 1}
    net = module().backbone
    images, labels = next(iter(digits().train_dataloader()))
    expected = module().backbone.train()
    loss = torch.nn.functional.cross_entropy(expected(images), labels)
    gradient = torch.autograd.grad(loss, expected.linear.weight)[0]
    weight = expected.linear.weight.detach()
    assert list(recover(net, digits(), fields, "32-true", 0)) == [1]
    torch.testing.assert_close(net.linear.weight.detach(), weight - 0.01 * (gradient + 1e-4 * weight))


def test_the_subset_of_the_test_images_is_balanced_and_splits_survive_a_redraw():
    data = digits()
    data.setup()
    labels = torch.cat([labels for _, labels in data.subset_dataloader("test", 30)])
    assert torch.bincount(labels, minlength=10).tolist() == [3] * 10
    other = data.redrawn(1)
    assert other.calibration_indices != data.calibration_indices
    assert torch.equal(other.train_positions, data.train_positions) and data.seed == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("composit_ix",)}, "did you mean composite_ix"),
        ({"sparsities": (0.5, 1.0)}, "sparsities: 1.0 lies outside"),
        ({"seeds": ()}, "seeds: empty"),
        ({"seeds": (2**32,)}, "is no seed"),
        ({"alphas": (float("nan"),)}, "'nan' that is not a number"),
        ({"recovery_checks": (2,)}, "recovery_checks: 2 must lie in"),
        ({"normalisation": "softmax"}, "normalisation='softmax' is unknown"),
        ({"removals": ("mask",), "recoveries": ("refit",)}, "'refit' goes with physical removal"),
        ({"recoveries": ("sgdd",)}, "'sgdd' is none of sgd, adam"),
        ({"removals": ("mask",), "allocations": ("hybrid",)}, "'mask' goes with the allocations global and uniform"),
    ],
)
def test_bad_requests_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        SweepRequest(**{**REQUEST, **changes})


def test_checkpoints_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    torch.save({"conv1.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    for file, words in ((tmp_path / "other.pth", "other.pth"), (tmp_path / "none.pth", "no such file")):
        with pytest.raises(InputError, match=words):
            sweep(tmp_path / "run", [str(file)])
    assert not (tmp_path / "run").exists()


def test_an_unknown_method_on_the_command_line_is_one_line_with_near_matches(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["sweep", "-c", "tests/tiny_run.yaml", "--run_dir", str(tmp_path / "r"), "--request.methods", "[tailor]"])
    assert exit_.value.code == 2 and "did you mean taylor" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
