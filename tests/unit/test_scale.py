"""The tables of docs/scale.md are those that its script makes from what was measured."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
import scale_tables


def test_the_page_has_the_tables_of_the_measured_file():
    text = scale_tables.PAGE.read_text(encoding="utf-8")
    assert scale_tables.words(text) == scale_tables.words(scale_tables.with_tables(text))


def test_another_number_is_seen():
    text = scale_tables.PAGE.read_text(encoding="utf-8")
    changed = text.replace("| 4,096 |", "| 4,097 |", 1)
    assert changed != text
    assert scale_tables.words(changed) != scale_tables.words(scale_tables.with_tables(changed))


@pytest.mark.parametrize("controller", ["MPI", "Gloo"])
def test_the_rules_that_are_extrapolated_are_those_of_the_measured_ranks(controller):
    rows = scale_tables.of(scale_tables.measured()["rows"], controller)
    assert len(rows) >= 3
    for row in rows:
        update = {name: n for name, n in row["update"]["sums"].items() if "noise" not in name}
        assert sum(update.values()) == 2  # one bucket, and the small sum
        (small,) = (row["update"]["sum_bytes"][name] for name in update if "flags" in name)
        assert small == scale_tables.small_sum_bytes(row["ranks"])
        if controller == "Gloo":
            each = row["ranks"] // row["nodes"]
            assert row["rank"]["connections"] == scale_tables.gloo_connections(row["ranks"], each)
            requests = sum(row["rendezvous_requests"].values())
            assert requests >= scale_tables.rendezvous_requests(row["ranks"], each)
