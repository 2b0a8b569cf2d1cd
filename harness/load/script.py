"""What the truth server says: its script, what it understands of a request, and the bytes of an answer.

Pure: no sockets and no clock. When each byte goes is truth.py's matter. The chunks are vLLM's, key for key, and cheap:
all but the token's own text and id is put together once for a request.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from harness.errors import InputError

FIRST_ID, LAST_ID = 100, 29_999
"""Every word has a token id in this range."""
_KV_CACHE_TOKENS = 1 << 16
_OPENAI_FIELDS = set(
    "model prompt messages max_tokens max_completion_tokens temperature top_p n stop stream stream_options seed user "
    "presence_penalty frequency_penalty logit_bias logprobs".split()
)


def _option(default: Any, text: str, *, least: float = 0, most: float = float("inf"), fault: bool = False) -> Any:
    """A field that is also an option of the command line: `text` is its help."""
    return field(default=default, metadata={"help": text, "least": least, "most": most, "fault": fault})


@dataclass(frozen=True, slots=True)
class Script:
    """What the server does. A field is an option: `gap_ms` is --gap-ms, `token_ids` is --no-token-ids."""

    ttft_ms: float = _option(50.0, "from a request's arrival to its first chunk")
    gap_ms: float = _option(20.0, "from chunk to chunk")
    gap_per_running_ms: float = _option(0.0, "the gap grows by this for each running request: a server that saturates")
    gap_growth: float = _option(0.0, "the gap grows by this share of itself a second: a server that drifts")
    max_running: int | None = _option(None, "so many requests are served at once, the others wait in turn", least=1)

    token_ids: bool = _option(True, "send token_ids when asked to, as vLLM does")
    chat_only: bool = _option(False, "there is no completions API")
    strict: bool = _option(False, "refuse fields that the OpenAI API does not know, as hosted servers do")
    tokenize: bool = _option(True, "/tokenize exists")
    tokens_per_chunk: int = _option(1, "tokens in each chunk, as with speculative decoding", least=1)
    empty_text_every: int | None = _option(None, "each so-many-th chunk has an id and no text", least=1)
    comment_every: int | None = _option(None, "a proxy's comment line before each so-many-th chunk", least=1)
    drip: int | None = _option(None, "chunks go in pieces of so many bytes, 1 ms apart", least=1)
    multibyte: bool = _option(False, "text of multi-byte characters, each chunk cut inside one of them")

    cache_hits: float = _option(0.0, "share of the prompt tokens that the counters call prefix-cache hits", most=1)
    preempt_every: int | None = _option(None, "each so-many-th request counts as a preemption", least=1)
    counter_factor: float = _option(1.0, "generation_tokens_total is so many times the truth")

    every: int = _option(1, "the faults below befall only each so-many-th request", least=1)
    status: int = _option(200, "answer with this HTTP status", least=200, most=599, fault=True)
    echo_auth: bool = _option(
        False, "errors quote the Authorization header; without --status or --error-after, all get a 401", fault=True
    )
    close_after: int | None = _option(None, "close the connection after so many tokens", fault=True)
    error_after: int | None = _option(None, "an error object in the stream after so many tokens", fault=True)
    stall_after: int | None = _option(None, "silence after so many tokens, the connection stays", fault=True)
    short: int = _option(0, "answer so many tokens fewer than asked for", fault=True)
    usage: bool = _option(True, "tell the usage", fault=True)
    prompt_tokens_off: int = _option(0, "the usage counts so many prompt tokens too many", least=-1e9, fault=True)

    def __post_init__(self) -> None:
        for option in fields(self):
            value, least, most = getattr(self, option.name), option.metadata["least"], option.metadata["most"]
            if value is not None and not least <= value <= most:
                flag = "--" + option.name.replace("_", "-")
                limit = f"{least:g} to {most:g}" if most < float("inf") else f"{least:g} or more"
                raise InputError(f"{flag} {value:g}: out of range.", allowed=limit, remedy=f"give {flag} such a number")

    def without_faults(self) -> Script:
        """The same server on a good day."""
        calm: dict[str, Any] = {option.name: option.default for option in fields(self) if option.metadata["fault"]}
        return replace(self, **calm)

    def fault_after(self, tokens: int) -> tuple[int, str]:
        """(tokens sent before it, name) of the first fault within an answer of so many tokens; "" when none comes."""
        planned = ((self.close_after, "close"), (self.error_after, "error"), (self.stall_after, "stall"))
        due = [(after, name) for after, name in planned if after is not None and after < tokens]
        return min(due, default=(tokens, ""))

    def complaint(self, words: str, request: Request) -> str:
        """The words of an error."""
        return f"{words}: your header is {request.authorization}" if self.echo_auth else words


class Refusal(Exception):
    """The request is answered with this status and these words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """What the server understood of a request for tokens."""

    id: str | None
    """Its X-Request-Id."""
    model: str
    authorization: str
    chat: bool
    stream: bool
    prompt_tokens: int
    tokens: int
    ids_wanted: bool
    usage_wanted: bool


def read_request(url: str, headers: Mapping[str, str], body: bytes, script: Script) -> Request:
    """Read a request for tokens. Raises Refusal for one that vLLM would refuse, too, and where the script says so."""
    chat = url == "/v1/chat/completions"
    asked = _object(body)
    unknown = sorted(set(asked) - _OPENAI_FIELDS)
    if script.strict and unknown:
        raise Refusal(400, f"unrecognized arguments: {unknown}")
    tokens = asked.get("max_completion_tokens") or asked.get("max_tokens")
    tokens = 16 if tokens is None else tokens
    if not isinstance(tokens, int) or tokens < 1:
        raise Refusal(400, f"max_tokens is {tokens!r}, which is no number of tokens")
    options = asked.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refusal(400, "stream_options is no object")
    request = Request(
        id=headers.get("x-request-id"),
        model=str(asked.get("model") or "truth"),
        authorization=headers.get("authorization", ""),
        chat=chat,
        stream=bool(asked.get("stream")),
        prompt_tokens=_message_words(asked.get("messages")) + 5 if chat else len(_prompt(asked.get("prompt"))),
        tokens=tokens,
        ids_wanted=script.token_ids and bool(asked.get("return_token_ids")),
        usage_wanted=script.usage and bool(options.get("include_usage")),
    )
    if script.status != 200 or (script.echo_auth and script.error_after is None):
        raise Refusal(401 if script.status == 200 else script.status, script.complaint("scripted", request))
    return request


def _object(body: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"malformed JSON: {error}") from None
    if not isinstance(asked, dict):
        raise Refusal(400, "the body is no JSON object")
    return asked


def _prompt(prompt: object) -> list[object]:
    """The prompt's tokens: its ids, or its words. A list of one prompt is that prompt."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return list(prompt.split())
    if isinstance(prompt, list) and all(isinstance(item, int) for item in prompt):
        return prompt
    raise Refusal(400, "the prompt is neither text nor a list of token ids")


def _message_words(messages: object) -> int:
    words = 0
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        parts = content if isinstance(content, list) else [{"text": content}]
        words += sum(len(str(part.get("text") or "").split()) for part in parts if isinstance(part, dict))
    return words


def tokenized(body: bytes) -> dict[str, Any]:
    """The answer of /tokenize: a word is a token, and its id hangs on the word alone."""
    asked = _object(body)
    text = asked.get("prompt")
    if text is None:
        messages = asked.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise Refusal(400, "neither a prompt nor messages")
        text = " ".join(str(message.get("content")) for message in messages)
    words = (word.encode("utf-8", "replace") for word in str(text).split())
    ids = [FIRST_ID + zlib.crc32(word) % (LAST_ID + 1 - FIRST_ID) for word in words]
    return {"count": len(ids), "max_model_len": _KV_CACHE_TOKENS, "tokens": ids, "token_strs": None}


def models() -> dict[str, Any]:
    """The answer of /v1/models."""
    card = {"id": "truth", "object": "model", "created": 0, "owned_by": "truth", "root": "truth", "parent": None}
    return {"object": "list", "data": [{**card, "max_model_len": _KV_CACHE_TOKENS}]}


@functools.lru_cache(maxsize=1 << 16)
def _spelled(first: int, stop: int, letter: str) -> tuple[bytes, bytes]:
    """(text, ids) of the tokens from `first` to before `stop`."""
    numbers = range(first, stop)
    text = "".join(f" {letter}{number}" for number in numbers)
    ids = ",".join(str(FIRST_ID + number % (LAST_ID + 1 - FIRST_ID)) for number in numbers)
    return text.encode(), ids.encode()


class Wording:
    """The bytes of one answer."""

    def __init__(self, script: Script, request: Request, name: str, created: int) -> None:
        self._script, self._request = script, request
        self._letter = "世" if script.multibyte else "t"
        kind = "chat.completion" if request.chat else "text_completion"
        chunk_kind = kind + ".chunk" if request.chat else kind
        about = {"id": ("chatcmpl-" if request.chat else "cmpl-") + name, "created": created, "model": request.model}
        self._whole_about = {"object": kind, **about}
        self._about = json.dumps({"object": chunk_kind, **about}, separators=(",", ":")).encode()[:-1]
        # data: {about,"choices":[{"index":0,"text":" TEXT ","logprobs":null,"finish_reason": REASON ... IDS ...}]}
        opening = b'"delta":{"content":"' if request.chat else b'"text":"'
        self._before = b"data: " + self._about + b',"choices":[{"index":0,' + opening
        self._after = b'"},' if request.chat else b'",'
        self._reason = b'"stop"' if script.short else b'"length"'

    def role(self) -> bytes:
        """The chat API's first delta: a role and no token."""
        return _http_chunk(
            b"data: " + self._about + b',"choices":[{"index":0,"delta":{"role":"assistant","content":""},'
            b'"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
        )

    def tokens(self, first: int, stop: int, *, last: bool, empty: bool) -> bytes:
        """The chunk with the tokens from `first` to before `stop`; the `last` one tells the finish reason."""
        text, ids = _spelled(first, stop, self._letter)
        return _http_chunk(
            b'%b%b%b"logprobs":null,"finish_reason":%b,"stop_reason":null%b}],"usage":null}\n\n'
            % (
                self._before,
                b"" if empty else text,
                self._after,
                self._reason if last else b"null",
                b',"token_ids":[%b]' % ids if self._request.ids_wanted else b"",
            )
        )

    def pieces(self, chunk: bytes) -> list[bytes]:
        """`chunk` as it goes over the wire: whole, dripping, or cut inside a character."""
        if self._script.drip:
            size = self._script.drip
            return [chunk[start : start + size] for start in range(0, len(chunk), size)]
        middle = chunk.find("世".encode()) + 1
        return [chunk[:middle], chunk[middle:]] if self._script.multibyte and middle else [chunk]

    def error(self, message: str) -> bytes:
        """An error object inside the stream."""
        return _http_chunk(b"data: " + json.dumps({"error": {"message": message, "code": 500}}).encode() + b"\n\n")

    def ending(self, tokens: int) -> bytes:
        """All that follows the last token."""
        usage = b""
        if self._request.usage_wanted:
            counts = json.dumps(self._usage(tokens), separators=(",", ":")).encode()
            usage = _http_chunk(b"data: " + self._about + b',"choices":[],"usage":' + counts + b"}\n\n")
        return usage + STREAM_END

    def whole(self, tokens: int) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        text, ids = _spelled(0, tokens, self._letter)
        said = {"message": {"role": "assistant", "content": text.decode()}} if self._request.chat else {}
        choice: dict[str, Any] = {
            "index": 0, **(said or {"text": text.decode()}), "logprobs": None,
            "finish_reason": self._reason.decode().strip('"'), "stop_reason": None,
        }  # fmt: skip
        if self._request.ids_wanted:
            choice["token_ids"] = [int(number) for number in ids.split(b",") if number]
        return {**self._whole_about, "choices": [choice], "usage": self._usage(tokens) if self._script.usage else None}

    def _usage(self, tokens: int) -> dict[str, int]:
        prompt = self._request.prompt_tokens + self._script.prompt_tokens_off
        return {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens}


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_END = _http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
COMMENT = _http_chunk(b": keep-alive\n\n")


@dataclass(slots=True)
class Counters:
    """What /metrics tells, in vLLM's names."""

    running: int = 0
    waiting: int = 0
    held_tokens: int = 0
    """Tokens in the KV cache: prompts and answers of all that run."""
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0

    def page(self, script: Script) -> bytes:
        """The page in Prometheus' text format."""
        figures = (
            ("num_requests_running", "gauge", self.running),
            ("num_requests_waiting", "gauge", self.waiting),
            ("kv_cache_usage_perc", "gauge", min(1.0, self.held_tokens / _KV_CACHE_TOKENS)),
            ("num_preemptions_total", "counter", self.preemptions),
            ("prefix_cache_queries_total", "counter", self.prompt_tokens),
            ("prefix_cache_hits_total", "counter", round(self.prompt_tokens * script.cache_hits)),
            ("prompt_tokens_total", "counter", self.prompt_tokens),
            ("generation_tokens_total", "counter", round(self.generation_tokens * script.counter_factor)),
        )
        lines = (
            f'# TYPE vllm:{name} {kind}\nvllm:{name}{{engine="0",model_name="truth"}} {float(value)}\n'
            for name, kind, value in figures
        )
        return "".join(lines).encode()
