"""The pages: self-contained, escaped, and honest about overload."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from sim_probers import ComputedProber
from sim_run_results import make_records, make_result

from octavo.sim.plan.candidate import Candidate
from octavo.sim.plan.capacity import capacity
from octavo.sim.plan.planner import Question, plan
from octavo.sim.report.plan_report import capacity_report, plan_report
from octavo.sim.report.requests_csv import COLUMNS, write_requests
from octavo.sim.report.run_report import WORST_FIRST, run_report
from octavo.sim.results import TimelinePoint
from octavo.sim.slo import parse_slo

EVIL = "</style><script>alert('x')</script><img src=http://evil.example/x>\"&"
SLO = parse_slo("ttft_p99<1s,tpot_p99<50ms")
VOID = ("meta", "br", "img", "link", "input")


class Page(HTMLParser):
    """Checks that tags nest, and keeps what they are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_self_contained(text: str) -> Page:
    page = Page(text)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", text.replace("http://evil.example", ""))
    assert "default-src 'none'" in text and "prefers-color-scheme:dark" in text
    return page


def test_a_runs_page_holds_its_plots_and_nothing_from_outside() -> None:
    records = make_records()
    page = assert_self_contained(run_report(make_result(records), records))
    assert page.tags["svg"] == 6
    assert page.tags["table"] == 3


def test_hostile_names_stay_text() -> None:
    records = make_records(20)
    result = make_result(records, workload=EVIL, config={EVIL: EVIL}, step_time={"kind": EVIL}, counts={EVIL: 3})
    assert_self_contained(run_report(result, records))


@pytest.mark.parametrize("load", WORST_FIRST)
def test_a_run_that_did_not_keep_up_says_so_before_any_percentile(load: str) -> None:
    records = make_records(50)
    text = run_report(make_result(records, load=load), records)
    body = text[text.index("<main>") :]
    assert load in body
    assert body.index(load) < body.index("p99")


def test_extrapolation_is_told() -> None:
    records = make_records(50)
    assert "1.3 % of the steps lie outside" in run_report(make_result(records, extrapolated_share=0.013), records)
    assert "extrapolated" not in run_report(make_result(records), records)


def test_a_run_without_any_request_done_still_has_a_page() -> None:
    result = make_result([], timeline=(TimelinePoint(0.0, 0, 0, 0.0),))
    assert "Nothing to draw" in run_report(result, [])


def test_a_thousand_replicas_do_not_make_a_thousand_rows() -> None:
    records = make_records(50)
    text = run_report(make_result(records, num_replicas=1000), records)
    assert "the 64 busiest of 1000" in text and text.count("<tr") < 150


def test_a_plans_page_holds_front_candidates_and_diagnosis() -> None:
    prober = ComputedProber({"a": 2, "b": 3}, {"a": 2.0, "b": 1.0})
    question = Question(slo=SLO, max_replicas=16)
    found = plan([Candidate(gpu=gpu) for gpu in ("a", "b", EVIL)], lambda: prober, question, with_curve=True)
    text = plan_report(found, SLO, title=EVIL, serve_command=f"octavo serve {EVIL}", remarks=[EVIL])
    page = assert_self_contained(text)
    assert page.tags["svg"] == 5  # two fronts, three curves
    assert "What binds: prefill compute" in text and "cannot boot" in text


def test_an_infeasible_plan_says_so_first() -> None:
    prober = ComputedProber({"a": 200}, {"a": 2.0})
    found = plan([Candidate(gpu="a")], lambda: prober, Question(slo=SLO, max_replicas=4))
    text = plan_report(found, SLO, title="t", serve_command="", remarks=[])
    assert_self_contained(text)
    assert "Infeasible: nothing that was asked for keeps the service level." in text


def test_a_capacitys_page_holds_latency_over_load() -> None:
    found = capacity(Candidate(gpu="a"), 2, ComputedProber({"a": 0.7}, {"a": 2.0}), Question(slo=SLO))
    page = assert_self_contained(capacity_report(found, SLO, title="t"))
    assert page.tags["svg"] == 3


def test_an_overloaded_point_of_a_curve_is_labelled() -> None:
    found = capacity(Candidate(gpu="a"), 2, ComputedProber({"a": 0.7}, {"a": 2.0}), Question(slo=SLO))
    worse = tuple(msgspec.structs.replace(probe, load="OVERLOADED") for probe in found.probes)
    text = capacity_report(msgspec.structs.replace(found, probes=worse), SLO, title="t")
    assert "the queue never drained" in text


def test_the_csv_has_a_line_for_each_request_and_runs_no_formula(tmp_path: Path) -> None:
    records = make_records(100)
    records[3].tenant = "=HYPERLINK(1)"
    write_requests(tmp_path / "requests.csv", records)
    rows = list(csv.DictReader((tmp_path / "requests.csv").read_text().splitlines()))
    assert tuple(rows[0]) == COLUMNS and len(rows) == len(records)
    assert rows[3]["tenant"] == "'=HYPERLINK(1)"
    for row, record in zip(rows, records, strict=True):
        if record.outcome == "done":
            assert float(row["ttft_s"]) == pytest.approx(record.ttft_s)
            assert float(row["e2e_s"]) == pytest.approx(record.e2e_s)
        else:
            assert row["e2e_s"] == "" and row["first_token_s"] == ""
