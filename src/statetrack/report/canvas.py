"""From a drawing to SVG that takes its colours and fonts from the page it stands in, or to a file of its own."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PALETTE = {
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#68717c", "#9aa3ae"),
    "rule": ("#d5d9de", "#3a4149"),
    "wash": ("#f0f2f5", "#20252b"),
    "paper": ("#ffffff", "#14171b"),
    "model-0": ("#0b62b0", "#6cb2f5"),
    "model-1": ("#c4501b", "#ff9a6b"),
    "model-2": ("#177f59", "#4fcb9d"),
    "model-3": ("#8446b5", "#c99df0"),
    "model-4": ("#9a7200", "#e3bd4a"),
    "model-5": ("#bd3577", "#f58bba"),
    "model-6": ("#4a6675", "#9fb8c6"),
    "model-7": ("#6e4b29", "#cfa984"),
    "token-0": ("#00818a", "#45cbd3"),
    "token-1": ("#cf3f57", "#ff8596"),
    "token-2": ("#5f53b8", "#a79ff5"),
    "token-3": ("#b5790a", "#eeb64e"),
    "token-4": ("#4d8a2f", "#93cf72"),
    "token-5": ("#a14fa0", "#e29be1"),
    "token-6": ("#2f6fc4", "#82b4fa"),
    "token-7": ("#8a5a3c", "#d3a583"),
}
"""Every colour a figure may use, on light and on dark ground, by the name of the page's CSS custom property."""

INK, MUTED, RULE, WASH, PAPER = (PALETTE[name][0] for name in ("ink", "muted", "rule", "wash", "paper"))
MODEL_COLORS = [light for name, (light, _) in PALETTE.items() if name.startswith("model")]
TOKEN_COLORS = [light for name, (light, _) in PALETTE.items() if name.startswith("token")]
_NAMES = {light: name for name, (light, _) in PALETTE.items()}

_RC: dict[Any, Any] = {
    "font.size": 11.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 11.5,
    "axes.axisbelow": True,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 4,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "lines.dash_capstyle": "round",
    "figure.dpi": 72,
    "svg.hashsalt": "statetrack",
}


def inline_svg(
    draw: Callable[[Axes], None],
    width: float,
    height: float,
    *,
    margins: tuple[float, float, float, float],
    prefix: str,
    label: str,
) -> str:
    """A figure of one panel as an SVG element for an HTML page.

    Colours become CSS custom properties (`var(--ink)`), fonts are the page's, and nothing refers to anything outside.

    Args:
        draw: draws on the axes.
        width: in CSS pixels; the element scales with its container.
        height: in CSS pixels.
        margins: left, right, bottom, top, in CSS pixels.
        prefix: of the ids, so that those of several figures on a page don't clash.
        label: what the figure shows, for those who can't see it.
    """
    left, right, bottom, top = margins
    with mpl.rc_context({**_RC, "svg.fonttype": "none"}):
        figure = Figure(figsize=(width / 72, height / 72))
        box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
        draw(figure.add_axes(box))
        return _embed(_savefig(figure, "svg", transparent=True), prefix, label)


def save_figure(figure_size: tuple[float, float], draw: Callable[[Figure], None], kind: str) -> bytes:
    """A figure as the content of a file of its own, on white.

    Args:
        figure_size: inches.
        draw: draws on the figure.
        kind: "svg" or "png".
    """
    # Text as outlines: a file that is shown as an image has no fonts to rely on.
    with mpl.rc_context({**_RC, "svg.fonttype": "path"}):
        figure = Figure(figsize=figure_size, facecolor=PAPER)
        draw(figure)
        return _savefig(figure, kind, transparent=False)


def _savefig(figure: Figure, kind: str, *, transparent: bool) -> bytes:
    file = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type")) if kind == "svg" else {"Software": None}
    figure.savefig(file, format=kind, dpi=72 if kind == "svg" else 200, transparent=transparent, metadata=nothing)
    return file.getvalue()


_HREF = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def _embed(svg: bytes, prefix: str, label: str) -> str:
    root = ElementTree.fromstring(svg)
    referenced = {e.attrib[_HREF].removeprefix("#") for e in root.iter() if _HREF in e.attrib}
    referenced |= {name for e in root.iter() for value in e.attrib.values() for name in _REFERENCE.findall(value)}
    for element in root.iter():
        # HTML knows SVG by its tags; namespaces would only be noise.
        element.tag = element.tag.rpartition("}")[2]
        attributes = element.attrib
        if _HREF in attributes:
            attributes["href"] = f"#{prefix}-{attributes.pop(_HREF).removeprefix('#')}"
        if (name := attributes.pop("id", None)) in referenced:
            attributes["id"] = f"{prefix}-{name}"
        for key, value in attributes.items():
            attributes[key] = _REFERENCE.sub(rf"url(#{prefix}-\1)", value)
        if "style" in attributes:
            attributes["style"] = _page_style(attributes["style"])
        for key in ("d", "x", "y") if element.tag in ("path", "use") else ():
            if key in attributes:
                attributes[key] = _rounded(attributes[key])
        element.text, element.tail = _without_blank(element.text), _without_blank(element.tail)
    for parent in root.iter():
        for child in list(parent):
            if child.tag == "style" or (child.tag in ("g", "defs") and not len(child)):
                parent.remove(child)
        styles = {child.attrib.get("style") for child in parent}
        if len(parent) > 1 and parent.tag == "g" and len(styles) == 1 and (style := styles.pop()):
            # The thousand points of a scatter say their colour once.
            for child in parent:
                del child.attrib["style"]
            parent.attrib["style"] = ";".join(filter(None, (parent.attrib.get("style"), style)))
    root.attrib = {"viewBox": root.attrib["viewBox"], "class": "figure", "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _page_style(style: str) -> str:
    """A style with the page's fonts and with its custom properties as colours."""
    kept = [rule for rule in style.split("; ") if not rule.startswith("font-family:")]
    return re.sub(r"#[0-9a-f]{6}", lambda match: f"var(--{_NAMES[match[0]]})", ";".join(kept))


def _rounded(numbers: str) -> str:
    """Path data or a coordinate to a hundredth of a pixel, in one line."""
    short = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), numbers)
    return " ".join(short.split())


def _without_blank(text: str | None) -> str | None:
    return text if text and text.strip() else None
