"""What the openai package gets from a server at argv[1]; with "refused" as argv[2], from one that wants the key "secret", has one
place and no queue."""

import json
import sys
import urllib.request

import jsonschema
import openai

base = sys.argv[1]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def client(key="none", **more):
    return openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0, timeout=120, **more)


def chats(api):
    answer = api.chat.completions.create(model="any", messages=QUESTION, temperature=0, max_tokens=60)
    whole = answer.choices[0].message.content
    assert "Paris" in whole, whole
    assert answer.choices[0].finish_reason == "stop" and answer.usage.total_tokens > answer.usage.completion_tokens > 0

    # Streamed it is the same, and the last chunk has the usage.
    text, usage, reasons = "", None, []
    stream = api.chat.completions.create(
        model="any", messages=QUESTION, temperature=0, max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
        usage = chunk.usage or usage
    assert text == whole, (text, whole)
    assert reasons == ["stop"] and usage == answer.usage, (reasons, usage, answer.usage)

    # The package's own way to stream.
    with api.chat.completions.stream(model="any", messages=QUESTION, temperature=0, max_tokens=60) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert text == whole == stream.get_final_completion().choices[0].message.content

    scored = api.chat.completions.create(
        model="any", messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    ).choices[0]
    assert scored.finish_reason == "length" and len(scored.logprobs.content) == 5
    assert "".join(token.token for token in scored.logprobs.content) == scored.message.content
    for token in scored.logprobs.content:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token and token.logprob <= 0


def choices(api):
    story = [{"role": "user", "content": "Begin a story."}]

    def ask(**fields):
        answer = api.chat.completions.create(model="any", messages=story, max_tokens=20, temperature=1.2, **fields)
        return [choice.message.content for choice in answer.choices]

    three = ask(n=3, seed=5)
    assert len(three) == len(set(three)) == 3 and three == ask(n=3, seed=5) and three != ask(n=3, seed=6), three
    counted = [{"role": "user", "content": "Count: 1, 2, 3, 4, 5, 6, 7, 8, 9"}]
    answer = api.chat.completions.create(model="any", messages=counted, max_tokens=60, temperature=0)
    whole = answer.choices[0].message.content
    word = whole[5:9]
    stopped = api.chat.completions.create(model="any", messages=counted, max_tokens=60, temperature=0, stop=[word, "\0"])
    assert stopped.choices[0].message.content == whole[: whole.index(word)] and stopped.choices[0].finish_reason == "stop"


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather of a town.",
            "parameters": {
                "type": "object",
                "properties": {
                    "town": {"type": "string", "maxLength": 20},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["town", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "set_alarm",
            "description": "Sets an alarm.",
            "parameters": {
                "type": "object",
                "properties": {"hour": {"type": "integer", "minimum": 0, "maximum": 23}},
                "required": ["hour"],
                "additionalProperties": False,
            },
        },
    },
]


def tools(api):
    messages = [{"role": "user", "content": "What is the weather in Oslo, in celsius?"}]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}

    def call_of(choice, **fields):
        answer = api.chat.completions.create(
            model="any", messages=messages, tools=TOOLS, tool_choice=choice, temperature=0, max_tokens=120, **fields
        )
        assert answer.choices[0].finish_reason == "tool_calls", answer
        (call,) = answer.choices[0].message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
        return answer.choices[0].message, call

    message, call = call_of("required")
    _, named = call_of({"type": "function", "function": {"name": "set_alarm"}})
    assert named.function.name == "set_alarm"

    # Streamed, the parts are put together by their index.
    stream = api.chat.completions.create(
        model="any", messages=messages, tools=TOOLS, tool_choice="required", temperature=0, max_tokens=120, stream=True
    )
    name, arguments, reason = "", "", None
    for chunk in stream:
        choice = chunk.choices[0]
        reason = choice.finish_reason or reason
        for part in choice.delta.tool_calls or []:
            assert part.index == 0
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert (name, arguments, reason) == (call.function.name, call.function.arguments, "tool_calls")

    # What the tool says goes back, in the package's own form.
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 7, "sky": "rain"}'}]
    answer = api.chat.completions.create(model="any", messages=messages, tools=TOOLS, tool_choice="none", temperature=0, max_tokens=40)
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls


SCHEMA = {
    "type": "object",
    "properties": {
        "fruit": {"enum": ["apple", "pear", "plum"]},
        "weight": {"type": "number", "minimum": 0, "maximum": 5},
        "boxes": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "integer", "minimum": 0, "maximum": 99}},
        },
        "ripe": {"type": "boolean"},
    },
    "required": ["fruit", "weight", "boxes", "ripe"],
    "additionalProperties": False,
}


def schemas(api):
    messages = [{"role": "user", "content": "Describe a delivery of fruit as JSON."}]
    for seed in range(3):
        answer = api.chat.completions.create(
            model="any",
            messages=messages,
            seed=seed,
            temperature=1,
            max_tokens=200,
            response_format={"type": "json_schema", "json_schema": {"name": "delivery", "strict": True, "schema": SCHEMA}},
        )
        assert answer.choices[0].finish_reason == "stop", answer
        jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)
    loose = api.chat.completions.create(
        model="any", messages=messages, temperature=0, max_tokens=300, response_format={"type": "json_object"}
    )
    if loose.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(loose.choices[0].message.content), dict)


def completions(api):
    def ask(prompt, **fields):
        return api.completions.create(model="any", prompt=prompt, temperature=0, **fields)

    one = ask("The capital of France is", max_tokens=8)
    assert one.choices[0].text.startswith(" Paris"), one
    two = ask(["The capital of France is", "One, two, three,"], max_tokens=8)
    assert [choice.index for choice in two.choices] == [0, 1] and two.choices[0].text == one.choices[0].text
    asked = urllib.request.Request(f"{base}/tokenize", json.dumps({"prompt": "The capital of France is"}).encode())
    tokens = json.load(urllib.request.urlopen(asked))["tokens"]
    assert ask(tokens, max_tokens=8).choices[0].text == one.choices[0].text
    assert ask([tokens, tokens[:3]], max_tokens=8).choices[0].text == one.choices[0].text

    echoed = ask(tokens, max_tokens=1, echo=True, logprobs=2).choices[0]
    told = echoed.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == len(tokens) + 1
    assert told.token_logprobs[0] is None and all(logprob <= 0 for logprob in told.token_logprobs[1:])
    assert "".join(told.tokens) == echoed.text == "The capital of France is Paris"
    assert [echoed.text[a:b] for a, b in zip(told.text_offset, told.text_offset[1:])] == told.tokens[:-1]
    pieces = [part.choices[0].text for part in ask(tokens, max_tokens=8, stream=True)]
    assert len(pieces) > 2 and "".join(pieces) == one.choices[0].text


def embeddings(api):
    texts = ["The cat sleeps.", "A cat is sleeping.", "Interest rates rose by half a percent."]
    vectors = [item.embedding for item in api.embeddings.create(model="any", input=texts).data]
    floats = api.embeddings.create(model="any", input=texts[0], encoding_format="float").data[0].embedding
    near = lambda a, b: sum(x * y for x, y in zip(a, b))
    assert abs(near(vectors[0], floats) - 1) < 1e-4
    assert near(vectors[0], vectors[1]) > near(vectors[0], vectors[2])


def models(api):
    (model,) = api.models.list().data
    assert api.models.retrieve(model.id).id == model.id


def raises(kind, code, ask):
    try:
        ask()
    except kind as error:
        assert error.status_code == code and error.body["message"], error
        return error
    raise AssertionError(f"no {kind.__name__}")


def errors(api):
    wrong = raises(openai.BadRequestError, 400, lambda: api.chat.completions.create(model="any", messages=QUESTION, temperature=-1))
    assert wrong.param == "temperature" and wrong.type == "invalid_request_error"
    raises(openai.NotFoundError, 404, lambda: api.models.retrieve("nobody"))
    long = [{"role": "user", "content": "long " * 9000}]
    too_long = raises(openai.BadRequestError, 400, lambda: api.chat.completions.create(model="any", messages=long))
    assert too_long.code == "context_length_exceeded"


def refusals():
    refused = raises(openai.AuthenticationError, 401, lambda: client("guess").models.list())
    assert refused.code == "invalid_api_key"
    api = client("secret")
    stream = api.completions.create(model="any", prompt="Once", max_tokens=4000, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    ask = lambda: api.completions.create(model="any", prompt="Once", max_tokens=1)
    raises(openai.RateLimitError, 429, ask)
    stream.close()
    # The place is free again: as the package tries it.
    patient = api.with_options(max_retries=8)
    assert patient.completions.create(model="any", prompt="Once", max_tokens=1).choices


if sys.argv[2:] == ["refused"]:
    refusals()
else:
    for part in (chats, choices, tools, schemas, completions, embeddings, models, errors):
        print(part.__name__, flush=True)
        part(client())
print(f"openai {openai.__version__}: all as expected")
