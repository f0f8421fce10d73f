"""How the HTTP server behaves; checked once, never written to."""

from __future__ import annotations

import msgspec


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names, keys and bounds of the HTTP side.

    Attributes:
        served_model_names: names clients may use, the first one answers; empty means the engine's own.
        api_keys: any of these is accepted; none means that no key is asked for.
        allowed_origins: browser pages from these origins may call (`*` for all); empty means no CORS at all.
        allowed_hosts: names a `Host` header may carry, in lower case, against DNS rebinding; addresses always may, and
            `*` is any. Empty: no check, but on a loopback address without keys `localhost` alone.
        max_connections: open at a time, then 503; 0 for no bound. Each takes a file descriptor.
        max_connections_per_client: open at a time from one address (IPv6: one /64 network), then 429; 0 for no bound.
        trusted_proxies: addresses or networks of proxies that many clients stand behind; the bound for one client does
            not hold for these. Headers such as X-Forwarded-For are never believed.
        max_body_bytes: of a request.
        max_n: sequences per prompt.
        max_prompts: prompts in one completions request.
        max_messages: in one chat request.
        header_timeout_s, body_timeout_s, keepalive_timeout_s: for a client that does not send.
        stream_buffer_bytes: unsent bytes of a stream before it counts as stalled, and as much again before it is cut.
        stream_stall_s: a stream that cannot be written to for so long is cut.
        sse_keep_alive_s: a comment line after so much silence on a stream; 0 for none.
        request_timeout_s: an answer that takes longer, waiting included, ends with what it has, as `abort`; None for no
            limit.
        max_open_bytes: of bodies of requests that are open, then 429; 0 for no bound.
        max_queue_wait_s: while those who wait would take longer, by the speed of late, more are refused with 429; 0 for
            no bound. As many sequences as run at a time may wait in any case.
        ready_grace_s: an executor that is being replaced makes the server not ready after so long.
        stall_s: so makes work that is there while no step ends; engines slower than that get more.
        shutdown_timeout_s: how long open responses may go on once the server is told to stop; None for as long as it
            takes.
        log_requests: one log line for each request, at its end.
        stream_journal: folder in which open streams are noted, to be taken up by the next server; empty for none.
        enable_fault_injection: clients may make actors fail (`POST /debug/crash`); for tests of recovery alone.
    """

    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_connections: int = 16384
    max_connections_per_client: int = 4096
    trusted_proxies: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 1024 * 1024
    max_n: int = 16
    max_prompts: int = 64
    max_messages: int = 2048
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keepalive_timeout_s: float = 75.0
    stream_buffer_bytes: int = 256 * 1024
    stream_stall_s: float = 30.0
    sse_keep_alive_s: float = 0.0
    request_timeout_s: float | None = None
    max_open_bytes: int = 256 * 1024 * 1024
    max_queue_wait_s: float = 5.0
    ready_grace_s: float = 1.0
    stall_s: float = 5.0
    shutdown_timeout_s: float | None = None
    log_requests: bool = True
    enable_fault_injection: bool = False
    stream_journal: str = ""
