"""What leaves the house: ONNX with the preparation inside or beside, INT8 beside float, times and their worth."""

import json
from importlib.util import find_spec

import pytest
import torch
import yaml

from lit_prune import InputError, Preparation, cost, load_compact, save_compact, timing
from lit_prune.cli.main import main
from lit_prune.data import DigitsData
from lit_prune.deployment import Setting, latency_table, measure_deployment
from lit_prune.export import export_compact
from lit_prune.models import build_network
from lit_prune.predict import read_prepared
from lit_prune.report.tables import result_cells
from lit_prune.structure.latency import time_networks
from lit_prune.structure.record import Record, note_record
from lit_prune.timing import Timing, busy, circumstances, time_runs

onnxruntime = pytest.importorskip("onnxruntime")
OPENVINO = ("OpenVINO",) if find_spec("openvino") else ()
ARGUMENTS = {"num_classes": 10, "in_channels": 1}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run folder with a compact network for digit images and the configuration of its data."""
    folder = tmp_path_factory.mktemp("run")
    data = {"resolution": 8, "calibration_size": 32, "train_size": 64, "seed": 3}
    images = DigitsData(**data)
    images.setup()
    torch.manual_seed(0)
    network = build_network("cifar_resnet20", ARGUMENTS).eval()
    save_compact(
        folder / "compact",
        network,
        backbone="cifar_resnet20",
        arguments=ARGUMENTS,
        input_shape=(1, 8, 8),
        preparation=images.preparation,
    )
    settings = {"data": {"class_path": "lit_prune.data.DigitsData", "init_args": data}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def exported(run_dir):
    main(["export", "--run_dir", str(run_dir), "--formats", "[onnx]", "--normalisation", "inside", "--int8", "true"])
    return run_dir / "export"


def session(file):
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def test_the_exported_file_says_how_images_are_prepared_and_normalises_them_itself(run_dir, exported):
    said = session(exported / "model.onnx").get_modelmeta().custom_metadata_map
    preparation = Preparation(**json.loads(said["preparation"]), classes=json.loads(said["classes"]))
    images = DigitsData(resolution=8)
    images.setup()
    assert preparation == images.preparation and said["input_scale"] == "0..1"
    raw = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    (logits,) = session(exported / "model.onnx").run(None, {"images": raw.numpy()})
    expected = load_compact(run_dir / "compact")(preparation.normalise(raw))
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=1e-4)


def test_openvino_reads_the_exported_file_and_gives_the_same(run_dir, tmp_path):
    pytest.importorskip("openvino")
    report = export_compact(run_dir / "compact", tmp_path, ("onnx",))["onnx"]
    assert 0 <= report["openvino_max_abs_difference"] < 1e-4


def test_int8_is_smaller_and_mostly_decides_as_the_float_with_both_figures_told(exported):
    report = json.loads((exported / "int8.json").read_text())
    assert report["calibration_images"] == 32 and report["images"] == 360
    assert report["int8"]["bytes"] < report["float"]["bytes"] and report["agreement"] > 0.8
    raw = [1.0 * (DigitsData(resolution=8).load_split("test").pixels / 255).numpy()]
    classes = session(exported / "model.onnx").run(None, {"images": raw[0].astype("float32")})[0].argmax(1)
    truth = DigitsData(resolution=8).load_split("test").labels.numpy()
    assert report["float"]["accuracy"] == pytest.approx((classes == truth).mean(), abs=1e-9)
    assert {"median", "spread", "passes", "noisy"} == set(report["int8"]["latency_ms"])


def test_int8_without_data_of_ours_or_images_is_refused_in_a_line(run_dir, tmp_path, capsys):
    network = note_record(load_compact(run_dir / "compact"), Record())  # nothing says how images are prepared for it
    save_compact(tmp_path / "compact", network, backbone="cifar_resnet20", arguments=ARGUMENTS, input_shape=(1, 8, 8))
    (tmp_path / "config.yaml").write_text("data: {class_path: os.system, init_args: {command: ls}}")
    for more, words in ((["--int8", "true"], "no data set of lit_prune"), (["--normalisation", "inside"], "with what")):
        with pytest.raises(SystemExit):
            main(["export", "--run_dir", str(tmp_path), "--formats", "[onnx]", *more])
        assert words in capsys.readouterr().err


@pytest.mark.usefixtures("exported")
def test_latency_has_every_runtime_the_int8_file_and_every_batch_size_and_says_what_it_holds_for(run_dir):
    found = measure_deployment(run_dir, Setting((1, 2), rounds=3, threads=1))
    rows = [(row["network"], row["runtime"], row["batch"]) for row in found["rows"]]
    kinds = [(name, kind) for name in ("dense", "compact") for kind in ("eager", "ONNX Runtime", *OPENVINO)]
    kinds.append(("compact", "ONNX Runtime, INT8"))
    assert rows == [(*kind, batch) for batch in (1, 2) for kind in kinds]
    assert json.loads((run_dir / "latency.json").read_text()) == found
    assert found["circumstances"]["threads"] == 1 and {"device", "date", "load"} <= found["circumstances"].keys()
    assert latency_table(found).row_count == len(rows)
    with pytest.raises(InputError, match="at least 1"):
        Setting((0,))


def test_a_folder_of_images_is_halved_to_calibrate_and_to_compare(run_dir, tmp_path):
    from PIL import Image

    from lit_prune.quantise import batches_of_folder
    from lit_prune.structure import read_preparation

    preparation = read_preparation(run_dir / "compact")
    for value in range(5):
        Image.new("L", (8, 8), 50 * value).save(tmp_path / f"{value}.png")
    calibration, [(compared, labels)] = batches_of_folder(tmp_path, preparation)
    assert len(list(calibration)) == 3 and len(compared) == 2 and labels is None
    assert compared[0].mean() == pytest.approx(
        float(preparation.normalise(torch.full((1, 1, 1, 1), 50 / 255))), abs=0.01
    )
    with pytest.raises(InputError, match="holds 0 images"):
        batches_of_folder(tmp_path / "none", preparation)


def test_the_median_stands_beside_its_spread_and_a_wide_one_is_said(monkeypatch):
    calm, wild = Timing.of([0.001] * 9), Timing.of([0.001, 0.002, 0.004, 0.001, 0.003])
    assert (calm.median, calm.spread, calm.noisy) == (pytest.approx(1), 0, False)
    assert wild.noisy and "NOISY" in str(wild) and "NOISY" not in str(calm)
    monkeypatch.setattr(timing, "WARM_UP", 3)
    order = []
    times = time_runs([lambda: order.append("a"), lambda: order.append("b")], rounds=4, seconds=0)
    assert order == ["a", "b"] * 7 and [time.passes for time in times] == [4, 4]  # three rounds to warm up


def test_times_of_a_busy_machine_are_called_noisy_and_have_no_change_beside_them():
    result = {
        name: {"accuracy": 0.9, "macs": 4, "params": 4, "latency_ms": 5.0, "throughput": t, "bytes": 9, "noisy": False}
        for name, t in (("dense", 600.0), ("compact", 36.0))
    }
    calm = circumstances() | {"load": 0.5, "cores": 2}
    assert not busy(calm) and busy(calm | {"load": 7.0})
    notes = [result_cells(result | {"timing": said}).rows[-1][5].note for said in (calm, calm | {"load": 7.0})]
    assert notes == ["−94.0 %", "noisy"]
    assert "busy" in result_cells(result | {"timing": calm | {"load": 7.0}}).caption


def test_networks_of_one_time_take_turns_and_stay_in_their_mode():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Dropout()).train()
    assert time_networks([model, model], (1, 8, 8), repeats=2)[0].passes == 2
    assert model.training and cost(model, torch.zeros(1, 1, 8, 8)).params == 20


def test_a_grey_image_file_reaches_a_grey_network(run_dir, tmp_path):
    from PIL import Image

    from lit_prune.structure import read_preparation

    Image.new("L", (16, 16), 128).save(tmp_path / "grey.png")
    prepared = read_prepared(tmp_path / "grey.png", read_preparation(run_dir / "compact"))
    assert prepared.shape == (1, 8, 8) and prepared.std() < 1e-6
