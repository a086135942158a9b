"""The verb `reduce`: cells, resuming, tables, bad input."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from lit_prune.cli.main import main
from lit_prune.errors import InputError
from lit_prune.lab.reduce.bench import ranges
from lit_prune.lab.reduce.handover import Chosen, hand_over
from lit_prune.lab.reduce.head import HeadSite
from lit_prune.lab.reduce.images import Images, evaluation_batches
from lit_prune.lab.reduce.request import ReduceMethod, ReduceRequest
from lit_prune.lab.reduce.run import reduce
from lit_prune.lab.reduce.sites import AttentionSite, GroupSite, find_site
from lit_prune.models import build_backbone
from lit_prune.replace import Swaps
from lit_prune.structure import load_compact, save_compact
from lit_prune.structure.networks import load_network
from lit_prune.structure.record import Record, image_inputs, note_record

SWAPS = Swaps(pairs=100, images=60)
EVERY = tuple(
    ReduceMethod(score, **values)
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
    kept = json.loads(json.dumps(content))
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


def test_batches_are_read_by_the_task_whatever_holds_the_images(mlp):
    pairs = pictures((1, 4, 4))
    named = Images(*([{"image": x, "label": y} for x, y in part] for part in (pairs.calibration, pairs.test)))
    asked = request(methods=EVERY[:1], extras=("stress", "curvature"), stress_draws=1)
    found = [reduce(lambda seed: mlp, images, asked) for images in (pairs, named)]
    assert plain(found[0]) == plain(found[1])


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
        methods = (ReduceMethod("cmr_logit", "affine", parents=2), ReduceMethod("cmr_const", objective="loss", steps=2))
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
    deleted = ReduceMethod("head_removal", "delete")
    methods = (ReduceMethod("cmr_const", objective="loss"), deleted, ReduceMethod("variance", steps=2))
    asked = request(layer="blocks.1.attn", methods=methods, kept=(2,))
    for cell in reduce(lambda seed: net, pictures((3, 16, 16)), asked)["cells"]:
        assert cell["width"] == 2 and cell["certificate"]["empirical"] <= cell["iia"]


@pytest.mark.parametrize(("values", "message"), [
    ({"kept": (0.01,)}, "leaves nothing"), ({"kept": (12,)}, "removes nothing"), ({"kept": (-1,)}, "leaves nothing"),
    ({"kept": (float("nan"),)}, "leaves nothing"), ({"kept": (float("inf"),)}, "leaves"), ({"seeds": (-1,)}, "seed"),
    ({"layer": "layers.3"}, "ReLU"), ({"layer": "layer.2"}, "did you mean layers.2"),
    ({"calibration_sizes": (4000,)}, "4000"), ({"calibration_classes": (9,)}, "classes"),
    ({"methods": (ReduceMethod("label"),)}, "'label' is unknown"),
    ({"methods": (ReduceMethod(kind="affine", parents=6),), "calibration_sizes": (5,), "kept": (8,)}, "parents=6"),
    ({"methods": (ReduceMethod(), ReduceMethod())}, "twice"), ({"extras": ("x",)}, "extras"),
])  # fmt: skip
def test_bad_requests_are_one_clear_line(mlp, values, message):
    with pytest.raises(InputError, match=message):
        reduce(lambda seed: mlp, pictures((1, 4, 4)), request(**values))


@pytest.mark.parametrize("values", [{"kind": "refit", "objective": "loss"}, {"kind": "means"}, {"steps": 0}])
def test_a_method_without_meaning_is_refused_as_it_is_written(values):
    with pytest.raises(InputError, match="objective='loss'|kind='means'|steps=0"):
        ReduceMethod("cmr_logit", **values)


@pytest.mark.parametrize(("reader", "message"), [
    (nn.ConvTranspose2d(8, 8, 2), r"its reader 'mid' \(ConvTranspose2d\) is not affine in one unit at a time"),
    (nn.Conv2d(8, 8, 3, groups=2), r"its reader 'mid' \(Conv2d\) is not affine in one unit at a time"),
])  # fmt: skip
def test_a_reader_that_is_not_affine_is_named(reader, message):
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.mid, self.head = nn.Conv2d(1, 8, 1), reader, nn.Linear(8, 4)

        def forward(self, images):
            return self.head(self.mid(self.body(images)).mean((2, 3)))

    with pytest.raises(InputError, match=f"^request.layer='body': {message}"):
        find_site(Between().eval(), "body", torch.zeros(1, 1, 4, 4))


def test_some_of_the_sorted_test_images_are_of_all_classes():
    labels = torch.arange(4).repeat_interleave(10)
    loader = [(part[:, None].float(), part) for part in labels.split(7)]
    batches = evaluation_batches(loader, 12, 100)
    assert torch.cat([part for _, part in batches]).bincount().tolist() == [3, 3, 3, 3]
    assert all(torch.equal(images[:, 0].long(), part) for images, part in batches) and len(batches) == 2
    swapped = evaluation_batches(loader, None, 8)
    assert torch.cat([part for _, part in swapped])[:8].bincount().tolist() == [2, 2, 2, 2]
    assert sum(len(part) for _, part in swapped) == 40


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
    assert all(0 <= content["results"][key]["accuracy_repaired"] <= 1 for key in content["requests"][1]["keys"])
    assert set(first["results"]) < set(content["results"])
    assert content["requests"][0] == first["requests"][0]
    assert len(list(Path(tmp_path, "cells").iterdir())) == 2
    report = json.loads((tmp_path / "compact" / "report.json").read_text())
    best = max(content["results"][key]["accuracy_repaired"] for key in content["requests"][1]["keys"])
    assert report["compact"]["accuracy"] == best and report["cell"]["width"] == 4
    trained = load_network(tmp_path / f"cells/{report['cell']['key']}/checkpoints/last.ckpt", (1, 1, 8))
    bits = torch.randint(2, (5, 1, 1, 8), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(load_compact(tmp_path / "compact")(bits), trained(bits))


@pytest.fixture
def original(mlp):
    arguments = {"in_channels": 1, "image_size": 4, "hidden": [10, 12], "num_classes": 4}
    return note_record(mlp, Record("mlp", arguments, (), image_inputs((1, 4, 4))))


def test_requests_in_one_folder_keep_their_own_tables(mlp, tmp_path):
    asked = [request(methods=EVERY[:2]), request(methods=EVERY[1:3], kept=(0.5,)), request(methods=EVERY[:2])]
    found = [reduce(lambda seed: mlp, pictures((1, 4, 4)), one, run_dir=tmp_path) for one in asked]
    kept = json.loads((tmp_path / "reduction.json").read_text())["requests"]
    assert [len(tables["summary"]) for tables in kept] == [6, 2]
    for tables, content in zip(kept, (found[2], found[1]), strict=True):
        assert tables == json.loads(json.dumps({key: value for key, value in content.items() if key != "cells"}))


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [((0.961, 0.90, 0.766), 384), ((0.97, 0.965, 0.766), 256), ((0.5, 0.6, 0.4), 256), ((0.97, 0.97, 0.969), 128)],
)
def test_the_narrowest_network_that_holds_its_accuracy_is_chosen_else_the_most_accurate(accuracies, expected):
    widths = zip((384, 256, 128), accuracies, strict=True)
    cells = [{"width": width, "accuracy": value, "accuracy_dense": 0.97} for width, value in widths]
    assert Chosen.of({"cells": cells, "keys": list("abc")}).result["width"] == expected


def test_the_chosen_network_is_handed_over_bit_for_bit(mlp, original, tmp_path):
    images, asked = pictures((1, 4, 4)), request(methods=EVERY, kept=(0.5, 3), seeds=(0, 1))
    content = reduce(lambda seed: mlp, images, asked, run_dir=tmp_path)
    assert Chosen.of(content).words in hand_over(lambda seed: original, images, asked, content, tmp_path)
    report = json.loads((tmp_path / "compact" / "report.json").read_text())
    best = Chosen.of(content).result["accuracy"]
    assert report["compact"]["accuracy"] == best and report["compact"]["params"] < report["dense"]["params"]
    chosen = content["cells"][content["keys"].index(report["cell"]["key"])]
    assert (report["cell"]["method"], report["compact"]["macs"]) == (chosen["method"], chosen["macs"])
    again = tmp_path / "again"
    hand_over(lambda seed: original, images, asked, content, again)
    test, labels = images.test[0]
    one, other = load_compact(tmp_path / "compact"), load_compact(again / "compact")
    assert torch.equal(one(test), other(test))
    top = torch.cat([one(part).argmax(1) == truth for part, truth in images.test])
    assert float(top.double().mean()) == best
    assert "was there" in hand_over(lambda seed: original, images, asked, content, tmp_path)


def test_what_no_plan_can_say_and_what_another_verb_wrote_is_told(original, tmp_path):
    net = build_backbone("cifar_resnet20", 4).eval()
    images, asked = pictures((3, 8, 8)), request(kept=(0.5,))
    content = reduce(lambda seed: net, images, asked, run_dir=tmp_path)
    residual = note_record(net, Record("cifar_resnet20", {"num_classes": 4}, (), image_inputs((3, 8, 8))))
    assert "no plan" in hand_over(lambda seed: residual, images, asked, content, tmp_path)
    assert not (tmp_path / "compact").exists()
    save_compact(tmp_path / "compact", original, report={"dense": {}, "compact": {}})
    assert "another verb" in hand_over(lambda seed: residual, images, asked, content, tmp_path)


VIT = """
reduce -c configs/base.yaml -c configs/model/deit_tiny.yaml -c configs/experiment/reduce_deit_tiny.yaml
--data lit_prune.data.DigitsData --data.resolution 32 --data.channels 3 --data.calibration_size 64
--model.pretrained false --trainer.accelerator cpu --trainer.logger false --trainer.max_epochs 1
--trainer.limit_train_batches 1 --trainer.enable_progress_bar false --trainer.enable_model_summary false
--request.calibration_sizes [24] --request.kept [0.5] --request.swaps.pairs 20 --request.swaps.images 20
--request.repair_epochs 0 --request.test_images 20
"""


def test_the_transformer_configuration_reduces_the_last_feed_forward_part(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[3])
    sizes = "{img_size: 32, patch_size: 16, embed_dim: 12, depth: 12, num_heads: 3}"
    methods = "[{score: cmr_logit}, {score: cmr_affine, kind: affine, objective: loss, parents: 4}]"
    main([*VIT.split(), "--model.arguments", sizes, "--request.methods", methods, "--run_dir", str(tmp_path)])
    (tables,) = json.loads((tmp_path / "reduction.json").read_text())["requests"]
    assert (tables["layer"], tables["units"]) == ("blocks.11.mlp.fc1", 48)
    assert {row["width"] for row in tables["summary"]} == {24} and len(tables["summary"]) == 2
    assert load_compact(tmp_path / "compact").blocks[11].mlp.fc1.out_features == 24
