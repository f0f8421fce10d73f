from __future__ import annotations

from octavo.gateway.processes.drop_tally import DropTally


def test_what_processes_dropped_adds_up_over_names_and_incarnations() -> None:
    tally = DropTally()
    assert dict(tally.totals) == {}
    tally.note("executor 0", 1, (("malformed", 2),))
    tally.note("executor 0", 1, (("malformed", 3), ("gap", 1)))  # a later account takes the earlier one in
    tally.note("node b", 7, (("denied_key", 4), ("gap", 1)))
    assert dict(tally.totals) == {"malformed": 3, "gap": 2, "denied_key": 4}
    tally.note("executor 0", 2, ())
    tally.note("executor 0", 2, (("malformed", 1),))
    assert dict(tally.totals) == {"malformed": 4, "gap": 2, "denied_key": 4}


def test_what_an_older_incarnation_still_says_counts_no_more() -> None:
    tally = DropTally()
    tally.note("executor 0", 2, (("gap", 1),))
    tally.note("executor 0", 1, (("gap", 100),))
    assert dict(tally.totals) == {"gap": 1}
