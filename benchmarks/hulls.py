"""Hulls of a small wide ConvNet along its training, for several strengths of weight decay.

    python benchmarks/hulls.py SAMPLES --out FILE.jsonl [--decays 0 0.0005 0.005 0.02] [--steps 1000] [--seed 0]

SAMPLES is the folder of `compression.py`; CIFAR-100, crops of 16 pixels, SGD, the same first weights and batches for
every decay. One JSON line a decay and step: shares of single-peer and saturated hulls and their mean size by layer, on
2,000 training images, and accuracy on 2,000 test images.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from compression_cases import B, cifar, split
from torch import Tensor, nn

from lit_prune.measurement import local_axis
from lit_prune.measurement.channel_table import collect_sums
from lit_prune.scores.hulls import greedy_hulls

LAYERS = ("0", "3", "6", "9")
BATCH, CROP, IMAGES = 128, 16, 2000


def convnet(seed: int) -> nn.Sequential:
    """64, 32, 64 and 128 channels, of which the first have 27 inputs."""
    torch.manual_seed(seed)
    shapes = ((3, 64, 1), (64, 32, 2), (32, 64, 2), (64, 128, 2))
    layers = [
        layer
        for before, after, stride in shapes
        for layer in (nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 100))


def found_hulls(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """Shares of single-peer and saturated hulls, and the mean size, by layer."""
    found = {}
    for name, sums in collect_sums(model, batches, "none", list(LAYERS)).layers.items():
        dead = local_axis.dead_channels(local_axis.signal_power(sums.outputs).cpu())
        hulls = greedy_hulls(local_axis.correlation_matrix(sums.outputs.covariance()), dead)
        found[name] = {"single": hulls.singleton_ratio, "saturated": hulls.saturated_ratio, "mean": hulls.mean_size}
    return found


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """On the middle of each image."""
    edge = (images.shape[-1] - CROP) // 2
    middle = images[:, :, edge : edge + CROP, edge : edge + CROP]
    with torch.no_grad():
        return float((torch.cat([model(part) for part in middle.split(250)]).argmax(1) == labels).float().mean())


def trained(parts: list, decay: float, steps: int, seed: int):
    """The network after no step, a quarter of the steps, half and all of them: step, network in evaluation mode."""
    model, (images, labels) = convnet(seed), parts[0]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, 0.05, cycle_momentum=False)
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for step in range(steps + 1):
        if step in (0, steps // 4, steps // 2, steps):
            yield step, model.eval()
        if step == steps:
            return
        model.train()
        if len(order) < BATCH:
            order = torch.randperm(len(labels), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        top, left, mirror = torch.randint(0, images.shape[-1] - CROP + 1, (3,), generator=generator).tolist()
        batch = images[chosen][:, :, top : top + CROP, left : left + CROP]
        loss = F.cross_entropy(model(batch.flip(3) if mirror % 2 else batch), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    """Trains and writes a line for each decay and step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--decays", type=float, nargs="+", default=[0.0, 5e-4, 5e-3, 2e-2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = cifar(arguments.samples, "cifar100", B)
    probe = split(tuple(values[:IMAGES] for values in parts[0]), 250)
    held_out = [values[:IMAGES] for values in parts[1]]
    for decay in arguments.decays:
        for step, model in trained(parts, decay, arguments.steps, arguments.seed):
            row = {"decay": decay, "seed": arguments.seed, "step": step, "accuracy": accuracy(model, *held_out)}
            line = json.dumps(row | found_hulls(model, probe))
            print(line, flush=True)
            with arguments.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
