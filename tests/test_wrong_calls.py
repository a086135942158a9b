"""Wrong calls of the public names of Python, in one process: each ends in an `InputError` of one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import lit_prune
from lit_prune import InputError
from lit_prune.replace import Swaps
from lit_prune.structure.networks import STRUCTURE_KEY
from lit_prune.task import Classification, Custom, Segmentation

NAN, INF = float("nan"), float("inf")


class Text(nn.Module):
    """A network that answers in text."""

    def forward(self, images: torch.Tensor) -> str:
        return "cat"


class Plain(pl.LightningModule):
    """A module of somebody's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


class Given(NamedTuple):
    """What right calls are made of."""

    model: nn.Module
    batches: list
    example: torch.Tensor
    table: pd.DataFrame
    ranks: dict[str, torch.Tensor]
    plan: lit_prune.Plan
    reduced: Any
    folder: Path


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Given:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU())
    model = nn.Sequential(trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    batches = [(torch.rand(8, 3, 8, 8), torch.arange(8) % 4) for _ in range(2)]
    example, folder = batches[0][0][:1], tmp_path_factory.mktemp("calls")
    ranks = lit_prune.score(model, "magnitude")
    plan = lit_prune.make_plan(model, ranks, example)
    reduced = lit_prune.replace_mechanisms(model, plan, batches, "constant", example)
    lit_prune.save_compact(
        folder / "compact", lit_prune.apply_plan(model, plan, example), plans=[plan], input_shape=(3, 8, 8)
    )
    (folder / "empty").mkdir()
    (folder / "text.json").write_text("no json")
    (folder / "list.json").write_text("[1]")
    (folder / "text.ckpt").write_text("no checkpoint")
    torch.save([1, 2], folder / "list.ckpt")
    torch.save({"state_dict": 3}, folder / "state.ckpt")
    torch.save(nn.Linear(2, 2).state_dict(), folder / "weights.pt")
    return Given(model, batches, example, lit_prune.measure(model, batches), ranks, plan, reduced, folder)


NO_NETWORK = (None, "net", 3, [nn.Linear(2, 2)], nn.Linear, torch.ones(3))
NO_BATCHES = (None, 5, "batches", [], [None], [3], ["text"], [[]], [{}], [{"a": torch.ones(2)}], nn.ReLU(), [()])
NO_BATCHES += (torch.rand(8, 3, 8, 8), [np.ones((4, 3, 8, 8))], [torch.rand(8, 5, 8, 8)], [torch.rand(8)], {"x": 1})
NO_BATCHES += ([torch.zeros(0, 3, 8, 8)], [torch.tensor(1.0)], [(None, torch.arange(4))], 2.5, True)
NO_TASK = ("nothing", 3, Classification, [], "os:system", "nowhere:Task", "", {}, True)
NO_EXAMPLE = (3, "image", torch.tensor(1.0), [], {}, torch.rand(1, 5, 8, 8), torch.rand(3), np.ones((1, 3, 8, 8)))
NO_SHARE = (0, -1, 1.5, "half", NAN, INF, True, [0.5], 1e-9)
NO_NAME = (3, "nothing", "", b"macs", [], True)
NO_WHOLE = (0, -1, 1.5, "two", NAN, True, [2])
NO_NAMES = (3, ["nothing"], [3], [None], "nothing", True, {"a": 1})
NO_PATH = (3, None, ["a"], True)


def wrong(call: Callable[[Given], Callable], right: Callable[[Given], dict], **values: tuple) -> list[tuple]:
    """Calls that are right but for one argument."""
    return [(call, right, name, value) for name, choices in values.items() for value in choices]


def of(name: str) -> Callable[[Given], Callable]:
    return lambda given: getattr(lit_prune, name)


CALLS: dict[str, list[tuple]] = {
    "measure": wrong(
        of("measure"),
        lambda g: {"model": g.model, "batches": g.batches},
        model=(*NO_NETWORK, Text()),
        batches=NO_BATCHES,
        target=(3, "nothing", [], True),
        layers=(3, [], ["nothing"], [3], "nothing", {"a": 1}, True),
        protocol=(None, 3, "pre_bn", {}),
        task=NO_TASK,
    ),
    "score": wrong(
        of("score"),
        lambda g: {"model": g.model, "name": "taylor", "batches": g.batches},
        model=(*NO_NETWORK, Text()),
        name=(None, 3, "nothing", "magnitude(3)", "hybrid(", "", "os:nothing", nn.Linear, [], "hybrid(taylor, x)"),
        batches=NO_BATCHES,
        table=("table", 3, {}, pd.DataFrame(), []),
        seed=("zero", None, 1.5, NAN, [1]),
        task=NO_TASK,
    ),
    "make_plan": wrong(
        of("make_plan"),
        lambda g: {"model": g.model, "ranks": g.ranks, "example_input": g.example},
        model=NO_NETWORK,
        ranks=(None, [], 3, {}, {"nothing": torch.ones(3)}, {"0.0": 3}, {"0.0": torch.ones(2)}, {3: torch.ones(6)})
        + ({"0.0": torch.full((6,), NAN)}, {"0.0": torch.ones(2, 3)}, {"0.0": "text"}, "magnitude", {"0.0": None}),
        example_input=(None, *NO_EXAMPLE),
        budget=NO_NAME,
        keep=(*NO_SHARE, {}, {"nothing": 0.5}, {"0.0": "half"}, {"0.0": 2.0}, None),
        allocation=(*NO_NAME, None),
        round_to=NO_WHOLE,
        normalisation=(*NO_NAME, None),
        cap=(-1, 1.5, "most", NAN, None, []),
        only=NO_NAMES,
        protect=(3, None, ["nothing"], [3], True, "nothing"),
    ),
    "apply_plan": wrong(
        of("apply_plan"),
        lambda g: {"model": g.model, "plan": g.plan, "example_input": g.example},
        model=(*NO_NETWORK, nn.Linear(2, 2)),
        plan=(None, {}, "plan.json", 3, lit_prune.Plan(drop_blocks=("nothing",)), lit_prune.Plan),
        example_input=(None, *NO_EXAMPLE),
    ),
    "Plan": wrong(
        of("Plan"),
        lambda g: {"keep_channels": {"a": (0, 1)}, "sizes": {"a": 3}},
        keep_channels=(
            None,
            3,
            [],
            {"a": 3},
            {"a": "text"},
            {"a": (0, 9)},
            {"a": ()},
            {"a": (-1,)},
            {"a": (0, 0)},
            {"b": (0,)},
        )
        + ({"a": None}, {"a": (0.5,)}, {"a": [None]}),
        sizes=(None, 3, {}, {"a": "many"}, {"a": -1}, {"a": None}, {"a": 1.5}),
        drop_blocks=(None, 3, "block", {"a": 1}),
        notes=(None, 3, []),
        added_biases=(None, 3, "conv"),
    ),
    "Plan.load": wrong(
        lambda g: lit_prune.Plan.load,
        lambda g: {},
        path=(3, None, "nowhere.json", "", ["a"], lambda g: g.folder, lambda g: g.folder / "text.json")
        + (lambda g: g.folder / "list.json", lambda g: g.folder / "text.ckpt"),
    ),
    "Plan.from_dict": wrong(
        lambda g: lit_prune.Plan.from_dict,
        lambda g: {},
        values=(
            None,
            3,
            {},
            [],
            "plan",
            {"format": "lit_prune.plan", "version": 1},
            {"format": "lit_prune.plan", "version": 9},
        ),
    ),
    "Plan.save": wrong(lambda g: g.plan.save, lambda g: {}, path=(3, None, ["a"], True, lambda g: g.folder)),
    "Budget": wrong(
        of("Budget"),
        lambda g: {},
        kind=(*NO_NAME, None),
        keep=(*NO_SHARE, {}, None, {"a": "half"}),
        allocation=(*NO_NAME, None),
        round_to=NO_WHOLE,
        normalisation=(*NO_NAME, None),
        cap=(-1, 1.5, "most", NAN, None, []),
        only=(3, [3], True),
        protect=(3, None, [3], True),
    ),
    "cost": wrong(
        of("cost"),
        lambda g: {"model": g.model, "example_input": g.example},
        model=NO_NETWORK,
        example_input=(None, *NO_EXAMPLE),
    ),
    "replace_mechanisms": wrong(
        of("replace_mechanisms"),
        lambda g: {"model": g.model, "plan": g.plan, "batches": g.batches, "kind": "affine"},
        model=(*NO_NETWORK, nn.Linear(2, 2)),
        plan=(None, {}, 3, lit_prune.Plan(drop_blocks=("nothing",)), "plan.json"),
        batches=NO_BATCHES,
        kind=(*NO_NAME, None),
        example_input=NO_EXAMPLE,
        settings=(None, {}, 3, "loss"),
        task=NO_TASK,
    ),
    "Replacement": wrong(
        of("Replacement"),
        lambda g: {},
        ridge=(-1, "much", NAN, None, [], True),
        parents=(-1, "all", 1.5, [1]),
        parent_rule=(*NO_NAME, None),
        objective=(*NO_NAME, None),
        curvature=(*NO_NAME, None),
        border=(*NO_NAME, None),
        scope=(*NO_NAME, None),
        towards=(*NO_NAME, None),
        images=(0, -1, "all", None, 1.5),
        rows=(0, -1, "all", None, 1.5),
        held_out=(-1, 1, 1.5, "some", None, NAN),
        unsupported=(*NO_NAME, None),
        seed=("zero", None, 1.5),
        clipped=(3, "yes", None),
    ),
    "interchange": wrong(
        of("interchange"),
        lambda g: {"low": g.model, "reduced": g.reduced, "batches": g.batches},
        low=(*NO_NETWORK, nn.Linear(2, 2)),
        reduced=(None, 3, "folder", {}, nn.Linear(2, 2)),
        batches=NO_BATCHES,
        example_input=NO_EXAMPLE,
        layer=(3, "nothing", [], True),
        swaps=(None, 3, {}),
        task=NO_TASK,
    ),
    "recalibrate_batchnorm": wrong(
        of("recalibrate_batchnorm"),
        lambda g: {"model": g.model, "batches": g.batches},
        model=NO_NETWORK,
        batches=NO_BATCHES,
        limit=(0, -1, "all", None, 1.5, True),
        task=NO_TASK,
    ),
    "compress": wrong(
        of("compress"),
        lambda g: {"model": g.model, "batches": g.batches},
        model=(*NO_NETWORK, Text(), nn.ReLU()),
        batches=NO_BATCHES,
        keep=(*NO_SHARE, None, {}),
        budget=(*NO_NAME, None),
        task=NO_TASK,
        seconds=(-1, "long", NAN, True, []),
        recipe=(None, {}, 3, "strongest"),
    ),
    "save_compact": wrong(
        of("save_compact"),
        lambda g: {"folder": g.folder / "new", "model": g.model, "input_shape": (3, 8, 8)},
        folder=(*NO_PATH, lambda g: g.folder / "text.json"),
        model=NO_NETWORK,
        backbone=(3, "nothing", [], True, "os:system"),
        arguments=(3, [], "x", {"a": nn.ReLU()}),
        input_shape=(3, "x", (), (3, -1, 8), (3, "x", 8), (3, 8.5, 8), (None,)),
        plans=(3, [None], ["plan"], {}, "plan"),
        report=(3, [], "x", {"a": nn.ReLU()}),
        inputs=(3, [], "x", {"args": 3}),
        preparation=(3, {}, "x"),
    ),
    "load_compact": wrong(
        of("load_compact"),
        lambda g: {"folder": g.folder / "compact", "model": g.model},
        folder=(*NO_PATH, "nowhere", "", lambda g: g.folder / "empty", lambda g: g.folder / "text.json"),
        model=("net", 3, nn.Linear(2, 2), nn.Linear, []),
        trust=(3, None, [3], "os:system", True),
    ),
    "load_pruned": wrong(
        of("load_pruned"),
        lambda g: {"kind": Plain, "path": g.folder / "text.ckpt"},
        kind=(None, 3, "Plain", nn.Linear, int, lambda g: Plain()),
        path=(
            *NO_PATH,
            "nowhere.ckpt",
            lambda g: g.folder,
            lambda g: g.folder / "list.ckpt",
            lambda g: g.folder / "state.ckpt",
            lambda g: g.folder / "compact" / "model.safetensors",
            lambda g: g.folder / "weights.pt",
        ),
        map_location=(3.5, "nowhere", []),
        weights_only=(3, "yes", None),
        nothing=(1,),
    ),
    "restore_structure": wrong(
        of("restore_structure"),
        lambda g: {"module": Plain(), "checkpoint": {}},
        module=(None, 3, nn.Linear(2, 2), Plain, "module"),
        checkpoint=(None, 3, "last.ckpt", [], {"state_dict": 3}, {STRUCTURE_KEY: 3}),
        dense=(3, "net", nn.Linear),
    ),
    "register_score": wrong(
        lambda g: lambda **given: lit_prune.register_score(**given)(lambda evidence: {}),
        lambda g: {"axis": "baseline", "cost": "weights"},
        axis=(None, 3, "nothing", []),
        cost=(None, 3, "nothing", []),
        name=(3, [], "", "magnitude", "a b"),
        defaults=(3, None, "x"),
        needs=(3, None, ("nothing",), "sums"),
    ),
    "ChannelStage": wrong(
        of("ChannelStage"),
        lambda g: {"keep": 0.5},
        keep=(*NO_SHARE, None, {}),
        epoch=(-1, "first", None, 1.5, True, []),
        part=(*NO_NAME, None),
        budget=(*NO_NAME, None),
        score=(3, "nothing", None, [], "", True),
        allocation=(*NO_NAME, None),
        normalisation=(*NO_NAME, "z"),
        round_to=NO_WHOLE,
        cap=(-1, 0, 1.5, "most", NAN, None, []),
        protect=(3, None, [3], True),
        replace=(*NO_NAME, None),
    ),
    "BlockStage": [
        *wrong(
            of("BlockStage"),
            lambda g: {},
            remove_ratio=(0, 1, -1, "some", NAN, [], True),
            remove_count=(0, -1, "some", 1.5, [], True),
            keep_blocks=(3, [], "x", {"a": 3}, {"a": ["x"]}, {3: [0]}),
            keep=(*NO_SHARE, {}),
        ),
        *wrong(
            of("BlockStage"), lambda g: {"keep": 0.5}, epoch=(-1, "x", None, 1.5, True), budget=(*NO_NAME, "channels")
        ),
    ],
    "StagedPruning": wrong(
        of("StagedPruning"),
        lambda g: {"stages": [lit_prune.ChannelStage(0.5)]},
        stages=(None, [], 3, [3], "x", {}, lit_prune.ChannelStage(0.5), [None], [lit_prune.ChannelStage]),
        network=(3, [], True),
        monitor=(3, "", [], True),
        mode=(3, None, "most"),
        calibration=(-1, 0, "x", 1.5, True),
        task=NO_TASK,
        repair=(None, 3, {}, "x"),
        optimizer=(3, "x", []),
        scheduler=(3, "x", []),
        teacher=(3, [], True),
        probe_limit=(0, -1, "x", None, 1.5),
        recalibration_batches=(-1, "x", 1.5, []),
        tolerance=(-1, "x", NAN, []),
    ),
    "Recipe": wrong(
        of("Recipe"),
        lambda g: {},
        score=(3, None, [], True),
        allocation=(3, None, [], True),
        only=(3, 1.5, {}, True),
        protect=(3, None, "0.0", {}),
        round_to=("x", 1.5, [], True),
        cap=("x", NAN, None, [], True),
        kind=(3, None, [], True),
        replacement=(None, 3, "refit", {}),
        seed=("x", None, 1.5, [1]),
    ),
    "Repair": wrong(
        of("Repair"),
        lambda g: {},
        alpha=(-1, "x", NAN, None, []),
        beta=(-1, "x", NAN, None, []),
        ramp=(3, "x", None),
        form=(*NO_NAME, None),
        temperature=(0, -1, "x", NAN, None),
        gradient_clip=(0, -1, "x", NAN, []),
    ),
    "AxisTrace": wrong(
        of("AxisTrace"),
        lambda g: {},
        every_n_epochs=(*NO_WHOLE, None),
        layers=(3, [3], "x", True),
        target=(3, [], True),
        limit=(0, -1, "x", 1.5, True),
        protocol=(3, {}, "x"),
        plane=(3, "x", None),
        network=(3, [], True),
        calibration=(-1, 0, "x", 1.5, True),
        task=NO_TASK,
    ),
    "GradientTrace": wrong(
        of("GradientTrace"),
        lambda g: {},
        every_n_epochs=(*NO_WHOLE, None),
        layers=(3, [3], "x", True),
        target=(3, [], True),
        limit=(0, -1, "x", 1.5, True),
        network=(3, [], True),
        calibration=(-1, 0, "x", 1.5, True),
        task=NO_TASK,
    ),
    "Decorrelation": wrong(
        of("Decorrelation"),
        lambda g: {},
        weight=(-1, "x", NAN, None, []),
        every_n_batches=(*NO_WHOLE, None),
        seed=("x", None, 1.5),
        network=(3, [], True),
    ),
    "added_loss": wrong(of("added_loss"), lambda g: {}, module=(None, 3, "x", nn.Linear(2, 2), Plain)),
    "Preparation": wrong(
        of("Preparation"),
        lambda g: {"mean": (0.5,), "std": (0.5,), "size": (8, 8), "resize": 8},
        mean=(None, 0.5, "x", (), ("a",), (NAN,), (0.5, 0.5)),
        std=(None, 0.5, "x", (), ("a",), (0,), (-1,)),
        size=(None, 8, "x", (8,), (8, 0), (8, "x"), (8.0, 8.0)),
        resize=(None, 0, "x", 8.5, -1),
        channels=(None, 3, "BGR"),
        interpolation=(None, 3, "x"),
        classes=(None, 3, "x", (3,)),
    ),
    "HubNetwork": wrong(
        of("HubNetwork"),
        lambda g: {"network": g.model},
        network=NO_NETWORK,
        report=(3, [], "x"),
        preparation=(3, {}, "x"),
    ),
    "HubNetwork.from_pretrained": wrong(
        lambda g: lit_prune.HubNetwork.from_pretrained,
        lambda g: {"pretrained_model_name_or_path": str(g.folder / "compact"), "local_files_only": True},
        pretrained_model_name_or_path=(lambda g: str(g.folder / "empty"),),
        model=(3, "net", nn.Linear(2, 2)),
    ),
    "LitClassifier": wrong(
        of("LitClassifier"),
        lambda g: {"backbone": "cifar_convnet", "num_classes": 4},
        backbone=(None, 3, "nothing", "", "os:system", nn.ReLU(), []),
        num_classes=(0, -1, "ten", None, 1.5, 1, True),
        image_shape=(None, 3, "x", (3,), (3, 0, 8), (3, -1, 8), (3, "x", 8)),
        arguments=(3, [], "x", {"nothing": 1}, {3: 1}),
        weights=(3, "nowhere.pth", [], True),
        pretrained=(3, "x", True, None),
        optimizer=(None, 3, "sgd", []),
        scheduler=(3, "x", []),
        label_smoothing=(-1, 1.5, "x", NAN, None),
        channels_last=(3, "x", None),
        compile=(3, None, []),
    ),
    "Swaps": wrong(
        lambda g: Swaps,
        lambda g: {},
        pairs=(*NO_WHOLE, None),
        probability=(-1, 1.5, "x", NAN, None),
        images=(1, "x", None, 1.5),
        batch_size=(*NO_WHOLE, None),
        seed=("x", None, 1.5),
    ),
    "Custom": wrong(
        lambda g: Custom,
        lambda g: {},
        run=(3, "x", []),
        loss=(3, "x", nn),
        prediction=(3, "x"),
        variables=(3, "x", [], {"a": 3}),
        metric=(3, "x"),
        inputs=(3, "x"),
        size=(3, "x"),
        metric_name=(3, None),
        scalar_loss=(3, "x", None),
    ),
    "Segmentation": wrong(lambda g: Segmentation, lambda g: {}, void=("x", 1.5, ["x"])),
}
TABLE = [(name, *entry) for name, entries in CALLS.items() for entry in entries]


def title(entry: tuple) -> str:
    name, _, _, argument, value = entry
    said = " ".join(str(value).split())
    return f"{name}({argument}={said[:40]})"


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_one_line(given, name):
    found = {}
    for entry in [entry for entry in TABLE if entry[0] == name]:
        _, call, right, argument, value = entry
        value = value(given) if getattr(value, "__name__", "") == "<lambda>" else value
        try:
            call(given)(**{**right(given), argument: value})
        except InputError as error:
            if "\n" in str(error) or len(str(error)) < 15:
                found[title(entry)] = f"InputError, but {str(error)!r}"
        except Exception as error:
            found[title(entry)] = f"{type(error).__name__}: {' '.join(str(error).split())[:140]}"
        else:
            found[title(entry)] = "accepted"
    assert not found, "\n".join(["", *(f"{key} -> {value}" for key, value in found.items())])


def test_the_table_is_as_large_as_it_says():
    assert len(TABLE) > 400 and {name.partition(".")[0] for name in CALLS} >= {*lit_prune.__all__} - {
        "InputError",
        "Task",  # a base class
        "__version__",
    }
