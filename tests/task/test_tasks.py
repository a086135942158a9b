import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_prune.errors import InputError
from lit_prune.measurement.labels import Pooled
from lit_prune.measurement.passes import collect
from lit_prune.replace.curvature import measure_curvature
from lit_prune.replace.risk import RiskSamples
from lit_prune.scores import SCORES, Evidence, find_score, score
from lit_prune.scores.planning import method_needs
from lit_prune.task import (
    TARGETS,
    Classification,
    Custom,
    Detection,
    MultiLabel,
    Regression,
    Segmentation,
    Unlabelled,
    task_variable,
)

RANDOM = torch.Generator().manual_seed(3)
LOGITS = torch.randn(6, 4, generator=RANDOM)
LABELS = torch.tensor([0, 1, 2, 3, 3, 0])
MAPS = torch.randn(2, 3, 4, 5, generator=RANDOM)
MAP_LABELS = torch.randint(3, (2, 4, 5), generator=RANDOM)
PAIRS = {
    "classification": (Classification(), LOGITS, LABELS, F.cross_entropy),
    "soft labels": (Classification(), LOGITS, LOGITS.flip(0).softmax(1), F.cross_entropy),
    "multi-label": (MultiLabel(), LOGITS, (LOGITS.flip(0) > 0).float(), F.binary_cross_entropy_with_logits),
    "regression": (Regression(), LOGITS, LOGITS.flip(0), F.mse_loss),
    "segmentation": (Segmentation(), MAPS, MAP_LABELS, F.cross_entropy),
}


@pytest.mark.parametrize("case", PAIRS)
def test_losses_average_to_torchs_own(case):
    task, output, target, loss = PAIRS[case]
    batch = (torch.zeros(len(output), 3), target)
    assert task.losses(output, batch).shape == (len(output),)
    torch.testing.assert_close(task.losses(output, batch).mean(), loss(output, target))
    torch.testing.assert_close(
        task.variable(output, batch, "negative_loss")[:, 0], -task.losses(output, batch).double(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("case", PAIRS)
def test_figures_add_over_batches(case):
    task, output, target, _ = PAIRS[case]
    whole = task.metric(output, (torch.zeros(len(output), 3), target))
    parts = [task.metric(output[s], (torch.zeros(len(output[s]), 3), target[s])) for s in (slice(1), slice(1, None))]
    torch.testing.assert_close(whole, parts[0] + parts[1])
    assert task.figure(whole) == pytest.approx(task.figure(parts[0] + parts[1]))


def gauss_newton(task, output, batch):
    """Mean over samples of weight · g gᵀ, summed over the terms."""
    output, found = output.double().requires_grad_(), 0.0
    for values, weights in task.curvature_terms(output, batch, torch.Generator().manual_seed(0)):
        rows = torch.autograd.grad(values.sum(), output, retain_graph=True)[0].flatten(1)
        found = found + (weights[:, None] * rows).T @ rows / len(rows)
    return found


@pytest.mark.parametrize(("case", "samples"), [("classification", 1), ("multi-label", 4000), ("segmentation", 4000)])
def test_curvature_terms_give_the_hessian_of_a_log_likelihood(case, samples):
    """With logits as parameters the Gauss-Newton matrix is the Hessian of the loss."""
    task, output, target, _ = PAIRS[case]
    output, batch = output[:1], (torch.zeros(1, 3), target[:1])
    exact = torch.autograd.functional.hessian(lambda values: task.losses(values, batch).sum(), output.double())
    found = gauss_newton(task, output.expand(samples, *output.shape[1:]).clone(), batch)
    exact = exact.reshape(found.shape)
    assert (found - exact).norm() < (1e-12 if samples == 1 else 0.1) * exact.norm()


def test_random_projections_give_the_hessian_of_the_squared_error():
    found = gauss_newton(Regression(), LOGITS[:1].repeat(4000, 1), None)
    assert (found - torch.eye(4) * 2 / 4).norm() < 0.1


def test_mean_intersection_over_union_is_that_of_the_definition():
    task = Segmentation(void=(2, 255))
    labels = MAP_LABELS.clone()
    labels[0, 0] = 255
    answers, seen = MAPS.argmax(1), (labels != 255) & (labels != 2)
    ious = []
    for k in (0, 1):
        both = ((answers == k) & (labels == k) & seen).sum()
        ious.append(both / (((answers == k) | (labels == k)) & seen).sum())
    sums = task.metric(MAPS, (torch.zeros(2, 3), labels))
    assert task.figure(sums) == pytest.approx(float(torch.stack(ious).mean()))


def test_void_pixels_have_no_loss_and_unknown_labels_are_refused():
    task, labels = Segmentation(), MAP_LABELS.clone()
    labels[0, :2], labels[1] = 255, -100
    batch = (torch.zeros(2, 3), labels)
    expected = F.cross_entropy(MAPS[:1, :, 2:], labels[:1, 2:])
    torch.testing.assert_close(task.losses(MAPS, batch), torch.stack([expected, torch.tensor(0.0)]))
    with pytest.raises(InputError, match="labels from 0 to 7 for 3 classes.*void="):
        task.losses(MAPS, (torch.zeros(2, 3), labels.clamp_min(0).clamp_max(7)))


def test_coarse_logits_are_resized_to_the_labels():
    labels = MAP_LABELS.repeat_interleave(2, 1).repeat_interleave(2, 2)
    wide = F.interpolate(MAPS, labels.shape[1:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        Segmentation().losses(MAPS, (torch.zeros(2, 3), labels)).mean(), F.cross_entropy(wide, labels)
    )


@pytest.mark.parametrize("name", TARGETS)
def test_the_six_variables_of_classification_stay(name):
    found = Classification().variable(LOGITS, (torch.zeros(6, 3), LABELS), name)
    assert torch.equal(found, task_variable(name, LOGITS, LABELS))


def test_images_alone_have_the_predicted_variables_and_no_loss():
    task, images = Classification(), torch.zeros(6, 3)
    assert task.default_variable(images) is None
    assert task.variable(LOGITS, images, "predicted_logit").shape == (6, 1)
    for asked in (task.loss, lambda o, b: task.variable(o, b, "true_margin"), task.metric):
        with pytest.raises(InputError, match="labels"):
            asked(LOGITS, images)
    with pytest.raises(InputError, match="'unlabelled' has no loss, which this needs; give batches with targets"):
        Unlabelled().losses(LOGITS, images)


def test_f1_is_that_of_the_definition():
    task = MultiLabel()
    logits, labels = torch.tensor([[1.0, -1, 1, -1]]), torch.tensor([[1, 1, 0, 0]])
    assert task.figure(task.metric(logits, (torch.zeros(1, 3), labels))) == pytest.approx(0.5)


def test_one_number_for_several_samples_is_refused_or_run_one_by_one():
    batch = torch.randn(3, 2)
    task = Custom(loss=lambda output, batch: output.mean())
    with pytest.raises(InputError, match=r"shape \[\] for 3 samples.*scalar_loss=True"):
        task.losses(batch, batch)
    task = Custom(loss=lambda output, batch: output.mean(), scalar_loss=True)
    losses = torch.cat([task.losses(piece, piece) for piece in task.pieces(batch)])
    torch.testing.assert_close(losses, batch.mean(1))


def test_a_detector_gives_losses_with_its_norms_in_evaluation_mode():
    torch.manual_seed(0)

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1)

        def forward(self, images, targets=None):
            values = [self.head(self.norm(image[None])) for image in images]
            assert self.training is (targets is not None) and not self.norm.training
            return {"a": values[0].mean().square(), "b": targets[0]["boxes"].sum()} if self.training else []

    model = Detector().eval()
    batch = ([torch.rand(3, 4, 4)], [{"boxes": torch.ones(1, 4), "labels": torch.ones(1).long()}])
    output = Detection().run(model, batch)
    assert not model.training and torch.equal(model.norm.running_mean, torch.zeros(3))
    torch.testing.assert_close(Detection().losses(output, batch)[0], output.losses["a"] + 4)
    assert Detection().prediction(output).shape == (1, 5 * 16)
    with pytest.raises(InputError, match="no targets"):
        Detection().loss(Detection().run(model, batch[0]), batch[0])


class Twice(nn.Module):
    """A trunk that runs on both halves of the channels, or two copies of it."""

    def __init__(self, trunks):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.mix, self.head = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 4, 1), nn.Linear(8, 3)
        self.second = self.first if trunks == 1 else copy.deepcopy(self.first)
        self.other = self.mix if trunks == 1 else copy.deepcopy(self.mix)

    def forward(self, x):
        parts = [self.mix(torch.relu(self.first(x[:, :2]))), self.other(torch.relu(self.second(x[:, 2:])))]
        return self.head(torch.cat(parts, 1).mean((2, 3)))


def test_a_layer_that_runs_twice_has_the_gradient_of_both_calls():
    one, two = Twice(1).eval(), Twice(2).eval()
    batches = [(torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3)]
    shared = measure_curvature(one, ["mix"], batches)["mix"]
    apart = measure_curvature(two, ["mix", "other"], batches)
    for name in ("gradient", "product"):
        both = getattr(apart["mix"], name) + getattr(apart["other"], name)
        torch.testing.assert_close(getattr(shared, name), both, rtol=1e-5, atol=1e-8)
    assert (shared.hessian.diagonal() != (apart["mix"].hessian + apart["other"].hessian).diagonal()).all()  # they meet
    rows = collect(one, batches, RiskSamples(one, ["mix"], Classification(), per_image=100), Classification())["mix"]
    torch.testing.assert_close(rows.gradient.sum(0) / rows.images, shared.gradient, rtol=1e-5, atol=1e-8)
    assert rows.images == 6 and len(rows.values) == 6 * 25 * 2
    kept = []
    handle = one.mix.register_forward_hook(lambda module, args, output: kept.append(output.detach().mean((2, 3))))
    one(batches[0][0])
    handle.remove()
    values, kinds = collect(one, batches, Pooled(one, Classification()), Classification())
    torch.testing.assert_close(values["mix"], (kept[0] + kept[1]) / 2)
    assert torch.equal(kinds, batches[0][1])


NETWORKS = {
    "segmentation": (lambda: nn.Conv2d(5, 3, 1), lambda n: torch.randint(3, (n, 6, 6))),
    "heat maps": (lambda: nn.Conv2d(5, 3, 1), lambda n: torch.rand(n, 3, 6, 6)),
    "multi-label": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)),
        lambda n: (torch.randn(n, 4) > 0).float(),
    ),
    "soft labels": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)),
        lambda n: torch.randn(n, 4).softmax(1),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_score_works_for_every_task_with_targets(name):
    torch.manual_seed(0)
    head, target = NETWORKS[name]
    trunk = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1))
    model = nn.Sequential(*trunk, nn.ReLU(), head()).eval()
    batches = [(torch.randn(4, 2, 6, 6), target(4)) for _ in range(5)]
    evidence = Evidence(model, batches)
    evidence.gather(method_needs(SCORES))
    for score_name in SCORES:
        found = find_score(score_name).at(0.5).ranks(evidence)
        assert found and all(values.isfinite().all() for values in found.values()), score_name


def test_scores_that_need_no_labels_are_those_with_labels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(20, 3)).eval()
    images = torch.randn(8, 2, 6, 6)
    for name in ("variance", "cmr_logit", "chip", "mipp", "composite_ix", "reconstruction", "activation_rms"):
        alone, labelled = score(model, name, [images]), score(model, name, [(images, torch.arange(8) % 3)])
        assert alone.keys() == labelled.keys() and all(torch.equal(alone[k], labelled[k]) for k in alone), name
    for name in ("taylor", "cmr_const", "composite_pid", "label_information", "cap"):
        with pytest.raises(InputError, match="has no loss"):
            score(model, name, [images])
