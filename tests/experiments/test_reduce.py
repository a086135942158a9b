"""The verb `reduce`: cells, resuming, tables, bad input."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from lit_prune.backbones import build_backbone
from lit_prune.cli import main
from lit_prune.errors import InputError
from lit_prune.experiments.reduce import Images, ranges, reduce
from lit_prune.experiments.reduce_head import HeadSite
from lit_prune.experiments.reduce_request import Method, ReduceRequest
from lit_prune.experiments.reduce_sites import AttentionSite, GroupSite, find_site
from lit_prune.mechanisms import Swaps

SWAPS = Swaps(pairs=100, images=60)
EVERY = tuple(
    Method(score, **values)
    for score, values in (
        ("cmr_logit", {}),
        ("variance", {"kind": "affine", "parents": 3}),
        ("cmr_const", {"objective": "joint_loss", "steps": 2}),
        ("cmr_affine", {"kind": "affine", "objective": "loss", "parents": 3, "ridge": 1e-3}),
        ("magnitude", {"kind": "refit"}),
        ("random", {"kind": "delete"}),
    )
)


def pictures(shape, classes: int = 4, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    return Images(*(
        [(torch.randn(30, *shape, generator=generator), torch.randint(classes, (30,), generator=generator))] * 2
        for _ in range(2)
    ))  # fmt: skip


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return build_backbone("mlp", 4, in_channels=1, image_size=4, hidden=[10, 12]).eval()


def request(**values) -> ReduceRequest:
    return ReduceRequest(**{"calibration_sizes": (40,), "swaps": SWAPS, **values})


def plain(content) -> str:
    """Everything but the times."""
    kept = json.loads(json.dumps({key: value for key, value in content.items() if key != "results"}))
    for cell in kept["cells"]:
        del cell["seconds"]
    kept["summary"] = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in kept["summary"]]
    return json.dumps(kept, sort_keys=True)


def test_every_cell_is_certified_and_its_compiled_network_is_what_was_verified(mlp):
    content = reduce(lambda seed: mlp, pictures((1, 4, 4)), request(methods=EVERY, seeds=(0, 1), kept=(0.5, 3)))
    assert len(content["cells"]) == 24 and content["layer"] == "layers.2" and content["units"] == 12
    for cell in content["cells"]:
        assert 0 <= cell["certificate"]["bound"] <= cell["certificate"]["empirical"] <= cell["iia"] <= 1
        assert cell["compiled_difference"] < 1e-5
        assert cell["macs"] < 16 * 10 + 120 + 48 and cell["curvature_method"] == "exact"
        assert len(cell["seconds"]) == 3
    widths = {(row["width"], row["method"]) for row in content["summary"]}
    assert len(widths) == 12 and all(row["seeds"] == 2 for row in content["summary"])
    assert len(content["differences"]) == 2 * 5 * 3


class Killed(Exception):
    pass


def test_a_killed_reduction_resumes_to_the_same_result(mlp, tmp_path, monkeypatch):
    asked = request(methods=EVERY[:3], seeds=(0, 1), extras=("stress", "curvature"), stress_draws=2)
    whole = reduce(lambda seed: mlp, pictures((1, 4, 4)), asked)
    verify, calls = HeadSite.verify, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 8:
            raise Killed
        return verify(self, *args)

    monkeypatch.setattr(HeadSite, "verify", failing)
    with pytest.raises(Killed):
        reduce(lambda seed: mlp, pictures((1, 4, 4)), asked, run_dir=tmp_path)
    assert len(json.loads((tmp_path / "reduction.json").read_text())["results"]) == 7
    resumed = reduce(lambda seed: mlp, pictures((1, 4, 4)), asked, run_dir=tmp_path)
    assert len(calls) == 8 + 18 - 7 and plain(resumed) == plain(whole)
    reduce(lambda seed: mlp, pictures((1, 4, 4)), asked, run_dir=tmp_path)
    assert len(calls) == 8 + 18 - 7  # nothing twice
    with torch.no_grad():
        mlp.layers[0].weight += 0.1
    reduce(lambda seed: mlp, pictures((1, 4, 4)), asked, run_dir=tmp_path)
    assert len(calls) == 8 + 18 - 7 + 18  # another network


def test_rescaling_changes_variance_and_not_cmr_logit(mlp):
    content = reduce(lambda seed: mlp, pictures((1, 4, 4)), request(extras=("stress", "curvature"), stress_draws=5))
    by_score = {}
    for row in content["stress"]:
        by_score.setdefault(row["score"], []).append(row["jaccard"])
        assert row["logit_change"] < 1e-9
    assert set(by_score) >= {"cmr_logit", "variance", "magnitude", "random"}
    assert set(by_score["cmr_logit"]) == {1.0} and sum(by_score["variance"]) < 0.8 * len(by_score["variance"])
    assert 0 < content["curvature"][0]["off_diagonal"] < 1 and content["curvature"][0]["method"] == "exact"


def test_a_hidden_layer_and_a_convolution_are_reduced_in_the_network(mlp):
    for net, layer, shape in (
        (mlp, "layers.0", (1, 4, 4)),
        (build_backbone("cifar_convnet", 4, widths=[8, 8], hidden=6).eval(), "features.4", (3, 8, 8)),
    ):
        methods = (Method("cmr_logit", "affine", parents=2), Method("cmr_const", objective="loss", steps=2))
        found = reduce(lambda seed, net=net: net, pictures(shape), request(layer=layer, methods=methods, kept=(0.5,)))
        assert isinstance(find_site(net, layer, torch.zeros(1, *shape)), GroupSite)
        assert all(cell["certificate"]["empirical"] <= cell["iia"] for cell in found["cells"])
        assert all(cell["curvature_method"] == "gauss_newton" for cell in found["cells"])


def test_pooled_features_of_a_residual_network_are_reduced_at_the_head():
    net = build_backbone("cifar_resnet20", 4).eval()
    content = reduce(lambda seed: net, pictures((3, 16, 16)), request(methods=EVERY[:2] + EVERY[4:5], kept=(0.5,)))
    assert content["layer"] == "linear" or content["units"] == 64
    assert all(cell["compiled_difference"] < 1e-5 for cell in content["cells"])
    saved = sum(parameter.numel() for parameter in net.parameters()) - content["cells"][0]["params"]
    assert saved == 32 * 4


def test_heads_of_an_attention_are_units():
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 4}
    net = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    assert isinstance(find_site(net, "blocks.1.attn", torch.zeros(1, 3, 16, 16)), AttentionSite)
    methods = (Method("cmr_const", objective="loss"), Method("head_removal", "delete"), Method("variance", steps=2))
    asked = request(layer="blocks.1.attn", methods=methods, kept=(2,))
    for cell in reduce(lambda seed: net, pictures((3, 16, 16)), asked)["cells"]:
        assert cell["width"] == 2 and cell["certificate"]["empirical"] <= cell["iia"]


@pytest.mark.parametrize(("values", "message"), [
    ({"kept": (0.01,)}, "leaves nothing"), ({"kept": (12,)}, "removes nothing"), ({"kept": (-1,)}, "leaves nothing"),
    ({"layer": "layers.3"}, "ReLU"), ({"layer": "layer.2"}, "did you mean layers.2"),
    ({"calibration_sizes": (4000,)}, "4000"), ({"calibration_classes": (9,)}, "classes"),
    ({"methods": (Method("label"),)}, "'label' is unknown"),
    ({"methods": (Method("cmr_logit", "affine", parents=6),), "calibration_sizes": (5,), "kept": (8,)}, "parents=6"),
    ({"methods": (Method(), Method())}, "twice"), ({"extras": ("x",)}, "extras"),
    ({"methods": (Method("cmr_logit", "refit", objective="loss"),)}, "objective"),
])  # fmt: skip
def test_bad_requests_are_one_clear_line(mlp, values, message):
    with pytest.raises(InputError, match=message):
        reduce(lambda seed: mlp, pictures((1, 4, 4)), request(**values))


def test_a_reader_that_is_not_affine_is_named():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(InputError, match="'1'|protected|cannot be removed|affine"):
        find_site(net.eval(), "0", torch.zeros(1, 1, 4, 4))


def test_ranges_are_short():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and ranges([]) == ""


COMMAND = """
reduce --data lit_prune.data.BooleanCircuitData --data.train_size 400 --data.calibration_size 100 --model.backbone mlp
--trainer.max_epochs 1 --trainer.accelerator cpu --trainer.logger false
--trainer.enable_progress_bar false --trainer.enable_model_summary false --trainer.limit_val_batches 0
--request.seeds [0,1] --request.kept [4] --request.calibration_sizes [50] --request.swaps.pairs 50
"""


def test_the_command_trains_a_network_a_seed_once_and_repairs_with_a_teacher(tmp_path, capsys):
    command = [*COMMAND.split(), "--model.arguments", "{hidden: [8, 8], in_features: 8}", "--run_dir", str(tmp_path)]
    main(command)
    assert "layers.2" in capsys.readouterr().out
    first = json.loads((tmp_path / "reduction.json").read_text())
    checkpoints = [tmp_path / f"seed={seed}" / "checkpoints" / "last.ckpt" for seed in (0, 1)]
    written = [file.stat().st_mtime_ns for file in checkpoints]
    repair = ["--request.repair_epochs", "1", "--request.repair", "{alpha: 1.0, beta: 0.0, form: kl}"]
    main([*command, *repair, "--request.methods", "[{score: cmr_logit}]"])
    assert [file.stat().st_mtime_ns for file in checkpoints] == written
    content = json.loads((tmp_path / "reduction.json").read_text())
    assert all(0 <= content["results"][key]["accuracy_repaired"] <= 1 for key in content["cells"])
    assert set(first["results"]) < set(content["results"])
    assert len(list(Path(tmp_path, "cells").iterdir())) == 2
