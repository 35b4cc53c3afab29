"""What a request may say. Everything is optional where OpenAI says so, and null is the same as absent."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from grace.runtime.sampling import MAX_SEED
from grace.runtime.serve.errors import bad_request

MAX_CHOICES = 16
MAX_TOKENS = 2**31
MAX_STOPS = 16
MAX_PROMPTS = 64

# Fields of OpenAI's that this server has no use for, with the values that ask for nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none",), "functions": ([],), "function_call": ("none",),
    "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (), "web_search_options": (),
    "store": (False,), "metadata": ({},), "service_tier": ("auto", "default"), "suffix": ("",), "echo": (False,),
    "best_of": (1,),
}  # fmt: skip
# Who asks, and hints for caches: accepted, and not used.
_ABOUT_THE_CALLER = ("user", "safety_identifier", "prompt_cache_key")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # the pixel budget is the server's


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


def _kind_of_part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"#{kind}" if kind in ("text", "image_url") else None


def _kind_of_content(value: Any) -> str | None:
    return {str: "#string", list: "#list"}.get(type(value))


def _choose(name: Any, expected: str) -> Discriminator:
    return Discriminator(
        name,
        custom_error_type="wrong_kind",
        custom_error_message=f"Input should be {expected}",
    )


Part = Annotated[
    Annotated[TextPart, Tag("#text")] | Annotated[ImagePart, Tag("#image_url")],
    _choose(_kind_of_part, "a part of type 'text' or 'image_url'"),
]
Content = Annotated[
    Annotated[str, Tag("#string")] | Annotated[list[Part], Tag("#list")],
    _choose(_kind_of_content, "a string or a list of parts"),
]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None  # the chat format has no place for it


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # nothing is ever padded


class Request(_Strict):
    """What both endpoints have."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Annotated[
        Annotated[str, Tag("#string"), Field(min_length=1)]
        | Annotated[
            list[Annotated[str, Field(min_length=1)]], Tag("#list"), Field(max_length=MAX_STOPS)
        ],
        _choose(_kind_of_content, "a string or a list of strings"),
    ] | None = None  # fmt: skip
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    # Not OpenAI's, but other servers' too (`extra_body` of the Python client).
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    ignore_eos: bool | None = None

    def limit(self) -> int | None:
        """Tokens asked for at most."""
        return self.max_tokens

    def likeliest(self) -> int | None:
        """Alternatives wanted beside each token; None where no log-probabilities are."""
        return None


R = TypeVar("R", bound=Request)


class ChatRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _kind_of_prompt(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return "#string" if isinstance(value, str) else None
    return {str: "#strings", int: "#tokens", list: "#token_lists"}.get(type(value[0]))


class CompletionRequest(Request):
    prompt: Annotated[
        Annotated[str, Tag("#string")]
        | Annotated[list[str], Tag("#strings")]
        | Annotated[list[int], Tag("#tokens")]
        | Annotated[list[list[int]], Tag("#token_lists")],
        _choose(_kind_of_prompt, "a text, a list of texts, tokens, or lists of tokens"),
    ]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def limit(self) -> int | None:
        return self.max_tokens or 16

    def likeliest(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """One text, or its tokens, for each answer that is wanted."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        numbers = [one for one in self.prompt if isinstance(one, int)]
        return [numbers] if numbers else [one for one in self.prompt if not isinstance(one, int)]


def read_chat(body: dict[str, Any]) -> ChatRequest:
    """The body of /v1/chat/completions.

    Raises:
        ApiError: 400, naming the field.
    """
    request = _read(ChatRequest, body)
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    for at, message in enumerate(request.messages):
        parts = message.content if isinstance(message.content, list) else []
        if message.role != "user" and any(part.type == "image_url" for part in parts):
            raise bad_request("pictures belong into user messages", f"messages.{at}.content")
    return request


def read_completion(body: dict[str, Any]) -> CompletionRequest:
    """The body of /v1/completions.

    Raises:
        ApiError: 400, naming the field.
    """
    request = _read(CompletionRequest, body)
    prompts = request.prompts()
    if not prompts or not all(prompts):
        raise bad_request("a prompt is empty: give some text", "prompt")
    if len(prompts) > MAX_PROMPTS:
        raise bad_request(f"at most {MAX_PROMPTS} prompts at once", "prompt")
    return request


def _read(kind: type[R], body: dict[str, Any]) -> R:
    given = {name: value for name, value in body.items() if value is not None}
    for name in list(given):
        if name in _WITHOUT_EFFECT and name not in kind.model_fields:
            if not any(
                type(given[name]) is type(one) and given[name] == one for one in _WITHOUT_EFFECT[name]
            ):
                raise bad_request(
                    f"{name} is not supported by this server: leave it out", name, "unsupported"
                )
            del given[name]
        elif name in _ABOUT_THE_CALLER:
            if not isinstance(given.pop(name), str):
                raise bad_request(f"{name}: Input should be a valid string", name)
        elif name not in kind.model_fields:
            raise bad_request(
                f"Unrecognized request argument supplied: {name[:100]}", name[:100], "unknown_field"
            )
    try:
        request = kind.model_validate(given)
    except ValidationError as error:
        raise _as_api_error(error) from error
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")
    return request


def _as_api_error(error: ValidationError) -> Exception:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # Tags of alternatives are no part of the path that the client wrote.
    steps = [str(step) for step in first["loc"] if not str(step).startswith("#")]
    path = ".".join(steps)[:200]
    return bad_request(
        f"{path}: {first['msg']}", path, None if first["type"] != "missing" else "missing_field"
    )
