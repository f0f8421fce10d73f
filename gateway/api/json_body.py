"""A request's body: read within bounds, decoded strictly, refused in words that name the field."""

from __future__ import annotations

import asyncio
import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Generic, TypeVar

import msgspec
from aiohttp import web

from .http_errors import ApiError, bad_request
from .id_lists import IdList, decode_in_pieces, is_long_id_list
from .json_shape import members, refuse_too_much
from .protocol import HARMLESS, Unsupported

_T = TypeVar("_T", bound=msgspec.Struct)

LONG_BODY_BYTES: Final = 256 * 1024
_ID_LISTS: Final = ("prompt", "tokens")

_PATH = re.compile(r" - at `(?:key in )?\$\.?(.*)`$", re.DOTALL)
_MISSING_FIELD = re.compile(r"Object missing required field `(\w+)`")
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)


class BodyDecoder(Generic[_T]):
    """Decodes one endpoint's body.

    Args:
        kind: the struct that the body must be.
    """

    def __init__(self, kind: type[_T]) -> None:
        self._decoder = msgspec.json.Decoder(kind)
        self._names = [field.encode_name for field in msgspec.structs.fields(kind)]

    async def read(self, request: web.Request, *, max_bytes: int, timeout_s: float) -> _T:
        """The body of a request.

        Raises:
            ApiError: 408, 413, 415, or 400 with the field that is wrong.
        """
        return await self.decode_in_turns(await read_bytes(request, max_bytes=max_bytes, timeout_s=timeout_s))

    def decode(self, body: bytes) -> _T:
        """Decode a JSON document.

        Raises:
            ApiError: 400; `param` is the field's dotted path.
        """
        refuse_too_much(body)
        decoded = self._decode(body)
        self._members(body)
        return decoded

    async def decode_in_turns(self, body: bytes) -> _T:
        """As `decode`, but others have a turn now and then while a long body is decoded."""
        if len(body) < LONG_BODY_BYTES:
            return self.decode(body)
        refuse_too_much(body)
        await asyncio.sleep(0)
        spans = self._members(body)
        await asyncio.sleep(0)
        for name in _ID_LISTS:
            start, end = spans.get(name, (0, 0))
            if name in self._names and is_long_id_list(body[start:end]):
                decoded = self._decode(b"%b[]%b" % (body[:start], body[end:]))  # all but these, which may be refused
                setattr(decoded, name, await self._ids(name, body[start:end]))
                return decoded
        return self._decode(body)

    async def _ids(self, name: str, raw: bytes) -> IdList:
        ids: IdList = []
        try:
            for _ in decode_in_pieces(raw, ids):
                await asyncio.sleep(0)
        except msgspec.ValidationError as error:
            message = str(error).partition(" - at `")[0]
            raise bad_request(f"{name}: {message}", name) from None
        return ids

    def _members(self, body: bytes) -> dict[str, tuple[int, int]]:
        with self._refusing():
            if not body.isascii():
                # Strings that are skipped over are not looked at by the decoder.
                body.decode()
            return members(body)

    def _decode(self, body: bytes) -> _T:
        with self._refusing():
            decoded = self._decoder.decode(body)
        if isinstance(decoded, Unsupported):
            _refuse_unsupported(decoded)
        return decoded

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """What a decoder has to say, as it is said to clients."""
        try:
            yield
        except UnicodeDecodeError:
            raise bad_request("the body is not valid UTF-8", code="invalid_json") from None
        except RecursionError:
            raise bad_request("the body is nested too deeply", code="invalid_json") from None
        except msgspec.ValidationError as error:
            raise self._refusal(str(error)) from None
        except msgspec.DecodeError as error:
            raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None

    def _refusal(self, message: str) -> ApiError:
        found = _PATH.search(message)
        param = found.group(1)[:100] if found else None
        message = message[: found.start()] if found else message
        missing = _MISSING_FIELD.fullmatch(message)
        if missing is not None:
            path = f"{param}.{missing.group(1)}" if param else missing.group(1)
            return bad_request(f"{path} is missing", path)
        unknown = _UNKNOWN_FIELD.fullmatch(message)
        if unknown is None:
            return bad_request(f"{param}: {message}" if param else message, param)
        name = unknown.group(1)[:100]
        path = f"{param}.{name}" if param else name
        nearest = [] if param else difflib.get_close_matches(name, self._names, n=1, cutoff=0.7)
        hint = f": did you mean {nearest[0]}?" if nearest else ""
        return bad_request(f"unknown parameter {path}{hint}", path, "unknown_parameter")


async def read_bytes(request: web.Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """Read a JSON body.

    Raises:
        ApiError: 415 for anything but JSON as it is, 413 if it is too long, 408 if it does not come.
    """
    refuse_by_headers(request, max_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            while chunk := await request.content.readany():
                size += len(chunk)
                if size > max_bytes:
                    raise _too_long(max_bytes)
                chunks.append(chunk)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {timeout_s:g} s", code="request_timeout") from None
    except (web.RequestPayloadError, ValueError):
        raise bad_request("the body could not be read: its framing is broken", code="invalid_body") from None
    return b"".join(chunks)


def refuse_by_headers(request: web.Request, max_bytes: int) -> None:
    """What the headers alone show to be wrong.

    Raises:
        ApiError: 413 or 415.
    """
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(415, "compressed bodies are not accepted: send the JSON as it is", code="unsupported_encoding")
    content_type = request.headers.get("Content-Type", "")
    media_type, _, options = content_type.partition(";")
    media_type = media_type.strip().lower()
    charset = options.strip().lower().removeprefix("charset=").strip('"')
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise ApiError(415, "send the body with Content-Type: application/json", code="unsupported_media_type")
    if options.strip().lower().startswith("charset=") and charset not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(415, "send the body in UTF-8", code="unsupported_charset")
    if (request.content_length or 0) > max_bytes:
        raise _too_long(max_bytes)


def _too_long(max_bytes: int) -> ApiError:
    # What was not read of it must not be taken for the next request.
    return ApiError(
        413, f"the body is longer than {max_bytes} bytes", code="body_too_large", headers={"Connection": "close"}
    )


def _refuse_unsupported(request: Unsupported) -> None:
    for name in _REFUSED_FIELDS:
        raw = getattr(request, name, None)
        if not isinstance(raw, msgspec.Raw):
            continue
        value = bytes(raw).strip()
        if (
            value in (b"", b"null")
            or value in HARMLESS.get(name, ())
            or b"".join(value.split()) in HARMLESS.get(name, ())
        ):
            continue
        if name == "response_format" and _is_text_format(raw):
            continue
        raise bad_request(f"{name} is not supported by this server: leave it out", name, "unsupported_parameter")


def _is_text_format(raw: msgspec.Raw) -> bool:
    try:
        return msgspec.json.decode(raw, type=dict[str, str]) == {"type": "text"}
    except msgspec.DecodeError:
        return False


_REFUSED_FIELDS = (
    *(field.name for field in msgspec.structs.fields(Unsupported)),
    "suffix",
    "prompt_embeds",
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "documents",
    "chat_template",
    "modalities",
    "audio",
    "prediction",
    "web_search_options",
    "verbosity",
    "media_io_kwargs",
)
