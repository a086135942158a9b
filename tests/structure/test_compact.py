"""The compact folder gives back the same network, whole or not at all."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lit_prune import compress
from lit_prune.errors import InputError
from lit_prune.models import build_backbone
from lit_prune.replace import replace_mechanisms
from lit_prune.structure import Plan, apply_plan, load_compact, make_plan, save_compact
from lit_prune.structure.record import rebuild_inputs, record_of

ARGUMENTS = {"num_classes": 10}


class Tied(nn.Module):
    """A network of the user's own whose last two layers share a bias."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.first, self.second = nn.Linear(width, 4), nn.Linear(width, 4)
        self.second.bias = self.first.bias

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.conv(images)).mean((2, 3))
        return self.first(features) + self.second(features)


@pytest.fixture
def saved(tmp_path, random_ranks):
    """A compact ResNet-20 after a block stage and a channel stage, its images and its folder."""
    torch.manual_seed(0)
    model, images = build_backbone("cifar_resnet20", **ARGUMENTS), torch.randn(2, 3, 32, 32)
    plans = [Plan(("layer1.1", "layer3.2"))]
    model = apply_plan(model, plans[0], images)
    plans.append(make_plan(model, random_ranks(model), images, keep=0.5))
    model = apply_plan(model, plans[1], images)
    model(images)  # moves the norm statistics
    arguments = {**ARGUMENTS, "pretrained": False}
    shape = (3, 32, 32)
    save_compact(
        tmp_path / "compact", model, backbone="cifar_resnet20", arguments=arguments, input_shape=shape, plans=plans
    )
    return model.eval(), images, tmp_path / "compact"


def test_loaded_network_gives_the_same_bits_and_trains(saved) -> None:
    model, images, folder = saved
    loaded = load_compact(folder)  # on the CPU
    assert not loaded.training
    assert torch.equal(loaded(images.cpu()), model.cpu()(images.cpu()))
    loaded.train()(images.cpu()).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_folder_holds_plain_weights_structure_and_report(saved) -> None:
    model, _, folder = saved
    assert {file.name for file in folder.iterdir()} == {
        "model.safetensors",
        "structure.json",
        "report.json",
        "README.md",
    }
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    structure = json.loads((folder / "structure.json").read_text())
    assert structure["backbone"] == "cifar_resnet20" and structure["input_shape"] == [3, 32, 32]
    assert [file.name for file in folder.parent.iterdir()] == ["compact"]


def test_own_network_by_import_path_keeps_precision_and_ties(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_network.py").write_text("def make(width):\n    return BUILDER(width)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import own_network

    own_network.BUILDER = Tied
    model, images = Tied(6).to(torch.bfloat16).eval(), torch.randn(1, 3, 8, 8, dtype=torch.bfloat16)
    plan = Plan((), {"conv": (0, 2, 5)}, {"conv": 6})
    small = apply_plan(model, plan, images)
    details = {"backbone": "own_network:make", "arguments": {"width": 6}, "input_shape": (3, 8, 8), "plans": [plan]}
    save_compact(tmp_path / "compact", small, **details)
    loaded = load_compact(tmp_path / "compact", trust=("own_network:make",))
    assert torch.equal(loaded.to(images.device)(images), small(images))
    assert loaded.first.bias is loaded.second.bias and loaded.conv.out_channels == 3


def test_loading_draws_no_random_numbers_from_the_caller(saved) -> None:
    before = torch.get_rng_state()
    load_compact(saved[2])
    assert torch.equal(before, torch.get_rng_state())


def damage_weights(folder) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def change_structure(**changes):
    def change(folder) -> None:
        structure = json.loads((folder / "structure.json").read_text())
        (folder / "structure.json").write_text(json.dumps({**structure, **changes}))

    return change


def drop_key(folder) -> None:
    structure = json.loads((folder / "structure.json").read_text())
    del structure["plans"]
    (folder / "structure.json").write_text(json.dumps(structure))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_weights, "sha256"),
        (lambda folder: (folder / "model.safetensors").unlink(), "missing"),
        (lambda folder: (folder / "structure.json").unlink(), "no compact folder"),
        (lambda folder: (folder / "structure.json").write_text("{"), "no compact folder"),
        (lambda folder: (folder / "structure.json").write_text("[]"), "not an object"),
        (change_structure(format="other"), "format"),
        (change_structure(checksum=None, plans=[{"format": "other"}]), "plan"),
        (change_structure(checksum=None, plans=[]), "does not fit"),
        (change_structure(checksum=None, plans=3), "no list"),
        (change_structure(checksum=None, input_shape="a"), "damaged"),
        (change_structure(checksum=None, backbone="cifar_resnet32"), "."),
        (change_structure(checksum=None, backbone="no_such_package:make"), "import path"),
        (change_structure(plans=[]), "checksum"),
        (lambda folder: (folder / "structure.json").write_text("[" * 100_000), "no compact folder"),
        (drop_key, "damaged"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(saved, damage, words: str) -> None:
    damage(saved[2])
    with pytest.raises(InputError, match=words) as caught:
        load_compact(saved[2])
    assert "\n" not in str(caught.value)


def test_only_a_compact_folder_is_replaced_and_a_failure_leaves_the_old_one(saved, tmp_path) -> None:
    folder, model = saved[2], build_backbone("cifar_resnet20", **ARGUMENTS)
    details = {"backbone": "cifar_resnet20", "arguments": ARGUMENTS, "input_shape": (3, 32, 32), "plans": []}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(InputError, match="something else"):
        save_compact(tmp_path / "mine", model, **details)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep"
    before = (folder / "structure.json").read_text()
    with pytest.raises(InputError, match="plain"):
        save_compact(folder, model, **details | {"arguments": {"x": object()}})
    assert (folder / "structure.json").read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["compact", "mine"]
    save_compact(folder, model, **details)
    assert json.loads((folder / "structure.json").read_text())["plans"] == []


def test_a_folder_that_could_not_be_loaded_is_not_written(saved, tmp_path) -> None:
    model = build_backbone("cifar_resnet20", **ARGUMENTS)
    details = {"backbone": "cifar_resnet20", "arguments": ARGUMENTS, "input_shape": (3, 32, 32), "plans": []}
    other = build_backbone("cifar_resnet20", num_classes=7)
    foreign = Plan((), {"stem": (0, 1)}, {"stem": 16})
    wrong = [
        (nn.DataParallel(model), details),
        (torch.compile(model), details),
        (other, details),
        (saved[0], details),
        (model, details | {"plans": [Plan(("layer1.1",))]}),
        (model, details | {"plans": [foreign]}),
        (None, details),
    ]
    for network, described in wrong:
        with pytest.raises(InputError) as caught:
            save_compact(tmp_path / "new", network, **described)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_somebodys_own_network_is_saved_bare_and_loads_into_a_dense_one_of_the_same_head(tmp_path) -> None:
    def own(classes: int) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes))

    plan = Plan(keep_channels={"0": (0, 3, 5)}, sizes={"0": 8})
    small = apply_plan(own(2), plan, torch.zeros(1, 4))
    inside = copy.deepcopy(small)
    inside[0] = torch.compile(inside[0])
    for wrapped in (torch.compile(small), nn.DataParallel(small), inside):
        with pytest.raises(InputError, match="give the bare network"):
            save_compact(tmp_path / "own", wrapped, plans=[plan], input_shape=(4,))
    small[2] = nn.Linear(3, 5)  # a head of another task
    small.compile()  # in place: the network is still its own
    save_compact(tmp_path / "own", small, plans=[plan], input_shape=(4,))
    with pytest.raises(InputError, match=r"see '2\.bias'"):
        load_compact(tmp_path / "own", model=own(2))
    loaded = load_compact(tmp_path / "own", model=own(5))
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_what_the_library_returns_is_saved_by_itself(tmp_path) -> None:
    class Named(nn.Module):
        """Called with two named arguments of a network of the user's own."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, values, shift):
            return self.outer(torch.relu(self.inner(values)) + shift[:, None])

    torch.manual_seed(0)
    model = Named().eval()
    batches = [{"values": torch.randn(64, 4), "shift": torch.randn(64)} for _ in range(3)]
    small, _ = compress(model, batches, keep=0.8)
    again, _ = compress(small, batches, keep=0.8)
    cut = apply_plan(model, Plan(keep_channels={"inner": (0, 3, 5)}, sizes={"inner": 16}), batches[0])
    stood = replace_mechanisms(
        model, Plan(keep_channels={"inner": (0, 3)}, sizes={"inner": 16}), batches, "affine"
    ).model
    for name, network in {"small": small, "again": again, "cut": cut, "stood": stood}.items():
        save_compact(tmp_path / name, network, report={"name": name})
        loaded = load_compact(tmp_path / name, model=model)
        assert torch.equal(loaded(**batches[0]), network(**batches[0])), name
        save_compact(tmp_path / "later", loaded)
        assert torch.equal(load_compact(tmp_path / "later", model=model)(**batches[0]), network(**batches[0])), name
    for begun in (small, again):  # plans that a network has behind it are not carried out again
        loaded = load_compact(tmp_path / "again", model=begun)
        assert torch.equal(loaded(**batches[0]), again(**batches[0])) and loaded is not begun
    with pytest.raises(InputError, match="the plan"):
        load_compact(tmp_path / "again", model=stood)
    with pytest.raises(InputError, match="give input_shape"):
        save_compact(tmp_path / "dense", model)


@pytest.mark.parametrize("shape", [(1, 4), (1, 2, 4)])
def test_a_network_that_is_called_with_complex_numbers_is_saved(tmp_path, shape) -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, values):
            return self.outer(torch.relu(self.inner(values.abs())))

    model, values = Spectrum(), torch.randn(shape, dtype=torch.complex64)
    small = apply_plan(model, Plan(keep_channels={"inner": (0, 3)}, sizes={"inner": 16}), values)
    save_compact(tmp_path / "own", small)
    assert torch.equal(load_compact(tmp_path / "own", model)(values), small(values))


def test_no_images_are_written_down_and_the_network_is_rebuilt_all_the_same(tmp_path) -> None:
    class Clips(nn.Module):
        """Reads pixels of several frames, and which of a few kinds a clip is."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.kind, self.head = nn.Conv2d(3, 16, 3), nn.Embedding(300, 2), nn.Linear(16, 2)

        def forward(self, clips, kind):
            maps = torch.relu(self.conv(clips.flatten(0, 1).float() / 255)).mean((2, 3))
            return self.head(maps.unflatten(0, clips.shape[:2]).mean(1)) + self.kind(kind)

    torch.manual_seed(0)
    model = Clips().eval()
    clips = torch.randint(3, 250, (1, 2, 3, 24, 24), dtype=torch.uint8)
    example = {"clips": clips, "kind": torch.tensor([299])}
    small = apply_plan(model, Plan(keep_channels={"conv": (0, 3, 5)}, sizes={"conv": 16}), example)
    save_compact(tmp_path / "clips", small)
    text = (tmp_path / "clips" / "structure.json").read_text()
    assert len(text) < 5000 and "299" in text
    loaded = load_compact(tmp_path / "clips", model=model)
    assert torch.equal(loaded(**example), small(**example))
    rebuilt = rebuild_inputs(record_of(loaded).inputs).kwargs["clips"]
    assert rebuilt.dtype == torch.uint8 and rebuilt.shape == clips.shape
    assert (rebuilt.min(), rebuilt.max()) == (clips.min(), clips.max()) and not torch.equal(rebuilt, clips)


def test_a_kill_between_the_two_renames_loses_nothing(saved, tmp_path) -> None:
    model, images, folder = saved
    model, images = model.cpu(), images.cpu()
    folder.rename(tmp_path / ".compact.replaced")
    assert torch.equal(load_compact(folder)(images), model(images))
    folder.rename(tmp_path / ".compact.replaced")
    details = {"backbone": "cifar_resnet20", "arguments": ARGUMENTS, "input_shape": (3, 32, 32), "plans": []}
    with pytest.raises(InputError):
        save_compact(folder, nn.Linear(1, 1), **details)
    (tmp_path / ".compact.1.partial").mkdir()
    save_compact(folder, build_backbone("cifar_resnet20", **ARGUMENTS), **details)
    assert [file.name for file in tmp_path.iterdir()] == ["compact"]


def test_every_changed_value_of_the_structure_is_noticed(saved) -> None:
    file = saved[2] / "structure.json"
    text = file.read_text()
    for old, new in (('"num_classes": 10', '"num_classes": 11'), ("layer1.1", "layer1.2"), ("32,", "33,")):
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(InputError, match="checksum"):
            load_compact(saved[2])


@pytest.mark.cpu
def test_sizes_beyond_all_memory_are_compared_and_refused(saved) -> None:
    change_structure(checksum=None, plans=[Plan((), {"conv1": (0,)}, {"conv1": 10**15}).to_dict()])(saved[2])
    with pytest.raises(InputError, match="the plan says 1000000000000000|no group"):
        load_compact(saved[2])
    change_structure(checksum=None, arguments={"num_classes": 10**11}, plans=[])(saved[2])
    with pytest.raises(InputError, match="GiB"):
        load_compact(saved[2])
    change_structure(checksum=None, input_shape=[3, 10**9, 10**9], plans=[])(saved[2])
    with pytest.raises(InputError, match="no shape"):
        load_compact(saved[2])
