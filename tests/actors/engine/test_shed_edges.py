from __future__ import annotations

from octavo.actors.engine.shed_edges import ShedEdges


def test_an_edge_is_told_once_its_requests_have_ended_and_the_steps_with_their_rows_are_done() -> None:
    shed = ShedEdges()
    shed.add("edge 1")
    assert "edge 1" in shed and "edge 2" not in shed and shed.untold == ["edge 1"]
    assert not shed.is_due("edge 1", num_done=100), "some of its requests may be live"
    shed.note_ended("edge 1", num_planned=102)
    shed.note_ended("edge 1", num_planned=103)  # those planned since have no row of theirs
    assert not shed.is_due("edge 1", num_done=101)
    assert shed.is_due("edge 1", num_done=102)


def test_an_edge_is_back_with_its_answer_and_not_with_one_to_something_else() -> None:
    shed = ShedEdges()
    shed.add("edge 1")
    shed.take_answer("edge 1", 1)
    assert "edge 1" in shed, "nobody has told it"
    shed.note_told("edge 1")
    assert shed.untold == []
    shed.take_answer("edge 1", 2)
    shed.take_answer("edge 2", 1)
    assert "edge 1" in shed
    shed.take_answer("edge 1", 1)
    assert "edge 1" not in shed and shed.num_shed == 1


def test_what_an_edge_answers_to_before_it_was_shed_again_is_late() -> None:
    shed = ShedEdges()
    shed.add("edge 1")
    shed.note_ended("edge 1", num_planned=5)
    shed.note_told("edge 1")
    shed.add("edge 1")
    assert shed.untold == ["edge 1"] and not shed.is_due("edge 1", num_done=9)
    shed.note_told("edge 1")
    shed.take_answer("edge 1", 1)
    assert "edge 1" in shed
    assert shed.number_of("edge 1") == shed.num_shed == 2


def test_an_edge_that_refused_the_line_is_to_be_told_again_and_one_that_left_is_nobody() -> None:
    shed = ShedEdges()
    shed.add("edge 1")
    shed.note_told("edge 1")
    shed.note_told("edge 1", is_told=False)
    shed.note_told("edge 2", is_told=False)  # was never shed
    assert shed.untold == ["edge 1"]
    shed.forget("edge 1")
    shed.forget("edge 2")
    assert "edge 1" not in shed and shed.untold == []
