"""Every tensor of the forward-only paths is made where the network is: shown without a device, on fake CUDA tensors.

A fake tensor has a shape, a type and a device but no values, and an operation between two devices raises as on the
device itself. What needs values (tables, figures) begins on the CPU, behind the last line that these tests reach.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lit_prune.data import augmentation
from lit_prune.data.augmentation import Normalisation, PadCropFlip
from lit_prune.data.resident import ResidentLoader
from lit_prune.data.sampling import EpochSampler
from lit_prune.data.sources import MemoryImages
from lit_prune.measurement.channel_table import collect_sums
from lit_prune.models import build_backbone
from lit_prune.task.batches import to_network
from lit_prune.train.distillation import Distillation, Repair
from lit_prune.train.evaluation import evaluate

CUDA = torch.device("cuda", 0)
FORMS = ("cosine", "kl", "mse")


@pytest.fixture
def fake(monkeypatch):
    """Tensors without values, on a device that need not be there."""
    monkeypatch.setattr(torch.random, "fork_rng", lambda *_, **__: nullcontext())  # it asks the device for its state
    answers = fake_impls.op_implementations_dict
    monkeypatch.setitem(answers, torch.ops.aten._local_scalar_dense.default, _value)
    caches = (augmentation._scale_and_shift, augmentation.draw_crops)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for cache in caches:
            cache.cache_clear()
        yield mode
    for cache in caches:
        cache.cache_clear()


def _value(_mode, _operation, tensor: torch.Tensor) -> bool | int | float:
    """What asking the device for a value gives: labels are 0, numbers are finite."""
    return True if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0


def network(width: int = 8) -> nn.Module:
    with CUDA:
        return build_backbone("cifar_convnet", num_classes=4, widths=[width, 6])


def batches(place: str | torch.device = "cpu") -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.randn(size, 3, 8, 8, device=place), torch.zeros(size, dtype=torch.long, device=place)) for size in (4, 3)
    ]


def test_a_mistake_in_placement_is_seen_without_a_device(fake):
    with pytest.raises(RuntimeError, match="device"):
        network()(torch.randn(2, 3, 8, 8))


class Copies(TorchDispatchMode):
    """Where tensors are copied to while it lasts, and whether the program goes on before they are there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            self.seen.append((torch.device(kwargs["device"]).type, bool(kwargs.get("non_blocking"))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("place", "origin"), [("cpu", CUDA), (CUDA, "cpu")])
def test_a_batch_is_waited_for_only_on_its_way_to_the_cpu(fake, place, origin):
    model = nn.Linear(2, 2, device=place)
    with Copies() as copies:
        found = to_network(batches(origin)[0], model)
    assert all(tensor.device == torch.device(place) for tensor in found)
    assert copies.seen and set(copies.seen) == {(torch.device(place).type, place == CUDA)}


def tensors_of(value, seen: set[int]) -> list[torch.Tensor]:
    """Every tensor that hangs on an object."""
    if isinstance(value, torch.Tensor):
        return [value]
    if id(value) in seen or isinstance(value, type | nn.Module):
        return []
    seen.add(id(value))
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    inner = [*inner, *getattr(value, "__dict__", {}).values()]
    return [tensor for part in inner for tensor in tensors_of(part, seen)]


@pytest.mark.parametrize("target", ["true_margin", None, "none"])
def test_the_recorder_keeps_its_sums_on_the_device(fake, target):
    sums = collect_sums(network(), batches(), target, task="classification")
    kept = [tensor for tensor in tensors_of(sums.layers, set()) if tensor.ndim > 1]
    assert kept and all(tensor.device == CUDA for tensor in kept)


@pytest.mark.parametrize("form", FORMS)
def test_the_teachers_pass_stays_on_the_device(fake, form):
    student, teacher = network(), network(12)
    layer = [name for name, module in student.named_modules() if isinstance(module, nn.Linear)][-1]
    term = Distillation(Repair(form=form, ramp=False), student.train(), teacher, lambda: (1, 3), layer, None)
    student(batches(CUDA)[0][0])
    assert term().device == CUDA


class ReachedError(Exception):
    pass


def test_evaluation_waits_for_the_device_once_at_its_end(fake):
    def reduce(sums):
        assert sums.device.type == "cpu" and sums.ndim == 1
        if len(sums) > 1:  # more than the question whether a rank has no batch
            raise ReachedError
        return sums

    with pytest.raises(ReachedError):
        evaluate(network(), batches(), reduce, "classification")


@pytest.mark.parametrize("padding", ["zero", "reflect"])
def test_resident_images_are_augmented_where_they_live(fake, padding):
    images = MemoryImages(torch.zeros(10, 3, 8, 8, dtype=torch.uint8, device=CUDA), torch.zeros(10, device=CUDA).long())
    crops = PadCropFlip(10, 0, pad=2, padding=padding)
    sampler = EpochSampler(torch.arange(10), 4, shuffle=True)
    normalisation = Normalisation((0.5,) * 3, (0.5,) * 3)
    for pixels, labels in ResidentLoader(images, sampler, normalisation, crops):
        assert pixels.device == labels.device == CUDA and pixels.dtype == torch.float32
