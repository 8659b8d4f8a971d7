"""The report in a real browser: narrow and wide, light and dark, with and without scripts."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from sphereify import plan_conversion
from sphereify.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
DARK = "--blink-settings=preferredColorScheme=0"

MEASURE = """
<script>
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
addEventListener("load", () => {
  const page = document.documentElement;
  for (const part of document.querySelectorAll("details")) part.open = true;
  const wide = [...document.querySelectorAll("body *")].filter(
    (one) => !one.closest(".scroll, .strip, svg") && one.getBoundingClientRect().right > innerWidth + 1);
  const found = {
    width: innerWidth, scroll: page.scrollWidth, height: page.scrollHeight, errors: errors,
    wide: wide.map((one) => one.outerHTML.slice(0, 80)), text: document.body.innerText,
    background: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    loaded: performance.getEntriesByType("resource").map((one) => one.name),
    filters: document.querySelectorAll("input[type=search]").length,
  };
  const holder = document.createElement("pre");
  holder.id = "measured";
  holder.textContent = JSON.stringify(found);
  document.body.append(holder);
});
</script>
"""


@pytest.fixture(scope="module", params=["test_vit", "names"])
def report(request, tmp_path_factory):
    """The report of a small network of timm's, and that of a network with long names."""
    if request.param == "names":
        plain: nn.Module = nn.Sequential()
        for key, layer in {"a" * 90: nn.Conv2d(3, 4, 3), "flat": nn.Flatten(), "<b>fc</b>": nn.Linear(144, 3)}.items():
            plain.add_module(key, layer)
    else:
        plain = timm.create_model(request.param)
    file = tmp_path_factory.mktemp("report") / "report.html"
    images = torch.randn(2, *getattr(plain, "pretrained_cfg", {}).get("input_size", (3, 8, 8)))
    plan = plan_conversion(plain, example_inputs=images)
    return write_report(plan, file, original=plain, inputs=images, name="n" * 70, options={"exclude": "x" * 200})


def shown(file: Path, folder: Path, width: int, *flags: str) -> dict:
    """What a frame of this width shows of the page, measured by a script of the test's own."""
    text = file.read_text(encoding="utf-8")
    (folder / "inner.html").write_text(text.replace("</head>", MEASURE + "</head>"), encoding="utf-8")
    # A window is never narrower than some 500 pixels; a frame is.
    frame = (
        f'<iframe src="inner.html" style="width:{width}px;height:900px;border:0"></iframe><script>onload = () => '
        f'setTimeout(() => document.body.append(frames[0].document.getElementById("measured").cloneNode(true)), 50)'
        f"</script>"
    )
    (folder / "frame.html").write_text(f"<!DOCTYPE html><body style='margin:0'>{frame}</body>", encoding="utf-8")
    dom = chromium(folder, "--allow-file-access-from-files", "--dump-dom", *flags, (folder / "frame.html").as_uri())
    (measured,) = re.findall(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    return json.loads(html.unescape(measured))


def chromium(folder: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    own = ["--disable-component-update", "--virtual-time-budget=5000", f"--user-data-dir={folder / 'profile'}"]
    command = [CHROMIUM, *quiet, *own]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_fits_its_window_and_runs_without_errors(report, tmp_path, width):
    found = shown(report, tmp_path, width, "--window-size=1500,1000")
    assert found["width"] == width
    assert found["scroll"] <= width, found["wide"]
    assert found["wide"] == []
    assert found["errors"] == []
    assert found["loaded"] == []
    assert found["filters"] == 1
    assert 900 < found["height"] < 40_000
    for text in ("Which layers resist", "Angles before and after", "Every layer", "n" * 70):
        assert text in found["text"]


@pytest.mark.parametrize("flags", [(), (DARK,)])
def test_text_has_contrast_in_light_and_dark(report, tmp_path, flags):
    found = shown(report, tmp_path, 800, *flags)

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    page, ink = luminance(found["background"]), luminance(found["ink"])
    assert (page < ink) == bool(flags)
    assert (max(page, ink) + 0.05) / (min(page, ink) + 0.05) > 7


@pytest.mark.parametrize("flags", [(), (DARK,)])
def test_a_screenshot_shows_more_than_one_colour(report, tmp_path, flags):
    picture = tmp_path / "shot.png"
    chromium(tmp_path, f"--screenshot={picture}", "--window-size=1400,1600", *flags, report.as_uri())
    image = Image.open(picture).convert("RGB")
    assert image.size == (1400, 1600)
    assert len(image.resize((200, 200)).getcolors(40_000)) > 30
