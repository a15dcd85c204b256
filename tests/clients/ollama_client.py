"""What Ollama's package gets from a server at argv[1]."""

import importlib.metadata
import json
import sys

import jsonschema
import ollama

api = ollama.Client(host=sys.argv[1])
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0, "num_predict": 60}

(model,) = api.list().models
assert model.size > 50e6 and model.details.family == "llama", model
name = model.model
shown = api.show(name)
assert shown.modelinfo["llama.context_length"] == 8192 and "completion" in shown.capabilities and shown.template, shown
assert [running.model for running in api.ps().models] == [name]

whole = api.chat(model=name, messages=QUESTION, options=GREEDY)
assert "Paris" in whole.message.content and whole.done and whole.done_reason == "stop" and whole.eval_count > 0, whole
parts = list(api.chat(model=name, messages=QUESTION, options=GREEDY, stream=True))
assert len(parts) > 2 and "".join(part.message.content for part in parts) == whole.message.content
assert parts[-1].done and parts[-1].eval_count == whole.eval_count

short = api.chat(model=name, messages=QUESTION, options={"temperature": 0, "num_predict": 2})
assert short.done_reason == "length" and short.eval_count == 2, short
stopped = api.chat(model=name, messages=QUESTION, options={**GREEDY, "stop": ["Paris"]})
assert stopped.message.content == whole.message.content.split("Paris")[0]
dice = {"temperature": 1.5, "num_predict": 12, "seed": 3}
rolled = [api.generate(model=name, prompt="Begin a story.", options=options).response for options in (dice, dice, {**dice, "seed": 4})]
assert rolled[0] == rolled[1] != rolled[2], rolled

text = api.generate(model=name, prompt="What is the capital of France?", system="Answer with one word.", options=GREEDY)
assert text.response and text.prompt_eval_count > 0, text
raw = api.generate(model=name, prompt="The capital of France is", raw=True, options={"temperature": 0, "num_predict": 4})
assert raw.response.startswith(" Paris"), raw
pieces = list(api.generate(model=name, prompt="The capital of France is", raw=True, options={"temperature": 0, "num_predict": 4}, stream=True))
assert "".join(piece.response for piece in pieces) == raw.response

schema = {
    "type": "object",
    "properties": {"fruit": {"enum": ["apple", "pear"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["fruit", "count"],
    "additionalProperties": False,
}
told = api.chat(model=name, messages=[{"role": "user", "content": "Which fruit?"}], format=schema, options=GREEDY)
jsonschema.validate(json.loads(told.message.content), schema)

vectors = api.embed(model=name, input=["The cat sleeps.", "Interest rates rose."]).embeddings
single = api.embeddings(model=name, prompt="The cat sleeps.").embedding
assert len(vectors) == 2 and all(abs(a - b) < 1e-5 for a, b in zip(vectors[0], single)) and vectors[0] != vectors[1]

try:
    api.chat(model=name, messages=QUESTION, options={"temperature": -1})
    raise AssertionError("a temperature below 0 is taken")
except ollama.ResponseError as error:
    assert error.status_code == 400 and "temperature" in error.error, error
try:
    api.delete("nobody")
    raise AssertionError("a model is deleted")
except ollama.ResponseError as error:
    assert error.status_code == 404 and error.error, error
print(f"ollama {importlib.metadata.version('ollama')}: all as expected")
