"""The bytes of one streamed answer -> its tokens, their stamps, the counts. The only reader of HTTP and SSE.

    bytes + stamp ─► httptools ─► body ─► lines ─► events ─► msgspec ─► choices ─► stamps, tokens, text, usage

It is pure (bytes and stamps in, fields out): however a stream is cut, the fields are the same. Events are decoded by
msgspec, which builds only the fields we read: at 20 us of CPU a token, json.loads alone would be a fifth. Whatever a
server says without an end is ended here, by its size.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import httptools
import msgspec

MOST_TOKENS = 1 << 24
"""More than any context holds: a server that counts more has counted nothing."""
_MAX_EVENT_BYTES = 4 << 20
"""Of one event. The largest honest one is vLLM's first, with the prompt's ids: half a million of them fit."""
_MAX_ANSWER_BYTES = 64 << 20
_MAX_ANSWER_TOKENS = 1 << 18
"""Of one answer: 250 bytes for each of as many tokens as no model answers. What never ends is ended here."""
_MAX_BARE_BYTES = 64 << 10
"""In a row without a byte of the body: headers, trailers, extensions of chunks."""
_WORDS_BYTES = 2 << 10
"""Of an answer that is no stream so much is kept, and so much is waited for."""


class StreamError(Exception):
    """The stream said something that is no answer; `kind` becomes the record's error class."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


_Count = Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]
_Word = Annotated[str, msgspec.Meta(max_length=100, pattern=r"^[ -~]*\Z")]


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: _Word | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class ResponseReader:
    """Takes a response's bytes with their stamps, in any cutting, and keeps what a RequestRecord needs."""

    def __init__(self) -> None:
        self.status = 0
        self.done = False
        self.keep_alive = False
        self.stamps: list[int] = []
        self.tokens: list[int] = []
        self.ids_seen = False
        self.received_tokens = 0
        self.largest_chunk = 0
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.finish_reason: str | None = None
        self.reads = 0
        self.coalesced_reads = 0
        self.last_read_ns = 0
        self._parser = httptools.HttpResponseParser(self)
        self._sse = False
        self.chunked = False
        self._framed = False
        self._coding = b""
        self._streams = False
        self._said_done = False
        self._bytes = self._bare_bytes = self._event_bytes = 0
        self._pending = bytearray()
        """A line that has begun; of an answer that is no stream its first words."""
        self._event: list[bytes] = []

    def feed(self, data: bytes, stamp_ns: int) -> None:
        """Take the next bytes. Raises StreamError for anything that is not a proper token stream."""
        self.last_read_ns = stamp_ns
        self.reads += 1
        self._bytes += len(data)
        self._bare_bytes += len(data)
        before = len(self.stamps)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            raise cause if isinstance(cause, StreamError) else StreamError("protocol", str(cause or error)) from None
        except httptools.HttpParserError as error:
            raise StreamError("protocol", f"not HTTP: {error}") from None
        except httptools.HttpParserUpgrade:
            raise StreamError("protocol", "the server wants to speak something else than HTTP (101)") from None
        if self._bare_bytes > _MAX_BARE_BYTES and not self.done:
            raise StreamError("protocol", f"more than {_MAX_BARE_BYTES >> 10} KiB of headers")
        if self._bytes > _MAX_ANSWER_BYTES:
            raise StreamError("protocol", f"an answer of more than {_MAX_ANSWER_BYTES >> 20} MiB")
        if len(self.stamps) - before > 1:
            self.coalesced_reads += 1

    def feed_eof(self) -> None:
        """The server closed. Raises StreamError unless that is how this answer was to end (no length, not chunked)."""
        if self.done:
            return
        if self.status and not self._streams:
            raise self._no_stream()
        if not self._said_done or self._framed:
            raise StreamError("early_close", "the server closed before the end of the answer")
        self.done = True

    def let_go(self) -> None:
        """Give the parser back: nothing more is fed. It holds our methods as we hold it, and collections are off."""
        del self._parser

    # -- httptools callbacks ------------------------------------------------------------------------------------
    def on_message_begin(self) -> None:
        if self.done:
            raise StreamError("protocol", "more bytes after the end of the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self._sse = value.lower().startswith(b"text/event-stream")
        elif name in (b"content-length", b"transfer-encoding"):
            self._framed = True
            self.chunked = value.lower() == b"chunked"
        elif name == b"content-encoding":
            self._coding = value.lower()

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._streams = self.status == 200 and self._sse and self._coding in (b"", b"identity")

    def on_body(self, body: bytes) -> None:
        self._bare_bytes = 0
        if not self._streams:
            self._pending += body[:_WORDS_BYTES]
            if len(self._pending) >= _WORDS_BYTES:
                raise self._no_stream()
            return
        self._event_bytes += len(body)
        if b"\n" in body:
            self._take_lines(body)
        else:
            self._pending += body
        if self._event_bytes > _MAX_EVENT_BYTES:
            raise StreamError("protocol", f"an event of more than {_MAX_EVENT_BYTES >> 20} MiB")

    def on_message_complete(self) -> None:
        if self.status < 200:
            return  # only a word on the way, as 103 Early Hints: the answer is yet to come
        self.done = True
        self.keep_alive = self._parser.should_keep_alive()
        if not self._streams:
            raise self._no_stream()
        if not self._said_done and self.finish_reason is None:
            raise StreamError("early_close", "the answer ended with neither a finish_reason nor [DONE]")

    def _no_stream(self) -> StreamError:
        """What an answer is that is no event stream, with its first words."""
        said = self._pending.decode("utf-8", "replace")
        if self.status != 200:
            return StreamError(f"http_{self.status}", said[:300])
        if self._sse:
            return StreamError("protocol", f"the answer is compressed ({self._coding[:40].decode('latin-1')})")
        return StreamError("protocol", f"the answer is no event stream: {said[:200]}")

    # -- server-sent events (HTML living standard, section 9.2.6) -----------------------------------------------
    def _take_lines(self, body: bytes) -> None:
        if self._pending:
            body = bytes(self._pending) + body
            self._pending.clear()
        # Cut at LF only: a CR before it is stripped, and a lone CR as line end is something no JSON stream sends.
        *lines, rest = body.split(b"\n")
        self._pending += rest
        for line in lines:
            if line.endswith(b"\r"):
                line = line[:-1]
            if line.startswith(b"data:"):
                self._event.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif not line and self._event:
                event = self._event[0] if len(self._event) == 1 else b"\n".join(self._event)
                self._event.clear()
                self._event_bytes = len(rest)
                self._take_event(event)
            # anything else (": comment" of a proxy, "event:", "id:") carries no token

    def _take_event(self, event: bytes) -> None:
        if event == b"[DONE]":
            self._said_done = True
            return
        try:
            chunk = _decode(event)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            said = event[:200].decode("utf-8", "replace")
            raise StreamError("protocol", f"malformed event ({error}): {said}") from None
        if chunk.error:
            raise StreamError("stream_error", json.dumps(chunk.error)[:300])
        if chunk.usage is not None:
            self.prompt_tokens = chunk.usage.prompt_tokens
            self.completion_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices or ():
            self._take_choice(choice)

    def _take_choice(self, choice: _Choice) -> None:
        text, ids, delta = choice.text, choice.token_ids, choice.delta
        if delta is not None and not text:
            text = delta.content or delta.reasoning_content or delta.reasoning
        # Token-bearing: it carries ids (vLLM sends empty text with an id for partial UTF-8 and for the end of the
        # sequence), else text. A delta with only a role is no token.
        if ids:
            self.ids_seen = True
            self._take_tokens(len(ids))
            self.token_ids += ids
        elif text:
            self._take_tokens(1)
        if text:
            self.text.append(text)
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason

    def _take_tokens(self, count: int) -> None:
        self.stamps.append(self.last_read_ns)
        self.tokens.append(count)
        self.received_tokens += count
        if count > self.largest_chunk:
            self.largest_chunk = count
        if self.received_tokens > _MAX_ANSWER_TOKENS:
            raise StreamError("protocol", f"an answer of more than {_MAX_ANSWER_TOKENS:,} tokens")
