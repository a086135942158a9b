import copy
import weakref

import pytest
import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.measurement.inputs import InputMoments
from lit_prune.measurement.passes import collect
from lit_prune.models import build_backbone
from lit_prune.replace import Replacement, replace_mechanisms
from lit_prune.replace.flow import find_readers, observe
from lit_prune.replace.stand_ins import affine, choose_parents, constants
from lit_prune.structure import Plan, apply_plan, load_compact, save_compact, trace_groups
from lit_prune.task import Unlabelled

EXACT = {"rtol": 0, "atol": 1e-10}


class Chain(nn.Module):
    """3x3, 1x1, 3x3 convolutions and two linear layers; a norm follows the first two, nothing the third."""

    def __init__(self, padding: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=padding, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 7, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(7)
        self.conv3 = nn.Conv2d(7, 6, 3, padding=padding, bias=False)
        self.fc1 = nn.Linear(6, 9, bias=False)
        self.fc2 = nn.Linear(9, 4)

    def forward(self, images):
        values = torch.relu(self.bn1(self.conv1(images)))
        values = torch.relu(self.bn2(self.conv2(values)))
        values = torch.relu(self.conv3(values)).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(values)))


PLAN = Plan(
    keep_channels={"conv1": (0, 2, 3, 5, 7), "conv2": (1, 2, 4, 6), "conv3": (0, 1, 3), "fc1": (2, 4, 5, 8)},
    sizes={"conv1": 8, "conv2": 7, "conv3": 6, "fc1": 9},
)
IMAGE = torch.zeros(1, 3, 8, 8, dtype=torch.float64)


def seeded(net: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.5)
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.4)
    return net.double().eval()


def images(batches: int = 4, size: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(12, 3, size, size, generator=generator, dtype=torch.float64), torch.zeros(12))
        for _ in range(batches)
    ]


def intervened(net: nn.Module, batches, parents):
    """The original network with hooks that put the stand-ins where each layer reads the removed channels."""
    net = copy.deepcopy(net)
    readers = [r for r in find_readers(net, PLAN, trace_groups(net, IMAGE), observe(net, IMAGE)).values() if r.removed]
    sums = collect(net, batches, InputMoments(net, [reader.name for reader in readers]), Unlabelled())
    for reader in readers:
        found = sums[reader.name].moments
        weight, settings = net.get_submodule(reader.name).weight, Replacement(parents=parents)
        chosen = choose_parents(found, reader, weight, settings)
        stand_in = constants(found, reader) if parents == 0 else affine(found, reader, chosen, 1e-6)

        def hook(module, args, reader=reader, stand_in=stand_in):
            values = args[0].movedim(1, -1).clone()
            values[..., list(reader.removed)] = (
                values[..., list(reader.kept)] @ stand_in.coefficients.T + stand_in.offsets
            )
            return values.movedim(-1, 1)

        net.get_submodule(reader.name).register_forward_pre_hook(hook)
    return net


@pytest.mark.parametrize(("kind", "parents"), [("constant", 0), ("affine", 2), ("affine", None)])
def test_compiled_network_equals_the_intervened_one_exactly(kind, parents):
    net, batches = seeded(Chain()), images()
    reduced = replace_mechanisms(net, PLAN, batches, kind, IMAGE, settings=Replacement(parents=parents))
    expected = intervened(net, batches, parents)
    for batch, _ in images(seed=5):
        torch.testing.assert_close(reduced.model(batch), expected(batch), **EXACT)
        assert not torch.allclose(reduced.model(batch), net(batch), atol=1e-3)
    assert all(entry["border_error"] < 1e-20 for entry in reduced.report["layers"].values())


def test_zero_padding_leaves_a_border_error_that_the_report_states():
    net, batches = seeded(Chain(padding=1)), images()
    plan = Plan(keep_channels={"conv2": PLAN.keep_channels["conv2"]}, sizes={"conv2": 7})
    reduced = replace_mechanisms(net, plan, batches, "constant", IMAGE)
    entry = reduced.report["layers"]["conv3"]
    assert entry["border_error"] > 1e-3
    removed = plan.removed("conv2")
    seen = {}
    net.conv3.register_forward_pre_hook(lambda module, args: seen.update(inputs=args[0]))
    outputs = []
    for batch, _ in batches:
        outputs.append((net(batch), seen["inputs"])[1])
    inputs = torch.cat(outputs)
    replaced = inputs.clone()
    replaced[:, removed] = inputs[:, removed].mean((0, 2, 3))[None, :, None, None]
    kept = list(plan.keep_channels["conv2"])
    compiled = reduced.model.conv3(inputs[:, kept])
    exact, original = net.conv3(replaced), net.conv3(inputs)
    variance = original.movedim(1, 0).flatten(1).var(1, correction=0).sum()
    measured = (compiled - exact).square().sum(1).mean() / variance
    assert entry["border_error"] == pytest.approx(float(measured.detach()), rel=1e-9)
    torch.testing.assert_close(compiled[..., 1:-1, 1:-1], exact[..., 1:-1, 1:-1], **EXACT)


@pytest.mark.parametrize(("kind", "parents"), [("constant", 0), ("affine", 3)])
def test_a_carrier_channel_makes_zero_padded_replacement_exact(kind, parents):
    net, batches = seeded(Chain(padding=1)), images()
    settings = Replacement(parents=parents, border="carrier")
    reduced = replace_mechanisms(net, PLAN, batches, kind, IMAGE, settings=settings)
    assert reduced.carriers == {"conv2": 0}  # conv1 is read by a 1x1 convolution, which needs none
    assert reduced.model.conv2.out_channels == 5 and reduced.plan.keep_channels["conv2"] == (0, 1, 2, 4, 6)
    expected = intervened(net, batches, parents)
    for batch, _ in images(seed=5):
        torch.testing.assert_close(reduced.model(batch), expected(batch), **EXACT)
    inexact = replace_mechanisms(net, PLAN, batches, kind, IMAGE, settings=Replacement(parents=parents))
    assert not torch.allclose(inexact.model(batch), expected(batch), atol=1e-4)
    assert reduced.report["layers"]["conv3"]["error"] < inexact.report["layers"]["conv3"]["error"]


def test_a_carrier_runs_through_a_residual_trunk(tiny_net):
    net, batches = tiny_net.double(), images()
    plan = Plan(keep_channels={"stem.0": (0, 1, 3, 5), "conv1": (0, 1, 4)}, sizes={"stem.0": 6, "conv1": 8})
    reduced = replace_mechanisms(net, plan, batches, "constant", IMAGE, settings=Replacement(border="carrier"))
    seen = []
    reduced.model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    reduced.model(batches[0][0])
    place = reduced.plan.keep_channels["stem.0"].index(reduced.carriers["stem.0"])
    torch.testing.assert_close(seen[0][:, place], torch.ones(12, dtype=torch.float64))
    assert all(entry["border_error"] == 0 for entry in reduced.report["layers"].values())


def test_a_carrier_in_place_of_the_only_removed_unit_is_refused():
    plan = Plan(keep_channels={"conv2": (0, 1, 2, 3, 4, 5)}, sizes={"conv2": 7})
    with pytest.raises(InputError, match="one unit a group"):
        replace_mechanisms(
            seeded(Chain(padding=1)), plan, images(), "constant", IMAGE, settings=Replacement(border="carrier")
        )


def test_delete_is_apply_plan():
    net, batches = seeded(Chain()), images(1)
    reduced = replace_mechanisms(net, PLAN, batches, "delete", IMAGE)
    expected = apply_plan(net, PLAN, IMAGE).state_dict()
    assert reduced.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in reduced.model.state_dict().items())


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("scope", ["consumers", "all"])
def test_refit_reproduces_the_outputs_when_nothing_is_lost(padding, scope):
    net, batches = seeded(Chain(padding)), images()
    with torch.no_grad():  # the removed unit 1 is 2·unit 0, the removed unit 4 a copy of unit 2
        for removed, kept, factor in ((1, 0, 2.0), (4, 2, 1.0)):
            net.conv1.weight[removed] = net.conv1.weight[kept]
            net.bn1.running_mean[removed], net.bn1.running_var[removed] = (
                net.bn1.running_mean[kept],
                net.bn1.running_var[kept],
            )
            net.bn1.weight[removed], net.bn1.bias[removed] = factor * net.bn1.weight[kept], factor * net.bn1.bias[kept]
    plan = Plan(keep_channels={"conv1": (0, 2, 3, 5, 6, 7)}, sizes={"conv1": 8})
    settings = Replacement(ridge=1e-13, scope=scope)
    reduced = replace_mechanisms(net, plan, batches, "refit", IMAGE, settings=settings)
    for batch, _ in images(seed=9):
        torch.testing.assert_close(reduced.model(batch), net(batch), rtol=0, atol=1e-8)
    deleted = replace_mechanisms(net, plan, batches, "delete", IMAGE)
    assert not torch.allclose(deleted.model(batch), net(batch), atol=1e-2)


def test_on_calibration_images_refit_errs_no_more_than_affine_and_affine_no_more_than_constant(tiny_net):
    plan = Plan(keep_channels={"conv1": (0, 2, 5, 6, 7)}, sizes={"conv1": 8})
    settings = Replacement(parents=None, ridge=1e-10)
    errors = {}
    for kind in ("constant", "affine", "refit"):
        reduced = replace_mechanisms(tiny_net.double(), plan, images(), kind, IMAGE, settings=settings)
        errors[kind] = reduced.report["layers"]["conv2"]["error"]
    assert errors["refit"] < errors["affine"] < errors["constant"]
    assert reduced.report["layers"]["conv2"]["fit_error"] == pytest.approx(errors["refit"], rel=1e-6)


@pytest.mark.parametrize("kind", ["delete", "constant", "affine", "refit"])
def test_the_original_is_untouched(tiny_net, kind):
    before = copy.deepcopy(tiny_net.state_dict())
    tiny_net.train()
    plan = Plan(keep_channels={"conv1": (0, 2, 5), "stem.0": (1, 2, 3)}, sizes={"conv1": 8, "stem.0": 6})
    batches = [(batch.float(), labels) for batch, labels in images(2)]
    state = torch.get_rng_state()
    reduced = replace_mechanisms(tiny_net, plan, batches, kind, IMAGE.float())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in tiny_net.state_dict().items())
    assert tiny_net.training and all(not module._forward_hooks for module in tiny_net.modules())
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in reduced.model.modules())
    assert reduced.model.conv2.weight.shape == (3, 3, 3, 3)


@pytest.mark.parametrize(("backbone", "size", "group", "biases"), [
    ("cifar_convnet", 16, "features.0", ()),
    ("bare_chain:BareChain", 8, "first", ("second",)),
])  # fmt: skip
def test_reduced_networks_survive_the_compact_folder(tmp_path, monkeypatch, backbone, size, group, biases):
    source = "from torch import nn\n\ndef BareChain():\n"
    source += "    net = nn.Sequential()\n    net.add_module('first', nn.Conv2d(3, 6, 3, bias=False))\n"
    source += "    net.add_module('relu', nn.ReLU())\n    net.add_module('second', nn.Conv2d(6, 4, 3, bias=False))\n"
    source += "    net.add_module('flat', nn.Flatten())\n    net.add_module('head', nn.Linear(64, 3))\n    return net\n"
    (tmp_path / "bare_chain.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    from lit_prune.models import build_network

    arguments = {} if ":" in backbone else {"num_classes": 3}
    net = build_network(backbone, arguments, trust=(backbone,)).eval()
    example = torch.zeros(1, 3, size, size)
    width = len(net.get_submodule(group).weight)
    plan = Plan(keep_channels={group: tuple(range(0, width, 2))}, sizes={group: width})
    batches = [(batch.float(), labels) for batch, labels in images(2, size)]
    reduced = replace_mechanisms(net, plan, batches, "affine", example)
    assert reduced.plan.added_biases == biases
    folder = tmp_path / "compact"
    shape = tuple(example.shape[1:])
    save_compact(folder, reduced.model, backbone=backbone, arguments=arguments, input_shape=shape, plans=[reduced.plan])
    restored = load_compact(folder, trust=(backbone,))
    assert torch.equal(restored(batches[0][0].cpu()), reduced.model.cpu()(batches[0][0].cpu()))


def test_a_shortcut_without_weights_is_refused_by_name():
    net = build_backbone("cifar_resnet20", num_classes=3).eval()
    plan = Plan(keep_channels={"conv1": tuple(range(12))}, sizes={"conv1": 16})
    batches = [(batch.float(), labels) for batch, labels in images(1, 16)]
    with pytest.raises(InputError, match=r"layer2\.0\.shortcut.*conv1"):
        replace_mechanisms(net, plan, batches, "constant", torch.zeros(1, 3, 16, 16))
    settings = Replacement(unsupported="delete")
    reduced = replace_mechanisms(net, plan, batches, "constant", torch.zeros(1, 3, 16, 16), settings=settings)
    assert list(reduced.report["refused"]) == ["layer2.0.shortcut"]


def test_refit_repairs_a_sliced_trunk_and_a_dropped_block():
    torch.manual_seed(0)
    net = build_backbone("cifar_resnet14_wide_stem", num_classes=3).eval()
    batches = [(batch.float()[:4], labels[:4]) for batch, labels in images(2, 32)]
    plan = Plan(("layer1.1",), {"layer3.0.conv2": tuple(range(44))}, {"layer3.0.conv2": 64})
    settings = Replacement(towards="weights", ridge=1e-6, rows=1000)
    distances = {}
    for kind in ("delete", "refit"):
        reduced = replace_mechanisms(net, plan, batches, kind, torch.zeros(1, 3, 32, 32), settings=settings)
        distances[kind] = sum(float((reduced.model(b) - net(b)).square().sum().detach()) for b, _ in batches)
    assert distances["refit"] < 0.5 * distances["delete"]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"kind": "mean"}, "kind='mean'"), ({"batches": []}, "batches"), ({"settings": {"ridge": 0}}, "ridge=0"),
])  # fmt: skip
def test_bad_arguments_are_named(tiny_net, arguments, message):
    plan = Plan(keep_channels={"conv1": (0, 2, 5)}, sizes={"conv1": 8})
    with pytest.raises(InputError, match=message):
        settings = Replacement(**arguments.get("settings", {}))
        replace_mechanisms(
            tiny_net,
            plan,
            arguments.get("batches", images(1)),
            arguments.get("kind", "refit"),
            IMAGE,
            settings=settings,
        )


def test_moments_hold_the_inputs_of_one_layer_at_a_time():
    net, held, alive = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)), [], []
    net[1].register_forward_pre_hook(lambda module, inputs: held.append(weakref.ref(inputs[0])))
    net[2].register_forward_pre_hook(lambda module, inputs: alive.append(held[-1]() is not None))
    collect(net, [(torch.randn(6, 3), None)] * 2, InputMoments(net, ["0", "1", "2"]), Unlabelled())
    assert alive == [False, False]
