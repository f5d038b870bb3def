"""Pieces of an HTML page: texts, tables and pictures in the page itself. Every text is escaped here."""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from evaluation.pictures import grid
from files import whole_file

TEMPLATE = Path(__file__).with_name("report.html")
MOST_SIDE = 128  # pixels: larger images are shown reduced to it


def write_page(path: Path, title: str, body: Iterable[str]) -> None:
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(title=escape(title), body="\n".join(body))
    with whole_file(path) as file:
        file.write(page.encode(errors="replace"))  # a class may have the name of a folder that is not UTF-8


def text_of(words: str) -> str:
    """Escaped, and a number beside its per cent."""
    return escape(words).replace(" %", "\u00a0%")


def header(title: str, text: str) -> str:
    return f"<header><h1>{text_of(title)}</h1>{p(text, kind='soft')}</header>"


def p(*sentences: str, kind: str = "") -> str:
    return f"<p{kind and f' class={kind}'}>{text_of(' '.join(filter(None, sentences)))}</p>"


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{text_of(title)}</h2>{''.join(parts)}</section>"


def columns_of_two(*parts: str) -> str:
    """Side by side where there is room."""
    return f'<div class="two">{"".join(parts)}</div>'


def tiles(rows: Sequence[tuple[str, str, str]]) -> str:
    """What, how much, and in small print how it was measured, of each row."""
    boxes = (f"<dt>{text_of(a)}</dt><dd><b>{text_of(b)}</b><br><small>{text_of(c)}</small></dd>" for a, b, c in rows)
    return f'<dl class="tiles">{"".join(f"<div>{box}</div>" for box in boxes)}</dl>'


def table(head: tuple[str, str, str], rows: Sequence[tuple[str, str, str]]) -> str:
    """Rows of what, how much (to the right) and how it was measured."""
    names = "".join(f"<th>{text_of(name)}</th>" for name in head)
    body = "".join(
        f'<tr><td>{text_of(a)}</td><td class="number">{text_of(b)}</td><td>{text_of(c)}</td></tr>' for a, b, c in rows
    )
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def picture(images: Tensor, columns: int | None = None, most: int = MOST_SIDE) -> Image.Image:
    """evaluation.pictures.grid of images [B, C, H, W], reduced to `most` pixels, grey ones with one channel."""
    made = grid(shrunk(images, most), columns)
    return made.convert("L") if images.shape[1] < 3 else made


def shrunk(images: Tensor, most: int) -> Tensor:
    """Images [B, C, H, W] whose longer side is at most so many pixels, by averages."""
    height, width = images.shape[2:]
    scale = most / max(height, width)
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    return images if scale >= 1 else F.interpolate(images.float(), size=size, mode="area")


def base64_png(made: Image.Image) -> str:
    with io.BytesIO() as file:
        made.save(file, "PNG", optimize=True)
        return base64.b64encode(file.getvalue()).decode()


def img(made: Image.Image, alt: str, name: str = "") -> str:
    size = f'width="{made.width}" height="{made.height}"'
    return f'<img{name and f" id={name}"} {size} alt="{text_of(alt)}" src="data:image/png;base64,{base64_png(made)}">'


def figure(made: Image.Image, alt: str, *lines: str) -> str:
    caption = f"<figcaption>{'<br>'.join(map(text_of, lines))}</figcaption>" if lines else ""
    return f"<figure>{img(made, alt)}{caption}</figure>"


def pre(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def details(summary: str, text: str) -> str:
    """Text that opens with a click."""
    return f"<details><summary>{text_of(summary)}</summary>{pre(text)}</details>"


def scrubber(pictures: dict[int, Image.Image], text: str) -> str:
    """A slider through pictures, by their time t; without a script or on paper, the first, a middle and the last one."""
    times = list(pictures)
    stills = "".join(
        figure(pictures[t], f"t = {t}", f"t = {t}") for t in dict.fromkeys(times[i] for i in (0, len(times) // 2, -1))
    )
    last, label = len(times) - 1, f"t = {times[-1]}"
    slider = f'<input id="scrub" type="range" min="0" max="{last}" value="{last}" aria-label="From noise to image">'
    output = '<output id="time" for="scrub"></output>'
    frames = json.dumps({"times": times, "pictures": [base64_png(made) for made in pictures.values()]})
    return (
        f'<div>{p(text)}<figure class="scrub">{img(pictures[times[-1]], label, "frame")}{slider}'
        f'<figcaption>{output}</figcaption></figure><div class="stills">{stills}</div>'
        f'<script type="application/json" id="frames">{frames}</script></div>'
    )
