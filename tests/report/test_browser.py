"""The page in a browser: sorting, the slider, hovering, and that it fits a small screen. Skipped without Chromium."""

import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")

ASK = """
<script>
addEventListener("load", () => requestAnimationFrame(() => {
  const box = document.querySelector(".epochs"), svg = box.querySelector("svg"), found = {};
  const sorted = () => [...document.querySelectorAll("#files tbody tr")].map((row) => parseFloat(row.cells[1].title));
  const size = document.querySelectorAll("#files th button")[1];
  size.click(); found.rising = sorted(); size.click(); found.falling = sorted();
  const select = box.querySelector("select"), slider = box.querySelector("input");
  select.selectedIndex = 3; select.dispatchEvent(new Event("change"));
  found.last = box.querySelector("output").textContent; found.dots = box.querySelectorAll("circle").length;
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  found.first = box.querySelector("output").textContent; found.dense = box.querySelectorAll("circle").length;
  const dot = box.querySelector("circle"), area = svg.getBoundingClientRect();
  const at = {clientX: area.left + Number(dot.getAttribute("cx")), clientY: area.top + Number(dot.getAttribute("cy"))};
  svg.dispatchEvent(new PointerEvent("pointermove", at));
  found.tip = box.querySelector(".tip").textContent; found.shown = !box.querySelector(".tip").hidden;
  document.querySelectorAll("details").forEach((part) => { part.open = true; });
  found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const answer = document.createElement("pre"); answer.id = "answer"; answer.textContent = JSON.stringify(found);
  document.body.append(answer);
}));
</script>
"""


@pytest.fixture(scope="module", params=[1280, 500])
def answer(request, page: str, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("browser")
    file = folder / "page.html"
    file.write_text(page.replace("</body>", ASK + "</body>"), encoding="utf-8")
    look = (
        "--headless=new",
        "--enable-logging=stderr",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
    )
    size = (f"--window-size={request.param},900", "--virtual-time-budget=5000", "--dump-dom", f"file://{file}")
    done = subprocess.run([CHROMIUM, *look, *size], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(re.search(r'<pre id="answer">(.*?)</pre>', done.stdout)[1])
    return found | {"console": re.findall(r"CONSOLE.*", done.stderr)}


def test_a_click_on_a_title_sorts_by_the_exact_values_and_another_turns_the_order_round(answer: dict):
    assert answer["rising"] == sorted(answer["rising"]) and answer["rising"] != answer["falling"]
    assert answer["falling"] == sorted(answer["falling"], reverse=True)


def test_the_slider_shows_the_channels_of_its_epoch(answer: dict):
    assert (answer["first"], answer["last"]) == ("at initialisation: 32 channels", "after 10 epochs: 32 channels")
    assert answer["dense"] == answer["dots"] == 32


def test_pointing_at_a_channel_names_it_with_its_numbers(answer: dict):
    assert answer["shown"]
    assert re.match(r"layer2\.0\.conv1, channel \d+\ninput capture [\d.]+ nats\ntask inf", answer["tip"])


def test_the_page_is_no_wider_than_its_window(answer: dict):
    assert answer["wide"] <= 0


def test_the_browser_has_nothing_to_complain_of(answer: dict):
    assert answer["console"] == []
