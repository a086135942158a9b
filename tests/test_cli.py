"""The command line as a user meets it: help, bad input in one line with exit code 2, nothing overwritten."""

import copy
import json
from pathlib import Path

import pytest

import lit_prune
from lit_prune.cli.listing import LIGHTNING
from lit_prune.cli.main import main
from lit_prune.cli.prune_cli import build_cli
from lit_prune.errors import InputError
from lit_prune.train.classifier import LitClassifier
from lit_prune.train.surgeon import Surgeon

ROOT = Path(__file__).resolve().parents[1]
TINY = ["fit", "-c", str(ROOT / "tests" / "tiny_run.yaml")]


def refused(capsys, *arguments: str) -> str:
    """Runs a command that must fail; returns its one line."""
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_help_lists_every_verb(capsys):
    main(["--help"])
    said = capsys.readouterr().out
    for verb in ("fit", "validate", "test", "predict", "compress", "report", "export"):
        assert f"\n  {verb} " in said


@pytest.mark.parametrize("verb", ["fit", "predict"])
def test_help_of_a_trainers_verb_leads_with_our_own_options(capsys, verb):
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    said = capsys.readouterr().out
    assert exit_.value.code == 0 and said.startswith(f"usage: lit-prune {verb} -c RECIPE")
    places = [said.index(f"\n  --{option}") for option in ("run_dir", "model.backbone", "data", "trainer.max_epochs")]
    assert places == sorted(places) and LIGHTNING[verb][:40] in said[: places[0]]


def test_a_run_writes_its_folder_and_a_second_start_changes_nothing(tmp_path, capsys):
    run_dir = tmp_path / "run"
    main([*TINY, "--run_dir", str(run_dir)])
    for name in ("config.yaml", "run.json", "checkpoints/last.ckpt", "stages.jsonl", "compact/report.json"):
        assert (run_dir / name).exists(), name
    record = json.loads((run_dir / "run.json").read_text())
    assert record["seed"] == 7 and record["versions"]["torch"] and len(record["calibration_indices"]) == 64
    assert record["validation"] == {"split": "test", "images": 360}
    assert "!!python" not in (run_dir / "tensorboard" / "hparams.yaml").read_text()
    said = capsys.readouterr().out
    assert "validation reads the test split" in said and "fewer multiply-adds" in said
    before = {path: path.read_bytes() for path in (run_dir / "compact").iterdir()}
    main([*TINY, "--run_dir", str(run_dir)])
    assert {path: path.read_bytes() for path in (run_dir / "compact").iterdir()} == before
    line = refused(capsys, *TINY, "--run_dir", str(run_dir), "--data.batch_size", "16")
    assert "another configuration (data.init_args.batch_size)" in line
    main(["report", "--run_dir", str(run_dir)])
    assert (run_dir / "report.html").stat().st_size > 10_000


def test_a_refused_command_does_not_take_the_folder(tmp_path, capsys):
    command = ["compress", *TINY[1:], "--run_dir", str(tmp_path)]
    assert "needs a trained network" in refused(capsys, *command)
    assert "needs a trained network" in refused(capsys, *command, "--data.batch_size", "16")
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


def test_a_refused_first_fit_leaves_nothing_behind_and_the_corrected_command_runs(tmp_path, capsys):
    run_dir = tmp_path / "run"
    wrong = [*TINY, "--run_dir", str(run_dir), "--trainer.max_epochs", "1"]  # refused in setup: no epoch for repair
    refused(capsys, *wrong)
    assert not run_dir.exists()
    main([*TINY, "--run_dir", str(run_dir), "--trainer.fast_dev_run", "true"])


@pytest.mark.parametrize("wrong", ["magnitud", "l1"])
def test_a_misspelt_score_is_refused_before_anything_is_trained_or_written(tmp_path, capsys, wrong):
    text = (ROOT / "tests" / "tiny_run.yaml").read_text()
    config = tmp_path / "run.yaml"
    config.write_text(text.replace("score: proxy", f"score: {wrong}"))
    line = refused(capsys, "fit", "-c", str(config), "--run_dir", str(tmp_path / "run"))
    assert wrong in line and "magnitude" in line and not (tmp_path / "run").exists()


CORRECTED = "[{class_path: lit_prune.BlockStage, init_args: {epoch: 1, remove_ratio: 0.3}},"
CORRECTED += " {class_path: lit_prune.ChannelStage, init_args: {epoch: 2, keep: 0.6, score: proxy, replace: delete}}]"


def test_a_folder_in_which_nothing_was_trained_takes_another_configuration(tmp_path):
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "epoch=000.parquet").touch()
    (tmp_path / "config.yaml").write_text("model: {backbone: cifar_resnet56}\n")
    main([*TINY, "--run_dir", str(tmp_path), "--trainer.max_epochs", "1", "--trainer.callbacks", "[]"])
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_stages_that_are_not_done_are_corrected_in_place_with_one_option(tmp_path, capsys, monkeypatch):
    carry_out = Surgeon.carry_out

    def fail(surgeon, trainer, subject, stage, record):
        if stage.epoch == 2:
            raise InputError("stage channels cannot be done")
        carry_out(surgeon, trainer, subject, stage, record)

    command = [*TINY, "--run_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Surgeon, "carry_out", fail)
        assert "cannot be done" in refused(capsys, *command)
    other = [*command, "--trainer.callbacks.stages", CORRECTED]
    assert "give --correct_stages true to go on with these stages" in refused(capsys, *other)
    assert "correct_stages" not in refused(capsys, *other, "--data.batch_size", "16", "--correct_stages", "true")
    done = ["--trainer.callbacks.stages", CORRECTED.replace("0.3", "0.5"), "--correct_stages", "true"]
    assert "stage blocks at epoch 1 is done" in refused(capsys, *command, *done)
    main([*other, "--correct_stages", "true"])
    records = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    assert [record["protocol"]["stage"].get("keep") for record in records] == [None, 0.6]
    main(other)  # the folder is that of the corrected run now


def older(settings: dict, *options: tuple) -> dict:
    """Settings without the options, given as paths of keys and positions."""
    settings = copy.deepcopy(settings)
    for *place, name in options:
        part = settings
        for key in place:
            part = part[key]
        del part[name]
    return settings


def test_an_option_that_an_older_run_folder_lacks_counts_with_its_default():
    cli = build_cli(TINY, run=False)
    assert cli.changed_since({}) != []
    present = cli.config_dump
    added = [
        ("model", "compile"),
        ("data", "init_args", "resident"),
        ("trainer", "callbacks", 0, "init_args", "teacher"),
    ]
    assert cli.changed_since(present) == cli.changed_since(older(present, *added)) == []
    changed = build_cli([*TINY, "--model.channels_last", "true"], run=False)
    assert changed.changed_since(older(present, ("model", "channels_last"))) == ["model.channels_last"]
    gone = {**present, "model": {**present["model"], "no_more": 1}}
    assert cli.changed_since(gone) == ["model.no_more"]


def test_test_verb_rebuilds_the_pruned_network_of_a_checkpoint(tmp_path, tiny_run):
    records = [json.loads(line) for line in (tiny_run / "stages.jsonl").read_text().splitlines()]
    last = str(tiny_run / "checkpoints" / "last.ckpt")
    cli = main(["test", *TINY[1:], "--run_dir", str(tmp_path / "test"), "--ckpt_path", last])
    accuracy = cli.trainer.callback_metrics["test/accuracy"].item()
    assert accuracy == pytest.approx(records[-1]["accuracy"]["after_repair"], abs=1e-6)
    module = LitClassifier.load_from_checkpoint(last, map_location="cpu", weights_only=True)
    assert lit_prune.cost(module.backbone, module.example_input).macs == records[-1]["macs"]["after"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.backbone", "cifar_resnet2"], ["cifar_resnet2", "did you mean", "cifar_resnet20"]),
        (["--model.weights", "/nowhere.pth"], ["/nowhere.pth"]),
        (["--data", "lit_prune.data.ImageFolderData", "--data.root", "/nowhere"], ["/nowhere"]),
        (["--trainer.max_epochs", "1"], ["leaves no epoch for repair"]),
        (["--trainer.max_epochs", "many"], ["max_epochs"]),
        (["--model.no_such", "1"], ["no_such"]),
        (["--data", "lightning.pytorch.LightningDataModule"], ["subclass of ImageData", "from Python"]),
        (["--model.class_path", "mine.Module"], ["model.class_path", "--model.backbone package.module:callable"]),
        (["--model.backbone", "mine.Network"], ["mine.Network", "package.module:callable"]),
    ],
)
def test_bad_input_is_one_line_that_names_argument_value_and_remedy(tmp_path, capsys, options, words):
    line = refused(capsys, *TINY, "--run_dir", str(tmp_path / "run"), *options)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("keep", ["0", "1.5", "-0.2"])
def test_budgets_outside_their_range_are_refused(tmp_path, capsys, keep):
    text = (ROOT / "tests" / "tiny_run.yaml").read_text().replace("keep: 0.5", f"keep: {keep}")
    config = tmp_path / "run.yaml"
    config.write_text(text)
    line = refused(capsys, "fit", "-c", str(config), "--run_dir", str(tmp_path / "run"))
    assert "keep must lie in (0, 1]" in line and keep in line


def test_compress_without_trained_weights_is_refused(tmp_path, capsys):
    line = refused(capsys, "compress", *TINY[1:], "--run_dir", str(tmp_path / "run"))
    assert "needs a trained network" in line and "--model.weights" in line


def test_report_of_no_run_and_export_of_no_model_are_refused(tmp_path, capsys):
    assert str(tmp_path) in refused(capsys, "report", "--run_dir", str(tmp_path))
    assert str(tmp_path) in refused(capsys, "export", "--run_dir", str(tmp_path))


def test_an_unknown_verb_is_refused(capsys):
    assert "prune" in refused(capsys, "prune")


def test_compress_sweeps_block_ratios_and_resumes(tmp_path, capsys):
    main([*TINY, "--run_dir", str(tmp_path / "dense"), "--trainer.callbacks", "[]", "--trainer.max_epochs", "1"])
    config = tmp_path / "blocks.yaml"
    config.write_text(
        (ROOT / "tests" / "tiny_run.yaml").read_text().split("          - class_path: lit_prune.ChannelStage")[0]
    )
    command = ["compress", "-c", str(config), "--run_dir", str(tmp_path / "sweep"), "--repair_epochs", "1"]
    command += ["--model.weights", str(tmp_path / "dense" / "checkpoints" / "last.ckpt"), "--ratios", "[0.2, 0.5]"]
    for ratios, words in (("[0.301, 0.302]", "the same as 0.301"), ("[0.5, 0.01]", "0.01 removes 0 blocks")):
        assert words in refused(capsys, *command[:-1], ratios)
    assert not list((tmp_path / "sweep").glob("ratio=*"))
    main(command)
    reports = sorted((tmp_path / "sweep").glob("ratio=*/compact/report.json"))
    assert [file.parts[-3] for file in reports] == ["ratio=0.20", "ratio=0.50"]
    figures = [json.loads(file.read_text()) for file in reports]
    assert figures[0]["dense"]["macs"] > figures[0]["compact"]["macs"] > figures[1]["compact"]["macs"]
    reports[1].unlink()
    stamp = reports[0].stat().st_mtime_ns
    main(command)
    assert reports[0].stat().st_mtime_ns == stamp and reports[1].exists()
