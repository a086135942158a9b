"""The report page: a list of sections, each one function of the run folder."""

import base64
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from lit_prune.errors import InputError
from lit_prune.files import whole_file, write_text
from lit_prune.report.drawing import Picture, render_png, styled
from lit_prune.report.makers import commands_for
from lit_prune.report.run_folder import AbsentInput, RunFolder
from lit_prune.report.sections import Section, question_of, register_section, sections
from lit_prune.report.tables import Entry, Table, Text, format_bytes, tabulate_result
from lit_prune.report.vector import LARGEST, render_svg, themed
from lit_prune.report.verdict import find_verdict

LOGGER = logging.getLogger(__name__)


@register_section("config", "Configuration", place=330)
def _show_config(run: RunFolder) -> Text:
    return Text(run.config, "config.yaml")


@register_section("files", "Files", place=340)
def list_files(run: RunFolder) -> Table:
    """Returns the files of the run folder with their sizes."""
    files = run.files
    rows = tuple(
        (Entry(name, link=quote(name, safe="/=")), Entry(format_bytes(size), exact=f"{size} bytes"))
        for name, size in files
    )
    total = format_bytes(sum(size for _, size in files))
    return Table(("file", "size"), rows, "Paths relative to the run folder.", folded=f"{len(rows)} files, {total}")


@dataclass(frozen=True)
class Rendered:
    """A section as the template takes it: exactly one of picture, table, text is set.

    Attributes:
        key: anchor.
        title: heading.
        question: what it answers, one of `sections.GROUPS`.
        caption: text below a picture or table.
        picture: markup of a figure.
        file: path of the figure's own file in the run folder.
        frames: see `Picture`.
        table: rows.
        text: preformatted.
    """

    key: str
    title: str
    question: str
    caption: str = ""
    picture: Markup = Markup("")  # noqa: RUF009  (Markup is a str)
    file: str = ""
    frames: Mapping[str, Any] | None = None
    table: Table | None = None
    text: Text | None = None


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html`, `figures/*.png` and `figures/*.svg` of a run folder and returns the page's path.

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
    absent: list[tuple[str, str, tuple[tuple[str, str], ...]]] = []
    with styled():
        for section in sections():
            try:
                shown.append(_render(section, run))
            except AbsentInput as reason:
                absent.append((section.title, f"needs {reason}", commands_for(str(reason), run)))
            except Exception as error:  # one damaged input must not take the rest of the page with it
                LOGGER.warning("report section %r left out: %s", section.title, error, exc_info=_is_defect(error))
                absent.append((section.title, f"could not be made: {_describe(error)}", ()))
    page = run.path / "report.html"
    write_text(page, _template().render(**_first_screen(run), sections=shown, absent=absent))
    return page


def _first_screen(run: RunFolder) -> dict[str, Any]:
    """What stands above the sections."""
    return {"name": run.name, "verdict": find_verdict(run), "headline": _headline(run)}


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
    picture, file = _draw(part, section, run)
    return Rendered(*named, part.caption, picture=picture, file=file, frames=part.frames)


def _draw(part: Picture, section: Section, run: RunFolder) -> tuple[Markup, str]:
    """Markup of a figure and the file to link: SVG, or PNG where that would weigh too much; PNG is always written."""
    svg, png = render_svg(part.figure, section.key), render_png(part.figure)
    large = len(svg) > LARGEST
    for content, ending in ((png, "png"),) if large else ((png, "png"), (svg.encode(), "svg")):
        with whole_file(run.path / f"figures/{section.key}.{ending}") as partial:
            partial.write_bytes(content)
    if not large:
        markup = Markup(themed(svg))  # drawn here; names from the run are escaped by matplotlib
        return markup, f"figures/{section.key}.svg"
    data = base64.b64encode(png).decode("ascii")
    picture = Markup('<img alt="{}" src="data:image/png;base64,{}">').format(section.title, data)
    return picture, f"figures/{section.key}.png"


def _headline(run: RunFolder) -> tuple[tuple[str, str, str, str], ...]:
    """Returns quantity, dense value, compact value and change of what the run was for; empty without a result."""
    try:
        table = tabulate_result(run)
    except (AbsentInput, InputError):
        return ()
    dense, compact = table.rows[0], table.rows[-1]
    columns = zip(table.columns[1:], dense[1:], compact[1:], strict=True)
    return tuple((title, old.text, new.text, new.note) for title, old, new in columns if new.note)[:4]


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    for name, file in (("style", "page.css"), ("script", "page.js")):
        environment.globals[name] = Markup(_source(file))
    return environment.from_string(_source("page.html.jinja"))


def _source(name: str) -> str:
    return resources.files("lit_prune.report").joinpath(name).read_text(encoding="utf-8")
