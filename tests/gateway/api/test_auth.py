from __future__ import annotations

import asyncio

import pytest
from fake_engine import FakeEngine
from http_client import serving

from octavo.gateway.api.auth import OPEN_PATHS
from octavo.gateway.api.server import create_app
from octavo.gateway.api.settings import ServerSettings

KEYS = ("first-key", "schlüssel")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_every_route_asks_for_a_key_unless_it_is_on_the_open_list() -> None:
    async def run() -> None:
        app = create_app(FakeEngine(), ServerSettings())
        routes = [
            (route.method, route.resource.canonical) for route in app.router.routes() if route.resource is not None
        ]
        assert len(routes) > 15
        async with serving(api_keys=KEYS) as client:
            for method, path in routes:
                filled = path.replace("{model}", "fake/bytes")
                answer = await client.request(method, filled)
                if path in OPEN_PATHS:
                    assert answer.status in (200, 204), path
                elif method == "HEAD":
                    assert answer.status == 401, path
                else:
                    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), path
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
            for path in ("/nope", "//health", "/health/../v1/models", "/%68ealth/x"):
                assert (await client.get(path)).status == 401, path

    asyncio.run(run())


def test_any_of_the_keys_opens_and_nothing_else_does() -> None:
    async def run() -> None:
        async with serving(api_keys=KEYS) as client:
            for key in KEYS:
                assert (await client.get("/v1/models", headers=bearer(key))).status == 200
            wrong = ("", "first-ke", "first-key2", "FIRST-KEY", "é" * 10, "x" * 5000)
            for key in wrong:
                assert (await client.get("/v1/models", headers=bearer(key))).status == 401, key
            for header in ("first-key", "Basic first-key", "Bearer"):
                assert (await client.get("/v1/models", headers={"Authorization": header})).status == 401, header
            two = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + (
                b"Authorization: Bearer first-key\r\nAuthorization: Bearer x\r\n\r\n"
            )
            assert (await client.raw(two)).startswith(b"HTTP/1.1 401")

    asyncio.run(run())


@pytest.mark.parametrize("host", ["localhost/?", "localhost/health", "a@b", "localhost#", "/health"])
def test_what_the_host_header_says_does_not_change_who_may_enter(host: str) -> None:
    async def run() -> None:
        async with serving(api_keys=KEYS) as client:
            data = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
            assert (await client.raw(data)).split()[1] in (b"400", b"401")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", b"200"), ("127.0.0.1", b"200"), ("[::1]:8000", b"200"), ("evil.example", b"403"), ("", b"403")],
)
def test_a_local_server_without_keys_answers_to_local_names_only(host: str, status: bytes) -> None:
    async def run() -> None:
        async with serving() as client:
            data = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
            assert (await client.raw(data)).split()[1] == status

    asyncio.run(run())


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        (("box.example",), "box.example:8000", b"200"),
        (("box.example",), "BOX.example.", b"200"),
        (("box.example",), "localhost", b"200"),
        (("box.example",), "10.0.0.1", b"200"),
        (("box.example",), "not.box.example", b"403"),
        (("*",), "anything.example", b"200"),
    ],
)
def test_a_server_answers_to_the_names_it_was_given(allowed: tuple[str, ...], host: str, status: bytes) -> None:
    async def run() -> None:
        for keys in ((), KEYS):  # a key takes nothing away from a check that was asked for
            async with serving(allowed_hosts=allowed, api_keys=keys) as client:
                data = f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
                assert (await client.raw(data)).split()[1] == status

    asyncio.run(run())


def test_pages_of_other_sites_are_refused_unless_they_were_let_in() -> None:
    async def run() -> None:
        page = {"Origin": "https://chat.example"}
        async with serving() as client:
            answer = await client.post("/v1/completions", {"prompt": "x"}, page)
            assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")
            own = await client.post("/v1/completions", {"prompt": "x"}, {"Origin": client.url})
            assert own.status == 200
        async with serving(allowed_origins=("https://chat.example",)) as client:
            for stream in (False, True):
                answer = await client.post("/v1/completions", {"prompt": "x", "stream": stream}, page)
                assert answer.status == 200
                assert answer.headers["Access-Control-Allow-Origin"] == "https://chat.example"
            other = await client.post("/v1/completions", {"prompt": "x"}, {"Origin": "https://other.example"})
            assert other.status == 403 and "Access-Control-Allow-Origin" not in other.headers

    asyncio.run(run())


def test_a_browser_may_ask_before_it_calls_without_a_key() -> None:
    async def run() -> None:
        headers = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
        async with serving(allowed_origins=("*",), api_keys=KEYS) as client:
            answer = await client.request("OPTIONS", "/v1/completions", headers=headers)
            assert answer.status == 204 and answer.headers["Access-Control-Allow-Origin"] == "*"
            assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]
        async with serving(api_keys=KEYS) as client:
            assert (await client.request("OPTIONS", "/v1/completions", headers=headers)).status == 403

    asyncio.run(run())
