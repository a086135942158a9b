"""Exported files compute what the network computes, and an unverified file never appears."""

import errno
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lit_prune import export, save_compact
from lit_prune.errors import InputError
from lit_prune.export import ExportError, Format, export_compact, export_module, read_input_shape
from lit_prune.models import PaddedShortcut, build_backbone

INPUT_SHAPE = (3, 12, 12)


def outputs_of(format_name: str, file: str, images: torch.Tensor) -> np.ndarray:
    """Runs an exported file with the public runtime of its format, not with the exporter's own reader."""
    if format_name == "torch_export":
        return torch.export.load(file).module()(images).detach().numpy()
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


def assert_same(model: nn.Module, report: dict, input_shape: tuple[int, ...]) -> None:
    for name, entry in report.items():
        assert entry["bytes"] == Path(entry["file"]).stat().st_size
        for batch in (1, 3, 5):
            images = torch.randn(batch, *input_shape)
            expected = model.eval()(images).detach().numpy()
            np.testing.assert_allclose(outputs_of(name, entry["file"], images), expected, atol=1e-5, rtol=1e-5)


def test_conv_net_gives_equal_outputs_in_both_formats_at_any_batch_size(tiny_net: nn.Module, tmp_path: Path, capfd):
    tiny_net.train()
    report = export_module(tiny_net, INPUT_SHAPE, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert all(module.training for module in tiny_net.modules())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.pt2"]
    assert set(report) == {"onnx", "torch_export"}
    assert_same(tiny_net, report, INPUT_SHAPE)


@pytest.mark.parametrize(("width", "uneven"), [(8, 0), (6, 2)])
def test_the_report_counts_the_widths_that_onnx_runtime_pads(tmp_path, width, uneven):
    net = nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten())
    assert export_module(net, INPUT_SHAPE, tmp_path, ("onnx",))["onnx"]["uneven_convolutions"] == uneven


def test_padded_shortcuts_survive_the_export(tmp_path: Path):
    torch.manual_seed(0)
    model = build_backbone("cifar_resnet20", num_classes=5)
    for module in model.modules():
        if isinstance(module, PaddedShortcut):
            module.source = [3, -1, *module.source[2:]]  # not what option A gives: the table of a pruned network
    assert_same(model, export_module(model, (3, 16, 16), tmp_path), (3, 16, 16))


def test_file_that_computes_something_else_is_removed_and_an_older_one_stays(tiny_net, tmp_path: Path, monkeypatch):
    right = export.FORMATS["torch_export"]

    def load_wrong(path: Path):
        run = right.load(path)
        return lambda images: run(images) * 1.001

    (tmp_path / "model.pt2").write_bytes(b"older")
    monkeypatch.setitem(export.FORMATS, "torch_export", Format(right.file, right.write, load_wrong))
    with pytest.raises(ExportError, match="torch_export: outputs differ by"):
        export_module(tiny_net, INPUT_SHAPE, tmp_path, ("torch_export",))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_bytes() == b"older"


class Diverging(nn.Module):
    """Its outputs are NaN."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) / 0.0 - images.mean((2, 3)) / 0.0


class DataDependent(nn.Module):
    """Branches on its input, which no exporter can follow."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


@pytest.mark.parametrize("model", [Diverging(), DataDependent()], ids=["nan", "data-dependent"])
def test_network_that_cannot_be_verified_leaves_no_file(model: nn.Module, tmp_path: Path):
    with pytest.raises(ExportError, match="format torch_export") as raised:
        export_module(model, INPUT_SHAPE, tmp_path, ("torch_export",))
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_operator_set_is_the_one_asked_for_or_an_error(tiny_net: nn.Module, tmp_path: Path):
    onnx = pytest.importorskip("onnx")
    entry = export_module(tiny_net, INPUT_SHAPE, tmp_path, ("onnx",), opset=20)["onnx"]
    assert [opset.version for opset in onnx.load(entry["file"]).opset_import if not opset.domain] == [20]
    with pytest.raises(InputError, match="opset=5"):
        export_module(tiny_net, INPUT_SHAPE, tmp_path / "old", ("onnx",), opset=5)
    assert list((tmp_path / "old").iterdir()) == []


@pytest.mark.parametrize("formats", [(), ("onnx", "tflite")])
def test_unknown_format_is_an_input_error(tiny_net: nn.Module, tmp_path: Path, formats: tuple[str, ...]):
    with pytest.raises(InputError, match="choose from onnx, torch_export"):
        export_module(tiny_net, INPUT_SHAPE, tmp_path, formats)


def test_a_full_disk_is_said_as_such_and_is_no_fault_of_the_network(tiny_net, tmp_path: Path, monkeypatch):
    def write(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    right = export.FORMATS["torch_export"]
    monkeypatch.setitem(export.FORMATS, "torch_export", Format(right.file, write, right.load))
    with pytest.raises(OSError, match="No space left"):
        export_module(tiny_net, (3, 8, 8), tmp_path, ("torch_export",))
    assert not list(tmp_path.iterdir())


def test_missing_extra_names_the_remedy(tiny_net: nn.Module, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(InputError, match=r"onnxscript missing; pip install 'lit-prune\[export\]'"):
        export_module(tiny_net, INPUT_SHAPE, tmp_path, ("onnx",))


def test_module_imports_without_the_extra(monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("export_without_extra", export.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert set(module.FORMATS) == {"onnx", "torch_export"}


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"input_shape": [3, 32]}', '{"input_shape": null}'])
def test_damaged_structure_file_is_an_input_error(tmp_path: Path, content: str):
    (tmp_path / "structure.json").write_text(content)
    with pytest.raises(InputError, match="structure.json is damaged"):
        read_input_shape(tmp_path)


def test_compact_folder_is_exported_from_what_it_holds_alone(tmp_path: Path):
    torch.manual_seed(0)
    model = build_backbone("cifar_convnet", num_classes=4)
    structure = {"backbone": "cifar_convnet", "arguments": {"num_classes": 4}, "input_shape": (3, 32, 32), "plans": []}
    save_compact(tmp_path / "compact", model, **structure)
    report = export_compact(tmp_path / "compact", tmp_path / "out", ("torch_export",))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.pt2"]
    assert_same(model, report, (3, 32, 32))


def test_damaged_or_absent_compact_folder_is_an_input_error_and_nothing_is_written(tmp_path: Path):
    folder = tmp_path / "compact"
    with pytest.raises(InputError, match="compact"):
        export_compact(folder, tmp_path / "out")
    folder.mkdir()
    (folder / "structure.json").write_text(json.dumps({"input_shape": [3, 8, 8]}))
    with pytest.raises(InputError):
        export_compact(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
