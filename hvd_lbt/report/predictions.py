"""How good a run's own estimates of the time left were, beside its average speed so far."""

import numpy as np

from hvd_lbt.report.runs import Run

SHARE = 0.2  # of the run, at which the estimate is judged


def time_left_line(run: Run) -> str | None:
    """The estimate after a fifth of the run against what was left; None if it cannot be judged.

    Only of a run in one part that has finished: its clock begins with it.
    """
    seconds, left = run.updates["seconds"], run.updates["seconds_left"]
    whole = run.reason == "finished" and run.parts == 1 and run.done == len(seconds)
    if not whole or not len(seconds) or not np.isfinite(seconds).all():
        return None
    place = int(np.searchsorted(seconds, SHARE * run.seconds))
    if place >= len(seconds) or not np.isfinite(left[place]):
        return None
    true = run.seconds - float(seconds[place])
    if true <= 0:
        return None
    seen = run.updates["samples_seen"]
    average = float(seconds[place] / seen[place] * (seen[-1] - seen[place]))
    return (
        f"time left after {SHARE:.0%} of the run: {true:,.1f} s; predicted "
        f"{left[place]:,.1f} s ({left[place] / true - 1:+.1%}), by the average speed until then "
        f"{average:,.1f} s ({average / true - 1:+.1%})"
    )
