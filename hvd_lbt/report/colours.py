"""The colours of a report: a policy has the same one on every page and in every picture."""

from collections.abc import Sequence

# Okabe and Ito's colours, distinct in all common forms of colour blindness, for a white page; and
# a lighter form of each for a dark one. Yellow is too faint for a line on white.
PALETTE = (
    ("#0072B2", "#4DA8EC"),
    ("#D55E00", "#FF8A4C"),
    ("#009E73", "#2FC79A"),
    ("#CC79A7", "#E69AC6"),
    ("#E69F00", "#F2BD4A"),
    ("#56B4E9", "#A3DCFF"),
    ("#000000", "#E6EDF3"),
)
COLOURS = tuple(light for light, _ in PALETTE)
DASHES = ("-", "--", ":", "-.")
# The others are free for more groups.
POLICIES = {"decay_lr": 0, "grow_batch": 1, "hybrid": 2, "measured": 3}
FREE = tuple(range(len(POLICIES), len(PALETTE)))


def assign(policies: Sequence[str]) -> list[tuple[int, int]]:
    """For each group's policy its place in PALETTE and in DASHES.

    The first group of a policy has the policy's colour; more of the same one, and policies that are
    not known, have the free colours, and after the last of them come again with another dash.
    """
    places: list[tuple[int, int]] = []
    extra = 0
    for policy in policies:
        place = (POLICIES.get(policy, -1), 0)
        if place[0] < 0 or place in places:
            place = FREE[extra % len(FREE)], extra // len(FREE) % len(DASHES)
            extra += 1
        places.append(place)
    return places
