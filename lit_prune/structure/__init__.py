"""Structure: groups of coupled channels, what they cost, plans, and the surgery that carries them out."""

from lit_prune.structure.allocation import make_plan, plan_channels
from lit_prune.structure.compact import load_compact, read_preparation, save_compact
from lit_prune.structure.cost import Cost, LayerCost, cost
from lit_prune.structure.cost_model import CostModel
from lit_prune.structure.groups import ChannelGraph, Group, Member, trace_groups
from lit_prune.structure.latency import compare_latencies, compare_profiles
from lit_prune.structure.masking import MaskPlan, mask_channels, plan_masks
from lit_prune.structure.plan import Plan
from lit_prune.structure.ranking import Budget, group_scores
from lit_prune.structure.surgery import apply_plan, check_invariants, kept_columns, transfer_tensors

__all__ = [
    "Budget",
    "ChannelGraph",
    "Cost",
    "CostModel",
    "Group",
    "LayerCost",
    "MaskPlan",
    "Member",
    "Plan",
    "apply_plan",
    "check_invariants",
    "compare_latencies",
    "compare_profiles",
    "cost",
    "group_scores",
    "kept_columns",
    "load_compact",
    "make_plan",
    "mask_channels",
    "plan_channels",
    "plan_masks",
    "read_preparation",
    "save_compact",
    "trace_groups",
    "transfer_tensors",
]
