"""The page at the width of a phone, in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_curr.report import write_report
from tests.report.synthetic import many_sources, write_run

PHONE, LAPTOP = 390, 1280  # pixels
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
MEASURE = """<script>addEventListener('load', () => {
  const drawn = svg => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const size = element => parseFloat(getComputedStyle(element).fontSize);
  const labels = [...document.querySelectorAll('svg text')];
  const slides = '.scroll, figure, .tables, pre';
  const wide = [...document.querySelectorAll('body *')].filter(element =>
    !element.parentElement.closest(slides) &&
    element.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  parent.document.body.dataset.found = JSON.stringify({
    width: document.documentElement.clientWidth, needs: document.documentElement.scrollWidth,
    label: Math.min(...labels.map(label => size(label) * drawn(label.ownerSVGElement))),
    wide: wide.map(element => element.outerHTML.slice(0, 80))});
})</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [PHONE, LAPTOP])
def test_nothing_overflows_and_every_label_can_be_read(tmp_path: Path, width: int) -> None:
    page = write_report(write_run(tmp_path / "run", recipe=many_sources(30), until_tokens=250_000))
    page.write_text(page.read_text().replace("</body>", MEASURE))
    frame = tmp_path / "frame.html"  # a window of its own is never narrower than 500 pixels
    frame.write_text(
        f'<body><iframe src="{page.as_uri()}" style="border: 0; width: {width}px; height: 900px">'
    )
    done = subprocess.run(
        [
            str(BROWSER),
            *("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"),
            *("--virtual-time-budget=5000", "--dump-dom", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
    )
    match = re.search(r'data-found="([^"]*)"', done.stdout)
    assert match, done.stderr
    found = json.loads(html.unescape(match[1]))
    assert abs(found["width"] - width) <= 20  # a scroll bar
    assert found["needs"] <= found["width"]
    assert found["wide"] == []
    assert found["label"] >= 9
