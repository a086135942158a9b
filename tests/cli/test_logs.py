"""Figures reach any logger, the report reads them, and what is printed without a terminal is one line an epoch."""

import json
from pathlib import Path

import pandas as pd
import pytest
from lightning.pytorch.loggers import CSVLogger

from lit_prune.cli.main import main
from lit_prune.report.event_files import find_curve
from lit_prune.report.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


def test_a_csv_logger_gets_every_figure_and_the_report_draws_from_it(make_run, tmp_path):
    trainer, module, data = make_run(tmp_path, trainer={"logger": CSVLogger(tmp_path, name="csv", version="")})
    trainer.fit(module, data)
    logged = pd.read_csv(tmp_path / "csv" / "metrics.csv")
    stages = {"stage/macs", "stage/params", "stage/kept", "stage/after_surgery", "stage/after_recalibration"}
    assert stages | {"stage/after_repair", "compact/macs", "compact/latency_ms", "compact/accuracy"} <= set(logged)
    kept = logged["stage/kept"].dropna().tolist()
    assert len(kept) == 2 and 1 > kept[0] > kept[1] == pytest.approx(0.5, abs=0.05)
    run = RunFolder(tmp_path)
    curve = find_curve(run.scalars, "train/loss")
    assert len(curve) == 6 and curve["step"].is_monotonic_increasing
    assert run.scalars["stage/after_repair"]["value"].iloc[-1] == logged["compact/accuracy"].dropna().iloc[-1]


def test_without_a_terminal_a_run_prints_one_line_an_epoch_and_no_noise(tmp_path, capsys):
    text = (ROOT / "tests" / "tiny_run.yaml").read_text().replace("enable_progress_bar: false", "")
    config = tmp_path / "run.yaml"
    config.write_text(text.replace("enable_model_summary: false", ""))
    main(["fit", "-c", str(config), "--run_dir", str(tmp_path / "run")])
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("epoch ") and "train/loss" in line]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all("val/accuracy" in line and "learning_rate" in line and len(line) < 120 for line in lines)
    for noise in ("Total FLOPs", "v_num", "weights_only", "━"):
        assert noise not in said
    dense = json.loads((tmp_path / "run" / "stages.jsonl").read_text().splitlines()[0])["params"]["dense"]
    assert f"network: {dense:,} parameters, {dense:,} trainable" in said
    scalars = RunFolder(tmp_path / "run").scalars
    assert len(scalars["learning_rate"]) == 3 and "hp_metric" in scalars and "stage/macs" in scalars
