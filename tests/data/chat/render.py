#!/usr/bin/env python3
"""Renders the templates of this folder with Jinja2, and writes what the tests expect.

    python3 -m venv venv && venv/bin/pip install jinja2==3.1.6
    venv/bin/python render.py            # writes expected/*.json and expressions.expected.json
    venv/bin/python render.py --check    # with transformers installed: that its own rendering is the same

The environment is the one that `apply_chat_template` of transformers 5.24 has: sandboxed, immutable, blocks trimmed, with loop
controls, `{% generation %}`, and a `tojson` that escapes no HTML. The clock stands still.
"""

import datetime
import json
import pathlib
import sys

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

HERE = pathlib.Path(__file__).parent
NOW = datetime.datetime(2024, 7, 26, 9, 5, 3)
TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the model wrote; here it only puts its text out."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_out"), [], [], body).set_lineno(line)

    def _out(self, caller):
        return caller()


def environment():
    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = NOW.strftime
    return env


def outcome(render):
    """What came out: a text, what `raise_exception` said, or the kind of another error."""
    try:
        return {"text": render()}
    except (jinja2.exceptions.UndefinedError, jinja2.exceptions.SecurityError) as error:
        return {"failed": type(error).__name__}
    except jinja2.exceptions.TemplateError as error:
        return {"refused": str(error)} if type(error) is jinja2.exceptions.TemplateError else {"failed": type(error).__name__}
    except Exception as error:
        return {"failed": type(error).__name__}


def chat(template, case, tokens):
    """What `apply_chat_template` gives: a message without its nulls, and cut behind the answer that is to be continued."""
    messages = [{k: v for k, v in m.items() if v is not None or k == "content"} for m in json.loads(json.dumps(case["messages"]))]
    keep = case.get("continue_final_message", False)
    if keep:
        messages[-1]["content"] += TAG
    text = template.render(
        messages=messages,
        tools=case.get("tools"),
        documents=case.get("documents"),
        add_generation_prompt=case.get("add_generation_prompt", True),
        **tokens,
        **case.get("extra", {}),
    )
    if keep:
        at = text.rindex(TAG.strip())
        text = text[:at] if text[at:].startswith(TAG) else text[:at].rstrip()
    return text


def transformers_chat(source, case, tokens):
    from transformers.utils import chat_template_utils as utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return NOW

    utils.datetime = Clock
    (text,), _ = utils.render_jinja_template(
        [json.loads(json.dumps(case["messages"]))],
        chat_template=source,
        tools=case.get("tools"),
        documents=case.get("documents"),
        add_generation_prompt=case.get("add_generation_prompt", True),
        continue_final_message=case.get("continue_final_message", False),
        **tokens,
        **case.get("extra", {}),
    )
    return text


def main():
    env = environment()
    cases = json.loads((HERE / "cases.json").read_text())
    templates = json.loads((HERE / "templates.json").read_text())
    (HERE / "expected").mkdir(exist_ok=True)
    differences = 0
    for name, tokens in templates.items():
        source = (HERE / f"{name}.jinja").read_bytes().decode()
        template = env.from_string(source)
        expected = {case["name"]: outcome(lambda: chat(template, case, tokens)) for case in cases}
        if "--check" in sys.argv:
            for case in cases:
                theirs = outcome(lambda: transformers_chat(source, case, tokens))
                ours = expected[case["name"]]
                if theirs != ours:
                    differences += 1
                    print(f"{name}: {case['name']}\n  ours   {ours}\n  theirs {theirs}")
            continue
        (HERE / "expected" / f"{name}.json").write_text(json.dumps(expected, ensure_ascii=False, indent=1) + "\n")
    if "--check" in sys.argv:
        sys.exit(1 if differences else 0)
    snippets = json.loads((HERE / "expressions.json").read_text())
    for snippet in snippets["snippets"]:
        context = json.loads(json.dumps(snippets["context"]))
        snippet["expected"] = outcome(lambda: env.from_string(snippet["template"]).render(**context))
    rows = {s["template"]: s["expected"] for s in snippets["snippets"]}
    (HERE / "expressions.expected.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
