"""Shared fixtures: tiny networks and small real images."""

import os
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path

import far
import numpy as np
import placement
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image
from torch import nn

from lit_prune import timing
from lit_prune.running import full_float32
from lit_prune.structure import latency


def pytest_addoption(parser) -> None:
    """`--device cuda` runs the tests there; `--table FILE` writes what they did and how long it took."""
    parser.addoption("--device", default="cpu", help="device of the tests: cpu, cuda, or far, which need not be there")
    parser.addoption("--table", default=None, help="file for one table of outcomes and seconds")


@pytest.fixture(scope="session")
def device(pytestconfig) -> torch.device:
    """The device that the core's tests run on."""
    name = pytestconfig.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("--device cuda: there is no CUDA device")
    return {"cuda": torch.device("cuda", 0), "far": far.PLACE}.get(name) or torch.device(name)


@pytest.fixture(autouse=True)
def on_device(request, device, monkeypatch):
    """What a test builds is built on the device of `--device`, and trainers train there."""
    if device.type == "cpu":
        yield
        return
    if request.node.get_closest_marker("cpu"):
        pytest.skip("of the CPU alone")
    if device == far.PLACE and request.node.get_closest_marker("real"):
        pytest.skip("of a device that is there")
    monkeypatch.setattr(Trainer, "__init__", _trains_on(device, Trainer.__init__))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # runs are compared bit by bit
    compare = partial(torch.testing.assert_close, check_device=False)
    monkeypatch.setattr(torch.testing, "assert_close", compare)
    place = far.far_device() if device == far.PLACE else nullcontext()
    with full_float32(), place, placement.OnDevice(device):  # tests know what float32 gives
        yield


@pytest.fixture(autouse=True)
def few_timed_passes(monkeypatch):
    """Every finished run times its networks, which tests seldom look at: a pass of each is enough."""
    monkeypatch.setattr(latency, "SINGLE", 1)
    monkeypatch.setattr(latency, "BATCHED", 1)
    monkeypatch.setattr(timing, "WARM_UP", 0)


def _trains_on(device: torch.device, init):
    """The trainer's constructor with the accelerator of the device where a test asks for the CPU."""

    @wraps(init)
    def on_device(self, *args, **settings) -> None:
        if settings.get("accelerator") == "cpu" and settings.get("devices") in (1, None) and "strategy" not in settings:
            settings |= {"accelerator": "gpu"}
            if device == far.PLACE:
                settings |= {"accelerator": far.FarAccelerator(), "strategy": SingleDeviceStrategy(device)}
        init(self, *args, **settings)

    return on_device


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Writes the table that `--table` asks for: failures first, with their last line."""
    file = config.getoption("--table")
    if file is None:
        return
    reports = [r for kind in ("failed", "error", "passed", "skipped") for r in terminalreporter.stats.get(kind, ())]
    rows = ["| test | outcome | seconds | |", "| --- | --- | --- | --- |"]
    for report in reports:
        lines = str(report.longrepr).strip().splitlines() if report.failed else [""]
        rows.append(f"| {report.nodeid} | {report.outcome} | {report.duration:.2f} | {lines[-1].replace('|', '/')} |")
    Path(file).write_text(f"{_where(config)}\n\n" + "\n".join(rows) + "\n")


def _where(config) -> str:
    place = config.getoption("--device")
    name = torch.cuda.get_device_name() if place == "cuda" and torch.cuda.is_available() else place
    return f"torch {torch.__version__} on {name}"


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder of real sample images and weights; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("LIT_PRUNE_SAMPLES", Path(__file__).resolve().parents[2] / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no sample data at {folder} (set LIT_PRUNE_SAMPLES to the folder that holds data/)")
    return folder


@pytest.fixture(scope="session")
def cifar10_test(samples: Path) -> tuple[np.ndarray, np.ndarray]:
    """First 2,000 CIFAR-10 test images, uint8 [N, H, W, C], with labels int64 [N]."""
    strips = sorted((samples / "cifar10").glob("test-*.webp"))[:4]
    images = np.concatenate([np.asarray(Image.open(file)).reshape(-1, 32, 32, 3) for file in strips])
    labels = np.load(samples / "cifar10" / "labels.npz")["test"].astype("int64")
    return images, labels[: len(images)]


class TinyNet(nn.Module):
    """Two convolutions with norm, one residual add, a linear head: the smallest network with every coupling."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.conv1 = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        trunk = self.stem(images)
        inner = torch.relu(self.bn1(self.conv1(trunk)))
        trunk = torch.relu(trunk + self.bn2(self.conv2(inner)))
        return self.head(trunk.mean((2, 3)))


@pytest.fixture
def tiny_net() -> nn.Module:
    """A seeded `TinyNet` in eval mode whose BatchNorm statistics and affine parameters are not trivial."""
    torch.manual_seed(0)
    net = TinyNet()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished `fit -c tests/tiny_run.yaml`; who writes into it takes a copy."""
    from lit_prune.cli.main import main

    folder = tmp_path_factory.mktemp("tiny") / "run"
    main(["fit", "-c", str(Path(__file__).with_name("tiny_run.yaml")), "--run_dir", str(folder)])
    return folder


@pytest.fixture
def make_run():
    """Factory of a whole run on small digit images: `(trainer, module, data)`, fresh objects at every call.

    Channel stages are cheap ones unless `settings` says otherwise; `settings={}` is what a user gets.
    """
    from functools import partial

    from lit_prune.cli.trainer import Trainer, last_checkpoint
    from lit_prune.data import DigitsData
    from lit_prune.train.checkpoints import checkpoint_writer
    from lit_prune.train.classifier import LitClassifier
    from lit_prune.train.schedule import PhaseCosine
    from lit_prune.train.staged_pruning import StagedPruning
    from lit_prune.train.stages import BlockStage, ChannelStage

    cheap = {
        "score": "proxy",
        "allocation": "uniform",
        "replace": "delete",
    }  # solving readers takes longer than training

    def make(
        run_dir,
        stages=(("blocks", 2), ("channels", 4)),
        max_epochs=6,
        callbacks=(),
        trainer=None,
        settings=cheap,
        **pruning,
    ):
        keeps = iter((0.5, 0.4, 0.3))
        parts = [
            BlockStage(epoch, remove_ratio=0.3)
            if part == "blocks"
            else ChannelStage(next(keeps), epoch, part, **settings)
            for part, epoch in stages
        ]
        os.environ["PL_GLOBAL_SEED"] = "7"
        torch.manual_seed(7)
        data = DigitsData(resolution=8, train_size=96, calibration_size=64, batch_size=32, pad=1)
        sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        module = LitClassifier("cifar_resnet20", 10, data.image_shape, optimizer=sgd, scheduler=PhaseCosine)
        pruning = {"optimizer": partial(torch.optim.Adam, lr=1e-3), "recalibration_batches": 2, **pruning}
        staged = [StagedPruning(parts, **pruning)] if parts else []
        checkpoint = last_checkpoint(Path(run_dir))
        options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
        options |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
        options |= {"use_distributed_sampler": False, "plugins": [checkpoint_writer()], **(trainer or {})}
        lightning_trainer = Trainer(
            max_epochs=max_epochs, default_root_dir=run_dir, callbacks=[*callbacks, *staged, checkpoint], **options
        )
        return lightning_trainer, module, data

    return make


@pytest.fixture
def without_drawing(monkeypatch):
    """A report's figures are made but not rendered, which takes most of its time: for tests of the page's text."""
    monkeypatch.setattr("lit_prune.report.page.render_svg", lambda figure, name: "<svg></svg>")
    monkeypatch.setattr("lit_prune.report.page.render_png", lambda figure: b"")
