"""The report page: a list of sections, each one function of the run folder."""

import base64
import io
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from lit_prune.errors import InputError
from lit_prune.files import whole_file, write_text
from lit_prune.report import drawing
from lit_prune.report.drawing import Picture, render_png, styled
from lit_prune.report.run_folder import AbsentInput, RunFolder, stages_if_any
from lit_prune.report.sections import Section, question_of, register_section, sections
from lit_prune.report.tables import Entry, Table, Text, format_bytes, tabulate_result
from lit_prune.report.verdict import find_verdict

FIT = "lit-prune fit"
ANALYZE = "lit-prune analyze --run_dir {run}"
SWEEP = "lit-prune sweep --run_dir {run}"
REDUCE = "lit-prune reduce --run_dir {run} --request.calibration_sizes '[1000]'"
SAME = "with the -c of the run"
MAKERS = (
    (r"trace/gradients", FIT, "with the callback lit_prune.GradientTrace"),
    (r"trace/|traced epoch", FIT, "with the callback lit_prune.AxisTrace"),
    (r"tensorboard/", FIT, "with a logger"),
    (r"stages\.jsonl|compact/", FIT, "with the callback lit_prune.StagedPruning"),
    (r"stages\.jsonl|compact/", "lit-prune compress", "on a trained network"),
    (r"run\.json|config\.yaml", FIT, "and every verb that reads data"),
    (r"rand_index|local_group", ANALYZE + " --request.extras '[groupings]'", SAME),
    (r"graphs\.table|modularity", ANALYZE + " --request.extras '[groupings,graphs,hulls,triplets]'", SAME),
    (r"propagation\.table", ANALYZE + " --request.extras '[propagation]'", SAME),
    (r"channels\.parquet(?! with local)|layers\.parquet(?! with (rand|mod))", ANALYZE, SAME),
    (r"lesions?\b", "lit-prune lesion --run_dir {run}", SAME),
    (r"sensitivity", "lit-prune sensitivity --run_dir {run}", SAME),
    (r"curve", "lit-prune curve --run_dir {run}", SAME),
    (r"sweep(?!/(rules|weights))", SWEEP, SAME),
    (r"sweep/rules", SWEEP + " --request.allocations '[global,uniform]'", SAME),
    (r"sweep/weights", SWEEP + " --request.alphas '[0.5,1]' --request.betas '[0.25]'", SAME),
    (r"reduction\.json with the extra 'stress'", REDUCE + " --request.extras '[stress]'", SAME),
    (r"reduction\.json(?! with the extra)", REDUCE, SAME),
)
"""Pattern of an absent input, the command that makes it, and with what."""
LOGGER = logging.getLogger(__name__)
THEME = {
    "#ffffff": "page",
    drawing.HALO: "halo",
    drawing.INK: "ink",
    drawing.GREY: "soft",
    drawing.GRID: "line",
    drawing.PALE: "pale",
    drawing.BLUE: "blue",
    drawing.ORANGE: "orange",
    drawing.GREEN: "green",
    drawing.VERMILLION: "vermillion",
}
"""Colours of figures by the names that `page.css` gives them, one value for light and one for dark."""
LARGEST = 400_000
"""Characters of a figure above which the page holds it as PNG: clouds of thousands of dots."""


def commands_for(reason: str, run: RunFolder) -> tuple[tuple[str, str], ...]:
    """Commands, each with what has to be said besides, that make the input which `reason` names; none is known: ()."""
    found = [(command, said) for pattern, command, said in MAKERS if re.search(pattern, reason)]
    return tuple((command.format(run=run.path), said) for command, said in found)


@register_section("config", "Configuration", place=330)
def _show_config(run: RunFolder) -> Text:
    return Text(run.config, "config.yaml")


@register_section("protocol", "Protocol", place=320)
def tabulate_protocol(run: RunFolder) -> Table:
    """Returns `run.json` and every stage's protocol as rows of name and value; long lists are shortened."""
    rows = list(_flatten(run.protocol))
    for stage in stages_if_any(run):
        rows += _flatten(stage.get("protocol") or {}, f"stage {stage.get('name', '?')}: ")
    caption = "What has to be equal for another run to be comparable. The full lists are in run.json."
    cells = tuple((Entry(name), Entry(value)) for name, value in rows)
    return Table(("field", "value"), cells, caption, text_columns=2, folded=f"{len(cells)} fields")


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            rows += _flatten(item, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _shorten(item)))
    return rows


def _shorten(value: object, limit: int = 8) -> str:
    if isinstance(value, list | tuple) and len(value) > limit:
        return f"{', '.join(map(str, value[:limit]))}, … ({len(value)} values)"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


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
    above = {"name": run.name, "verdict": find_verdict(run), "headline": _headline(run)}
    write_text(page, _template().render(**above, sections=shown, absent=absent))
    return page


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


def render_svg(figure: Figure, name: str) -> str:
    """Returns the figure as an SVG file; text stays text, equal figures are equal files.

    Args:
        figure: what to draw.
        name: of the figure; ids begin with it, so that several figures can stand in one page.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = re.sub(r'\bid="', f'id="{name}-', buffer.getvalue())
    return re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)


def themed(svg: str) -> str:
    """Returns the element of an SVG file for a page: scaled to its place, in the colours that the page defines.

    >>> themed('<?xml?><svg width="9pt" height="4pt" viewBox="0 0 9 4"><path style="fill: #ffffff"/></svg>')
    '<svg viewBox="0 0 9 4"><path style="fill: var(--page)"/></svg>'
    """
    element = svg[svg.index("<svg") :].strip()
    element = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", element, flags=re.DOTALL)
    element = re.sub(r'^(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", element)
    element = re.sub(r'^(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", element)
    names = {colour.lower(): f"var(--{name})" for colour, name in THEME.items()}
    return re.sub(r"(?<=[:\s])#[0-9a-f]{6}\b", lambda found: names.get(found[0], found[0]), element)
