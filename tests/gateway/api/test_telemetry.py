from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest
from fake_engine import FakeEngine
from http_client import Client, http_post, serving

from octavo.gateway.api.telemetry import Tracing, exporters_of

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


def trace_into_memory(client: Client) -> Any:
    """Switch tracing on for a server; returns the exporter that keeps its spans."""
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = pytest.importorskip("opentelemetry.sdk.trace").TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    client.server._context.tracing = Tracing(provider, "m")
    return memory


def test_a_request_is_one_span_below_its_traceparent_with_its_phases_and_tokens() -> None:
    async def run() -> None:
        async with serving(FakeEngine()) as client:
            memory = trace_into_memory(client)
            headers = {"Traceparent": TRACEPARENT, "X-Request-Id": "abc"}
            body = {"prompt": "hello", "max_tokens": 7, "n": 2, "stream": True}
            assert (await client.post("/v1/completions", body, headers)).status == 200
            (span,) = memory.get_finished_spans()
            assert span.name == "POST /v1/completions"
            assert f"{span.context.trace_id:032x}" == TRACE_ID
            assert f"{span.parent.span_id:016x}" == PARENT_ID
            assert [event.name for event in span.events] == ["queue", "decode"]  # this engine plans no steps
            times = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
            assert times == sorted(times)
            assert span.attributes["gen_ai.usage.input_tokens"] == 6
            assert span.attributes["gen_ai.usage.output_tokens"] == 14
            assert span.attributes["gen_ai.response.finish_reasons"] == ("length", "length")
            assert span.attributes["http.response.status_code"] == 200
            assert span.attributes["octavo.request_id"] == "abc"
            assert span.status.is_unset or span.status.is_ok

    asyncio.run(run())


def test_spans_of_requests_at_once_do_not_mix_and_a_bad_traceparent_begins_a_new_trace() -> None:
    async def run() -> None:
        async with serving(FakeEngine()) as client:
            memory = trace_into_memory(client)
            lengths = list(range(1, 21))
            await asyncio.gather(
                *(
                    client.post("/v1/completions", {"prompt": "x", "max_tokens": length}, {"traceparent": "nonsense"})
                    for length in lengths
                )
            )
            spans = memory.get_finished_spans()
            assert sorted(span.attributes["gen_ai.usage.output_tokens"] for span in spans) == lengths
            assert all(span.parent is None for span in spans)
            assert len({span.context.trace_id for span in spans}) == len(lengths)

    asyncio.run(run())


def test_failures_are_marked_disconnects_end_their_span_and_probes_have_none() -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine) as client:
            memory = trace_into_memory(client)
            for path in ("/health", "/ready", "/live", "/metrics"):
                await client.get(path)
            assert memory.get_finished_spans() == ()
            engine.fail_after = 0
            assert (await client.complete()).status == 500
            await client.get("/nope/of/client's/choice")
            failed, missing = memory.get_finished_spans()
            assert not failed.status.is_ok and failed.attributes["http.response.status_code"] == 500
            assert missing.name == "GET other"
            memory.clear()
            engine.fail_after = None
            engine._by_hand = True
            engine.was_submitted.clear()
            _, writer = await client.connect(http_post("/v1/completions", {"prompt": "x"}))
            await asyncio.wait_for(engine.was_submitted.wait(), 30)
            writer.transport.abort()
            await asyncio.wait_for(engine.was_cancelled.wait(), 30)
            while not memory.get_finished_spans():
                await asyncio.sleep(0)
            (left,) = memory.get_finished_spans()
            assert left.attributes["http.response.status_code"] == 499

    asyncio.run(run())


@pytest.mark.parametrize(
    ("environment", "exporters"),
    [
        ({}, []),
        ({"OTEL_SERVICE_NAME": "x"}, []),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, ["otlp"]),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, ["otlp"]),
        ({"OTEL_TRACES_EXPORTER": "console, otlp"}, ["console", "otlp"]),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, []),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, []),
    ],
)
def test_the_standard_environment_decides(environment: dict[str, str], exporters: list[str]) -> None:
    assert exporters_of(environment) == exporters


def test_spans_leave_in_otlp_for_the_collector_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    async def run() -> None:
        received: list[bytes] = []

        async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            received.append(await reader.readexactly(length))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            writer.close()

        collector = await asyncio.start_server(collect, "127.0.0.1", 0)
        port = collector.sockets[0].getsockname()[1]
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        async with serving(FakeEngine()) as client:
            await client.complete()
        collector.close()
        (body,) = received
        (resource_spans,) = ExportTraceServiceRequest.FromString(body).resource_spans
        assert [span.name for span in resource_spans.scope_spans[0].spans] == ["POST /v1/completions"]
        names = {item.key: item.value.string_value for item in resource_spans.resource.attributes}
        assert names["service.name"] == "octavo"

    asyncio.run(run())


def test_nothing_of_it_is_imported_while_it_is_off() -> None:
    code = "import sys, octavo.gateway.api.server; print([n for n in sys.modules if n.startswith('opentelemetry')])"
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
