"""HTTP/1.1 as it comes over a connection: bytes to requests, answers to bytes. It reads and writes nothing.

llhttp (through httptools) parses, strictly: what could be framed in two ways is refused, never guessed.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from http import HTTPStatus

import httptools

__all__ = ["CONTINUE", "Refusal", "Request", "Wire", "answer", "answer_json"]

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
MAX_HEAD_BYTES = 16 << 10
MAX_PIPELINED = 32  # requests that came before the first of them was answered
_KNOWN = frozenset(
    {
        b"authorization", b"content-encoding", b"content-length", b"content-type", b"expect", b"host",
        b"idempotency-key", b"origin", b"transfer-encoding",
    }
)  # fmt: skip
_PLAIN = "text/plain; charset=utf-8"


class Refusal(Exception):
    """A request that is not taken; the message says why and what to do.

    Args:
        status: Of the answer.
        message: For whoever sent it.
        headers: Added to the answer.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] = {}) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class Request:
    """One request; its body comes while it is answered.

    Attributes:
        method, path: From its first line, without a query.
        headers: Those that we look at, names in small letters.
        keep_alive: Whether the connection may be used again.
        modern: Whether the client speaks 1.1, and so understands 100 Continue.
        body: Pieces that came and were not taken yet.
        complete: Whether no more will come.
    """

    __slots__ = ("body", "complete", "headers", "keep_alive", "method", "modern", "path")

    def __init__(self) -> None:
        self.method = self.path = ""
        self.headers: dict[bytes, bytes] = {}
        self.keep_alive = self.modern = self.complete = False
        self.body: list[bytes] = []

    def text(self, name: bytes) -> str:
        """A header, "" if it is missing."""
        return self.headers.get(name, b"").decode("latin-1").strip()

    @property
    def media_type(self) -> str:
        """What the body is, without parameters; "" if nothing is said."""
        return self.text(b"content-type").partition(";")[0].strip().lower()

    @property
    def encoding(self) -> str:
        """How the body is packed; "" if it is not."""
        return self.text(b"content-encoding").lower()

    @property
    def goes_on(self) -> bool:
        """Whether another request may follow on the connection."""
        return self.keep_alive and self.complete

    @property
    def content_length(self) -> int | None:
        """Bytes of the body as announced, None where it comes in chunks or not at all."""
        stated = self.headers.get(b"content-length")
        return None if stated is None else int(stated)


class Wire:
    """Parses what one connection brings.

    Attributes:
        requests: Whose heads are complete, in order; whoever answers takes them off.
        fault: Why nothing more can be read from this connection, None while it can.
    """

    def __init__(self) -> None:
        self.requests: deque[Request] = deque()
        self.fault: Refusal | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._request: Request | None = None
        self._url = b""
        self._in_head = False
        self._header_bytes = 0  # of the headers of this head, or of the trailers
        self._framing_bytes = 0  # that were fed since a head was complete, or some of a body came
        self._progress = False  # whether the bytes just fed did that

    @property
    def quiet(self) -> bool:
        """Whether no request has begun that was not handed over whole."""
        return self._request is None

    def feed(self, data: bytes) -> None:
        """Take bytes; never raises."""
        if self.fault is not None:
            return
        self._progress = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # refused when its head was complete
        except httptools.HttpParserError as error:
            self._refuse(400, f"not a request in HTTP/1.1: {error}")
        # The parser keeps what it has of a header, or of a trailer, however long it gets.
        if not self._progress and self._request is not None:
            self._framing_bytes += len(data)
            if self._framing_bytes > MAX_HEAD_BYTES:
                self._refuse(431, f"more than {MAX_HEAD_BYTES} bytes of headers")

    def on_message_begin(self) -> None:
        """A request begins."""
        self._request, self._url, self._in_head = Request(), b"", True
        self._header_bytes = self._framing_bytes = 0
        if len(self.requests) >= MAX_PIPELINED:
            self._refuse(400, f"more than {MAX_PIPELINED} requests before the first answer")

    def on_url(self, url: bytes) -> None:
        """A part of its target came."""
        self._url += url

    def on_header(self, name: bytes, value: bytes | None) -> None:
        """A header came, or a trailer."""
        self._header_bytes += len(name) + len(value or b"") + 4
        if self._header_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"more than {MAX_HEAD_BYTES} bytes of headers")
        elif self._in_head and self._request is not None and (name := name.lower()) in _KNOWN:
            if name in self._request.headers:
                self._refuse(400, f"the header {name.decode()} came twice")
            self._request.headers[name] = value or b""

    def on_headers_complete(self) -> None:
        """The head is complete."""
        request, self._in_head = self._request, False
        self._header_bytes, self._framing_bytes, self._progress = 0, 0, True
        if request is None or self.fault is not None:
            return
        request.method = self._parser.get_method().decode("latin-1")
        request.path = self._url.partition(b"?")[0].decode("latin-1")
        request.keep_alive = self._parser.should_keep_alive()
        request.modern = self._parser.get_http_version() == "1.1"
        if self._parser.should_upgrade():
            self._refuse(400, "no other protocol is spoken here: leave Upgrade out")
        elif request.headers.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
            self._refuse(400, "of the transfer encodings only chunked is understood")
        elif request.modern and b"host" not in request.headers:
            self._refuse(400, "the header Host is missing")
        else:
            self.requests.append(request)

    def on_body(self, data: bytes) -> None:
        """A piece of the body came."""
        if self._request is not None:
            self._request.body.append(data)
            self._framing_bytes, self._progress = 0, True

    def on_message_complete(self) -> None:
        """The request is complete."""
        if self._request is not None:
            self._request.complete = True
        self._request, self._progress = None, True

    def _refuse(self, status: int, message: str) -> None:
        if self.fault is None:
            self.fault = Refusal(status, message)


def answer(
    status: int,
    text: str,
    headers: Mapping[str, str] = {},
    *,
    keep_alive: bool,
    kind: str = _PLAIN,
    bare: bool = False,
) -> bytes:
    """An answer as it goes over the connection.

    Args:
        status, text, headers: What it says.
        keep_alive: Whether the connection stays open after it.
        kind: Media type of the text.
        bare: Leave the text out, as HEAD wants it.
    """
    body = text.encode()
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        f"Connection: {'keep-alive' if keep_alive else 'close'}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if bare else body)


def answer_json(
    status: int, content: object, headers: Mapping[str, str] = {}, *, keep_alive: bool, bare: bool = False
) -> bytes:
    """An answer in JSON, with a line end for those who read it in a terminal."""
    text = json.dumps(content, ensure_ascii=False) + "\n"
    return answer(status, text, headers, keep_alive=keep_alive, kind="application/json", bare=bare)
