"""What can be cut from other people's architectures, and whether the cut network computes what it should.

    python benchmarks/architectures.py ROWS.jsonl [--only NAME ...] [--limit N] [--minutes M] [--table FILE.md]

One JSON line for each architecture, appended as it is done; architectures that ROWS.jsonl has already are skipped, so a
stopped run goes on where it was. Random weights and norm statistics, small images, a uniform plan for 50 % of the
multiply-adds by random scores. Columns: `free`, the share of the multiply-adds that can go; `kept`, the share that the
plan keeps, and `met`; `gap`, the largest difference of the outputs from the dense network whose readers see zeros in
the place of what they lost (read off the weights, not off the groups), relative to the largest output; `trains`, a
forward and backward pass in training mode; `replays`, plan through JSON and weights through a file give bit-equal
outputs; CPU seconds; and what Torch-Pruning makes of the same network by magnitude, 30 % of the channels gone, the
classifier left out.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from silenced import LAYERS, answer, gap, tensors
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.errors import InputError
from lit_prune.structure import Budget, CostModel, Plan, apply_plan, plan_channels, trace_groups

CLOSE = 1e-4
SECONDS, OTHER_SECONDS = 240, 60
"""Longest time for this project and for Torch-Pruning on one architecture."""

TIMM = {
    64: """resnet18 resnet26d resnet50 resnext50_32x4d regnetx_002 regnety_002 regnetz_005 seresnet18 ecaresnet26t
    skresnet18 resnest14d
    res2net50_26w_4s densenet121 dpn48b vgg11_bn mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050
    mobilenetv4_conv_small_035 mnasnet_small efficientnet_lite0 efficientnet_b0 tf_efficientnetv2_b0 test_efficientnet
    mixnet_s spnasnet_100 fbnetc_100 hardcorenas_a ghostnet_050 ghostnetv2_100 repvgg_a0 repghostnet_050 mobileone_s0
    cspresnet50 cspdarknet53 darknet53 hrnet_w18_small dm_nfnet_f0 nf_regnet_b0 eca_nfnet_l0 convnext_atto
    convnextv2_atto convmixer_768_32 fasternet_t0 efficientformer_l1 efficientformerv2_s0 mobilevit_xxs mobilevitv2_050
    poolformer_s12 edgenext_xx_small starnet_s1 dla34 selecsls42 vovnet39a lcnet_035 tinynet_e rexnet_100
    rexnetr_100 bat_resnext26ts gernet_s inception_next_atto repvit_m0_9 fastvit_t8 efficientvit_b0 efficientvit_m0
    tresnet_m xcit_nano_12_p16_224 pit_ti_224 convit_tiny""".split(),
    96: "levit_128s caformer_s18 pvt_v2_b0 mvitv2_tiny hgnet_tiny".split(),
    128: "inception_v3 inception_v4 xception41 nextvit_small".split(),
    224: """vit_tiny_patch16_224 deit_tiny_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224
    swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224 twins_svt_small mixer_s32_224 resmlp_12_224 gmlp_ti16_224
    maxvit_rmlp_pico_rw_256 coatnet_0_rw_224 crossvit_tiny_240 coat_tiny tnt_s_patch16_224""".split(),
}
"""Image size -> architectures of timm."""

VISION = {
    32: "resnet34 resnext50_32x4d wide_resnet50_2 vgg11 mobilenet_v2 mobilenet_v3_small mnasnet0_5".split(),
    64: [
        *("googlenet", "shufflenet_v2_x0_5", "squeezenet1_1", "alexnet", "densenet121", "efficientnet_v2_s"),
        *("regnet_y_400mf", "convnext_tiny"),
    ],
    96: "inception_v3 swin_t swin_v2_t".split(),
    224: ["vit_b_16"],
}
"""Image size -> classifiers of torchvision."""

SEGMENTATION = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
DETECTION = ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn")


def architectures() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]]:
    """Name -> how to build it, and the shape of an image."""
    import timm
    import torchvision

    cases: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {}
    for size, names in TIMM.items():
        for name in names:
            side = 256 if "_256" in name else 240 if "_240" in name else size
            cases[f"timm {name}"] = (lambda name=name: timm.create_model(name, num_classes=10), (3, side, side))
    for size, names in VISION.items():
        for name in names:
            cases[f"torchvision {name}"] = (lambda name=name: _vision(torchvision.models, name), (3, size, size))
    for name in SEGMENTATION:
        source = torchvision.models.segmentation
        cases[f"torchvision {name}"] = (
            lambda name=name, source=source: _vision(source, name, weights_backbone=None),
            (3, 64, 64),
        )
    for name in DETECTION:
        source = torchvision.models.detection
        cases[f"torchvision {name}"] = (
            lambda name=name, source=source: _Images(_vision(source, name, weights_backbone=None)),
            (3, 96, 96),
        )
    return cases


def _vision(source: Any, name: str, **arguments: Any) -> nn.Module:
    special = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return getattr(source, name)(weights=None, num_classes=10, **special, **arguments)


class _Images(nn.Module):
    """The feature pyramid and the heads of a detector, without the choice of boxes: its count depends on the data."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, getattr(detector, "head", None) or detector.rpn.head

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] to maps."""
        features = list(self.backbone(images).values())
        return [leaf for leaf in tree_leaves(self.head(features)) if isinstance(leaf, Tensor)]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The network with norm statistics, scales and biases that are not trivial, in evaluation mode."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.8, 1.2)
            if (
                isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm))
                and module.weight is not None
            ):
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(std=0.1)
        for parameter in model.parameters():
            if parameter.dim() < 2 and parameter.numel() and bool((parameter.abs() < 1e-3).all()):
                parameter.normal_(std=0.1)  # layer scales and biases that start at nothing would hide a difference
    return model.eval()


def trains(model: nn.Module, images: Tensor) -> bool:
    """Whether a pass forwards and backwards in training mode gives finite gradients."""
    trained = copy.deepcopy(model).train()
    sum(t.pow(2).mean() for t in tensors(trained(images))).backward()
    return all(p.grad is None or bool(p.grad.isfinite().all()) for p in trained.parameters())


def replays(build: Callable[[], nn.Module], plan: Plan, small: nn.Module, images: Tensor) -> bool:
    """Whether the plan as JSON and the weights as a file give the same outputs to the last bit."""
    again = apply_plan(seeded(build), Plan.from_dict(json.loads(json.dumps(plan.to_dict()))), images)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.safetensors")
        save_file({name: t.detach().clone().contiguous() for name, t in small.state_dict().items()}, path)
        again.load_state_dict(load_file(path))
    return all(torch.equal(a, b) for a, b in zip(answer(small, images), answer(again, images), strict=True))


def random_ranks(model: nn.Module) -> dict[str, Tensor]:
    """Seeded scores for every convolution and linear layer."""
    generator = torch.Generator().manual_seed(0)
    width = lambda m: m.out_features if isinstance(m, nn.Linear) else m.out_channels  # noqa: E731
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}
    return {name: torch.rand(width(module), generator=generator) for name, module in layers.items()}


def ours(build: Callable[[], nn.Module], shape: tuple[int, int, int]) -> dict[str, Any]:
    """The figures of this project."""
    model, images = seeded(build), torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    begin = time.process_time()
    graph = trace_groups(model, images)
    costs = CostModel.build(model, graph, images)
    traced = time.process_time() - begin
    least = costs.sizes.copy()
    for place, group in enumerate(graph.groups):
        least[place] = group.size if group.protected else 1
    found = {
        "free": round(1 - costs.macs(least) / costs.macs(costs.sizes), 4),
        "groups": len(graph.groups),
        "protected": len(graph.groups) - len(graph.prunable),
        "trace_s": round(traced, 2),
        "reasons": sorted({group.protected for group in graph.groups if group.protected})[:4],
    }
    plan = plan_channels(graph, costs, random_ranks(model), Budget("macs", 0.5, "uniform"))
    small = apply_plan(model, plan, images)
    found |= {"kept": round(plan.notes["achieved"], 4), "met": plan.notes["met"], "gap": gap(model, small, images)}
    found |= {"trains": trains(small, images), "replays": replays(build, plan, small, images)}
    return found | {"seconds": round(time.process_time() - begin, 1)}


def theirs(build: Callable[[], nn.Module], shape: tuple[int, int, int]) -> dict[str, Any]:
    """The figures of Torch-Pruning: "works", "differs" from the silenced network, or the error; seconds; MACs kept."""
    import torch_pruning as tp

    model, images = seeded(build), torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    small = copy.deepcopy(model)
    heads = [m for m in small.modules() if isinstance(m, LAYERS) and _width(m) == 10]
    begin = time.process_time()
    before = tp.utils.count_ops_and_params(small, images[:1])[0]
    pruner = tp.pruner.BasePruner(
        small, images[:1], tp.importance.MagnitudeImportance(), pruning_ratio=0.3, ignored_layers=heads
    )
    pruner.step()
    found = {"seconds": round(time.process_time() - begin, 1)}
    answer(small, images)
    found["kept"] = round(tp.utils.count_ops_and_params(small, images[:1])[0] / before, 4)
    try:
        found["gap"] = gap(model, small, images)
    except AssertionError:
        found["gap"] = math.inf
    return found | {"verdict": "works" if found["gap"] < CLOSE else "differs"}


def _width(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def guarded(work: Callable[..., dict[str, Any]], seconds: int, *args: Any) -> dict[str, Any]:
    """What `work` finds, or the line of its error; it is stopped after `seconds`."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return work(*args)
    except InputError as error:
        return {"refused": " ".join(str(error).split())[:200]}
    except Exception as error:  # whatever a network or a tool raises is a row of the table
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    finally:
        signal.alarm(0)


def measure(names: list[str], path: Path, limit: int, minutes: float) -> None:
    """Appends a line for each architecture that the file has not yet."""
    cases = architectures()
    done = {row["name"] for row in read(path)}
    todo = [name for name in cases if name not in done and (not names or any(part in name for part in names))][:limit]
    end = time.monotonic() + 60 * minutes
    for name in todo:
        if time.monotonic() > end:
            break
        row = {"name": name, "shape": cases[name][1], "ours": guarded(ours, SECONDS, *cases[name])}
        row["theirs"] = guarded(theirs, OTHER_SECONDS, *cases[name])
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, the last one of each name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return list({row["name"]: row for row in map(json.loads, lines)}.values())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = "| network | image | MACs that can go | 50 % plan | largest difference | trains | replays | trace s "
    head += "| Torch-Pruning |"
    lines = [head, "|" + " --- |" * 9]
    for row in rows:
        one = row["ours"]
        cells = [row["name"], "×".join(map(str, row["shape"]))]
        if "gap" in one:
            plan = f"{one['kept']:.3f}" + ("" if one["met"] else " (not met)")
            cells += [f"{one['free']:.1%}", plan, f"{one['gap']:.0e}"]
            cells += ["yes" if one[key] else "no" for key in ("trains", "replays")] + [f"{one['trace_s']:.1f}"]
        else:
            cells += [one.get("refused") or one["error"], *[""] * 5]
        lines.append("| " + " | ".join([*cells, _other(row["theirs"])]).replace("\n", " ") + " |")
    return "\n".join(lines) + "\n"


def _other(found: dict[str, Any]) -> str:
    if "verdict" not in found:
        return (found.get("error") or found.get("refused", "")).split(":")[0]
    return f"{found['verdict']} ({found['gap']:.0e}), {found['kept']:.2f} kept, {found['seconds']:.0f} s"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="file of JSON lines, appended to")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names")
    parser.add_argument("--limit", type=int, default=1000, help="most architectures in this run")
    parser.add_argument("--minutes", type=float, default=20.0, help="no architecture is begun after them")
    parser.add_argument("--table", type=Path, help="write the rows so far as a Markdown table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure(arguments.only, arguments.rows, arguments.limit, arguments.minutes)
    if arguments.table:
        arguments.table.write_text(table(read(arguments.rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
