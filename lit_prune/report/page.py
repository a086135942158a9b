"""The report page: a list of sections, each one function of the run folder."""

import base64
import logging
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from lit_prune.errors import InputError
from lit_prune.files import whole_file, write_text
from lit_prune.report import axes_figures, dynamics_figures, figures, tables  # noqa: F401  (they register sections)
from lit_prune.report.drawing import render_png, styled
from lit_prune.report.run_folder import AbsentInput, RunFolder
from lit_prune.report.sections import Section, question_of, register_section, sections
from lit_prune.report.tables import Cell, Table, Text, format_bytes
from lit_prune.report.verdict import find_verdict

LOGGER = logging.getLogger(__name__)


@register_section("config", "Configuration", place=330)
def _show_config(run: RunFolder) -> Text:
    return Text(run.config, "config.yaml")


@register_section("files", "Files", place=340)
def list_files(run: RunFolder) -> Table:
    """Returns the files of the run folder with their sizes."""
    files = run.files
    rows = tuple((Cell(name), Cell(format_bytes(size), exact=f"{size} bytes")) for name, size in files)
    total = format_bytes(sum(size for _, size in files))
    return Table(("file", "size"), rows, "Paths relative to the run folder.", folded=f"{len(rows)} files, {total}")


@dataclass(frozen=True)
class Rendered:
    """A section as the template takes it: exactly one of picture (data URI), table, text is set."""

    key: str
    title: str
    question: str
    caption: str = ""
    picture: str = ""
    table: Table | None = None
    text: Text | None = None


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` and `figures/*.png` of a run folder and returns the page's path.

    The page holds its figures and loads nothing from elsewhere. Sections whose inputs the run does not have are left
    out and named at the end of the page; inputs that are there and cannot be used are named with the reason, and logged
    as warnings.

    Args:
        run_dir: a run folder, complete or not.

    Returns:
        `run_dir/report.html`.

    Raises:
        InputError: `run_dir` is not a folder or holds no run.
    """
    run = RunFolder(run_dir)
    shown: list[Rendered] = []
    absent: list[tuple[str, str]] = []
    with styled():
        for section in sections():
            try:
                shown.append(_render(section, run))
            except AbsentInput as reason:
                absent.append((section.title, f"needs {reason}{_command(str(reason), run)}"))
            except Exception as error:  # one damaged input must not take the rest of the page with it
                LOGGER.warning("report section %r left out: %s", section.title, error, exc_info=_is_defect(error))
                absent.append((section.title, f"could not be made: {_describe(error)}"))
    page = run.path / "report.html"
    write_text(page, _template().render(**_first_screen(run), sections=shown, absent=absent))
    return page


def _first_screen(run: RunFolder) -> dict[str, Any]:
    """What stands above the sections."""
    return {"name": run.name, "verdict": find_verdict(run), "headline": _headline(run)}


MAKERS = {
    "trace/": "fit with the callback AxisTrace",
    "tensorboard/": "fit with a logger",
    "stages.jsonl": "fit with the callback StagedPruning",
    "compact/": "fit with the callback StagedPruning",
    "channels.parquet": "lit-prune analyze",
    "layers.parquet": "lit-prune analyze",
    "analysis/": "lit-prune analyze",
    "lesions": "lit-prune lesion",
    "sensitivity": "lit-prune sensitivity",
    "sweep": "lit-prune sweep",
    "reduction": "lit-prune reduce",
    "latency": "lit-prune latency",
}
"""What would make an input, by how its name begins."""


def _command(reason: str, run: RunFolder) -> str:
    """What would make the input that a section needs."""
    maker = next((command for start, command in MAKERS.items() if reason.startswith(start)), None)
    where = f" --run_dir {run.path}" if maker and maker.startswith("lit-prune") else ""
    return f"; `{maker}{where}` makes it" if maker else ""


def _is_defect(error: Exception) -> bool:
    return not isinstance(error, InputError)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if _is_defect(error) else str(error)


def _render(section: Section, run: RunFolder) -> Rendered:
    named = (section.key, section.title, question_of(section.place))
    part = section.build(run)
    if isinstance(part, Table):
        return Rendered(*named, part.caption, table=part)
    if isinstance(part, Text):
        return Rendered(*named, text=part)
    png = render_png(part.figure)
    with whole_file(run.path / "figures" / f"{section.key}.png") as partial:
        partial.write_bytes(png)
    return Rendered(*named, part.caption, picture=base64.b64encode(png).decode("ascii"))


def _headline(run: RunFolder) -> tuple[tuple[str, str, str, str], ...]:
    """Returns quantity, dense value, compact value and change of what the run was for; empty without a result."""
    try:
        table = tables.tabulate_result(run)
    except (AbsentInput, InputError):
        return ()
    dense, compact = table.rows[0], table.rows[-1]
    columns = zip(table.columns[1:], dense[1:], compact[1:], strict=True)
    return tuple((title, old.text, new.text, new.note) for title, old, new in columns if new.note)[:4]


def _template() -> jinja2.Template:
    source = resources.files("lit_prune.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source)
