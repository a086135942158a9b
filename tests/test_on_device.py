"""What the core does on the device of `--device` is what it does on the CPU, for every public function and score."""

import pandas as pd
import pytest
import torch
from torch import nn

import lit_prune
from lit_prune.data import DigitsData
from lit_prune.replace import STAND_INS
from lit_prune.scores import SCORES
from lit_prune.train.evaluation import evaluate

pytestmark = pytest.mark.device
IMAGES = 128


def network(device: torch.device | str) -> nn.Module:
    from lit_prune.models import build_backbone

    torch.manual_seed(0)
    model = build_backbone("cifar_convnet", num_classes=4, widths=[8, 12])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return model.eval().to(device)


def batches(seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = [(torch.rand(32, 3, 8, 8, generator=generator), torch.arange(32) % 4) for _ in range(4)]
    return [(images * (1 + labels[:, None, None, None]), labels) for images, labels in draw]


def example(device: torch.device | str) -> torch.Tensor:
    return batches()[0][0][:1].to(device)


def plan_of(model: nn.Module, device: torch.device | str) -> lit_prune.Plan:
    scores = {n: torch.arange(len(m.weight)) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return lit_prune.make_plan(model, scores, example(device), keep=0.5, allocation="uniform")


def outputs(model: nn.Module, device: torch.device | str) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(images.to(device)) for images, _ in batches(1)]).cpu()


def test_the_channel_table(device):
    found, wanted = (lit_prune.measure(network(place), batches()) for place in (device, "cpu"))
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SCORES)
def test_every_score(device, name):
    found, wanted = (lit_prune.score(network(place), name, batches()) for place in (device, "cpu"))
    assert found.keys() == wanted.keys()
    for layer, values in wanted.items():
        if name == "conditional_information" and len(values) > IMAGES:
            continue  # what more channels than images add is rounding
        torch.testing.assert_close(found[layer].cpu(), values, rtol=2e-2, atol=2e-2, equal_nan=True)


def test_plan_and_surgery(device):
    models = [network(place) for place in (device, "cpu")]
    plans = [plan_of(model, place) for model, place in zip(models, (device, "cpu"), strict=True)]
    assert plans[0].to_dict() == plans[1].to_dict()
    small = lit_prune.apply_plan(models[0], plans[0], example(device))
    assert all(tensor.device.type == device.type for tensor in small.state_dict().values())
    wanted = lit_prune.apply_plan(models[1], plans[1], example("cpu"))
    torch.testing.assert_close(outputs(small, device), outputs(wanted, "cpu"), rtol=1e-3, atol=1e-3)
    assert lit_prune.cost(small, example(device)).macs == lit_prune.cost(wanted, example("cpu")).macs


@pytest.mark.parametrize("kind", STAND_INS)
def test_every_stand_in(device, kind):
    found = []
    for place in (device, "cpu"):
        model = network(place)
        plan = plan_of(model, place)
        reduced = lit_prune.replace_mechanisms(model, plan, batches(), kind, example_input=example(place))
        found.append(outputs(reduced.model, place))
        agreement = lit_prune.interchange(model, reduced, batches(), example_input=example(place))
        assert 0 <= agreement.iia <= 1
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


def test_recalibration_and_evaluation(device):
    models = [network(place) for place in (device, "cpu")]
    for model in models:
        lit_prune.recalibrate_batchnorm(model, batches())
    for one, other in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)
    found, wanted = (evaluate(model, batches()) for model in models)
    assert found.figure == pytest.approx(wanted.figure, abs=0.02)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-3)


def test_a_compact_folder_of_a_network_on_the_device(device, tmp_path):
    model = network(device)
    plan = plan_of(model, device)
    small = lit_prune.apply_plan(model, plan, example(device)).eval()
    arguments = {"num_classes": 4, "widths": [8, 12]}
    details = {"backbone": "cifar_convnet", "arguments": arguments, "input_shape": (3, 8, 8), "plans": [plan]}
    lit_prune.save_compact(tmp_path / "compact", small, **details)
    loaded = lit_prune.load_compact(tmp_path / "compact")
    assert all(torch.equal(value, small.state_dict()[name].cpu()) for name, value in loaded.state_dict().items())


def test_compress(device):
    small, report = lit_prune.compress(network(device), batches(), keep=0.6)
    assert next(small.parameters()).device.type == device.type
    assert lit_prune.cost(small, example(device)).macs <= 0.6 * lit_prune.cost(network(device), example(device)).macs


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_a_run_with_traces_stages_distillation_and_a_regulariser(device, tmp_path, make_run, precision):
    callbacks = [lit_prune.AxisTrace(), lit_prune.GradientTrace(), lit_prune.Decorrelation()]
    options = {"accelerator": "gpu" if device.type == "cuda" else "cpu", "precision": precision}
    trainer, module, data = make_run(tmp_path, max_epochs=6, callbacks=callbacks, trainer=options)
    trainer.fit(module, datamodule=data)
    small = lit_prune.load_compact(tmp_path / "compact")
    saved = {name.removeprefix("backbone."): value.cpu() for name, value in module.state_dict().items()}
    assert all(torch.equal(value, saved[name]) for name, value in small.state_dict().items())
    assert (tmp_path / "trace" / "dynamics.parquet").exists()


@pytest.mark.parametrize("resident", [True, False])
def test_batches_of_resident_images_are_those_of_the_cpu(device, monkeypatch, resident):
    found = []
    for place in (device, torch.device("cpu")):
        data = DigitsData(resolution=8, train_size=64, calibration_size=16, batch_size=16, pad=1, resident=resident)
        data.prepare_data()
        data.setup("fit")
        monkeypatch.setattr(data, "_device", lambda place=place: place)
        found.append([images.cpu() for images, _ in data.train_dataloader()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
