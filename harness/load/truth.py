"""The server whose delays are known: an OpenAI-compatible stream with a scripted TTFT and inter-token gap.

The oracle for the clock: what the client reports is compared with what this server was told to do, and the server
reports its own lateness (how far behind the script it sent), so that nobody blames the client for it. It runs in a
process of its own: two event loops in one process would measure each other.

    python -m harness.load.truth --port 8000 --ttft-ms 50 --gap-ms 20 [--fail-after 3 ...]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import httptools


@dataclass(frozen=True, slots=True)
class Script:
    """What the server does with every request."""

    ttft_ms: float = 50.0
    gap_ms: float = 20.0
    token_ids: bool = True
    """Send `token_ids` when asked to (as vLLM does); False: text only, as other servers."""
    completions: bool = True
    """False: only the chat API exists."""
    strict: bool = False
    """Refuse fields that the OpenAI API does not know, as hosted servers do."""
    status: int = 200
    close_after: int | None = None
    """Close the connection after so many tokens."""
    error_after: int | None = None
    """Send an error object inside the 200 stream after so many tokens."""
    stall_after: int | None = None
    """Say nothing more after so many tokens, and keep the connection."""


_OPENAI_FIELDS = {"model", "prompt", "messages", "max_tokens", "temperature", "stream", "stream_options", "seed"}


class _Stream(asyncio.Protocol):
    """One connection; requests on it are answered one after the other."""

    def __init__(self, script: Script, lateness_ms: list[float]) -> None:
        self._script = script
        self._lateness_ms = lateness_ms
        self._body = bytearray()
        self._url = b""
        self._parser = httptools.HttpRequestParser(self)
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._task:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._arrived = time.perf_counter()
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        url, self._url = self._url.decode(), b""
        body = json.loads(bytes(self._body)) if self._body else {}
        self._body.clear()
        if url == "/v1/models":
            self._answer(200, {"object": "list", "data": [{"id": "truth", "object": "model"}]})
        elif url in ("/v1/completions", "/v1/chat/completions") and (self._script.completions or "chat" in url):
            unknown = set(body) - _OPENAI_FIELDS
            if self._script.strict and unknown:
                self._answer(400, {"error": {"message": f"unrecognized arguments: {sorted(unknown)}"}})
            elif self._script.status != 200:
                self._answer(self._script.status, {"error": {"message": "scripted"}})
            elif not body.get("stream"):
                self._answer(200, {"choices": [{"text": "t"}], "usage": _usage(body)})
            else:
                self._task = asyncio.get_running_loop().create_task(self._stream(body, "chat" in url, self._arrived))
        else:
            self._answer(404, {"error": {"message": f"no {url} here"}})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self._transport.write(head.encode() + data)

    async def _stream(self, body: dict[str, Any], chat: bool, start: float) -> None:
        script, usage = self._script, _usage(body)
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        if chat:
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for number in range(usage["completion_tokens"]):
            due = start + (script.ttft_ms + number * script.gap_ms) / 1e3
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if number == script.close_after:
                self._transport.close()
                return
            if number == script.error_after:
                self._event({"error": {"message": "scripted failure", "code": 500}})
                break
            if number == script.stall_after:
                await asyncio.sleep(3600)
            choice: dict[str, Any] = {"delta": {"content": "t "}} if chat else {"text": "t "}
            if script.token_ids and body.get("return_token_ids"):
                choice["token_ids"] = [number + 10]
            self._event({"choices": [choice]})
            self._lateness_ms.append((time.perf_counter() - due) * 1e3)
        self._event({"choices": [{"delta": {}, "text": "", "finish_reason": "length"}]})
        if (body.get("stream_options") or {}).get("include_usage"):
            self._event({"choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self._transport.write(b"0\r\n\r\n")

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self._transport.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def _usage(body: dict[str, Any]) -> dict[str, int]:
    prompt = body.get("prompt")
    if prompt is None:
        words = sum(len(message["content"].split()) for message in body.get("messages", [])) + 5
    else:
        words = len(prompt) if isinstance(prompt, list) else len(prompt.split())
    tokens = int(body.get("max_tokens", 16))
    return {"prompt_tokens": words, "completion_tokens": tokens, "total_tokens": words + tokens}


async def serve(script: Script, port: int = 0) -> None:
    """Serve on loopback until cancelled; prints `listening PORT` first, and the lateness on its way out."""
    lateness_ms: list[float] = []
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Stream(script, lateness_ms), "127.0.0.1", port, backlog=4096)
    print(f"listening {server.sockets[0].getsockname()[1]}", flush=True)
    try:
        await server.serve_forever()
    finally:
        late = sorted(lateness_ms) or [0.0]
        figures = {"tokens": len(lateness_ms), "p50_ms": late[len(late) // 2], "p99_ms": late[int(len(late) * 0.99)]}
        print(f"lateness {json.dumps(figures)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ttft-ms", type=float, default=Script().ttft_ms)
    parser.add_argument("--gap-ms", type=float, default=Script().gap_ms)
    parser.add_argument("--no-token-ids", action="store_true")
    parser.add_argument("--chat-only", action="store_true")
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--status", type=int, default=200)
    for fault in ("close", "error", "stall"):
        parser.add_argument(f"--{fault}-after", type=int)
    given = parser.parse_args()
    script = Script(
        ttft_ms=given.ttft_ms,
        gap_ms=given.gap_ms,
        token_ids=not given.no_token_ids,
        completions=not given.chat_only,
        strict=given.strict,
        status=given.status,
        close_after=given.close_after,
        error_after=given.error_after,
        stall_after=given.stall_after,
    )
    try:
        asyncio.run(serve(script, given.port))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
