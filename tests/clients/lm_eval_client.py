"""Runs lm-eval's tasks of this folder on a server at argv[1], as local-completions, local-chat-completions and gguf, and prints what
each request got as JSON. Data sets of the `json` kind are named by where they lie, for which this goes to the folder."""

import importlib.metadata
import json
import os
import pathlib
import sys

import lm_eval
from lm_eval.tasks import TaskManager

base = sys.argv[1]
os.chdir(pathlib.Path(__file__).parent / "tasks")
tasks = TaskManager(include_path=".", include_defaults=False)
told = {"version": importlib.metadata.version("lm_eval"), "runs": {}}


def run(title, model, arguments, names, **more):
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=names, task_manager=tasks, log_samples=True, bootstrap_iters=0, **more
    )
    samples = {name: [(list(s["arguments"]), s["resps"]) for s in of] for name, of in found["samples"].items()}
    told["runs"][title] = {"samples": samples, "results": found["results"]}


completions = {"base_url": f"{base}/v1/completions", "model": "any"}
# By itself it finds /tokenizer_info and takes the server's tokenizer.
run("tokens", "local-completions", completions, ["capitals", "prose"])
run("batches", "local-completions", {**completions, "batch_size": 4}, ["capitals"])
run("side by side", "local-completions", {**completions, "num_concurrent": 3}, ["capitals"])
run("texts", "local-completions", {**completions, "tokenized_requests": False}, ["capitals", "prose"])
run("answers", "local-completions", completions, ["riddles"])
chats = {"base_url": f"{base}/v1/chat/completions", "model": "any"}
run("chats", "local-chat-completions", chats, ["riddles"], apply_chat_template=True)
run("gguf", "gguf", {"base_url": base}, ["capitals", "riddles"])
print(json.dumps(told, default=str))
