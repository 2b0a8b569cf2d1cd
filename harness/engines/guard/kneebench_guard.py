"""Runs in vLLM's API server (this folder stands on its PYTHONPATH, `--middleware` names the class): no key, no answer.

vLLM itself asks for its key only below /v1. In vLLM 0.32 /invocations generates, /tokenize and /scale_elastic_ep work
for whoever asks: on a shared machine any user, and any web page in a browser there (it allows all origins). A request
that is not ours would be load in somebody's measurement. One look at a header a request; nothing is done per token.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_BODY = b'{"error": "Unauthorized"}'
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())]


class KeyRequired:
    """ASGI middleware around everything: requests without `Authorization: Bearer $VLLM_API_KEY` get 401."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._knows_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": _BODY})
        else:
            await send({"type": "websocket.close", "code": 1008})  # policy violation, RFC 6455

    def _knows_key(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._expected)
