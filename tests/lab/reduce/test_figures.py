import json
import shutil

from lit_prune.lab.reduce.figures import draw_reduction
from lit_prune.report.run_folder import RunFolder


def panels(run: RunFolder) -> list[tuple[str, list[float]]]:
    """Label of the horizontal axis and the places of the first line, panel by panel."""
    return [(axes.get_xlabel(), axes.lines[0].get_xdata().tolist()) for axes in draw_reduction(run).figure.axes]


def test_several_calibration_sizes_get_panels_of_their_own(full_run, tmp_path):
    shutil.copytree(full_run, tmp_path / "run")
    file = tmp_path / "run" / "reduction.json"
    content = json.loads(file.read_text())
    by_width = ("share of units kept", [0.25, 0.5, 0.75])
    assert panels(RunFolder(tmp_path / "run")) == 3 * [by_width]
    request = content["requests"][0]
    request["summary"] += [{**row, "calibration_size": 400} for row in request["summary"]]
    file.write_text(json.dumps(content))
    by_size = ("calibration images, 25% kept", [100, 400])
    assert panels(RunFolder(tmp_path / "run")) == 3 * [by_width] + 3 * [by_size]
    request["summary"] = [row for row in request["summary"] if row["width"] == 16]
    file.write_text(json.dumps(content))
    assert panels(RunFolder(tmp_path / "run")) == 3 * [by_size]
