#!/usr/bin/env python3
"""Writes data/chat_goldens.json: what Jinja2, set up as transformers sets it up, makes of each template and conversation.

  pip install jinja2==3.1.6 && tests/text/make_chat_goldens.py
"""
import json
import pathlib

import jinja2
import jinja2.ext
import jinja2.sandbox

DATA = pathlib.Path(__file__).parent / "data"
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}


class Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.If(jinja2.nodes.Const(True), body, [], []).set_lineno(line)


class Raised(Exception):
    pass


def raise_exception(message):
    raise Raised(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


def tool(name, description, properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def call(name, arguments):
    return {"id": "call12345", "type": "function", "function": {"name": name, "arguments": arguments}}


USER = {"role": "user", "content": "What is the capital of France? <&> \"quoted\" 中文 😀"}
TOOLS = [
    tool("weather", "The weather in a city, in °C", {"city": {"type": "string", "enum": ["Zürich", "東京"]}}),
    tool("add", "Adds", {"b": {"type": "number"}, "a": {"type": "number", "default": 1.0}}),
]
CONVERSATIONS = {
    "one": {"messages": [USER]},
    "system": {"messages": [{"role": "system", "content": "  Be brief.\n"}, USER]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, USER]},
    "turns": {
        "messages": [
            USER,
            {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nParis. "},
            {"role": "user", "content": "  And of Japan?  "},
        ]
    },
    "no_prompt": {
        "messages": [USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nParis."}],
        "add_generation_prompt": False,
    },
    "two_users": {"messages": [USER, USER]},
    "odd_role": {"messages": [USER, {"role": "narrator", "content": "Later."}]},
    "tools": {"messages": [{"role": "system", "content": "Use tools."}, USER], "tools": TOOLS},
    "tool_turns": {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call("weather", {"city": "Zürich", "days": 2})]},
            {"role": "tool", "content": "{\"t\": 21.5}", "tool_call_id": "call12345"},
            {"role": "assistant", "content": "21.5 °C"},
            {"role": "user", "content": "Thanks"},
        ],
        "tools": TOOLS[:1],
    },
    "two_calls": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call("add", {"a": 1}), call("add", "{\"a\": 2}")]},
            {"role": "tool", "content": "3"},
            {"role": "tool", "content": "4"},
        ],
        "tools": TOOLS,
    },
    "thinking_off": {"messages": [USER], "kwargs": {"enable_thinking": False, "date_string": "1 Jan 2030"}},
    "extra": {
        "messages": [
            {
                "role": "user",
                "content": "x",
                "extra": {
                    "z": 1, "a": [True, None, 1.5, 1e22, 1e-7, 5e-324, -0.0], "é": "ü\u0001\u007f\b\f\"\\/", "n": {}, "l": [],
                    "deep": {"y": {"x": [[1], []]}}, "big": 18446744073709551615, "neg": -9223372036854775808,
                },
            }
        ]
    },
}


def main():
    env = environment()
    cases = []
    for path in sorted(DATA.glob("*.jinja")):
        template = env.from_string(path.read_text())
        for name, conversation in CONVERSATIONS.items():
            if (path.stem == "python_values") != (name == "extra"):
                continue
            case = {"template": path.name, "conversation": name, "add_generation_prompt": True, "kwargs": {}} | conversation
            try:
                case["text"] = template.render(
                    messages=case["messages"], tools=case.get("tools"), documents=None,
                    add_generation_prompt=case["add_generation_prompt"], **SPECIALS, **case["kwargs"],
                )
            except Raised as raised:
                case["raises"] = str(raised)
            except (jinja2.TemplateError, TypeError) as error:
                case["fails"] = type(error).__name__
            cases.append(case)
    golden = {"jinja2": jinja2.__version__, "specials": SPECIALS, "cases": cases}
    (DATA / "chat_goldens.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main()
