"""A small server on a socket that answers by a function, for tests of whoever asks."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str, dict[str, Any]], tuple[int, Any]]
"""(path, body) -> (status, what goes out as JSON); status 0: the connection is cut."""


@contextmanager
def serving(reply: Reply) -> Iterator[str]:
    """Its URL. A GET asks with an empty body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(*reply(self.path, {}))

        def do_POST(self) -> None:
            self._say(*reply(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def _say(self, status: int, content: Any) -> None:
            if status == 0:
                self.close_connection = True
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
