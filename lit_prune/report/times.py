"""What the times of a result hold for, and whether they are worth anything."""

from collections.abc import Mapping
from typing import Any

from lit_prune.timing import busy


def times_are_unsure(result: Mapping[str, Any]) -> bool:
    """Whether times spread widely, or the machine was busy with something else."""
    return busy(result.get("timing") or {}) or any(result[name].get("noisy") for name in ("dense", "compact"))


def times_hold_for(result: Mapping[str, Any]) -> str:
    """Sentences on what the times hold for, and a warning where they are worth little; "" where it is not known."""
    said = result.get("timing") or {}
    if not said:
        return ""
    spread = result["compact"].get("latency_spread_ms")
    quartiles = f", quartiles {spread:.2g} ms apart" if isinstance(spread, float) else ""
    text = f"Times: eager PyTorch, {said.get('device')}, {said.get('threads')} threads, {said.get('date')}{quartiles}."
    warning = " The machine was busy or the times spread widely: `lit-prune latency` measures again."
    return text + (warning if times_are_unsure(result) else "")
