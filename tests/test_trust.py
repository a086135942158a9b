"""What a file names is neither imported nor called unless the caller names it too: every entry point."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lit_prune
from lit_prune.cli.main import main
from lit_prune.errors import InputError
from lit_prune.hub import HubNetwork
from lit_prune.models import build_backbone, build_network
from lit_prune.structure.networks import load_network, read_network
from lit_prune.train.classifier import LitClassifier

TINY = str(Path(__file__).with_name("tiny_run.yaml"))
SHAPE = (3, 8, 8)


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that exists as soon as the package `hostile` is imported or `hostile:touch` is called."""
    file = tmp_path / "executed"
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "hostile.py").write_text(f"open({str(file)!r}, 'w')\ndef touch(**_): pass\n")
    monkeypatch.syspath_prepend(tmp_path / "path")
    yield file
    sys.modules.pop("hostile", None)


def calls(marker: Path) -> list[dict]:
    """Descriptions of a network that would run something."""
    return [
        {"backbone": "os:system", "arguments": {"command": f"touch {marker}"}},
        {"backbone": "hostile:touch", "arguments": {}},
        {"backbone": "torch:load", "arguments": {"f": str(marker)}},
        {"backbone": "hostile", "arguments": {}},
        {"backbone": "timm/hf-hub:somebody/network", "arguments": {}},
        {"backbone": "local-dir:/tmp", "arguments": {}},
        {"backbone": "timm/../hostile", "arguments": {}},
        {"backbone": "resnet18", "arguments": {"weights": "https://127.0.0.1/w.pth", "pretrained": True}},
        {"backbone": "timm/resnet18", "arguments": {"checkpoint_path": str(marker)}},
        {"backbone": "timm/resnet18", "arguments": {"pretrained_cfg": {"file": str(marker)}}},
        {"backbone": "timm/resnet18", "arguments": {"pretrained_cfg_overlay": {"hf_hub_id": "a/b"}}},
        {"backbone": ["os", "system"], "arguments": {}},
        {"backbone": "cifar_resnet20", "arguments": {"num_classes": 10**13}},
    ]


CALLS = range(len(calls(Path())))


def hostile_folder(folder: Path, call: dict) -> Path:
    """A compact folder, whole in every other respect, that names the call."""
    model = build_backbone("cifar_resnet20", num_classes=10)
    lit_prune.save_compact(
        folder, model, backbone="cifar_resnet20", arguments={"num_classes": 10}, input_shape=SHAPE, plans=[]
    )
    structure = json.loads((folder / "structure.json").read_text())
    del structure["checksum"]
    (folder / "structure.json").write_text(json.dumps({**structure, **call}))
    return folder


def hostile_checkpoint(path: Path, call: dict) -> Path:
    """A checkpoint that loads with `weights_only`, of a network that is the call."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"backbone.{k}": v for k, v in build_backbone("cifar_resnet20", num_classes=10).state_dict().items()}
    torch.save(
        {
            "lit_prune_structure": {**call, "plans": [], "phase_start": 0},
            "hyper_parameters": {"num_classes": 10, **call},
            "state_dict": state,
            "epoch": 0,
            "global_step": 3,
            "pytorch-lightning_version": "2.6.6",
            "loops": {},
            "callbacks": {},
            "optimizer_states": [],
            "lr_schedulers": [],
        },
        path,
    )
    return path


@pytest.mark.parametrize("number", CALLS)
def test_a_compact_folder_runs_nothing(tmp_path, marker, number):
    folder = hostile_folder(tmp_path / "compact", calls(marker)[number])
    try:
        lit_prune.load_compact(folder)
    except InputError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    else:  # only what says where the first weights came from is left out, and the network is its own
        assert calls(marker)[number]["backbone"] == "resnet18"
    assert not marker.exists() and "hostile" not in sys.modules


@pytest.mark.parametrize("number", CALLS)
def test_a_checkpoint_runs_nothing(tmp_path, marker, number):
    path = hostile_checkpoint(tmp_path / "last.ckpt", calls(marker)[number])
    module = LitClassifier("cifar_resnet20", 10, SHAPE)
    for read in (
        lambda: load_network(path, SHAPE),
        lambda: read_network(path, module, "ckpt_path"),
        lambda: module.on_load_checkpoint(torch.load(path, weights_only=True)),
        lambda: LitClassifier.load_from_checkpoint(path),
    ):
        with pytest.raises(InputError) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not marker.exists() and "hostile" not in sys.modules


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_every_verb_that_reads_a_folder_or_a_checkpoint_refuses_and_runs_nothing(tmp_path, marker, capsys):
    call = calls(marker)[0]
    folder = hostile_folder(tmp_path / "run" / "compact", call)
    path = hostile_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt", call)
    for verb in ("export", "latency"):
        assert "os:system" in refused(capsys, verb, "--run_dir", str(tmp_path / "run")), verb
    assert "os:system" in refused(capsys, "predict", "--compact", str(folder), "a.png")
    with pytest.raises(InputError, match="os:system"):
        HubNetwork.from_pretrained(folder)
    for verb, option in (
        ("analyze", "--ckpt_path"),
        ("lesion", "--ckpt_path"),
        ("reduce", "--ckpt_path"),
        ("sweep", "--checkpoints"),
        ("sensitivity", "--ckpt_path"),
        ("curve", "--ckpt_path"),
        ("test", "--ckpt_path"),
        ("validate", "--ckpt_path"),
        ("predict", "--ckpt_path"),
        ("fit", "--ckpt_path"),
    ):
        given = f"[{path}]" if verb == "sweep" else str(path)
        run = ["--run_dir", str(tmp_path / verb), option, given, "--trainer.callbacks", "[]"]
        assert "os:system" in refused(capsys, verb, "-c", TINY, *run), verb
    for verb in ("analyze", "curve", "lesion", "reduce", "sensitivity"):
        run = ["--run_dir", str(tmp_path / "run"), "--trainer.callbacks", "[]"]
        assert "os:system" in refused(capsys, verb, "-c", TINY, *run), verb
    teacher = ["--trainer.callbacks.teacher", str(folder)]
    assert "os:system" in refused(capsys, "fit", "-c", TINY, "--run_dir", str(tmp_path / "student"), *teacher)
    assert not marker.exists()


def test_the_teacher_of_a_run_is_weights_alone_so_nothing_there_can_be_named(tiny_run):
    assert [file.name for file in (tiny_run / "teacher").iterdir()] == ["model.safetensors"]


class Own(nn.Module):
    """A network of the user's own."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(images)).mean((2, 3)))


def save_own(folder: Path, backbone: str | None) -> tuple[nn.Module, torch.Tensor]:
    images = torch.randn(2, *SHAPE)
    plan = lit_prune.Plan((), {"conv": (0, 2, 5)}, {"conv": 6})
    small = lit_prune.apply_plan(Own(6), plan, images).eval()
    details = {"arguments": {"width": 6}, "input_shape": SHAPE, "plans": [plan]}
    lit_prune.save_compact(folder, small, backbone=backbone, **details)
    return small, images


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    """Import path of `Own` in a package that is imported only when the path is followed."""
    (tmp_path / "own_package.py").write_text("BUILD = None\ndef make(width):\n    return BUILD(width)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import own_package

    own_package.BUILD = Own
    return "own_package:make"


def test_an_import_path_needs_the_callers_own_word(tmp_path, own_package):
    small, images = save_own(tmp_path / "compact", own_package)
    with pytest.raises(InputError, match="trust="):
        lit_prune.load_compact(tmp_path / "compact")
    with pytest.raises(InputError, match="trust="):
        lit_prune.load_compact(tmp_path / "compact", trust=("own_package:made",))
    with pytest.raises(InputError, match="trust="):  # a part of a trusted name is not the name
        lit_prune.load_compact(tmp_path / "compact", trust=(f"x{own_package}",))
    with pytest.raises(InputError, match="trust is"):  # nor is a text a list of names
        lit_prune.load_compact(tmp_path / "compact", trust=f"x{own_package}")
    loaded = lit_prune.load_compact(tmp_path / "compact", trust=(own_package,))
    assert torch.equal(loaded(images), small(images))


def test_a_dense_instance_needs_no_import_and_is_left_as_it_was(tmp_path, own_package, marker):
    small, images = save_own(tmp_path / "compact", own_package)
    save_own(tmp_path / "nameless", None)
    dense = Own(6)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    loaded = lit_prune.load_compact(tmp_path / "compact", model=dense)
    assert torch.equal(loaded(images), small(images)) and loaded is not dense
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    structure = tmp_path / "compact" / "structure.json"
    values = {name: value for name, value in json.loads(structure.read_text()).items() if name != "checksum"}
    structure.write_text(json.dumps({**values, **calls(marker)[0]}))
    assert torch.equal(lit_prune.load_compact(tmp_path / "compact", model=dense)(images), small(images))
    assert not marker.exists()
    assert isinstance(lit_prune.load_compact(tmp_path / "nameless", model=dense), Own)
    with pytest.raises(InputError, match="give model="):
        lit_prune.load_compact(tmp_path / "nameless")
    with pytest.raises(InputError, match="does not fit|do not fit"):
        lit_prune.load_compact(tmp_path / "nameless", model=Own(7))


def test_the_command_line_vouches_for_the_backbone_it_names(tmp_path, own_package):
    path = tmp_path / "last.ckpt"
    state = {f"backbone.{name}": value for name, value in Own(6).state_dict().items()}
    saved = {"backbone": own_package, "arguments": {"width": 6}, "plans": []}
    torch.save({"lit_prune_structure": saved, "state_dict": state}, path)
    assert isinstance(load_network(path, SHAPE, trust=(own_package,)), Own)
    with pytest.raises(InputError, match="trust="):
        load_network(path, SHAPE, trust=("cifar_resnet20",))


@pytest.mark.parametrize(
    ("backbone", "arguments"),
    [
        (":", {}),
        ("json:loads", {"s": "1"}),
        ("json:", {}),
        (":loads", {}),
        ("no_such_package:make", {}),
        ("torch.nn:Linear", {"num_classes": 3}),
        (None, {}),
        (3, {}),
        ("cifar_resnet20", {"num_classes": "ten"}),
        ("cifar_resnet20", {"num_classes": 0}),
        ("cifar_resnet20", {"in_channels": True}),
        ("cifar_resnet20", {"num_classes": object()}),
        ("cifar_resnet20", [1]),
        ("resnet18", {"width_per_group": -1}),
        ("timm/resnet18", {"block_args": {"x": {1: 2}}}),
        ("timm/vit_tiny_patch16_224", {"img_size": 0}),
        ("resnet18.no_such_tag", {}),
    ],
)
def test_what_builds_no_network_is_one_line(backbone, arguments):
    with pytest.raises(InputError) as caught:
        build_network(backbone, arguments, trust=(backbone,))
    assert "\n" not in str(caught.value) and os.linesep not in str(caught.value)


def test_a_run_folders_configuration_is_compared_without_importing_what_it_names(tmp_path, marker, capsys):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    for text in (
        "model: {backbone: cifar_resnet20, optimizer: hostile.touch}",
        "trainer: {callbacks: [{class_path: hostile.touch}]}",
        "model: {optimizer: {class_path: hostile.touch}}",
        "data: {class_path: hostile.touch}",
    ):
        (run_dir / "config.yaml").write_text(text)
        assert "another configuration" in refused(capsys, "fit", "-c", TINY, "--run_dir", str(run_dir))
    assert not marker.exists()
