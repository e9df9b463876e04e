"""The pictures of the public pages, as small SVG text: no library, few nodes, colours from the page's style sheet.

Nothing rests on colour: every verdict has its own shape, and every picture stands beside its table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from markupsafe import Markup, escape

from weighbridge.records import VerdictWord

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 54, 112, 46, 34
LABEL_APART = 22  # least distance of two labels, in units of the picture, on a narrow screen
MANY_NIGHTS = 90  # from which on markers are small
LONGEST_LABEL = 12
STRIP_WIDTH, STRIP_HEIGHT = 160, 18
LINE_WIDTH, LINE_HEIGHT = 360, 170


@dataclass(frozen=True)
class Point:
    """One night of one endpoint: what was said, and the distance from the reference with its interval, in nats."""

    night: date
    verdict: VerdictWord
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Guide:
    """A recorded departure that a distance is seen against."""

    name: str
    nats: float


def trusted(text: str) -> Markup:
    """Text that is shown as it is: put together of our own words, numbers, and what has been escaped; never of what came from outside."""
    return Markup(text)  # noqa: S704 -- the one place where this is said


def number(value: float) -> str:
    """A number for people: three significant digits, never in powers of ten."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(decimals, 9)}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def distance_chart(
    points: Sequence[Point], limit: float | None, guides: Sequence[Guide], changes: Sequence[date]
) -> Markup | None:
    """The distance from the reference, night by night, on a logarithmic scale; None where no night has one.

    Parameters
    ----------
    points : sequence of Point
        Oldest first.
    limit : float or None
        What honest stacks are allowed, in nats: shaded up to there.
    guides : sequence of Guide
        Lines to compare with; those whose labels would touch are left out.
    changes : sequence of datetime.date
        Nights that are marked by a dashed line.
    """
    drawn = [p for p in points if p.value]
    if not drawn:
        return None
    levels = [x for p in drawn for x in (p.value, p.low, p.high) if x] + [g.nats for g in guides]
    y = _log_scale([*levels, limit] if limit else levels, TOP, HEIGHT - BOTTOM)
    shown = _apart(guides, limit, y)
    x = _time_scale(points[0].night, points[-1].night, LEFT + 6, WIDTH - RIGHT - 6)
    end = WIDTH - RIGHT
    parts: list[str] = []
    if limit:
        top = y(limit)
        parts.append(f'<path class="allowed" d="M{LEFT} {top:.1f}H{end}V{HEIGHT - BOTTOM}H{LEFT}z"/>')
        parts.append(f'<path class="limit" d="M{LEFT} {top:.1f}H{end}"/>{_text(end + 6, top + 4, "limit", "guide")}')
    ticks = _log_ticks(y.low, y.high)
    parts.append(f'<path class="grid" d="{"".join(f"M{LEFT} {y(t):.1f}H{end}" for t in ticks)}"/>')
    parts += [_text(LEFT - 6, y(t) + 4, number(t), "tick", "end") for t in ticks]
    parts.append(f'<path class="departure" d="{"".join(f"M{LEFT} {y(g.nats):.1f}H{end}" for g in shown)}"/>')
    parts += [_text(end + 6, y(g.nats) + 4, _cut(g.name), "guide") for g in shown]
    parts += [f'<path class="change" d="M{x(night):.1f} {TOP - 14}V{HEIGHT - BOTTOM}"/>' for night in changes]
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{end}"/>')
    parts += [
        _text(x(night), HEIGHT - BOTTOM + 22, label, "tick", anchor)
        for night, label, anchor in _dates(points[0].night, points[-1].night)
    ]
    parts.append(_text(0, 18, "distance from the reference, nats (log scale)", "unit"))
    whiskers = "".join(f"M{x(p.night):.1f} {y(p.low):.1f}V{y(p.high):.1f}" for p in drawn if p.low and p.high)
    parts.append(f'<path class="whisker" d="{whiskers}"/>')
    radius = 2.4 if len(drawn) > MANY_NIGHTS else 4.5
    for verdict in sorted({p.verdict for p in drawn}):
        marks = "".join(
            _shape(verdict, x(p.night), y(p.value), radius) for p in drawn if p.verdict == verdict and p.value
        )
        parts.append(f'<path class="marker {verdict}" d="{marks}"/>')
    title = "Distance from the reference, night by night"
    last = drawn[-1]
    description = (
        f"{len(drawn)} nights from {drawn[0].night} to {last.night}; the last distance is {number(last.value or 0)} nats"
        + (f", honest stacks are allowed {number(limit)}" if limit else "")
        + ". The table below holds every number."
    )
    return _svg(WIDTH, HEIGHT, "distance", title, description, parts)


def line_chart(points: Sequence[tuple[date, float | None]], name: str, title: str) -> Markup | None:
    """A quantity night by night from zero on, as one line; None with fewer than two nights.

    Parameters
    ----------
    points : sequence of tuple of datetime.date and float or None
        Oldest first; a night without a number leaves a gap.
    name : str
        Unique on the page.
    title : str
        The quantity and its unit.
    """
    known = [(night, value) for night, value in points if value is not None]
    if len(known) < 2:
        return None
    highest = max(value for _, value in known) or 1.0
    x = _time_scale(points[0][0], points[-1][0], 4, LINE_WIDTH - 4)
    base, top = LINE_HEIGHT - 28, 44
    steps, pen = [], "M"
    for night, value in points:
        if value is None:
            pen = "M"
            continue
        steps.append(f"{pen}{x(night):.1f} {base - (base - top) * value / highest:.1f}")
        pen = "L"
    parts = [
        f'<path class="grid" d="M0 {top}H{LINE_WIDTH}"/><path class="axis" d="M0 {base}H{LINE_WIDTH}"/>',
        f'<path class="line" d="{"".join(steps)}"/>',
        _text(0, top - 5, number(highest), "tick"),
        _text(0, 14, title, "unit"),
        _text(0, LINE_HEIGHT - 8, points[0][0].isoformat(), "tick"),
        _text(LINE_WIDTH, LINE_HEIGHT - 8, points[-1][0].isoformat(), "tick", "end"),
    ]
    description = (
        f"From {points[0][0]} to {points[-1][0]}, at most {number(highest)}. The table below holds every number."
    )
    return _svg(LINE_WIDTH, LINE_HEIGHT, name, title, description, parts)


def strip(point: Point, limit: float | None, least: float, most: float) -> Markup:
    """One night's distance and interval on a bar of a logarithmic scale from ``least`` to ``most``; its numbers stand beside it."""
    scale = _LogScale(math.log(least / 1.4), math.log(most * 1.4), STRIP_WIDTH, 0)
    middle = STRIP_HEIGHT / 2
    parts = [f'<path class="axis" d="M0 {STRIP_HEIGHT - 1}H{STRIP_WIDTH}"/>']
    if limit:
        parts.insert(0, f'<path class="allowed" d="M0 0H{scale(limit):.1f}V{STRIP_HEIGHT}H0z"/>')
    if point.low and point.high:
        parts.append(f'<path class="whisker" d="M{scale(point.low):.1f} {middle}H{scale(point.high):.1f}"/>')
    if point.value:
        mark = _shape(point.verdict, scale(point.value), middle, 4.5)
        parts.append(f'<path class="marker {point.verdict}" d="{mark}"/>')
    return trusted(  # made of numbers and of the words of a verdict only
        f'<svg class="strip" viewBox="0 0 {STRIP_WIDTH} {STRIP_HEIGHT}" aria-hidden="true" focusable="false">{"".join(parts)}</svg>'
    )


def glyph(verdict: VerdictWord) -> Markup:
    """The shape that stands for a verdict in the pictures, for a legend beside its words."""
    return trusted(
        '<svg class="glyph" viewBox="0 0 14 14" aria-hidden="true" focusable="false">'
        f'<path class="marker {verdict}" d="{_shape(verdict, 7, 7, 4.5)}"/></svg>'
    )


# -- scales and marks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LogScale:
    """From ``exp(log_low)`` to ``exp(log_high)``, on ``near_high`` and ``near_low`` of the picture."""

    log_low: float
    log_high: float
    near_high: float
    near_low: float

    def __call__(self, value: float) -> float:
        share = (math.log(value) - self.log_low) / (self.log_high - self.log_low)
        return self.near_low + (self.near_high - self.near_low) * min(max(share, 0.0), 1.0)

    @property
    def low(self) -> float:
        return math.exp(self.log_low)

    @property
    def high(self) -> float:
        return math.exp(self.log_high)


@dataclass(frozen=True)
class _TimeScale:
    first: int
    days: int
    start: float
    end: float

    def __call__(self, night: date) -> float:
        if self.days == 0:
            return (self.start + self.end) / 2
        share = (night.toordinal() - self.first) / self.days
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)


def _log_scale(values: Sequence[float], top: float, bottom: float) -> _LogScale:
    return _LogScale(math.log(min(values) / 1.5), math.log(max(values) * 1.5), top, bottom)


def _time_scale(first: date, last: date, start: float, end: float) -> _TimeScale:
    return _TimeScale(first.toordinal(), (last - first).days, start, end)


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and where there are fewer than two, their halves and fifths."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    whole = [10.0**k for k in decades if low <= 10.0**k <= high]
    if len(whole) >= 2:
        return whole
    return [m * 10.0**k for k in decades for m in (1, 2, 5) if low <= m * 10.0**k <= high]


def _dates(first: date, last: date) -> list[tuple[date, str, str]]:
    """At most five nights to name below the axis, and how each label stands on its place."""
    days = (last - first).days
    if days == 0:
        return [(first, first.isoformat(), "middle")]
    if days < 120:
        return [(first, first.isoformat(), "start"), (last, last.isoformat(), "end")]
    months = [m for m in (_month(first, k) for k in range(1, days // 28 + 2)) if m <= last - timedelta(days=14)]
    step = -(-len(months) // 5)
    return [(m, m.isoformat()[:7], "middle") for m in months[::step]]


def _month(first: date, later: int) -> date:
    years, month = divmod(first.month - 1 + later, 12)
    return date(first.year + years, month + 1, 1)


def _apart(guides: Sequence[Guide], limit: float | None, y: _LogScale) -> list[Guide]:
    """Those guides whose labels touch neither each other nor that of the limit; the largest departures go first."""
    taken = [y(limit)] if limit else []
    shown = []
    for guide in sorted(guides, key=lambda g: -g.nats):
        place = y(guide.nats)
        if all(abs(place - other) >= LABEL_APART for other in taken):
            taken.append(place)
            shown.append(guide)
    return shown


def _shape(verdict: VerdictWord, x: float, y: float, r: float) -> str:
    match verdict:
        case "consistent":
            return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
        case "inconclusive":
            return f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}"
        case "differs":
            return f"M{x:.1f} {y - 1.3 * r:.1f}l{1.3 * r:.2f} {1.3 * r:.2f} {-1.3 * r:.2f} {1.3 * r:.2f} {-1.3 * r:.2f} {-1.3 * r:.2f}z"
        case "differs_replicated":
            return f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z"


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: int, height: int, name: str, title: str, description: str, parts: Sequence[str]) -> Markup:
    """A whole picture. Every text in ``parts`` has been escaped; ``name`` is our own."""
    return trusted(
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )
