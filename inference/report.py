"""One HTML page about an evaluation: no server, no link to outside, pictures inlined as JPEG.

    page = report_page(result, figures, worst, confused)      # str; result as in metrics.json

Tables sort by a click on a heading; colors follow the reader's light or dark setting.
"""
import base64
import io
import math
from html import escape
from pathlib import Path

from PIL import Image

from config import InputError
from dataio.image_rule import read_image

MISSING = "\u2013"  # in place of a score that does not exist
SCORES = {"miou": "mIoU", "mean_dice": "mean Dice", "pixel_accuracy": "pixel accuracy",
          "mean_class_accuracy": "mean class accuracy", "frequency_weighted_iou": "frequency weighted IoU",
          "boundary_f1": "boundary F1"}
COLUMNS = {"iou": "IoU", "dice": "Dice", "precision": "precision", "recall": "recall",
           "boundary_f1": "boundary F1", "pixels": "true pixels", "predicted": "predicted pixels",
           "images": "images"}

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 1400px;
       background: Canvas; color: CanvasText; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
.swatch { display: inline-block; width: .9em; height: .9em; margin-right: .5em;
          border: 1px solid var(--line); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .7rem; }
.facts div { background: var(--soft); padding: .6rem .8rem; border-radius: .4rem; }
.facts b { display: block; font-size: 1.4rem; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .4rem; }
figure { margin: 0 0 1.2rem; }
.row figure { margin: 0; }
img { width: 100%; height: auto; display: block; }
figcaption, .small { font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].dataset.value;
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // absent classes stay at the end
      const difference = column ? Number(x) - Number(y) : x.localeCompare(y);
      return down ? -difference : difference;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  }));
}
"""


def number(value):
    """Return a score for reading: four digits, a dash for NaN and None."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def figure(caption, picture, width):
    """Return a picture (H, W, 3) uint8 as HTML, with its caption; a JPEG at most `width` pixels wide."""
    image, buffer, text = Image.fromarray(picture), io.BytesIO(), escape(caption)
    image.thumbnail((width, image.height), Image.Resampling.LANCZOS, reducing_gap=None)
    image.save(buffer, "JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (f'<figure><img alt="{text}" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>")


def class_table(rows):
    """Return the sortable table of the classes as HTML; rows as per_class of metrics.json."""
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>'
                    for name in ("class", *COLUMNS.values()))
    lines = []
    for row in rows:
        color, name = "#{:02x}{:02x}{:02x}".format(*row["color"]), escape(row["name"])
        swatch = f'<span class="swatch" style="background:{color}"></span>'
        cells = [f'<td data-value="{name}">{swatch}{name}</td>']
        for key in COLUMNS:
            text = number(row[key])
            cells.append(f'<td data-value="{"" if text == MISSING else row[key]}">{text}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (f'<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead>'
            f'<tbody>{"".join(lines)}</tbody></table></div>')


def picture_rows(rows):
    """Return rows of pictures as HTML; rows = [(title, [(caption, picture (H, W, 3) uint8), ...]), ...]."""
    lines = []
    for title, panels in rows:
        pictures = "".join(figure(caption, picture, 360) for caption, picture in panels)
        lines.append(f'<h3 class="small">{escape(title)}</h3><div class="row">{pictures}</div>')
    return "".join(lines)


def report_page(result, figures, worst, confused):
    """Return the page.

    result: as in metrics.json. figures: [(caption, picture)]. worst, confused: rows as in picture_rows.
    """
    facts = [f"<div>{label}<b>{number(result[key])}</b></div>" for key, label in SCORES.items()]
    low, high = result["miou_interval"]
    protocol = "".join(f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>"
                       for key, value in result["protocol"].items())
    absent = escape(", ".join(result["absent"]))
    curves = "".join(figure(caption, picture, 1400) for caption, picture in figures)
    title = f"{result['protocol']['dataset']} {result['protocol']['split']}: mIoU {number(result['miou'])}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="facts">{"".join(facts)}</div>',
        f"<p>95 % interval of the mIoU over {escape(result['interval_over'])} (bootstrap): {number(low)} to "
        f"{number(high)}.</p>",
        f"<p>Absent from truth and prediction, left out of the means: {absent}.</p>" if absent else "",
        "<h2>Classes</h2>", class_table(result["per_class"]),
        "<h2>Curves and confusion</h2>",
        f'<div class="figures">{curves}</div>',
        f"<h2>The {len(worst)} worst images</h2>", picture_rows(worst),
        "<h2>Most confused classes</h2>", picture_rows(confused),
        "<h2>Protocol</h2>", f'<div class="scroll"><table>{protocol}</table></div>']
    icon = '<link rel="icon" href="data:,">'  # or a browser asks for one
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8">{icon}<meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
            f"<style>{STYLE}</style></head><body>{''.join(sections)}<script>{SCRIPT}</script></body></html>")


def existing_figures(folder, names):
    """Return [(caption, picture (H, W, 3) uint8)] of the pictures {file name: caption} that a folder holds;
    prints which of them are damaged.
    """
    figures = []
    for name, caption in names.items():
        path = Path(folder) / name
        if path.is_file():
            try:
                figures.append((caption, read_image(path).permute(1, 2, 0).numpy()))
            except InputError as error:
                print(f"{error}; the report goes without it")
    return figures
