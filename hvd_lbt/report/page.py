"""The page of a report: one HTML file with the pictures in it."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np

from hvd_lbt.report.pictures import PICTURES
from hvd_lbt.report.runs import Group, Run
from hvd_lbt.schedule.plan_warnings import plan_warnings
from hvd_lbt.stage_table import stage_cells
from hvd_lbt.terminal import printable

STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1200px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
figure { margin: 1.5em 0; } img { width: 100%; height: auto; } figcaption { color: #555; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; color: #555; padding-bottom: .3em; }
.key { display: inline-block; width: 1em; height: .7em; margin-right: .5em; }
"""


Cell = str | tuple[str, str]  # text, or text and the colour of its group
Rows = list[list[Cell]]


def render(groups: Sequence[Group], pictures: Mapping[str, bytes]) -> str:
    """The page: accuracies first, then the pictures, then what made the numbers."""
    runs = [(group, run) for group in groups for run in group.runs]
    names = list(dict.fromkeys(run.about["name"] for _, run in runs))
    notes = [f"<li>{_text(f'{run.folder}: {note}')}</li>" for _, run in runs for note in run.notes]
    figures = [
        f'<figure><img src="data:image/png;base64,{base64.b64encode(png).decode()}" '
        f'alt="{_text(PICTURES[name][1])}"><figcaption>{_text(PICTURES[name][1])} '
        f"({_text(name)})</figcaption></figure>"
        for name, png in pictures.items()
    ]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(', '.join(names))}</title><style>{STYLE}</style></head><body>",
            f"<h1>{_text(', '.join(names))}</h1>",
            "<h2>Test accuracy</h2>",
            _table("groups", _group_rows(groups), "± standard deviation over the runs (n − 1)"),
            _table("runs", _run_rows(runs)),
            *(["<h2>To be noted</h2>", f'<ul id="notes">{"".join(notes)}</ul>'] if notes else []),
            "<h2>Curves</h2>",
            *figures,
            "<h2>Stages</h2>",
            *(
                _table(f"stages-{place + 1}", _stage_rows(group), group.label) + _warnings(group)
                for place, group in enumerate(groups)
            ),
            "<h2>What made these numbers</h2>",
            _table("versions", _version_rows(run for _, run in runs)),
            "</body></html>\n",
        ]
    )


def _text(value: object) -> str:
    """Text of a page: no character of it is HTML, and none is invisible."""
    return escape(printable(value))


def _table(name: str, rows: Rows, caption: str = "") -> str:
    """Rows of cells, the first of them headings."""

    def cell(tag: str, value: Cell) -> str:
        text, colour = value if isinstance(value, tuple) else (value, "")
        key = f'<span class="key" style="background:{colour}"></span>' if colour else ""
        return f"<{tag}>{key}{_text(text)}</{tag}>"

    head, *body = rows
    lines = ["".join(cell("td", text) for text in row) for row in body]
    return (
        f'<div class="wide"><table id="{name}">'
        + (f"<caption>{_text(caption)}</caption>" if caption else "")
        + f"<thead><tr>{''.join(cell('th', text) for text in head)}</tr></thead><tbody>"
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + "</tbody></table></div>"
    )


def _key(group: Group, text: str) -> Cell:
    return text, group.style["color"]


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
    for group in groups:
        seeds = ", ".join(str(run.seed) for run in group.runs)
        finished = f"{len(group.finals())} of {len(group.runs)}"
        rows.append(
            [_key(group, group.label), spread(group), finished, seeds, updates_done(group.runs)]
        )
    return rows


def _run_rows(runs: Sequence[tuple[Group, Run]]) -> Rows:
    rows: Rows = [
        [
            *("run", "group", "seed", "workers", "updates done", "planned", "epochs"),
            *("final test accuracy", "best", "end", "seconds", "waited for data"),
            "peak memory of rank 0",
        ]
    ]
    for group, run in runs:
        best = max((line["top1"] for line in run.evals), default=None)
        rows.append(
            [
                _key(group, str(run.folder)),
                group.label,
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
