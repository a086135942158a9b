import pytest
import torch
from residual_net import TRUNK, ResidualNet
from torch import nn

from lit_prune.scores import Evidence, find_score
from lit_prune.scores.planning import measured_damage
from lit_prune.scores.trials import corrected_damage, plan_parts
from lit_prune.structure import Budget, Plan


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(TRUNK, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, TRUNK, 3, padding=1))


@pytest.fixture
def evidence():
    torch.manual_seed(0)
    images = torch.randn(64, 3, 8, 8)
    return Evidence(ResidualNet(block, 8, 4).eval(), [images[:40], images[40:]], task="unlabelled")


def halved(evidence: Evidence) -> Plan:
    sizes = {group.name: group.size for group in evidence.graph.prunable}
    return Plan((), {name: tuple(range(size // 2)) for name, size in sizes.items()}, sizes)


def test_parts_are_roles_and_places_in_forward_order_and_hold_every_group_once(evidence):
    parts = plan_parts(evidence.graph, halved(evidence))
    assert sorted(name for part in parts for name in part) == sorted(group.name for group in evidence.graph.prunable)
    roles = {group.name: group.role for group in evidence.graph.prunable}
    assert all(len({roles[name] for name in part}) == 1 for part in parts)
    inside = [part for part in parts if roles[part[0]] == "mid"]
    assert inside == [[f"blocks.{n}.0" for n in range(4)], [f"blocks.{n}.0" for n in range(4, 8)]]


def test_a_wrong_scale_of_one_part_s_table_is_put_right(evidence):
    """What a part really does when it is cut alone decides, not what its tables said."""
    ranks = find_score("reconstruction").at(0.5).ranks(evidence)
    tables = measured_damage(evidence, evidence.graph, ranks, Budget("macs", 0.5, "measured"))
    plan = halved(evidence)
    wrong = {n: (w, [e * (3 if n.startswith("blocks") else 1) for e in errors]) for n, (w, errors) in tables.items()}
    right, mended = (corrected_damage(evidence, evidence.graph, found, plan) for found in (tables, wrong))
    for name, (_, errors) in right.items():
        assert mended[name][1] == pytest.approx(errors)


def test_a_plan_of_one_part_is_not_tried(evidence, monkeypatch):
    monkeypatch.setattr("lit_prune.scores.trials.refitted", None)
    tables = {"blocks.0.0": ([3, 6], [1.0, 0.0])}
    plan = Plan((), {"blocks.0.0": (0, 1, 2)}, {"blocks.0.0": 6})
    assert corrected_damage(evidence, evidence.graph, tables, plan) is tables
