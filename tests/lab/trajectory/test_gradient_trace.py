"""Cosines of the information gradients and the direction of descent: oracles, resume, two processes."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import nn
from torch.nn import functional

from lit_prune.errors import InputError
from lit_prune.lab.trajectory.directions import collect_directions, direction_table
from lit_prune.lab.trajectory.gradient_trace import GradientTrace
from lit_prune.task import task_variable


def batches(count=3, size=12):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(size, 3, 6, 6, generator=generator), torch.arange(size) % 4) for _ in range(count)]


def information_gradients(layer: nn.Conv2d, inputs: torch.Tensor, target: torch.Tensor):
    """∇I_X and ∇I_T of each kernel by autograd through the unfolded Gaussian channel, noise floor held fixed."""
    patches = functional.unfold(inputs, layer.kernel_size, padding=layer.padding).transpose(1, 2).double()
    spread = target[:, None].expand(patches.shape[:2]).flatten()
    patches = patches.flatten(0, 1)
    patches, spread = patches - patches.mean(0), spread - spread.mean()
    second, crossed = patches.T @ patches / len(patches), patches.T @ spread / len(patches)
    weight = layer.weight.detach().double().flatten(1)
    power = ((weight @ second) * weight).sum(1)
    floor = power.median() if len(power) % 2 else power.sort().values[len(power) // 2 - 1 : len(power) // 2 + 1].mean()
    gradients = []
    for which in range(2):
        free = weight.clone().requires_grad_()
        signal = ((free @ second) * free).sum(1)
        squared = (free @ crossed).square() / ((signal + floor) * spread.square().mean())
        value = 0.5 * torch.log1p(signal / floor) if which == 0 else -0.5 * torch.log1p(-squared)
        gradients.append(torch.autograd.grad(value.sum(), free)[0])
    return gradients


def test_cosines_equal_those_of_autograd_through_the_unfolded_layer(tiny_net):
    data = batches()
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    table = direction_table(tiny_net, collect_directions(tiny_net, data, layers=["conv1"])).iloc[0]
    inputs = {}
    handle = tiny_net.conv1.register_forward_pre_hook(lambda _, args: inputs.update(x=args[0].detach()))
    logits = tiny_net(images)
    handle.remove()
    capture, task = information_gradients(
        tiny_net.conv1, inputs["x"], task_variable("true_margin", logits.detach(), labels)[:, 0]
    )
    descent = -torch.autograd.grad(functional.cross_entropy(logits, labels), tiny_net.conv1.weight)[0].flatten(1)
    pairs = {"capture_task": (capture, task), "update_capture": (descent, capture), "update_task": (descent, task)}
    for name, (first, second) in pairs.items():
        defined = first.any(1) & second.any(1)  # a channel that the ReLU cuts off has no gradient
        expected = functional.cosine_similarity(first.double(), second.double(), dim=1)[defined].mean()
        assert table[name] == pytest.approx(float(expected), abs=1e-5), name


def test_batches_of_any_size_give_the_same_cosines_and_the_model_stays_as_found(tiny_net):
    data = batches()
    tiny_net.stem[0].weight.requires_grad_(False)
    whole = [tuple(torch.cat(parts) for parts in zip(*data, strict=True))]
    first, second = (direction_table(tiny_net, collect_directions(tiny_net, part)) for part in (data, whole))
    pd.testing.assert_frame_equal(first, second, atol=1e-6)
    assert first["layer"].tolist() == ["stem.0", "conv1", "conv2", "head"]
    assert all(parameter.grad is None for parameter in tiny_net.parameters())
    assert not tiny_net.stem[0].weight.requires_grad and not tiny_net.training


def test_an_operation_in_place_after_the_layer_does_no_harm():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4)]
    plain = nn.Sequential(*layers)
    in_place = nn.Sequential(*(nn.ReLU(inplace=True) if isinstance(layer, nn.ReLU) else layer for layer in layers))
    first, second = (direction_table(net, collect_directions(net, batches())) for net in (plain, in_place))
    pd.testing.assert_frame_equal(first, second)


def read(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "trace" / "gradients.parquet")


class Stop(Exception):
    pass


class StopAt(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.current_epoch == self.epoch:
            raise Stop


def test_interrupted_and_resumed_trace_equals_the_uninterrupted_one_and_training_is_untouched(tmp_path, make_run):
    def run(folder, *callbacks, resume=None, interrupted=False):
        trainer, module, data = make_run(tmp_path / folder, stages=(), max_epochs=2, callbacks=callbacks)
        if interrupted:
            with pytest.raises(Stop):
                trainer.fit(module, datamodule=data)
        else:
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
        return module

    def trace():
        return GradientTrace(layers=["layer1.*", "head", "fc", "linear"][:1], limit=32)

    whole = run("whole", trace())
    run("parts", trace(), StopAt(1), interrupted=True)
    assert set(read(tmp_path / "parts")["epoch"]) == {0, 1}
    run("parts", trace(), resume=tmp_path / "parts" / "checkpoints" / "last.ckpt")
    pd.testing.assert_frame_equal(read(tmp_path / "parts"), read(tmp_path / "whole"))
    assert set(read(tmp_path / "whole")["epoch"]) == {0, 1, 2}
    plain = run("plain")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def sums_of_rank(rank: int, ranks: int, folder: str) -> None:
    """One rank of the two-process test."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    net = network()
    share = [(images[rank::ranks], labels[rank::ranks]) for images, labels in batches()]
    sums = collect_directions(net, share).all_reduce()
    if rank == 0:
        direction_table(net, sums).to_parquet(f"{folder}/two.parquet")
    torch.distributed.destroy_process_group()


def network() -> nn.Module:
    seed_everything(5, verbose=False)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(20, 4))


def test_two_processes_find_the_cosines_of_one(tmp_path):
    workers = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    net = network()
    expected = direction_table(net, collect_directions(net, batches()))
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "two.parquet"), expected, atol=1e-6)


@pytest.mark.parametrize("arguments", [{"every_n_epochs": 0}, {"target": "one_vs_rest"}, {"limit": 0}])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(InputError, match=f"{next(iter(arguments))}: "):
        GradientTrace(**arguments)


if __name__ == "__main__":
    sums_of_rank(int(sys.argv[1]), 2, sys.argv[2])
