"""Mistakes as one HTML page with thumbnails, which needs no other file and runs no script."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO

from ..image.load import load_image
from .items import Items
from .metrics import METRICS
from .results import Result, Scored
from .table import result_cells, result_lines

THUMBNAIL = 240  # pixels, the longer side
MOST = 300  # mistakes on a page
LONGEST = 2000  # characters of a prompt or answer
STYLE = """
:root { color-scheme: light dark; --line: #d0d4da; --soft: #5b6470; --card: #ffffff;
  --ground: #f5f6f8; --text: #1b1f24; --bad: #b3261e; --good: #14692f; }
@media (prefers-color-scheme: dark) { :root { --line: #3a4048; --soft: #a3adb8; --card: #1d2127;
  --ground: #14171b; --text: #e7eaee; --bad: #ff8a80; --good: #7ddc95; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--ground);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; background: var(--card); }
th, td { border: 1px solid var(--line); padding: .35rem .7rem; text-align: left;
  white-space: nowrap; }
main { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem; overflow-wrap: anywhere; }
article img { max-width: 100%; border-radius: 4px; margin: 0 .4rem .4rem 0; }
dl { margin: .4rem 0 0; } dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0 0 .4rem; white-space: pre-wrap; } .answer { color: var(--bad); }
.reference { color: var(--good); } p, .note { color: var(--soft); }
"""
# Nothing is loaded from anywhere and nothing runs, whatever an answer has in it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def mistakes_page(result: Result, items: Items) -> str:
    """The page: the figures, then each mistake with its images, question, answer and references.

    Args:
        result: of one model.
        items: with the images.
    """
    mistakes = result.mistakes()
    shown = mistakes[:MOST]
    pictures = thumbnails(items, {each.record.id for each in shown})
    count, heading = f"{len(mistakes)} of {len(result.scored)} answers", "Mistakes"
    if not METRICS[result.metric].percent:
        heading = "Lowest scores"
        count = f"The {len(shown)} lowest of {len(mistakes)} answers"
    elif len(shown) < len(mistakes):
        count += f", of which the first {len(shown)} are shown"
    title = escape(f"{result.name}: {result.model}")
    cards = "\n".join(_card(each, pictures.get(each.record.id, [])) for each in shown)
    notes = "".join(f"<p>{escape(line)}</p>" for line in result_lines(result))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{_table(result)}
{notes}
<h2>{heading}</h2>
<p>{escape(count)}.</p>
<main>
{cards}
</main>
</body>
</html>
"""


def _table(result: Result) -> str:
    heads, lines = result_cells(result)
    cells = ("".join(f"<td>{escape(value)}</td>" for value in line) for line in lines)
    body = "".join(f"<tr>{line}</tr>" for line in cells)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _card(scored: Scored, pictures: Sequence[str]) -> str:
    record, score = scored.record, scored.score
    notes = [f"score {score.value:.2f}"]
    notes += [f"taken as {score.parsed}"] if score.parsed else []
    notes += ["nothing could be taken from it"] if score.unparsed else []
    notes += ["cut off by its length"] if scored.is_cut_off else []
    images = "".join(f'<img src="{src}" alt="Image {n}">' for n, src in enumerate(pictures, 1))
    texts: Mapping[str, tuple[str, str]] = {
        "Question": (record.prompt, ""),
        "Answer": (scored.text or "(nothing)", "answer"),
        "Right": (" | ".join(dict.fromkeys(record.references)), "reference"),
    }
    shown = "".join(
        f'<dt>{name}</dt><dd class="{kind}">{escape(_cut(text))}</dd>'
        for name, (text, kind) in texts.items()
    )
    about = f"{record.task}, {record.id}: {', '.join(notes)}"
    return f'<article>{images}<dl>{shown}</dl><div class="note">{escape(about)}</div></article>'


def _cut(text: str) -> str:
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def thumbnails(items: Items, wanted: set[str]) -> dict[str, list[str]]:
    """Small copies of items' images as data URLs; none where an image can't be read."""
    left = set(wanted)
    found = {}
    for item in items if left else ():
        if item.id in left:
            left.remove(item.id)
            found[item.id] = [url for image in item.images if (url := _thumbnail(image))]
        if not left:
            break
    return found


def _thumbnail(source: str | bytes) -> str | None:
    try:
        image = load_image(source)
    except (ValueError, OSError):
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = BytesIO()
    image.save(file, "WEBP", quality=70)
    return f"data:image/webp;base64,{b64encode(file.getvalue()).decode()}"
