from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.measurement.channel_table import measure
from lit_prune.scores import score
from lit_prune.task import (
    Classification,
    Custom,
    Detection,
    MultiLabel,
    Regression,
    Segmentation,
    Unlabelled,
    find_task,
    recognise,
    settle,
)
from lit_prune.task.outputs import answers, named_outputs

X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 1, 2, 3])


class Answers(nn.Module):
    """Gives what a function makes of a batch of images."""

    def __init__(self, answer=lambda logits, maps: logits):
        super().__init__()
        self.net, self.head, self.answer = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 4), answer

    def forward(self, x):
        maps = self.net(x)
        return self.answer(self.head(maps.mean((2, 3))), maps)


class Named(nn.Module):
    """Takes its image by name only."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 4)

    def forward(self, *, pixel_values):
        return {"loss": None, "logits": self.head(pixel_values.flatten(1)), "hidden_states": (pixel_values,)}


class Detector(nn.Module):
    """The protocol of torchvision's detectors."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 5, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images, targets=None):
        values = [self.head(self.norm(image[None])) for image in images]
        if self.training:
            pairs = zip(values, targets, strict=True)
            return {"loss": sum((v.mean() - t["boxes"].sum()).square() for v, t in pairs) / len(values)}
        return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)} for _ in images]


@dataclass(frozen=True)
class Fields:
    """A batch as a dataclass."""

    images: torch.Tensor
    labels: torch.Tensor | None = None
    source: str = "here"


class Slots:
    """A batch as attrs makes one."""

    __slots__ = ("__weakref__", "label", "x")

    def __init__(self, x, label):
        self.x, self.label = x, label


SHOWN = torch.randint(4, (5, 8, 8), generator=torch.Generator().manual_seed(2))
ONE_HOT = torch.nn.functional.one_hot(SHOWN, 4).movedim(-1, 1)
SEVERAL = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
IMAGES = [torch.rand(3, 6, 8), torch.rand(3, 7, 5)]
TARGETS = [{"boxes": torch.rand(1, 4), "labels": torch.ones(1).long()} for _ in IMAGES]
MAPS = Answers(lambda logits, maps: maps)
CASES = {
    "x": (Answers(), X, Unlabelled),
    "x, y": (Answers(), (X, LABELS), Classification),
    "list of x, y": (Answers(), [X, LABELS], Classification),
    "x, y, index": (Answers(), (X, LABELS, torch.arange(5)), Classification),
    "one map of labels": (Answers(lambda _, maps: maps[:, :1]), (X, (X[:, 0] > 0).long()), MultiLabel),
    "one map of 0 and 1": (Answers(lambda _, maps: maps[:, :1]), (X, (X[:, :1] > 0).float()), MultiLabel),
    "one map of shares": (Answers(lambda _, maps: maps[:, :1].sigmoid()), (X, (X[:, :1] > 0).float()), Regression),
    "x, None": (Answers(), (X, None), Unlabelled),
    "dict": (Answers(), {"image": X, "label": LABELS}, Classification),
    "dict without labels": (Answers(), {"x": X}, Unlabelled),
    "by name": (Named(), {"pixel_values": X, "labels": LABELS}, Classification),
    "tuple of heads": (Answers(lambda logits, maps: (logits, maps)), (X, LABELS), Classification),
    "soft labels": (Answers(), (X, torch.rand(5, 4).softmax(1)), Classification),
    "multi-label": (Answers(), (X, torch.tensor([[0, 1, 1, 0]] * 5).float()), MultiLabel),
    "binary": (Answers(lambda logits, maps: logits[:, 0]), (X, torch.tensor([0, 1, 1, 0, 1])), MultiLabel),
    "regression": (Answers(), (X, torch.randn(5, 4)), Regression),
    "one value": (Answers(lambda logits, maps: logits[:, :1]), (X, torch.randn(5)), Regression),
    "heat maps": (MAPS, (X, torch.rand(5, 4, 8, 8)), Regression),
    "segmentation": (MAPS, (X, torch.randint(4, (5, 8, 8))), Segmentation),
    "segmentation, torchvision": (
        Answers(lambda logits, maps: {"out": maps, "aux": maps}),
        {"image": X, "mask": torch.randint(4, (5, 1, 8, 8))},
        Segmentation,
    ),
    "one-hot maps": (MAPS, (X, ONE_HOT.float()), Segmentation),
    "one-hot maps of integers": (MAPS, (X, ONE_HOT), Segmentation),
    "maps of several classes at once": (MAPS, (X, (torch.rand(5, 4, 8, 8) > 0.5).float()), Regression),
    "one-hot labels": (Answers(), (X, torch.eye(4)[LABELS]), Classification),
    "one-hot labels of integers": (Answers(), (X, torch.eye(4).long()[LABELS]), Classification),
    "one-hot labels, true or false": (Answers(), (X, torch.eye(4).bool()[LABELS]), Classification),
    "several labels later in the batch": (Answers(), (X, SEVERAL), MultiLabel),
    "several float labels later in the batch": (Answers(), (X, SEVERAL.float()), MultiLabel),
    "a dataclass": (Answers(), Fields(X, LABELS), Classification),
    "a dataclass without labels": (Answers(), Fields(X), Unlabelled),
    "slots": (Answers(), Slots(X, LABELS), Classification),
    "attributes": (Answers(), SimpleNamespace(image=X, mask=None, target=LABELS), Classification),
    "a dataclass of lists": (
        Detector(),
        SimpleNamespace(images=IMAGES, targets=TARGETS, ids=torch.arange(2)),
        Detection,
    ),
    "detection": (Detector(), (IMAGES, TARGETS), Detection),
    "detection without targets": (Detector(), IMAGES, Detection),
}


@pytest.mark.parametrize("case", CASES)
def test_the_usual_batches_and_outputs_are_recognised(case):
    model, batch, kind = CASES[case]
    model.train()
    before = torch.get_rng_state()
    assert type(recognise(model, batch)) is kind
    assert all(module.training for module in model.modules())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("case", CASES)
def test_a_slice_holds_the_first_samples_and_their_losses(case):
    model, batch, kind = CASES[case]
    model.eval()
    task = kind()
    few = task.take(batch, 2)
    assert task.size(few) == 2
    whole, part = (task.run(model, task.to(given, model)) for given in (batch, few))
    if kind is not Detection:
        torch.testing.assert_close(task.prediction(part), task.prediction(whole)[:2])
    if task.default_variable(batch):
        pieces = list(task.pieces(batch))
        losses = torch.cat([task.losses(task.run(model, piece), piece) for piece in pieces])
        torch.testing.assert_close(
            losses[:2], torch.cat([task.losses(task.run(model, p), p) for p in task.pieces(few)])
        )
        assert losses.shape == (task.size(batch),)


class Strange:
    """A batch that nobody knows."""


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (Strange(), "a batch is Strange"),
        (SimpleNamespace(left=X, right=X), "a batch is SimpleNamespace of {left: float32 [5, 3, 8, 8], right: "),
        ({"left": X, "right": X}, "dict of {left: float32 [5, 3, 8, 8]"),
        (("a", "b"), "a batch is tuple of (str, str)"),
        ((X[:, :2], LABELS), "which the network does not take"),
        ((X, torch.randn(7, 3)), "the target is float32 [7, 3], which is none of classification"),
    ],
)
def test_what_is_not_recognised_is_refused_in_one_line(batch, words):
    """A target that nothing is known of is refused where a loss is needed."""
    with pytest.raises(InputError) as refused:
        measure(Answers(), [batch])
    assert words in str(refused.value) and "task=" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", [torch.float32, torch.int64, torch.bool])
def test_one_hot_targets_are_the_classes_that_they_name(kind):
    for model, named, plain in ((MAPS, ONE_HOT, SHOWN), (Answers(), torch.eye(4)[LABELS], LABELS)):
        task, other = recognise(model, (X, named.to(kind))), recognise(model, (X, plain))
        output = model(X)
        assert torch.equal(task.loss(output, (X, named.to(kind))), other.loss(output, (X, plain)))
        assert torch.equal(task.metric(output, (X, named.to(kind))), other.metric(output, (X, plain)))
        assert task.default_variable((X, named.to(kind))) == other.default_variable((X, plain))


def test_a_batch_of_fields_is_left_as_it_was_and_moved_with_all_that_it_holds():
    batch = Fields(X, LABELS)
    task = recognise(Answers(), batch)
    moved = task.to(task.take(batch, 2), Answers().double())
    assert moved.images.dtype == torch.float64 and moved.source == "here" and len(moved.labels) == 2
    assert batch.images is X and task.relabelled(batch, X)["labels"] is X


def test_what_needs_no_targets_does_not_mind_strange_ones():
    model = Answers()
    assert score(model, "variance", [(X, torch.randn(7, 3))]).keys() == score(model, "variance", [X]).keys()
    with pytest.raises(InputError, match="which is none of"):
        score(model, "taylor", [(X, torch.randn(7, 3))])
    with pytest.raises(InputError, match="'unlabelled' has no loss"):
        score(model, "taylor", [X])


def test_an_output_that_holds_itself_or_an_enumeration_is_read_to_its_end():
    class Kind(Enum):
        LOGITS = 1

    answered = SimpleNamespace(kind=Kind.LOGITS, logits=torch.ones(2, 3))
    answered.itself = answered
    assert [tuple(values.shape) for values in answers(answered)] == [(2, 3)]
    assert list(named_outputs([answered, answered])) == [".0.logits", ".1.logits"]


def test_a_task_can_be_named():
    assert isinstance(find_task("regression"), Regression)
    with pytest.raises(InputError, match="task='regresion' is unknown: did you mean regression"):
        find_task("regresion")


def test_an_iterator_of_batches_keeps_its_first():
    task, batches = settle(None, Answers(), iter([(X, LABELS), (X, LABELS)]))
    assert isinstance(task, Classification) and len(list(batches)) == 2
    with pytest.raises(InputError, match="no batch"):
        settle(None, Answers(), [])


def test_a_task_of_functions_says_everything():
    model = nn.Bilinear(2, 3, 4)
    batch = {"left": torch.randn(6, 2), "right": torch.randn(6, 3)}
    task = Custom(
        run=lambda model, batch: model(batch["left"], batch["right"]),
        loss=lambda output, batch: output.square().mean(1),
        variables={"first": lambda output, batch: output[:, 0]},
    )
    output = task.run(model, batch)
    assert task.size(batch) == 6
    assert [value.shape for value in task.inputs(batch).args] == [(6, 2), (6, 3)]
    assert task.default_variable(batch) == "first" and task.variables == ("first", "negative_loss")
    assert torch.equal(task.variable(output, batch, "first")[:, 0], output[:, 0].double())
    torch.testing.assert_close(task.variable(output, batch, "negative_loss")[:, 0], -output.square().mean(1).double())
    assert task.take(batch, 2)["right"].shape == (2, 3)


class Noted(nn.Module):
    """Needs an image, a note on it and a mask; may be given a temperature and labels."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(7, 4)

    def forward(self, picture, note, mask, temperature=None, labels=None):
        assert labels is None
        shown = (picture.mean((2, 3)) * mask[:, None]).clone()
        logits = self.head(torch.cat([shown, note], 1))
        return logits if temperature is None else logits / temperature[:, None]


@pytest.mark.parametrize("first", ["picture", "image"])
@pytest.mark.parametrize("extra", [{}, {"temperature": torch.full((5,), 2.0)}], ids=["plain", "with a default"])
def test_a_dict_is_read_by_the_networks_own_names_and_a_target_is_an_input_only_where_it_must_be(first, extra):
    net, mask, note = Noted(), torch.tensor([1.0, 0, 1, 1, 0]), torch.randn(5, 4)
    batch = {first: X, "note": note, "mask": mask, "labels": LABELS, "file": list("abcde"), **extra}
    task = recognise(net, batch)
    assert isinstance(task, Classification) and task.size(batch) == 5
    assert torch.equal(task.run(net, batch), net(X, note, mask, *extra.values()))
    assert torch.equal(task.target(batch), LABELS)
    few = task.take(batch, slice(1, 3))
    torch.testing.assert_close(task.run(net, few), task.run(net, batch)[1:3])
    named, _ = settle("classification", net, [batch])
    assert torch.equal(named.run(net, batch), task.run(net, batch))


def test_one_number_a_sample_is_joined_with_other_answers():
    both = Answers(lambda logits, maps: {"age": logits[:, 0], "kind": logits, "map": maps, "scale": logits.sum()})
    task, found = recognise(both, X), both(X)
    expected = torch.cat([found["age"][:, None], found["kind"], found["map"].flatten(1)], 1)
    assert torch.equal(task.prediction(found), expected)
