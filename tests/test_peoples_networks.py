"""Networks and batches as people bring them to `compress`."""

import pytest
import torch
from torch import nn

import lit_prune


def images(*sizes: int, count: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, 3, size, size, generator=generator) for size in sizes]


def block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


def network(*head: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*block(3, 16), *block(16, 16), *head).eval()


def classifier(width: int = 16) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]


class Gate(nn.Module):
    """Squeeze and excitation through a single channel."""

    def __init__(self):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(16, 1, 1), nn.Conv2d(1, 16, 1)

    def forward(self, x):
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def test_a_layer_of_one_channel_stays_and_the_others_go():
    small, report = lit_prune.compress(network(Gate(), *classifier()), images(8, 8), keep=0.6)
    assert small[6].squeeze.out_channels == 1 and small[6].squeeze.in_channels < 16
    assert report["compact"]["macs"] <= 0.6 * report["dense"]["macs"]


@pytest.mark.parametrize("labelled", [True, False])
def test_images_of_differing_sizes(labelled):
    batches = images(8, 12, 8, 10, count=8)
    batches = [(x, torch.zeros(len(x), *x.shape[2:]).long()) for x in batches] if labelled else batches
    _, report = lit_prune.compress(network(nn.Conv2d(16, 4, 1)), batches, keep=0.6)
    assert report["images"] == 32 and report["distortion"] < 0.2


@pytest.mark.parametrize("label", [-100, 7])
def test_labels_that_do_not_fit_cost_the_figure_alone(label):
    x = images(8, 8)
    batches = [(x[0], torch.zeros(16).long()), (x[1], torch.full((16,), label))]
    with pytest.warns(UserWarning, match="no accuracy is given: batches: labels from"):
        _, report = lit_prune.compress(network(*classifier()), batches, keep=0.6)
    assert set(report["compact"]) == {"macs", "params"} and report["agreement"] > 0.5


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_weights_that_are_made_of_others_are_not_solved_for(norm):
    dense = network(*classifier())
    dense[-1] = norm(dense[-1])
    dense.eval()
    small, report = lit_prune.compress(dense, images(8, 8, 8, count=64), keep=0.6)
    assert torch.equal(small[-1].bias, dense[-1].bias) and "8" not in report["layers"]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Sequential(*block(3, 16), *block(16, 16)), nn.Linear(32, 1)

    def forward(self, left, right):
        return self.head(torch.cat([self.features(x).mean((2, 3)) for x in (left, right)], 1))


@pytest.mark.parametrize("more", [(), (torch.tensor([[0.0], [1.0]] * 8),)], ids=["alone", "with labels"])
def test_pairs_lie_side_by_side_in_a_batch(more):
    batches = [(*images(8, 8), *more)] * 2
    _, report = lit_prune.compress(Two().eval(), batches, keep=0.6)
    assert report["images"] == 32 and ("f1" in report["dense"]) == bool(more)


class Whole(nn.Module):
    """Is given the batch as it is."""

    def __init__(self):
        super().__init__()
        self.inner = network(*classifier())

    def forward(self, batch):
        return {"logits": self.inner(batch["image"])}


def test_a_network_that_reads_the_batch_itself():
    batches = [{"image": x, "label": torch.zeros(len(x)).long()} for x in images(8, 8)]
    with pytest.raises(lit_prune.InputError, match="which the network does not take"):
        lit_prune.compress(Whole().eval(), batches, keep=0.6)
    task = lit_prune.task.Custom(run=lambda model, batch: model(batch))
    assert lit_prune.compress(Whole().eval(), batches, keep=0.6, task=task)[1]["images"] == 32


class Decides(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.inner, self.how = network(*classifier()), how

    def forward(self, x):
        return self.how(self.inner(x))


@pytest.mark.parametrize("how", [lambda logits: logits.argmax(1), lambda logits: logits.detach()])
def test_answers_without_gradient_are_refused(how):
    with pytest.raises(lit_prune.InputError, match="has no gradient|without a tensor of floats"):
        lit_prune.compress(Decides(how).eval(), images(8), keep=0.6)


class Frequencies(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 8, 5, dtype=torch.complex64))

    def forward(self, x):
        return torch.fft.irfft2(torch.fft.rfft2(x) * self.weight, s=x.shape[-2:])


def test_complex_parameters_stay_beside_layers_that_are_solved():
    small, _ = lit_prune.compress(network(Frequencies(), *block(16, 16), *classifier()), images(8, 8), keep=0.7)
    assert small[6].weight.shape == (16, 8, 5)


def test_calls_compiled_in_place_are_not_those_of_the_copy():
    dense = network(*classifier())
    expected = lit_prune.compress(dense, images(8, 8), keep=0.6)[0]
    dense.compile(backend="eager")
    found = lit_prune.compress(dense, images(8, 8), keep=0.6)[0]
    x = images(8)[0]
    torch.testing.assert_close(found(x), expected(x), rtol=0, atol=0)


def test_a_wrong_name_of_an_argument_names_the_right_ones():
    with pytest.raises(TypeError, match="compress: .*'score'; its arguments are model, batches, keep"):
        lit_prune.compress(network(), images(8), score="taylor")
