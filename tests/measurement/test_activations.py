import pytest
import torch
from oracles import assert_moments
from torch import nn
from torch.nn import functional

from lit_prune.errors import InputError
from lit_prune.measurement import local_axis
from lit_prune.measurement.activations import Recording, record
from lit_prune.measurement.channel_table import collect_sums
from lit_prune.measurement.labels import Pooled
from lit_prune.measurement.layers import following_norms, select_layers
from lit_prune.measurement.moments import Moments
from lit_prune.measurement.passes import collect
from lit_prune.measurement.protocol import Protocol
from lit_prune.running import EXACT, MATMUL, PRECISION, undisturbed
from lit_prune.structure.example import Example
from lit_prune.task import Classification


def images(count=24, size=6, channels=3):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def outputs(model, module, data):
    """Raw outputs [S, N] and pooled outputs [B, N] of a convolution, float64, by its own hook."""
    kept = []
    handle = module.register_forward_hook(lambda m, i, o: kept.append(o.detach().double()))
    with torch.no_grad():
        model(data)
    handle.remove()
    values = torch.cat(kept)
    return values.movedim(1, -1).flatten(0, -2), values.flatten(2).mean(2)


def assert_recorded(conv, batches):
    """The recording of the batches holds the moments of the convolution's own outputs."""
    with torch.no_grad(), record(conv) as recording:
        for batch in batches:
            conv(batch)
    assert_moments(recording.sums.layers[""], *outputs(conv, conv, torch.cat(list(batches))))


def unfolded_power(conv, data):
    """w_iᵀ Σ_X w_i from the patches of each group, zero padding included: the definition itself."""
    powers = []
    data, weight = data.double(), conv.weight.detach().double().flatten(1)
    for group in range(conv.groups):
        width_in, width_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
        part = data[:, group * width_in : (group + 1) * width_in]
        patches = functional.unfold(part, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
        patches = patches.transpose(1, 2).flatten(0, 1)
        sigma = torch.cov(patches.T, correction=0)
        rows = weight[group * width_out : (group + 1) * width_out]
        powers.append(((rows @ sigma) * rows).sum(1))
    return torch.cat(powers)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
        {"kernel_size": 3, "padding": 2, "groups": 2},
        {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": 1},
        {"kernel_size": 3, "dilation": 2, "padding": (1, 2)},
    ],
)
def test_signal_power_equals_the_unfolded_quadratic_form(arguments):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **arguments)
    data = images(16, 8, 4) * torch.rand(4)[:, None, None] + 2.0
    with torch.no_grad(), record(conv) as recording:
        conv(data[:10])
        conv(data[10:])
    found = local_axis.signal_power(recording.sums.layers[""].outputs)
    torch.testing.assert_close(found, unfolded_power(conv, data), rtol=1e-5, atol=0)


@pytest.mark.parametrize("channels", [7, 20])  # summed in float64, in float32
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_covariance_agrees_with_float64_although_the_mean_is_a_thousand_deviations(memory_format, channels):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, channels, 3, padding=0).to(memory_format=memory_format)
    nn.init.normal_(conv.bias, 1000.0, 300.0)
    data = images(40, 20).to(memory_format=memory_format)
    assert_recorded(conv, data.split(16))


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_merged_recordings_equal_one_pass(tiny_net, precision, tolerance):
    tiny_net = tiny_net.to(precision)
    data, labels = images(40, 8).to(precision), torch.arange(40) % 4
    whole = collect_sums(tiny_net, [(data[:20], labels[:20]), (data[20:], labels[20:])])
    parts = [collect_sums(tiny_net, [(data[k : k + 20], labels[k : k + 20])]) for k in (20, 0)]
    merged = parts[0] + parts[1].copy()
    assert merged.images == 40
    assert list(merged.layers) == list(whole.layers)
    for name, sums in merged.layers.items():
        expected = whole.layers[name]
        assert not torch.equal(sums.outputs.shift, expected.outputs.shift)  # the algebra has something to do
        found, wanted = sums.reshift(expected.outputs.shift), expected
        for one, other in [(found.outputs, wanted.outputs), (found.pooled, wanted.pooled)]:
            scale = float(other.second.abs().max())
            torch.testing.assert_close(one.second, other.second, rtol=0, atol=tolerance * scale)
            torch.testing.assert_close(one.mean(), other.mean(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found.cross, wanted.cross, rtol=0, atol=float(tolerance * wanted.cross.abs().max()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sums_and_the_cross_moments_with_t_are_those_of_all_images(memory_format):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 20, 3).to(memory_format=memory_format)
    batches = images(25).to(memory_format=memory_format).split([12, 6, 7])
    with torch.no_grad(), record(conv) as recording:
        for batch in batches:
            recording.add_target(conv(batch).mean((1, 2, 3))[:, None])
    samples, pooled = outputs(conv, conv, torch.cat(batches))
    sums = recording.sums.layers[""]
    assert_moments(sums, samples, pooled)
    target = pooled.mean(1, keepdim=True)
    torch.testing.assert_close(sums.cross, (pooled - sums.pooled.shift).T @ target, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [3, 4, 8])  # maps of 1, 4, and 36 positions
def test_single_images_and_the_smallest_maps(size):
    torch.manual_seed(0)
    assert_recorded(nn.Conv2d(3, 4, 3), images(40, size).split(1))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [20, 60])
def test_outputs_in_half_precision_are_summed_as_they_are(precision, channels):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, channels, 3).to(precision)
    data = images(40, 8).to(precision)
    assert_recorded(conv, data.split(16))


def test_sums_are_the_same_in_and_out_of_inference_mode(tiny_net):
    batches = [(images(20, 8), torch.randn(20, 1)), (images(20, 8) + 1, torch.randn(20, 1))]
    kept = []
    for modes in [(False, False), (True, True), (True, False)]:
        with record(tiny_net.eval()) as recording:
            for (data, target), mode in zip(batches, modes, strict=True):
                with torch.inference_mode(mode), torch.no_grad():
                    tiny_net(data)
                    recording.add_target(target)
        kept.append(
            {name: sums.outputs.state() | {"cross": sums.cross} for name, sums in recording.sums.layers.items()}
        )
    for found in kept[1:]:
        for name, state in found.items():
            for key, value in state.items():
                assert torch.equal(value, kept[0][name][key])
                assert not value.is_inference()


def test_products_are_in_full_precision_whatever_the_trainer_allows(monkeypatch):
    settings, add = [], Moments.add

    def now():
        return [getattr(backend, PRECISION, EXACT[0]) for backend in MATMUL]

    def spied(*arguments):
        settings.extend(now())
        return add(*arguments)

    monkeypatch.setattr(Moments, "add", spied)
    conv, before = nn.Conv2d(3, 40, 3), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        allowed = now()
        with torch.no_grad(), record(conv):
            conv(images(64, 7))
            assert now() == allowed
        assert now() == allowed
        assert not set(allowed) <= set(EXACT)
    finally:
        torch.set_float32_matmul_precision(before)
    assert settings
    assert set(settings) <= set(EXACT)


def test_sums_that_are_completed_under_autocast_are_exact():
    torch.manual_seed(0)
    conv, data = nn.Conv2d(30, 90, 1), torch.randn(100, 30, 4, 4)  # read at its inputs
    with torch.no_grad(), record(conv) as recording:
        values = conv(data).double()
        with torch.autocast("cpu", torch.bfloat16):
            sums = recording.sums.layers[""]
    assert_moments(sums, values.movedim(1, -1).flatten(0, 2), values.mean((2, 3)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_samples_are_the_drawn_positions_and_means_are_over_all(memory_format, offset, monkeypatch):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 20, 3).to(memory_format=memory_format)
    conv.bias.data += offset
    data = images(40, 9).to(memory_format=memory_format)
    drawn = []
    place = Recording._places
    monkeypatch.setattr(Recording, "_places", lambda *a: drawn.append(place(*a)) or drawn[-1])
    with torch.no_grad(), record(conv, protocol=Protocol(positions=6)) as recording:
        for part in data.split(25):
            conv(part)
    places = torch.cat(drawn)
    assert places.shape == (40, 6)
    assert all(len(set(row.tolist())) == 6 for row in places)  # without replacement
    flat, pooled = outputs(conv, conv, data)
    samples = flat.view(40, 49, 20).gather(1, places[:, :, None].expand(-1, -1, 20)).flatten(0, 1)
    assert_moments(recording.sums.layers[""], samples, pooled)


def test_samples_at_random_positions_are_a_seeded_part_of_all(tiny_net):
    data = images(32, 8)
    batches = [(data, torch.arange(32) % 4)]
    few = Protocol(positions=5)
    one, two = (collect_sums(tiny_net, batches, protocol=few).layers["conv1"] for _ in range(2))
    every = collect_sums(tiny_net, batches).layers["conv1"]
    other = collect_sums(tiny_net, batches, protocol=Protocol(positions=5, seed=1)).layers["conv1"]
    assert one.outputs.count == 32 * 5
    assert torch.equal(one.outputs.second, two.outputs.second)
    assert not torch.allclose(one.outputs.second, other.outputs.second)
    torch.testing.assert_close(one.pooled.second, every.pooled.second, rtol=1e-5, atol=1e-5)
    capped = collect_sums(tiny_net, batches, protocol=Protocol(positions=64)).layers["conv1"]
    assert torch.equal(capped.outputs.second, every.outputs.second)


def test_post_bn_reads_the_norm_that_follows(tiny_net):
    data = images(16, 8)
    batches = [(data, torch.arange(16) % 4)]
    before = collect_sums(tiny_net, batches)
    after = collect_sums(tiny_net, batches, protocol=Protocol(hook_point="post_bn"))
    scale = (tiny_net.bn1.weight.square() / (tiny_net.bn1.running_var + tiny_net.bn1.eps)).detach().double()
    expected = local_axis.signal_power(before.layers["conv1"].outputs) * scale
    torch.testing.assert_close(local_axis.signal_power(after.layers["conv1"].outputs), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        after.layers["head"].outputs.second, before.layers["head"].outputs.second
    )  # no norm follows it


def test_following_norms_are_found_by_tensor_not_by_name_or_order():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn_first = nn.BatchNorm2d(4)  # declared first, follows `second`
            self.one, self.second, self.bare = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.late = nn.BatchNorm2d(4)  # reads an activation that was made in place from `bare`

        def forward(self, x):
            x = self.bn_first(self.second(torch.relu(self.one(x))))
            return self.late(torch.relu_(self.bare(x)))

    assert following_norms(Odd(), Example((images(),))) == {"second": "bn_first"}


def test_the_chosen_token_gives_the_channels_of_a_token_layer():
    torch.manual_seed(0)
    layer = nn.Linear(5, 6)
    tokens = torch.randn(30, 9, 5)
    with torch.no_grad(), record(layer, protocol=Protocol(token=2)) as recording:
        layer(tokens)
    expected = layer(tokens)[:, 2].detach().double().var(0, correction=0)
    torch.testing.assert_close(local_axis.signal_power(recording.sums.layers[""].outputs), expected, rtol=1e-5, atol=0)
    with torch.no_grad(), record(layer, protocol=Protocol(token=None)) as recording:
        layer(tokens)
    assert recording.sums.layers[""].outputs.count == 30 * 9
    with pytest.raises(InputError, match="token"), record(layer, protocol=Protocol(token=9)):
        layer(tokens)


def test_autocast_does_not_reach_the_sums():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 16, 3, padding=1)
    data = images(16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), record(conv) as recording:
        low = conv(data).double()
    assert_moments(recording.sums.layers[""], low.movedim(1, -1).flatten(0, 2), low.mean((2, 3)))


def test_the_model_and_the_random_state_are_left_as_found(tiny_net):
    tiny_net.bn1.train()
    tiny_net.stem.train()
    flags = [module.training for module in tiny_net.modules()]
    state = {key: value.clone() for key, value in tiny_net.state_dict().items()}
    dataset = torch.utils.data.TensorDataset(images(16, 8), torch.arange(16) % 4)
    torch.manual_seed(5)
    collect_sums(tiny_net, torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert flags == [module.training for module in tiny_net.modules()]
    assert all(torch.equal(value, state[key]) for key, value in tiny_net.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_net.modules())


def test_hooks_and_modes_are_restored_after_a_failure(tiny_net):
    tiny_net.train()
    with pytest.raises(InputError, match="batch 1 .*'stem.0'"):
        broken = images(8, 8)
        broken[3, 0, 2, 2] = torch.nan
        collect_sums(tiny_net, [(images(8, 8), torch.zeros(8).long()), (broken, torch.zeros(8).long())])
    assert tiny_net.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_net.modules())


def test_layers_are_chosen_by_pattern_and_a_miss_names_some(tiny_net):
    assert list(select_layers(tiny_net)) == ["stem.0", "conv1", "conv2", "head"]
    assert list(select_layers(tiny_net, ["conv?", "stem.*"])) == ["stem.0", "conv1", "conv2"]
    with pytest.raises(InputError, match="'layer9.\\*'.*stem.0"):
        collect_sums(tiny_net, [(images(8, 8), torch.zeros(8).long())], layers=["layer9.*"])


def test_the_calls_of_a_reused_layer_add():
    """A trunk that sees both images of a pair, with the pair's T for each."""

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Conv2d(3, 5, 3)

        def forward(self, one, other):
            return self.shared(one).mean((1, 2, 3)) - self.shared(other).mean((1, 2, 3))

    torch.manual_seed(0)
    model, pairs = Siamese(), [(images(12), 1 + images(12)), (images(9).roll(1, 0), images(9))]
    targets = [model(*pair)[:, None].detach() for pair in pairs]
    with torch.no_grad(), record(model) as recording:
        for pair, target in zip(pairs, targets, strict=True):
            model(*pair)
            recording.add_target(target)
    every = torch.cat([image for pair in pairs for image in pair])
    repeated = torch.cat([target for target in targets for _ in range(2)]).double()
    samples, pooled = outputs(model.shared, model.shared, every)
    sums = recording.sums.layers["shared"]
    assert_moments(sums, samples, pooled)
    torch.testing.assert_close(sums.cross, (pooled - sums.pooled.shift).T @ repeated, rtol=1e-4, atol=1e-5)
    assert sums.crossed == len(every) and not recording.sums.left_out


def test_windows_of_an_image_are_averaged_for_the_target_axis():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, maps):  # [B, 3, 6, 6] -> four windows an image, rows of an image together
            cut = maps.unfold(2, 3, 3).unfold(3, 3, 3).movedim(1, -1).flatten(0, 2).flatten(1, 2)  # [4·B, 9, 3]
            return self.layer(cut)

    torch.manual_seed(0)
    model, data = Windows(), images(20)
    with torch.no_grad(), record(model, protocol=Protocol(token=None)) as recording:
        values = model(data).double()
        recording.add_target(torch.randn(20, 1))
    sums = recording.sums.layers["layer"]
    assert_moments(sums, values.flatten(0, 1), values.view(20, 36, 5).mean(1))
    assert sums.crossed == 20


def test_layers_that_do_not_run_or_are_of_another_kind_are_named(caplog):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.idle, self.attention = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.MultiheadAttention(4, 2)

        def forward(self, maps):
            return self.conv(maps)

    model = Mixed()
    with torch.no_grad(), record(model) as recording:
        model(images())
    named = {"idle", "attention", "attention.out_proj"}
    assert set(recording.sums.left_out) == named
    (line,) = [r.getMessage() for r in caplog.records if "attention" in r.getMessage()]
    assert all(name in line for name in named)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 20, 3), (3, 11)),
        (nn.Conv3d(3, 20, 3), (3, 5, 4, 6)),
        (nn.ConvTranspose1d(3, 20, 3, stride=2), (3, 11)),
        (nn.ConvTranspose2d(4, 20, 3, stride=2, groups=2), (4, 5, 4)),
        (nn.ConvTranspose3d(3, 20, 2, stride=2), (3, 4, 3, 2)),
        (nn.Conv2d(4, 20, 3, groups=4), (4, 6, 6)),
    ],
)
def test_every_kind_of_convolution_is_recorded_by_its_channels(layer, shape):
    torch.manual_seed(0)
    layer.reset_parameters()
    assert_recorded(layer, torch.randn(20, *shape).split(9))


def test_a_linear_layer_on_maps_with_the_channels_last_has_all_their_positions():
    torch.manual_seed(0)
    layer, data = nn.Linear(8, 6), torch.randn(20, 5, 4, 8)
    with torch.no_grad(), record(layer) as recording:
        values = layer(data).double()
    assert_moments(recording.sums.layers[""], values.flatten(0, 2), values.mean((1, 2)))


def test_pooled_outputs_are_spatial_means_up_to_the_limit(tiny_net):
    data = images(30, 8)
    batches = [(data[k : k + 12], torch.arange(30)[k : k + 12] % 4) for k in range(0, 30, 12)]
    layers, task = {name: tiny_net.get_submodule(name) for name in ("conv1", "bn2")}, Classification()
    found, labels = collect(tiny_net, batches, Pooled(tiny_net, task, layers, limit=20), task)
    _, expected = outputs(tiny_net, tiny_net.conv1, data[:20])
    torch.testing.assert_close(found["conv1"].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(labels, torch.arange(20) % 4)


def test_undisturbed_gives_gradients_when_asked(tiny_net):
    with torch.no_grad(), undisturbed(tiny_net, gradients=True):
        assert torch.is_grad_enabled()
    with undisturbed(tiny_net):
        assert not torch.is_grad_enabled()
