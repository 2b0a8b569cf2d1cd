"""What the simulated server understands of a request, and the bytes of its answers. Pure: no socket and no clock.

There is no model behind it, so a token is the word "simulated", whatever was asked, and nobody can take an answer for
one. There is no tokenizer either: of a text, every 4 bytes are a token. Prompts of token ids are as long as they are.
Errors are those of vLLM 0.32 (entrypoints/serve/exception_handling, renderers/params.py), word for word where a client
may look at them.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

import msgspec

from harness.analysis.validity import SIMULATED_ENGINE

BYTES_A_TOKEN = 4
"""Of English text, in most vocabularies: OpenAI's rule of thumb (help.openai.com, "What are tokens")."""
CHAT_TOKENS, MESSAGE_TOKENS = 3, 5
"""What a template adds: before the answer, and with each message. ChatML: <|im_start|> role \\n ... <|im_end|> \\n."""
COMPLETION_TOKENS = 16
"""Length of a completion for which none is given: vLLM's own."""
CHAT_ANSWER_TOKENS = 256
"""Length of a chat's answer for which none is given. A model ends its answer by itself; this one would not."""

_WORD = " simulated"


class Refusal(Exception):
    """The request is answered with this status and an error object."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass(frozen=True, slots=True)
class Model:
    """What is served, as requests see it."""

    name: str
    context: int
    """Tokens: prompt and answer."""
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Question:
    """A request for tokens."""

    chat: bool
    stream: bool
    prompt_tokens: int
    tokens: int
    finish_reason: str
    """length: as long as was asked for; stop: nobody said how long."""
    ids_wanted: bool
    usage_wanted: bool


class _Part(msgspec.Struct):
    text: str | None = None


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Body(msgspec.Struct):
    """The fields that change the answer; others are taken and change nothing, as with a model that has no say."""

    model: str | None = None
    prompt: str | list[int | str | list[int]] | None = None
    messages: list[_Message] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    return_token_ids: bool | None = None


_decode = msgspec.json.Decoder(_Body).decode


def read_question(body: bytes, model: Model, *, chat: bool) -> Question:
    """Read a request for tokens. Raises Refusal for one that vLLM would refuse, and for several answers at once."""
    asked = _read(body, model)
    if asked.n not in (None, 1):
        raise Refusal(400, f"n={asked.n}: this simulated server gives one answer to a request.", param="n")
    if asked.stream_options is not None and not asked.stream:
        raise Refusal(400, "Stream options can only be defined when `stream=True`.", param="stream_options")
    prompt = _chat_tokens(asked.messages) if chat else _prompt_tokens(asked.prompt)
    tokens, reason = _answer_tokens(asked, prompt, model, chat=chat)
    return Question(
        chat=chat,
        stream=bool(asked.stream),
        prompt_tokens=prompt,
        tokens=tokens,
        finish_reason=reason,
        ids_wanted=bool(asked.return_token_ids),
        usage_wanted=asked.stream_options is not None and bool(asked.stream_options.include_usage),
    )


def _read(body: bytes, model: Model) -> _Body:
    try:
        asked = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the body cannot be read: {error}", "Bad Request") from None
    if asked.model and asked.model != model.name:
        raise Refusal(404, f"The model `{asked.model}` does not exist.", "NotFoundError", "model")
    return asked


def _answer_tokens(asked: _Body, prompt: int, model: Model, *, chat: bool) -> tuple[int, str]:
    """(length of the answer, why it ends). What does not fit the context is cut, as vLLM does."""
    name, wanted = "max_tokens", asked.max_tokens
    if chat and asked.max_completion_tokens is not None:
        name, wanted = "max_completion_tokens", asked.max_completion_tokens
    least, reason = asked.min_tokens or 0, "length"
    if wanted is None:
        wanted = max(least, CHAT_ANSWER_TOKENS) if chat else COMPLETION_TOKENS
        reason = "stop" if chat else "length"
    elif wanted > model.context:
        raise Refusal(
            400,
            f"{name}={wanted} cannot be greater than max_model_len={model.context}. "
            "Please request fewer output tokens.",
            param=name,
        )
    if wanted < 1:
        raise Refusal(400, f"max_tokens must be at least 1, got {wanted}.", param="max_tokens")
    if least < 0:
        raise Refusal(400, f"min_tokens must be greater than or equal to 0, got {least}.")
    if least > wanted:
        raise Refusal(400, f"min_tokens must be less than or equal to max_tokens={wanted}, got {least}.")
    if prompt >= model.context:
        raise Refusal(
            400,
            f"This model's maximum context length is {model.context} tokens. However, your prompt contains {prompt} "
            "input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the "
            "input prompt.",
            param="input_tokens",
        )
    left = model.context - prompt
    return min(wanted, left), "length" if left < wanted else reason


def _prompt_tokens(prompt: str | list[int | str | list[int]] | None) -> int:
    """A list of one prompt is that prompt."""
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        return _prompt_tokens(prompt[0])  # type: ignore[arg-type]  # ids are a prompt
    if isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt):
        raise Refusal(400, "this simulated server takes one prompt: text, or a list of token ids.", param="prompt")
    if not prompt:
        raise Refusal(400, "The decoder prompt cannot be empty", param="prompt")
    return len(prompt) if isinstance(prompt, list) else len(_pieces(prompt))


def _chat_tokens(messages: list[_Message] | None) -> int:
    if not messages:
        raise Refusal(400, "there are no messages.", param="messages")
    return CHAT_TOKENS + sum(MESSAGE_TOKENS + len(_pieces(_said(message))) for message in messages)


def _said(message: _Message) -> str:
    content = message.content
    return "".join(part.text or "" for part in content) if isinstance(content, list) else content or ""


def _pieces(text: str) -> list[bytes]:
    data = text.encode()
    return [data[at : at + BYTES_A_TOKEN] for at in range(0, len(data), BYTES_A_TOKEN)]


def _token_id(piece: bytes, model: Model) -> int:
    return zlib.crc32(piece) % model.vocabulary


def tokenized(body: bytes, model: Model) -> dict[str, Any]:
    """The answer of /tokenize: ids hang on the bytes alone. Raises Refusal."""
    asked = _read(body, model)
    text = asked.prompt if asked.messages is None else "".join(map(_said, asked.messages))
    if not isinstance(text, str):
        raise Refusal(400, "there is no text.", param="prompt")
    ids = [_token_id(piece, model) for piece in _pieces(text)]
    return {"count": len(ids), "max_model_len": model.context, "tokens": ids, "token_strs": None}


def models(model: Model, created: int) -> dict[str, Any]:
    """The answer of /v1/models."""
    about = {"id": model.name, "object": "model", "created": created, "owned_by": SIMULATED_ENGINE}
    card = {**about, "root": model.name, "parent": None, "max_model_len": model.context}
    return {"object": "list", "data": [card]}


class Wording:
    """The bytes of one answer, key for key as vLLM sends them."""

    def __init__(self, question: Question, model: Model, name: str, created: int) -> None:
        self._question = question
        self._id = _token_id(_WORD.encode(), model)
        kind = "chat.completion" if question.chat else "text_completion"
        about = {"id": ("chatcmpl-" if question.chat else "cmpl-") + name, "created": created, "model": model.name}
        self._whole = {**about, "object": kind}
        self._part = {**about, "object": kind + ".chunk" if question.chat else kind}
        self._middle = self._chunk(_WORD, None)  # put together once: all tokens but the first and the last are this

    def token(self, number: int) -> bytes:
        """What goes out with the token of that number, from 0 on; the last one's ends the stream."""
        last = number + 1 == self._question.tokens
        if number and not last:
            return self._middle
        role = self._event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                             "finish_reason": None}])  # fmt: skip
        before = role if self._question.chat and not number else b""
        token = self._chunk(_WORD if number else _WORD.lstrip(), self._question.finish_reason if last else None)
        return before + token + (self._ending() if last else b"")

    def whole(self) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        text = (_WORD * self._question.tokens).lstrip()
        said: dict[str, Any] = {"text": text, "stop_reason": None}
        if self._question.chat:
            said = {"message": {"role": "assistant", "content": text}, "stop_reason": None}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": self._question.finish_reason}
        if self._question.ids_wanted:
            choice["token_ids"] = [self._id] * self._question.tokens
        return {**self._whole, "choices": [choice], "usage": self._usage()}

    def _chunk(self, text: str, reason: str | None) -> bytes:
        said: dict[str, Any] = {"delta": {"content": text}} if self._question.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason, "stop_reason": None}
        if self._question.ids_wanted:
            choice["token_ids"] = [self._id]
        return self._event([choice])

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        event = json.dumps({**self._part, "choices": choices, **more}, separators=(",", ":"))
        return _http_chunk(b"data: " + event.encode() + b"\n\n")

    def _ending(self) -> bytes:
        usage = self._event([], usage=self._usage()) if self._question.usage_wanted else b""
        return usage + _http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"

    def _usage(self) -> dict[str, int]:
        prompt, tokens = self._question.prompt_tokens, self._question.tokens
        return {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens}


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
