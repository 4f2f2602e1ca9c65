"""The page of a report: one HTML file that holds its figures, its script and Plotly's."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from plotly.offline import get_plotlyjs

from hvd_lbt.report.colours import PALETTE
from hvd_lbt.report.curves import AXES
from hvd_lbt.report.figures import FIGURES, Figure
from hvd_lbt.report.pictures import PICTURES, legend_label
from hvd_lbt.report.runs import Group, Run
from hvd_lbt.report.summary import summarise
from hvd_lbt.schedule.plan_warnings import plan_warnings
from hvd_lbt.stage_table import stage_cells
from hvd_lbt.terminal import printable

HERE = Path(__file__).parent
STYLE = (HERE / "page.css").read_text("utf-8")
SCRIPT = (HERE / "page.js").read_text("utf-8")
# Nothing is loaded from anywhere; a name that is markup could not run even if it were not escaped.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src data: blob:"
)
TITLE = 200  # characters
LONG = 24  # characters of a cell from which it may have more than one line
BORDERS = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "double"}


Cell = str | tuple[str, str]  # text, or text and the variable of its group's colour
Rows = list[list[Cell]]


def render(groups: Sequence[Group], pictures: Mapping[str, bytes]) -> str:
    """The page: a summary first, then the curves, then what made the numbers."""
    runs = [(group, run) for group in groups for run in group.runs]
    names = ", ".join(dict.fromkeys(run.about["name"] for _, run in runs))
    title = _text(names if len(names) <= TITLE else f"{names[:TITLE]}…")
    notes = [f"<li>{_text(f'{run.folder}: {note}')}</li>" for _, run in runs for note in run.notes]
    figures = [figure for make in FIGURES if (figure := make(groups))]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{title}</title><style>{STYLE}{_colours(groups)}</style>",
            f"</head><body><h1>{title}</h1>",
            _summary(groups),
            *(["<h2>To be noted</h2>", f'<ul id="notes">{"".join(notes)}</ul>'] if notes else []),
            "<h2>Curves</h2>",
            _switches(groups),
            '<div id="figures">',
            *(_figure(figure) for figure in figures),
            "</div>",
            f"<noscript>{_still(pictures)}</noscript>",
            "<h2>Test accuracy</h2>",
            _table("groups", _group_rows(groups), "± standard deviation over the runs (n − 1)"),
            "<h2>Runs</h2>",
            _table("runs", _run_rows(groups)),
            "<h2>Stages</h2>",
            *(
                _table(f"stages-{place + 1}", _stage_rows(group), group.label) + _warnings(group)
                for place, group in enumerate(groups)
            ),
            "<h2>What made these numbers</h2>",
            _table("versions", _version_rows(run for _, run in runs)),
            f'<script type="application/json" id="report-data">{_data(groups, figures)}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{SCRIPT}</script>",
            "</body></html>\n",
        ]
    )


def _summary(groups: Sequence[Group]) -> str:
    summary = summarise(groups)
    return (
        '<section id="summary"><h2>Summary</h2>'
        + "".join(f"<p>{_text(sentence)}</p>" for sentence in summary.sentences)
        + "".join(f'<p class="note">{_text(note)}</p>' for note in summary.notes)
        + "</section>"
    )


def _switches(groups: Sequence[Group]) -> str:
    """The x-axis to choose, and the groups to show."""
    axes = "".join(
        f'<label><input type="radio" name="x" value="{axis}"'
        f"{' checked' if axis == AXES[0] else ''}>{axis}</label>"
        for axis in AXES
    )
    shown = "".join(
        f'<label><input type="checkbox" value="{place}" checked>'
        f'<span class="line" style="border-top-style:{BORDERS[group.style["linestyle"]]};'
        f'border-top-color:var(--group-{place})"></span>'
        f"<span>{_text(legend_label(group))}</span></label>"
        for place, group in enumerate(groups)
    )
    return (
        f'<fieldset class="switch" id="switch-x"><legend>x-axis</legend>{axes}'
        '<label><input type="checkbox" name="log">logarithmic</label></fieldset>'
        f'<fieldset id="switch-groups"><legend>show</legend>{shown}</fieldset>'
        '<p class="note">Drag to zoom, double-click to go back. Hours are those of the updates '
        "alone.</p>"
    )


def _figure(figure: Figure) -> str:
    place = (
        f'<div class="plot" id="figure-{figure.name}"></div>'
        if figure.traces
        else '<p class="empty">Nothing to draw yet.</p>'
    )
    return (
        f"<figure><h3>{_text(figure.title)}</h3>{place}"
        f"<figcaption>{_text(figure.caption)}</figcaption></figure>"
    )


def _still(pictures: Mapping[str, bytes]) -> str:
    """The pictures, for a reader without scripts."""
    return "".join(
        f'<p><img src="data:image/png;base64,{base64.b64encode(png).decode()}" '
        f'alt="{_text(PICTURES[name][1])}"></p><p class="note">{_text(PICTURES[name][1])} '
        f"({_text(name)})</p>"
        for name, png in pictures.items()
    )


def _colours(groups: Sequence[Group]) -> str:
    """Each group's colour as a variable, for a light page and for a dark one."""
    list(enumerate(groups))
    light, dark = (
        "".join(
            f"--group-{place}:{PALETTE[group.colour][form]};" for place, group in enumerate(groups)
        )
        for form in (0, 1)
    )
    scheme = "@media screen and (prefers-color-scheme: dark)"
    return f":root {{{light}}} {scheme} {{ :root {{{dark}}} }}"


def _data(groups: Sequence[Group], figures: Sequence[Figure]) -> str:
    """What the page's script reads, as JSON in which no character can end a script or begin one."""
    colours = [dict(zip(("light", "dark"), PALETTE[group.colour], strict=True)) for group in groups]
    drawn = [
        {"name": figure.name, "traces": figure.traces, "layout": figure.layout}
        for figure in figures
        if figure.traces
    ]
    text = json.dumps({"axes": AXES, "groups": colours, "figures": drawn}, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _text(value: object) -> str:
    """Text of a page: no character of it is HTML, and none is invisible."""
    return escape(printable(value))


def _table(name: str, rows: Rows, caption: str = "") -> str:
    """Rows of cells, the first of them headings."""

    def cell(tag: str, value: Cell) -> str:
        text, colour = value if isinstance(value, tuple) else (value, "")
        key = f'<span class="key" style="background:var({colour})"></span>' if colour else ""
        wraps = ' class="long"' if len(text) > LONG else ""
        return f"<{tag}{wraps}>{key}{_text(text)}</{tag}>"

    head, *body = rows
    lines = ["".join(cell("td", text) for text in row) for row in body]
    return (
        f'<div class="wide" tabindex="0"><table id="{name}">'
        + (f"<caption>{_text(caption)}</caption>" if caption else "")
        + f"<thead><tr>{''.join(cell('th', text) for text in head)}</tr></thead><tbody>"
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + "</tbody></table></div>"
    )


def _key(place: int, text: str) -> Cell:
    return text, f"--group-{place}"


def spread(group: Group) -> str:
    """Mean ± standard deviation (n − 1) of the final test accuracies."""
    finals = 100 * np.array(group.finals())
    if not len(finals):
        return "– (no run is finished)"
    if len(finals) == 1:
        return f"{finals[0]:.2f} %"
    return f"{finals.mean():.2f} ± {finals.std(ddof=1):.2f} %"


def updates_done(runs: Sequence[Run]) -> str:
    """Updates done / planned; a list where the runs differ."""
    done = list(dict.fromkeys(run.done for run in runs))
    return f"{', '.join(f'{count:,}' for count in done)} of {runs[0].planned:,}"


def _group_rows(groups: Sequence[Group]) -> Rows:
    rows: Rows = [["group", "final test accuracy", "finished runs", "seeds", "updates done"]]
    for place, group in enumerate(groups):
        seeds = ", ".join(str(run.seed) for run in group.runs)
        finished = f"{len(group.finals())} of {len(group.runs)}"
        rows.append(
            [_key(place, group.label), spread(group), finished, seeds, updates_done(group.runs)]
        )
    return rows


def _run_rows(groups: Sequence[Group]) -> Rows:
    rows: Rows = [
        [
            *("run", "group", "seed", "workers", "updates done", "planned", "epochs"),
            *("final test accuracy", "best", "end", "seconds", "waited for data"),
            "peak memory of rank 0",
        ]
    ]
    runs = [(place, run) for place, group in enumerate(groups) for run in group.runs]
    for place, run in runs:
        best = max((line["top1"] for line in run.evals), default=None)
        rows.append(
            [
                _key(place, str(run.folder)),
                groups[place].label,
                str(run.seed),
                " → ".join(str(count) for count in run.workers),
                f"{run.done:,}",
                f"{run.planned:,}",
                f"{run.updates['epoch'][-1]:.4g}" if run.done else "0",
                _percent(run.final),
                _percent(best),
                run.reason or "–",
                f"{run.seconds:,.1f}",
                _percent(run.data_wait),
                f"{run.peak_memory_bytes / 2**20:,.0f} MiB" if run.peak_memory_bytes else "–",
            ]
        )
    return rows


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def _stage_rows(group: Group) -> Rows:
    plan = group.runs[0].about["plan"]
    rows = []
    for stage in plan["stages"]:
        done = dict.fromkeys(
            int(np.sum(run.updates["stage"] == stage["index"])) for run in group.runs
        )
        cells = stage_cells(stage, plan["train_samples"])
        rows.append(cells | {"updates done": ", ".join(f"{count:,}" for count in done)})
    table: Rows = [list(rows[0])]
    table.extend(list(cells.values()) for cells in rows)
    return table


def _warnings(group: Group) -> str:
    """What is doubtful about the group's plan."""
    plan = group.runs[0].about["plan"]
    warnings = plan_warnings(plan["stages"], plan["train_samples"])
    return "".join(f"<p>{_text(warning)}</p>" for warning in warnings)


def _version_rows(runs: Iterable[Run]) -> Rows:
    """One row for each set of versions, naming its runs."""
    sets: dict[str, list[Run]] = {}
    for run in runs:
        made = {**run.about["versions"], "revision": run.about.get("revision", "")}
        sets.setdefault(json.dumps(made), []).append(run)
    names = list(dict.fromkeys(name for made in sets for name in json.loads(made)))
    return [
        ["runs", *names],
        *(
            [
                ", ".join(str(run.folder) for run in members),
                *(str(json.loads(made).get(name) or "–") for name in names),
            ]
            for made, members in sets.items()
        ),
    ]
