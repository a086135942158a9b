"""The page: its sections, what it says about absent and damaged inputs, and the numbers behind the figures."""

import logging
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from lit_prune.errors import InputError
from lit_prune.lab import sections as lab_sections  # noqa: F401  (they register)
from lit_prune.report import axes_figures, drawing, write_report
from lit_prune.report.axes_figures import AXES, couple_axes, draw_plane
from lit_prune.report.drawing import spread_apart
from lit_prune.report.figures import collect_widths, draw_path, draw_training
from lit_prune.report.run_folder import CHANNEL_COLUMNS, RunFolder, layer_order
from lit_prune.report.sections import sections as registered

ANALYSED = ("matrix", "collapse", "depth", "groupings", "redundancy", "higher_order", "propagation")
SENSITIVE = ("sensitivity",)
LESIONED = ("damage", "ranking", "recovery", "replacement", "matched", "selection")
REDUCED = ("reduction", "certificate", "rescaling", "reduction_table")
SWEPT = ("sweep", "sweep_areas", "sweep_gaps", "sweep_rules", "sweep_weights")
TRACED = ("dynamics", "gradients")
TABLES = ("ranking", "replacement", "matched", "reduction_table", "sweep_areas", "sweep_rules")
PICTURES = ("path", "curve", "widths", "training", "plane", "coupling", *TRACED, *ANALYSED, *SENSITIVE)
PICTURES += tuple(name for name in (*LESIONED, *REDUCED, *SWEPT) if name not in TABLES)


class Page(HTMLParser):
    """Section ids, what is loaded, where links lead, and the exact values of the result table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sections, self.targets, self.links, self.exact, self.open = [], [], [], {}, []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        if tag == "a":
            self.links.append(given["href"])
        else:
            loads = ("src", "href", "xlink:href", "data", "action", "srcset")
            self.targets += [value for name, value in attributes if name in loads]
        if tag == "section":
            self.sections.append(given["id"])
        if tag == "td" and "title" in given:
            self.exact.setdefault(self.sections[-1], []).append(given["title"])
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:  # of SVG: <path .../>
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "img"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_full_run_shows_every_section_in_order_and_misses_none(page: str):
    parsed = Page(page)
    assert parsed.sections == [section.key for section in registered()]
    assert parsed.open == []


def test_figures_stand_in_the_page_and_also_in_files_that_it_links(page: str, full_run: Path):
    drawn = re.findall(r'<section id="(\w+)">\s*<h2>[^<]*</h2>\s*<figure><div class="scroll"><svg', page)
    assert drawn == list(PICTURES)
    for name in PICTURES:
        assert ElementTree.parse(full_run / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
        assert (full_run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_would_weigh_too_much_is_a_picture(full_run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("lit_prune.report.page.LARGEST", 10)
    shutil.copy(full_run / "stages.jsonl", tmp_path)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert '<img alt="Layer widths" src="data:image/png;base64,' in html and 'href="figures/widths.png"' in html
    assert (tmp_path / "figures" / "widths.png").read_bytes().startswith(b"\x89PNG")


def test_ids_of_the_page_are_unique_and_what_refers_to_one_finds_it(page: str):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_page_loads_nothing_from_elsewhere_and_links_lead_to_files_of_the_run(page: str, full_run: Path):
    parsed = Page(page)
    assert parsed.targets and all(target.startswith(("data:", "#")) for target in parsed.targets)
    assert not re.search(r"@import|url\((?!#)|<script[^>]+src", page)
    files = [link for link in parsed.links if not link.startswith("#")]
    assert "compact/report.json" in files and "trace/epoch=000.parquet" in files
    assert all((full_run / link).is_file() for link in files)


def test_figures_take_the_colours_of_the_page(page: str):
    named = set(re.findall(r"var\(--(\w+)\)", page))
    light, dark = (set(re.findall(r"--(\w+): ", rule)) for rule in re.findall(r":root \{(.*?)\}", page, re.DOTALL))
    assert named == light == dark
    assert not any(colour.lower() in page.split("</style>")[1] for colour in (drawing.INK, drawing.GREY, drawing.BLUE))


def test_the_slider_has_every_live_channel_of_every_traced_epoch(made_up, full_run: Path):
    frames = draw_plane(RunFolder(full_run)).frames
    assert [layer["name"] for layer in frames["layers"]] == list(made_up.WIDTHS)
    assert frames["titles"][0] == "at initialisation" and len(frames["titles"]) == made_up.EPOCHS + 1
    for layer in frames["layers"]:
        for epoch, frame in enumerate(layer["frames"]):
            table = made_up.channel_table(epoch)
            rows = table[table["layer"] == layer["name"]]
            assert (frame is None) == rows.empty
            if frame is not None:
                assert frame["width"] == len(rows) and frame["channel"] == list(rows.dropna()["channel"])
                np.testing.assert_allclose(frame["x"], rows.dropna()["input_capture"], rtol=0.006)


def test_the_slider_leaves_out_epochs_and_then_layers_before_the_page_grows_heavy(monkeypatch):
    monkeypatch.setattr(axes_figures, "MOST_CHANNELS", 60)
    names = ["a", "b", "c"]
    rows = [(name, epoch, channel) for name in names for epoch in range(20) for channel in range(4)]
    live = pd.DataFrame(rows, columns=["layer", "epoch", "channel"]).assign(width=4, **dict.fromkeys(AXES, 1.0))
    frames = axes_figures.epoch_frames(live, {i: str(i) for i in range(20)}, names, ["b"], 1.0)
    assert frames["titles"][0] == "0" and frames["titles"][-1] == "19" and len(frames["titles"]) == 5
    assert [layer["name"] for layer in frames["layers"]] == names
    monkeypatch.setattr(axes_figures, "MOST_CHANNELS", 20)
    frames = axes_figures.epoch_frames(live, {i: str(i) for i in range(20)}, names, ["b"], 1.0)
    assert [layer["name"] for layer in frames["layers"]] == ["b"]


def test_result_table_carries_the_exact_values(made_up, page: str):
    result = made_up.result_record()
    values = [float(text) for text in Page(page).exact["result"]]
    keys = ("accuracy", "macs", "params", "latency_ms", "throughput", "bytes")
    entries = [result["dense"], *result["stages"], result["compact"]]
    assert values == [entry[key] for entry in entries for key in keys]


def test_page_is_the_same_when_made_again(page: str, full_run: Path, monkeypatch):
    """The page holds the vector figures; their PNG files, as long in the making, are taken as they are."""
    written = iter([(full_run / "figures" / f"{name}.png").read_bytes() for name in PICTURES])
    monkeypatch.setattr("lit_prune.report.page.render_png", lambda figure: next(written))
    assert write_report(full_run).read_text(encoding="utf-8") == page


@pytest.mark.usefixtures("without_drawing")
@pytest.mark.parametrize(
    "removed, sections",
    [
        ("compact", {"Result"}),
        ("stages.jsonl", {"Structural stages", "Cost and accuracy", "Layer widths", "What went and what stayed"}),
        ("trace", {"Coupling of the axes", "Motion on the two axes", "Directions of change"}),
        ("layers.parquet", {"Coupling by depth", "Groups on the two axes", "Graphs, hulls and triplets by depth"}),
        ("analysis", {"Pairwise redundancy", "From layer to layer"}),
        ("tensorboard", {"Training"}),
        ("run.json", {"Protocol"}),
    ],
)
def test_absent_input_is_named_at_the_end(full_run: Path, tmp_path: Path, removed: str, sections: set[str]):
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    (shutil.rmtree if (run / removed).is_dir() else Path.unlink)(run / removed)
    html = write_report(run).read_text(encoding="utf-8")
    end = html[html.index("Not in this run") :]
    assert set(re.findall(r"<li>([^:]+): ", end)) == sections
    assert removed in end
    assert Page(html).sections == [s.key for s in registered() if s.title not in sections] + ["absent"]


@pytest.mark.usefixtures("without_drawing")
def test_damaged_inputs_are_named_with_the_reason_and_the_rest_is_shown(full_run: Path, tmp_path: Path, caplog):
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    (run / "stages.jsonl").write_text((run / "stages.jsonl").read_text()[:-40])
    (run / "trace" / "epoch=003.parquet").write_bytes(b"PAR1")
    (run / "compact" / "report.json").write_text('{"dense": {}}')
    with caplog.at_level(logging.WARNING):
        html = write_report(run).read_text(encoding="utf-8")
    end = html[html.index("Not in this run") :]
    assert "stages.jsonl line 2 is not JSON" in end and "epoch=003.parquet cannot be read" in end
    assert "no object compact" in end
    shown = [
        "curve",
        "training",
        *TRACED,
        *ANALYSED,
        *SENSITIVE,
        *LESIONED,
        *REDUCED,
        *SWEPT,
        "protocol",
        "config",
        "files",
        "absent",
    ]
    assert Page(html).sections == shown
    assert len(caplog.records) == 7


@pytest.mark.usefixtures("without_drawing")
def test_names_from_the_run_are_escaped(full_run: Path, tmp_path: Path):
    run = tmp_path / "a<b>&c"
    shutil.copytree(full_run, run)
    html = write_report(run).read_text(encoding="utf-8")
    assert "a<b>" not in html and "<h1>a&lt;b&gt;&amp;c</h1>" in html


def test_folder_that_holds_no_run_is_an_input_error_and_stays_empty(tmp_path: Path):
    with pytest.raises(InputError, match="is not a folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(InputError, match="holds no run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_training_lines_stand_at_the_stages_and_curves_end_at_the_last_epoch(made_up, full_run: Path):
    for axes in draw_training(RunFolder(full_run)).figure.axes:
        curves = [line for line in axes.lines if len(line.get_xdata()) == made_up.EPOCHS]
        assert len(curves) == 2
        for line in curves:
            np.testing.assert_allclose(line.get_xdata(), np.arange(1, made_up.EPOCHS + 1))
        stages = [line.get_xdata()[0] for line in axes.lines if line not in curves]
        assert stages == list(made_up.STAGE_EPOCHS)


def test_path_visits_every_measured_point(made_up, full_run: Path):
    axes = draw_path(RunFolder(full_run)).figure.axes[0]
    drawn = {(line.get_xdata()[0], round(line.get_ydata()[0], 6)) for line in axes.lines if len(line.get_xdata()) == 1}
    expected = set()
    for stage in made_up.stage_records():
        for key in ("before", "after_surgery", "after_recalibration", "after_repair"):
            macs = stage["macs"]["before" if key == "before" else "after"]
            expected.add((macs, round(100 * stage["accuracy"][key], 6)))
    assert drawn == expected


def test_widths_go_from_the_first_stage_to_the_last_and_zero_marks_a_dropped_layer(made_up):
    widths = collect_widths(made_up.stage_records())
    assert widths == {
        name: (w, 0 if name in made_up.GONE else made_up.CUT.get(name, w)) for name, w in made_up.WIDTHS.items()
    }


def test_layer_cut_twice_has_its_first_width_before_and_its_last_width_after():
    stages = [{"widths": {"a": {"before": 16, "after": 12}}}, {}, {"widths": {"a": {"before": 12, "after": 5}}}]
    assert collect_widths(stages) == {"a": (16, 5)}


def test_plane_shares_axes_within_a_layer_and_leaves_out_dead_channels(made_up, full_run: Path):
    figure = draw_plane(RunFolder(full_run)).figure
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert len(panels) == 6
    for left, right in zip(panels[::2], panels[1::2], strict=True):
        assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
        for axes, epoch in ((left, 0), (right, made_up.EPOCHS)):
            table = made_up.channel_table(epoch)
            layer = axes.get_title(loc="left").split(",")[0]
            live = table[table["layer"] == layer].dropna()
            shown = axes.collections[0].get_offsets()
            np.testing.assert_allclose(shown, live[["input_capture", "task_information"]])


def test_plane_of_a_single_checkpoint_needs_no_trace(made_up, tmp_path: Path):
    made_up.channel_table(made_up.EPOCHS).drop(columns="epoch").to_parquet(tmp_path / "channels.parquet")
    titles = [axes.get_title(loc="left") for axes in draw_plane(RunFolder(tmp_path)).figure.axes]
    assert sum("analysed checkpoint" in title for title in titles) == 3


def test_coupling_is_spearmans_rho_over_live_channels(made_up):
    trace = pd.concat([made_up.channel_table(epoch) for epoch in (0, made_up.EPOCHS)])
    coupling = couple_axes(trace)
    assert list(coupling.index) == list(made_up.WIDTHS) and list(coupling.columns) == [0, made_up.EPOCHS]
    for (epoch, layer), group in trace.groupby(["epoch", "layer"]):
        expected = spearmanr(group["input_capture"], group["task_information"], nan_policy="omit").statistic
        assert coupling.loc[layer, epoch] == pytest.approx(expected, abs=1e-12)
    assert coupling.loc[list(made_up.GONE), made_up.EPOCHS].isna().all()


def test_layers_keep_the_order_of_their_first_depth_after_a_block_is_dropped():
    rows = [("a", 0, 0), ("b", 1, 0), ("c", 2, 0), ("a", 0, 5), ("c", 1, 5)]
    trace = pd.DataFrame(rows, columns=["layer", "depth", "epoch"])
    assert layer_order(trace.sample(frac=1, random_state=0)) == ["a", "b", "c"]


def test_trace_without_a_contract_column_is_an_input_error_that_names_it(made_up, tmp_path: Path):
    (tmp_path / "trace").mkdir()
    made_up.channel_table(0).drop(columns="peer_overlap").to_parquet(tmp_path / "trace" / "epoch=000.parquet")
    assert "peer_overlap" in CHANNEL_COLUMNS
    with pytest.raises(InputError, match="epoch=000.parquet has no column peer_overlap"):
        _ = RunFolder(tmp_path).trace


def test_labels_are_spread_to_the_gap_in_order_around_their_mean():
    positions = [3.0, 1.0, 1.1, 9.0]
    moved = spread_apart(positions, gap=1.0)
    assert np.diff(np.sort(moved)).min() >= 1.0 - 1e-12
    assert np.array_equal(np.argsort(moved), np.argsort(positions))
    assert moved.mean() == pytest.approx(np.mean(positions))
    np.testing.assert_allclose(spread_apart([1.0, 5.0], gap=1.0), [1.0, 5.0])


def test_sections_stand_under_the_question_that_they_answer(page: str):
    questions = re.findall(r'<p class="question">([^<]+)</p>', page)
    assert questions == [
        "Is it good?",
        "How it was trained, and what its channels are for",
        "What the lab found",
        "Can it be trusted?",
    ]
    assert page.index(questions[0]) < page.index('<section id="result"') < page.index(questions[1])


@pytest.mark.usefixtures("without_drawing")
def test_what_is_not_there_names_the_command_that_makes_it(full_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    (run / "sensitivity.parquet").unlink()
    (run / "lesions.parquet").unlink()
    html = write_report(run).read_text(encoding="utf-8")
    assert f"<code>lit-prune sensitivity --run_dir {run}</code> with the -c of the run makes it" in html
    assert f"<code>lit-prune lesion --run_dir {run}</code>" in html


@pytest.mark.usefixtures("without_drawing")
def test_every_absent_section_of_a_bare_run_names_a_command(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("seed_everything: 1\n")
    html = write_report(tmp_path).read_text(encoding="utf-8")
    absent = re.findall(r"<li>(.*?)</li>", html[html.index("Not in this run") :])
    assert len(absent) == len(registered()) - 2  # but the configuration and the list of files
    assert [entry for entry in absent if "<code>lit-prune " not in entry] == []
