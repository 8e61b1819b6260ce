"""Picture the report page of a model for the documentation: ``python docs/scripts/report_pictures.py OUT``.

OUT is the folder of a model made with ``merge_method: omp``. Writes ``docs/assets/report-*.png``, one for each part of
the page that the documentation shows. Needs the ``docs`` extra, and chromium (``apt install chromium``) to look at the
page as a reader does.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from mergekit_omp.report.page import page
from mergekit_omp.report.record import read_record

ASSETS = Path(__file__).parents[1] / "assets"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT, SCALE = 980, 2400, 1.5
MARGIN = 24
SAMPLES = 6

PARTS = {
    "head": [],
    "matches": ["Where the rows come from"],
    "residuals": ["How well new tokens are approximated", "How often anchors are used"],
    "samples": ["Some new tokens"],
}
"""Name of a picture, and the headings of the sections in it; without any, what stands before the first heading."""


def main() -> None:
    """Picture each part of the page."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if len(sys.argv) != 2 or browser is None:
        sys.exit(f"{__doc__}\nNeeds the folder of a model, and one of {', '.join(BROWSERS)}.")
    out = Path(sys.argv[1])
    html = page(read_record(out), out.resolve().name)
    with tempfile.TemporaryDirectory() as folder:
        for name, headings in PARTS.items():
            source, target = Path(folder) / f"{name}.html", Path(folder) / f"{name}.png"
            source.write_text(part(html, headings), encoding="utf-8")
            take_picture(browser, source, target)
            trimmed(Image.open(target)).quantize(128).save(ASSETS / f"report-{name}.png", optimize=True)


def part(html: str, headings: list[str]) -> str:
    """Return the page with some of its sections alone; of a table of samples, the first rows."""
    head, body = html.split("<body>", 1)
    beginning, *sections = re.split(r"(?=<h2>)", body.split("</body>", 1)[0])
    chosen = [text for text in sections if text.startswith(tuple(f"<h2>{title}</h2>" for title in headings))]
    if len(chosen) != len(headings):
        raise ValueError(f"the page has not got all of the sections {headings}")
    text = "".join(chosen) if headings else beginning
    rows = re.split(r"(?=<tr>)", text)
    if len(rows) > SAMPLES + 2:
        text = "".join(rows[: SAMPLES + 1]) + "</table></div>"
    return f"{head}<body>{text}</body></html>"


def take_picture(browser: str, source: Path, target: Path) -> None:
    """Have a browser draw a page."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
    options += [f"--user-data-dir={target.parent / 'profile'}", f"--force-device-scale-factor={SCALE}"]
    options += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={target}"]
    subprocess.run([browser, *options, source.as_uri()], check=True, capture_output=True, timeout=120)


def trimmed(image: Image.Image) -> Image.Image:
    """Cut off what is white around a picture, but for a margin."""
    image = image.convert("RGB")
    left, top, right, bottom = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox() or (
        0,
        0,
        1,
        1,
    )
    return image.crop((max(0, left - MARGIN), max(0, top - MARGIN), right + MARGIN, bottom + MARGIN))


if __name__ == "__main__":
    main()
