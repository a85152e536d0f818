"""The report page in a browser, where Chromium is installed: at the width of a telephone and of a desk."""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_bench_report import all_kinds

from bench import plots, report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell"))), None
)

# Every table is opened, since one that is too wide would show only then. Chromium's own window is never narrower than 500 pixels:
# the page stands in a frame, and tells the page around it what is seen.
LOOK = """<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(details => details.open = true)
  const sizes = Array.from(document.querySelectorAll("p, td, pre, li"), e => parseFloat(getComputedStyle(e).fontSize))
  parent.postMessage(JSON.stringify({
    pictures: Array.from(document.images, image => image.complete ? image.naturalWidth : 0),
    inner: innerWidth, scrolled: document.documentElement.scrollWidth, smallest: Math.min(...sizes),
  }), "*")
})
</script>"""
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin: 0">
<script>addEventListener("message", event => document.body.dataset.seen = event.data)</script>
<iframe src="looked_at.html" style="border: 0; width: WIDTHpx; height: 4000px"></iframe>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    (out / "rows.jsonl").write_text("\n".join(map(json.dumps, all_kinds())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plots.SETTINGS, "savefig.dpi", 40)
        report.write(out)
    return out / "report.html"


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_is_readable_in_a_browser(page, width):
    page.with_name("looked_at.html").write_text(page.read_text() + LOOK)
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    # Tests may run as root, under which Chromium's sandbox does not start.
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent}", "--enable-logging=stderr",
               f"--window-size={max(500, width)},900", "--virtual-time-budget=10000", "--dump-dom"]  # fmt: skip
    run = subprocess.run([CHROMIUM, *options, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert not [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', run.stdout)[1]))
    assert len(seen["pictures"]) == page.read_text().count("<img") >= 12
    assert min(seen["pictures"]) > 100
    assert seen["inner"] == width
    assert seen["scrolled"] <= width
    assert seen["smallest"] >= 11
