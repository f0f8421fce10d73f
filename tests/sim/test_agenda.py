import pytest

from octavo.sim.agenda import Agenda, TimeStandsStillError


def test_events_run_by_time_then_rank_then_order_of_addition() -> None:
    agenda, ran = Agenda(), []
    for name, time_ns, rank in [("d", 5, 1), ("a", 1, 9), ("c", 5, 0), ("e", 5, 1), ("b", 2, 0)]:
        agenda.add(time_ns, rank, lambda name=name: ran.append((agenda.now_ns, name)))
    while agenda.run_next():
        pass
    assert ran == [(1, "a"), (2, "b"), (5, "c"), (5, "d"), (5, "e")]
    assert len(agenda) == 0


def test_the_past_cannot_be_changed() -> None:
    agenda = Agenda()
    agenda.add(10, 0, lambda: agenda.add(9, 0, lambda: None))
    with pytest.raises(AssertionError, match="added at 10"):
        agenda.run_next()


def test_a_livelock_at_one_instant_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr("octavo.sim.agenda.MAX_EVENTS_AT_ONE_INSTANT", 50)
    agenda = Agenda()

    def again() -> None:
        agenda.add(agenda.now_ns, 0, again)

    again()
    with pytest.raises(TimeStandsStillError):
        while agenda.run_next():
            pass
