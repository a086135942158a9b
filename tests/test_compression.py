import copy
from dataclasses import replace

import pytest
import timm
import torch
from residual_net import TRUNK, ResidualNet
from torch import nn

import lit_prune
from lit_prune.compression import Recipe
from lit_prune.errors import InputError
from lit_prune.replace import Replacement
from lit_prune.structure import Plan, apply_plan, cost
from lit_prune.structure.budgets import Quantity
from lit_prune.task import Custom


def wide_block() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(TRUNK, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, TRUNK, 3, padding=1)
    )


@pytest.fixture
def net():
    """What the two blocks compute is redundant, so that much can go without a trace."""
    torch.manual_seed(0)
    model = ResidualNet(wide_block, 2, 3).eval()
    with torch.no_grad():
        for block in model.blocks:
            block[0].weight[6:] = block[0].weight[:6]  # six of the twelve units are copies
            block[0].bias[6:] = block[0].bias[:6]
    return model


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [(torch.randn(32, 3, 8, 8), torch.randint(3, (32,))) for _ in range(4)]


def test_compact_network_is_within_the_budget_and_answers_alike(net, batches):
    before = copy.deepcopy(net.state_dict())
    compact, report = lit_prune.compress(net, batches, keep=0.6)
    example = batches[0][0]
    assert cost(compact, example).macs == report["compact"]["macs"] <= 0.6 * cost(net, example).macs
    assert report["agreement"] > 0.97 and report["distortion"] < 0.05
    assert {"accuracy", "macs", "params"} <= set(report["dense"])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert set(report["seconds"]) == {"plan", "stand_in", "verify"}


def test_report_holds_a_plan_that_rebuilds_the_structure(net, batches):
    compact, report = lit_prune.compress(net, batches, keep=0.6)
    rebuilt = apply_plan(net, Plan.from_dict(report["plan"]), batches[0][0][:1])
    rebuilt.load_state_dict(compact.state_dict())
    torch.testing.assert_close(rebuilt(batches[0][0]), compact(batches[0][0]))


def test_a_task_that_only_runs_the_network_serves_too(net, batches):
    """A second input beside the images that looks like a target, and no loss: nothing is asked for one at the end."""
    run = Custom(run=lambda model, batch: model(batch[0] * (1 + batch[1].float())[:, None, None, None]))
    report = lit_prune.compress(net, batches, keep=0.6, task=run)[1]
    assert report["distortion"] < 0.05 and set(report["compact"]) == {"macs", "params"}


def test_labels_are_not_read_and_images_alone_serve(net, batches):
    with_labels, _ = lit_prune.compress(net, batches, keep=0.6)
    alone, report = lit_prune.compress(net, [images for images, _ in batches], keep=0.6, task="unlabelled")
    torch.testing.assert_close(alone(batches[0][0]), with_labels(batches[0][0]))
    assert "accuracy" not in report["dense"]


def test_parameters_are_a_budget_too(net, batches):
    compact, report = lit_prune.compress(net, batches, keep=0.7, budget="params")
    assert report["compact"]["params"] <= 0.7 * report["dense"]["params"]


class Time(Quantity):
    """Measured: multiply-adds, and a tenth of a dense pass for the calls."""

    measured, unit = True, "s"

    def compare(self, models, example_input):
        found = [cost(model, example_input).macs for model in models]
        return [value + 0.1 * found[0] for value in found]


def test_a_measured_budget_is_reported_as_asked_for_as_predicted_and_as_measured(net, batches):
    compact, report = lit_prune.compress(net, batches, keep=0.7, budget=f"{__name__}:Time")
    said = report["budget"]
    assert said["requested"] == 0.7 and 0.65 < said["measured"] == said["compact"] / said["dense"] <= 0.7
    assert said["predicted"] == pytest.approx(said["measured"], abs=0.02) and said["spread"] == 0
    assert f"{said['measured']:.1%}, predicted {said['predicted']:.1%}" in str(report)
    assert said["compact"] - 0.1 * report["dense"]["macs"] == pytest.approx(cost(compact, batches[0][0]).macs, rel=1e-3)


def test_widths_that_kernels_are_not_made_for_are_said():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()
    images, recipe = [torch.randn(64, 3, 8, 8)], Recipe(score="magnitude", allocation="uniform", kind="delete")
    any_width, multiples = (
        str(lit_prune.compress(net, images, keep=0.6, recipe=replace(recipe, round_to=to))[1]) for to in (1, 8)
    )
    said = "1 of the 2 widths are no multiples of 8, as they were"
    assert said in any_width and "multiples of 8" not in multiples


def test_scaling_units_changes_neither_choice_nor_function(net, batches):
    """Units times factors in [0.01, 100] that their readers undo."""
    net = net.double()
    batches = [(images.double(), labels) for images, labels in batches]
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        for block in scaled.blocks:
            factors = torch.exp(torch.empty(12, dtype=torch.float64).uniform_(-4.6, 4.6))
            block[1].weight *= factors
            block[1].bias *= factors
            block[3].weight /= factors.view(1, -1, 1, 1)
    recipe = Recipe(only=("blocks.0.0", "blocks.1.0"))
    (first, one), (second, two) = (lit_prune.compress(m, batches, keep=0.5, recipe=recipe) for m in (net, scaled))
    assert one["plan"]["keep_channels"] == two["plan"]["keep_channels"]  # Jaccard 1.000
    torch.testing.assert_close(first(batches[0][0]), second(batches[0][0]), rtol=1e-3, atol=1e-4)


def test_a_budget_out_of_reach_says_the_least(net, batches):
    with pytest.raises(InputError, match=r"keep=0\.001 is out of reach.*give at least keep=0\.\d+"):
        lit_prune.compress(net, batches, keep=0.001)


def test_a_measured_budget_out_of_reach_says_the_least(net, batches):
    with pytest.raises(
        InputError, match=r"keep=0\.05 is out of reach: .* still takes 0\.\d+ .*give at least keep=0\.\d+"
    ):
        lit_prune.compress(net, batches, keep=0.05, budget=f"{__name__}:Time")  # the calls alone take more


def test_singular_layers_are_solved_without_harm(net, batches):
    """Units that never fire, units that never change, and an image channel that is blank, beside the copies."""
    with torch.no_grad():
        for block in net.blocks:
            block[1].bias[:2] = -100.0
            block[1].weight[2:4], block[1].bias[2:4] = 0.0, 2.0
    for images, _ in batches:
        images[:, 1] = 0.0
    compact, report = lit_prune.compress(net, batches, keep=0.6)
    assert all(parameter.isfinite().all() for parameter in compact.parameters())
    assert report["distortion"] < 0.01


def test_no_batches_are_refused(net):
    with pytest.raises(InputError, match="batch"):
        lit_prune.compress(net, [], keep=0.5)


def few_images() -> list:
    torch.manual_seed(2)
    return [(torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))]


def test_layers_with_too_few_positions_are_pulled_to_their_weights_and_the_number_that_is_needed_is_said(net):
    few = few_images()
    with pytest.warns(UserWarning, match=r"fewer positions than weights .*; \d+ calibration images determine all"):
        _, report = lit_prune.compress(net, few, keep=0.6)
    _, deleted = lit_prune.compress(net, few, keep=0.6, recipe=Recipe(kind="delete"))
    assert report["distortion"] < deleted["distortion"]


def test_a_refit_that_may_leave_nothing_refuses_too_few_images_with_the_number_that_is_needed(net):
    few = few_images()
    refusing = Recipe(replacement=Replacement())
    with pytest.raises(InputError, match=r"from 32 positions of 2 images; give at least \d+ calibration images"):
        lit_prune.compress(net, few, keep=0.6, recipe=refusing)


def test_seconds_of_repair_never_end_worse_on_held_out_samples_and_leave_norm_statistics_alone(net, batches):
    plain, _ = lit_prune.compress(net, batches, keep=0.35)
    repaired, after = lit_prune.compress(net, batches, keep=0.35, seconds=1.0)
    assert after["repair"]["steps"] >= 1
    assert after["repair"]["divergence_after"] <= after["repair"]["divergence_before"]
    for one, other in zip(plain.blocks, repaired.blocks, strict=True):
        assert torch.equal(one[1].running_mean, other[1].running_mean)
    assert not any(parameter.grad is not None for parameter in repaired.parameters())


def test_repair_of_frozen_weights_is_no_step(net, batches):
    frozen = net.requires_grad_(False)
    with pytest.raises(InputError, match="requires_grad"):
        lit_prune.compress(frozen, batches, keep=0.6, seconds=0.5)


class Mixing(nn.Module):
    """Torch's attention, or timm's of the same weights."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(5, 32), attention, nn.Linear(32, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        mixed = self.attention(x, x, x)[0] if isinstance(self.attention, nn.MultiheadAttention) else self.attention(x)
        return self.head((x + mixed).mean(1))


@pytest.mark.parametrize("method", ["reconstruction", "variance", "magnitude"])
def test_heads_of_torchs_attention_go_as_those_of_the_same_attention_of_layers_do(method):
    torch.manual_seed(0)
    bare = Mixing(nn.MultiheadAttention(32, 8, batch_first=True)).eval()
    layered = Mixing(timm.layers.Attention(32, 8, qkv_bias=True)).eval()
    names = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias", "out_proj.": "proj."}
    state = bare.state_dict()
    for old, new in names.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    layered.load_state_dict(state)
    tokens = [torch.randn(64, 6, 5) for _ in range(4)]
    recipe = Recipe(only="heads", score=method)
    found = [lit_prune.compress(net, tokens, keep=0.7, recipe=recipe) for net in (bare, layered)]
    kept = [report["plan"]["keep_channels"] for _, report in found]
    assert kept[0] == kept[1] and 0 < len(kept[0]["attention"]) < 8
    torch.testing.assert_close(found[0][0](tokens[0]), found[1][0](tokens[0]), rtol=1e-3, atol=1e-4)


HIDDEN = {
    "exported": (lambda net, x: torch.export.export(net, (x,)).module(), "an exported program"),
    "scripted": (lambda net, x: torch.jit.trace(net, x), "a TorchScript module"),
    "copies": (lambda net, x: nn.DataParallel(net), r"give its \.module"),
    "quantised": (lambda net, x: torch.ao.quantization.quantize_dynamic(net, {nn.Linear}), "before it is quantised"),
    "compiled in place": (lambda net, x: _with_compiled_forward(net), "compile after it is cut"),
    "integers": (lambda net, x: _with_weights(net, torch.int8), "before it is quantised"),
    "complex": (lambda net, x: _with_weights(net, torch.complex64), "a Linear in it computes in complex numbers"),
    "inference": (lambda net, x: _made_for_inference(), "made under torch.inference_mode"),
    "subclass": (lambda net, x: _with_weights(net, torch.float32, Sharded), "held as Sharded; prune before that"),
}


class Sharded(torch.Tensor):
    """Stands for tensors of libraries that shard or quantise."""

    __module__ = "torch.distributed.tensor"


def _with_compiled_forward(net: nn.Module) -> nn.Module:
    net.forward = torch.compile(net.forward, backend="eager")
    return net


def _with_weights(net: nn.Module, dtype: torch.dtype, kind: type = torch.Tensor) -> nn.Module:
    weight = net[0].weight.detach().to(dtype).as_subclass(kind)
    net[0].weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return net


def _made_for_inference() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(4, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", HIDDEN)
def test_networks_whose_layers_cannot_be_seen_are_refused_before_any_work(how):
    make, message = HIDDEN[how]
    net, images = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(64, 4)
    for task in (None, "unlabelled"):
        with pytest.raises(InputError, match=message):
            lit_prune.compress(make(net, images), [images], task=task)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ((torch.randn(64, 4), torch.zeros(64).long()), r"batch 1 is int64 \[64\], the first is float32 \[64, 4\]"),
        ([torch.randn(64, 4), torch.full((8, 4), torch.nan)], "batch 1 holds NaN or infinity in its inputs"),
        ([torch.full((8, 4), torch.nan)], "batch 0 holds NaN or infinity in its inputs"),
        (torch.randn(64, 4), "give a list of batches, or a DataLoader"),
    ],
    ids=["inputs and targets apart", "NaN", "all NaN", "a tensor"],
)
def test_batches_that_cannot_be_meant_are_refused_before_any_work(batches, message):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with pytest.raises(InputError, match=message):
        lit_prune.compress(net, batches, keep=0.7)


def test_batches_may_be_lists_of_any_length():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval()

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, images):
            return torch.stack([self.net(image[None])[0] for image in images])

    batches = [[torch.randn(3, 8, 8) for _ in range(size)] for size in (8, 8, 3)]
    assert lit_prune.compress(Several().eval(), batches, keep=0.7)[1]["images"] == 19
