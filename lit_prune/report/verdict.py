"""The first screen of the page: is the compact network good, what went and why, can it be trusted, how is it used."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.text import Text as RichText

from lit_prune.errors import InputError
from lit_prune.report.run_folder import AbsentInput, RunFolder, stages_if_any
from lit_prune.report.tables import figure_of, format_count, is_number, point_change, times_are_unsure

SLIGHT, CLEAR = 0.01, 0.03  # losses of a share (accuracy, IoU) that are called small, and more than small
BUDGET_SLACK = 0.01  # share of the dense cost by which a budget may be passed over
REMEDY = (
    "Repair longer (more epochs after the stage), keep more, cut in several stages, or let `replace: refit` put solved "
    "readers in the place of what goes."
)
USE = """from lit_prune import load_compact

network = load_compact("{folder}")

# lit-prune export --run_dir {run} \\
#     --formats '[onnx]'
"""
Level = Literal["good", "fair", "poor", "open"]


@dataclass(frozen=True)
class Verdict:
    """What a reader wants to know first.

    Attributes:
        level: "good" (kept its figure), "fair" (lost a little), "poor" (lost more, or missed its budget), "open" (not
            measured).
        headline: the verdict in words.
        reasons: sentences: figure, budget, what is uncertain.
        removed: sentences on what went and what stayed whole, and why.
        trust: name and value of what the numbers hold for.
        use: lines of code and the command for the hand-over.
    """

    level: Level
    headline: str
    reasons: tuple[str, ...]
    removed: tuple[str, ...]
    trust: tuple[tuple[str, str], ...]
    use: str


def find_verdict(run: RunFolder) -> Verdict | None:
    """The verdict on a run's compact network; None where the run has none."""
    try:
        result = run.result
        dense, compact = result["dense"], result["compact"]
    except (AbsentInput, InputError, KeyError, TypeError):
        return None
    stages = stages_if_any(run)
    budget = list(_budgets(stages, dense, compact))
    figure, level = _figure(run, result, stages)
    if any(missed for _, missed in budget):
        level = "poor"
    cheaper = 1 - compact["macs"] / dense["macs"] if dense.get("macs") else math.nan
    words = {"good": "kept its figure", "fair": "lost a little", "poor": "lost too much or missed its budget"}
    headline = f"{cheaper:.0%} fewer multiply-adds: {words.get(level, 'its figure was not measured')}"
    removed, trust = tuple(_removed(stages, dense, compact)), tuple(_trust(run))
    use = USE.format(folder=run.path / "compact", run=run.path)
    return Verdict(level, headline, (*figure, *(sentence for sentence, _ in budget)), removed, trust, use)


def _figure(run: RunFolder, result: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> tuple[list[str], Level]:
    """Sentences on the figure, and the level that follows from it alone."""
    quantity = figure_of(result)
    before, after = (result[name].get(quantity.key) for name in ("dense", "compact"))
    if not (is_number(before) and is_number(after)):
        return [f"The {quantity.title} was not measured."], "open"
    less_is_better = (result.get("metric") or {}).get("mode") == "min"
    loss = (after - before) if less_is_better else (before - after)
    share = min(before, after) >= 0 and max(before, after) <= 1 and not less_is_better
    loss = loss if share else loss / max(abs(before), 1e-12)
    level: Level = "good" if loss <= SLIGHT else "fair" if loss <= CLEAR else "poor"
    sentence = f"{quantity.title} {quantity.format(after)}, dense {quantity.format(before)}"
    sentence += f" ({quantity.change(after, before)})"
    accuracy = share and quantity.change is point_change
    said = [sentence + (_interval(run, before, after) if accuracy else "") + "."]
    if level == "poor":
        much = f"{100 * CLEAR:.0f} points" if accuracy else f"{CLEAR:g}" if share else f"{CLEAR:.0%}"
        said.append(
            f"Warning: {quantity.title} got worse by more than {much}; look at the stages below before it is used."
        )
    return said, level


def _interval(run: RunFolder, before: float, after: float) -> str:
    """95 % interval of the difference of two accuracies, as if their images were independent; "" where unknown."""
    images = (run.result.get("metric") or {}).get("images") or validation_of(run).get("images")
    if not is_number(images) or not images:
        return ""
    half = 1.96 * math.sqrt((before * (1 - before) + after * (1 - after)) / images)
    return f"; the change is known to ±{100 * half:.1f} points from {images:,} images"


def validation_of(run: RunFolder) -> Mapping[str, Any]:
    """What run.json says of the images that the figures are of: `split` and `images`; empty where it says nothing."""
    try:
        return run.protocol.get("validation") or {}
    except (AbsentInput, InputError):
        return {}


def _budgets(
    stages: Sequence[Mapping[str, Any]], dense: Mapping[str, Any], compact: Mapping[str, Any]
) -> Iterator[tuple[str, bool]]:
    """A sentence on the last budget that a stage was given, and whether it was missed."""
    asked = [(stage.get("protocol") or {}).get("stage") or {} for stage in stages]
    asked = [stage for stage in asked if is_number(stage.get("keep")) and stage.get("budget") in ("macs", "params")]
    if asked:
        unit, keep = asked[-1]["budget"], asked[-1]["keep"]
        reached = compact[unit] / dense[unit]
        missed = reached > keep + BUDGET_SLACK
        name = {"macs": "MACs", "params": "parameters"}[unit]
        verdict = "missed" if missed else "met"
        yield f"Budget {verdict}: {keep:.0%} of the {name} asked for, {reached:.1%} left.", missed
    for stage in stages[-1:]:  # what was measured at the cut, as a share of the network before it
        notes = (stage.get("plan") or {}).get("notes") or {}
        if all(is_number(notes.get(name)) for name in ("requested", "achieved", "spread")):
            missed = notes.get("met") is False
            share = f"{notes['requested']:.0%} of the {notes.get('budget')} before the last cut asked for"
            after = f"{notes['achieved']:.1%} measured after it (±{notes['spread'] / 2:.0%})"
            yield f"Budget {'missed' if missed else 'met'}: {share}, {after}.", missed


def _removed(
    stages: Sequence[Mapping[str, Any]], dense: Mapping[str, Any], compact: Mapping[str, Any]
) -> Iterator[str]:
    """Sentences on what the stages removed and what they had to leave."""
    yield (
        f"MACs {format_count(dense['macs'])} → {format_count(compact['macs'])}, "
        f"parameters {format_count(dense['params'])} → {format_count(compact['params'])}."
    )
    for stage in stages:
        plan, settings = stage.get("plan") or {}, (stage.get("protocol") or {}).get("stage") or {}
        blocks, kept, sizes = (plan.get(key) or {} for key in ("drop_blocks", "keep_channels", "sizes"))
        gone = {name: sizes[name] - len(units) for name, units in kept.items() if name in sizes}
        parts = [f"blocks {', '.join(blocks)}"] if blocks else []
        if sum(gone.values()):
            parts.append(
                f"{sum(gone.values())} of {sum(sizes.values())} units in {sum(n > 0 for n in gone.values())} groups"
            )
        notes = plan.get("notes") or {}
        why = f", ranked by {settings['score']}{_medians(notes)}" if gone and settings.get("score") else ""
        why = why or (f", least label information first{_informations(notes, list(blocks))}" if blocks else "")
        if parts:
            yield f"Stage {stage.get('name', '?')} at epoch {stage.get('epoch', '?')}: {'; '.join(parts)}{why}."
        protected = notes.get("protected")
        if isinstance(protected, Mapping) and protected:
            name, reason = next(iter(protected.items()))
            more = f" and {len(protected) - 1} more" if len(protected) > 1 else ""
            yield f"Left whole: {name} ({reason}){more}."


def _medians(notes: Mapping[str, Any]) -> str:
    """Scores of the units that went and that stayed, as medians of the groups."""
    scores = (notes.get("scores") or {}).values()
    gone, stayed = ([parts[part][1] for parts in scores if part in parts] for part in ("removed", "kept"))
    return f" (group medians: {_span(gone)} went, {_span(stayed)} stayed)" if gone and stayed else ""


def _informations(notes: Mapping[str, Any], dropped: Sequence[str]) -> str:
    """Label information of the blocks that went and that stayed, nats."""
    known = notes.get("information") or {}
    gone = [known[name] for name in dropped if name in known]
    stayed = [value for name, value in known.items() if name not in dropped]
    return f" ({_span(gone)} nats went, {_span(stayed)} stayed)" if gone and stayed else ""


def _span(values: Sequence[float]) -> str:
    """Least and greatest, one number where they look the same.

    >>> _span([0.25, 0.306, 0.254]), _span([2.0])
    ('0.25 to 0.31', '2')
    """
    ends = dict.fromkeys(f"{end:.2g}" for end in (min(values), max(values)))
    return " to ".join(ends)


def _trust(run: RunFolder) -> Iterator[tuple[str, str]]:
    """What the numbers hold for, as far as the run recorded it."""
    try:
        record = run.protocol
    except (AbsentInput, InputError):
        return
    backbone, data, machine = (record.get(key) or {} for key in ("backbone", "data", "machine"))
    versions, product = record.get("versions") or {}, record.get("lit_prune") or {}
    facts = {
        "network": backbone.get("name") if isinstance(backbone, Mapping) else backbone,
        "data": data.get("name") if isinstance(data, Mapping) else data,
        "figures of": _images(validation_of(run)),
        "calibration samples": len(record.get("calibration_indices") or ()) or None,
        "seed": record.get("seed"),
        "machine": ", ".join(f"{key} {value}" for key, value in machine.items()) or None,
        "times": _times(run),
        "torch": versions.get("torch"),
        "lit_prune": " ".join(map(_short, (product.get(key) for key in ("version", "commit")))).strip() or None,
    }
    yield from ((name, str(value)) for name, value in facts.items() if value is not None)


def _times(run: RunFolder) -> str | None:
    """What the latencies are worth, and the day on which they were taken."""
    try:
        result = run.result
        said = result["timing"]
        return f"{said['date'][:10]}, {said['device']}, load {said['load']}" + (
            ": too busy, measure again" if times_are_unsure(result) else ""
        )
    except (AbsentInput, InputError, KeyError, TypeError):
        return None


def _short(value: Any) -> str:
    """A version as it is, a commit by its first letters, with its mark where files were changed."""
    text = "" if value is None else str(value)
    return re.sub(r"^([0-9a-f]{9})[0-9a-f]{31}(-dirty)?$", r"\1\2", text)


def _images(validation: Mapping[str, Any]) -> str | None:
    if not validation:
        return None
    chosen = ", which choices were made by too" if validation.get("split") == "test" else ""
    return f"{validation.get('images', '?'):,} images of the {validation.get('split')} split{chosen}"


COLOURS = {"good": "green", "fair": "yellow", "poor": "bold red", "open": "dim"}


def terminal_verdict(run_dir: str | Path) -> RichText:
    """The verdict on a run for the terminal, in its colour; a bad result says what to do about it."""
    verdict = find_verdict(RunFolder(run_dir))
    if verdict is None:
        return RichText("")
    text = RichText(f"{verdict.headline}. {' '.join(verdict.reasons)}", COLOURS[verdict.level])
    if verdict.level == "poor":
        text.append(" " + REMEDY)
    return text
