"""What each stage chose between: information of blocks, scores of the units that went and that stayed, protection."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lit_prune.report.run_folder import AbsentInput, RunFolder
from lit_prune.report.sections import register_section
from lit_prune.report.tables import ABSENT, Entry, Table

SHOWN = 30  # rows that stand open on the page


@register_section("choices", "What went and what stayed", place=35)
def tabulate_choices(run: RunFolder) -> Table:
    """A row for each block and each group of channels that a stage decided on, with the numbers it was decided by.

    Raises:
        AbsentInput: no stage recorded any.
    """
    rows = tuple(row for stage in run.stages for row in _rows(stage))
    if not rows:
        raise AbsentInput("stages.jsonl with scores")
    caption = (
        "By what the choice was made: of a block the information about the label in its output, nats; of channels the "
        "score, median and in small type least to greatest, as groups were compared. What is protected stays whole, "
        "for the reason given."
    )
    columns = ("stage", "group", "why", "outcome", "went with", "stayed with")
    return Table(columns, rows, caption, text_columns=3, folded=f"{len(rows)} choices" if len(rows) > SHOWN else "")


def _rows(stage: Mapping[str, Any]) -> Iterator[tuple[Entry, ...]]:
    plan, name = stage.get("plan") or {}, Entry(str(stage.get("name", "?")))
    notes, dropped = plan.get("notes") or {}, plan.get("drop_blocks") or ()
    information, protected = notes.get("information") or {}, notes.get("protected") or {}
    for block, nats in information.items():
        value, gone = Entry(f"{nats:.3g} nats", "", repr(nats)), block in dropped
        cells = (value, Entry(ABSENT)) if gone else (Entry(ABSENT), value)
        why = protected.get(block) or "label information"
        yield name, Entry(block), Entry(why), Entry("dropped" if gone else "kept"), *cells
    for group, scores in (notes.get("scores") or {}).items():
        size, kept = plan["sizes"][group], len(plan["keep_channels"][group])
        ranges = [_range(scores.get(part)) for part in ("removed", "kept")]
        yield name, Entry(group), Entry(str(notes.get("method", ABSENT))), Entry(f"{size} → {kept}"), *ranges
    for group, reason in protected.items():
        if group not in information:
            yield name, Entry(group), Entry(str(reason)), Entry("kept"), Entry(ABSENT), Entry(ABSENT)


def _range(values: Sequence[float] | None) -> Entry:
    """The median, with least and greatest in small type."""
    if not values:
        return Entry(ABSENT)
    least, median, greatest = values
    return Entry(f"{median:.3g}", f"{least:.3g} to {greatest:.3g}", repr(median))
