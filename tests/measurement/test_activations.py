import pytest
import torch
from oracles import assert_moments
from torch import nn
from torch.nn import functional

from lit_prune.errors import InputError
from lit_prune.measurement import local_axis, streaming
from lit_prune.measurement.activations import BACKENDS, EXACT, PRECISION, Recording, pooled_outputs, record
from lit_prune.measurement.channel_table import collect_sums
from lit_prune.measurement.layers import following_norms, select_layers
from lit_prune.measurement.moments import ActivationSums
from lit_prune.measurement.products import SymmetricSum
from lit_prune.measurement.protocol import Protocol
from lit_prune.structure.example import Example
from lit_prune.task.running import undisturbed


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
    found = local_axis.signal_power(recording.sums.layers[""])
    torch.testing.assert_close(found, unfolded_power(conv, data), rtol=1e-5, atol=0)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """So many threads while the test runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


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
    merged = parts[0] + ActivationSums.from_state(parts[1].state())
    assert merged.images == 40
    assert list(merged.layers) == list(whole.layers)
    for name, sums in merged.layers.items():
        expected = whole.layers[name]
        assert not torch.equal(sums.shift, expected.shift)  # the algebra has something to do
        for key, value in sums.reshift(expected.shift).state().items():
            scale = expected.state()[key].abs().max()
            torch.testing.assert_close(value, expected.state()[key], rtol=0, atol=float(tolerance * scale))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_each_thread_sums_its_own_images(threads, memory_format, monkeypatch):
    lanes, add = [], SymmetricSum.add

    def spied(products, rows):
        lanes.extend([len(rows)] if rows.ndim == 3 else [])  # those of pooled outputs have two
        add(products, rows)

    monkeypatch.setattr(SymmetricSum, "add", spied)
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 20, 3).to(memory_format=memory_format)
    batches = images(25).to(memory_format=memory_format).split([12, 6, 7])  # the threads divide some of these evenly
    with torch.no_grad(), record(conv) as recording:
        for batch in batches:
            recording.add_target(conv(batch).mean((1, 2, 3))[:, None])
    assert lanes == {1: [1, 1, 1], 2: [2, 2, 1], 3: [3, 3, 1]}[threads]
    samples, pooled = outputs(conv, conv, torch.cat(batches))
    sums = recording.sums.layers[""]
    assert_moments(sums, samples, pooled)
    target = pooled.mean(1, keepdim=True)
    torch.testing.assert_close(sums.cross, (pooled - sums.shift).T @ target, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [8, 36, 37, 120])
@pytest.mark.parametrize("block_bytes", [1, 20_000, 1 << 21])
def test_maps_with_more_and_with_fewer_positions_than_channels(
    channels, block_bytes, memory_format, threads, monkeypatch
):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(streaming, "FEWEST_ROWS", 50)
    torch.manual_seed(0)
    conv = nn.Conv2d(3, channels, 3).to(memory_format=memory_format)
    conv.bias.data += 100 * torch.randn(channels)
    data = images(70).repeat(1, 1, 2, 2)[:, :, :8, :8].contiguous(memory_format=memory_format)  # 36 positions
    assert_recorded(conv, data.split(32))


@pytest.mark.parametrize(("channels", "lane_sums"), [(8, 1), (8, 500), (37, 1), (37, 5000)])
def test_few_lanes_where_their_sums_would_be_too_large(channels, lane_sums, threads, monkeypatch):
    monkeypatch.setattr(streaming, "LANE_SUMS", lane_sums)
    torch.manual_seed(0)
    conv, data = nn.Conv2d(3, channels, 3), images(36, 8)
    assert_recorded(conv, data.split(12))


@pytest.mark.parametrize("size", [3, 4, 8])  # maps of 1, 4, and 36 positions
@pytest.mark.parametrize("threads", [2, 5], indirect=True)  # that can, and cannot, share the positions of a lone one
def test_single_images_and_the_smallest_maps(size, threads):
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
        kept.append({name: sums.state() for name, sums in recording.sums.layers.items()})
    for found in kept[1:]:
        for name, state in found.items():
            for key, value in state.items():
                assert torch.equal(value, kept[0][name][key])
                assert not value.is_inference()


def test_products_are_in_full_precision_whatever_the_trainer_allows(monkeypatch):
    settings, add = [], SymmetricSum.add

    def now():
        return [getattr(backend, PRECISION, EXACT[0]) for backend in BACKENDS]

    def spied(*arguments):
        settings.extend(now())
        add(*arguments)

    monkeypatch.setattr(SymmetricSum, "add", spied)
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
    linear, rows = nn.Linear(30, 90), torch.randn(1000, 30)  # read at its inputs
    with torch.no_grad(), record(linear) as recording:
        samples = linear(rows).double()
        with torch.autocast("cpu", torch.bfloat16):
            sums = recording.sums.layers[""]
    assert_moments(sums, samples, samples)


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
    assert int(one.samples) == 32 * 5
    assert torch.equal(one.second, two.second)
    assert not torch.allclose(one.second, other.second)
    torch.testing.assert_close(one.pooled_second, every.pooled_second, rtol=1e-5, atol=1e-5)
    capped = collect_sums(tiny_net, batches, protocol=Protocol(positions=64)).layers["conv1"]
    assert torch.equal(capped.second, every.second)


def test_post_bn_reads_the_norm_that_follows(tiny_net):
    data = images(16, 8)
    batches = [(data, torch.arange(16) % 4)]
    before = collect_sums(tiny_net, batches)
    after = collect_sums(tiny_net, batches, protocol=Protocol(hook_point="post_bn"))
    scale = (tiny_net.bn1.weight.square() / (tiny_net.bn1.running_var + tiny_net.bn1.eps)).detach().double()
    expected = local_axis.signal_power(before.layers["conv1"]) * scale
    torch.testing.assert_close(local_axis.signal_power(after.layers["conv1"]), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(after.layers["head"].second, before.layers["head"].second)  # no norm follows it


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
    torch.testing.assert_close(local_axis.signal_power(recording.sums.layers[""]), expected, rtol=1e-5, atol=0)
    with torch.no_grad(), record(layer, protocol=Protocol(token=None)) as recording:
        layer(tokens)
    assert int(recording.sums.layers[""].samples) == 30 * 9
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


def test_a_layer_that_runs_twice_is_refused_by_name():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.shared(self.shared(x))

    model = Twice()
    with pytest.raises(InputError, match="'shared' runs more than once"), record(model):
        model(images())


def test_pooled_outputs_are_spatial_means_up_to_the_limit(tiny_net):
    data = images(30, 8)
    batches = [(data[k : k + 12], torch.arange(30)[k : k + 12] % 4) for k in range(0, 30, 12)]
    found, labels = pooled_outputs(tiny_net, ["conv1", "bn2"], batches, limit=20)
    _, expected = outputs(tiny_net, tiny_net.conv1, data[:20])
    torch.testing.assert_close(found["conv1"].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(labels, torch.arange(20) % 4)


def test_undisturbed_gives_gradients_when_asked(tiny_net):
    with torch.no_grad(), undisturbed(tiny_net, gradients=True):
        assert torch.is_grad_enabled()
    with undisturbed(tiny_net):
        assert not torch.is_grad_enabled()
