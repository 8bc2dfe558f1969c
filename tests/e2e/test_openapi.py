"""docs/openapi.yaml against the daemon: the same paths, methods, keys and fields. tools/check_clients.sh openapi lets
schemathesis hold answers against it."""

import re
import socket
import time
from contextlib import ExitStack

import pytest
import requests
import yaml
from conftest import ROOT

DOCUMENT = yaml.safe_load((ROOT / "docs/openapi.yaml").read_text())
SCHEMAS = DOCUMENT["components"]["schemas"]
OPERATIONS = [(path, method.upper(), operation) for path, methods in DOCUMENT["paths"].items()
              for method, operation in methods.items()]
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH"]
# What makes a body of nothing but nulls a whole one.
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "hello", "max_tokens": 1},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [104]},
}


def resolved(schema):
    """`schema` with its references followed."""
    while "$ref" in schema:
        schema = SCHEMAS[schema["$ref"].rsplit("/", 1)[1]]
    return schema


def properties(schema):
    """{name: schema} of an object's fields, those of its parts counted."""
    schema = resolved(schema)
    found = {name: resolved(field) for name, field in schema.get("properties", {}).items()}
    for part in schema.get("allOf", []):
        found |= properties(part)
    return found


def fields_of(path):
    return properties(DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"])


def parsed_names():
    """Names of the fields that the door's parser knows."""
    source = (ROOT / "server/openai.cpp").read_text()
    names = set(re.findall(r'\b(?:fields|inner)\.(?:read|read_object|find|ignore)\("(\w+)"', source))
    names |= set(re.findall(r'\bread_strings\(fields, "(\w+)"', source))
    lists = re.findall(r"refuse_(?:present|true)\(\s*fields,\s*\{([^}]*)\}", source)
    lists += re.findall(r"for \(const char\* const name : \{([^}]*)\}\)", source)
    return names | {name for names_of_list in lists for name in re.findall(r'"(\w+)"', names_of_list)}


def documented_names():
    names = set()
    for path in BODIES:
        for name, field in fields_of(path).items():
            names |= {name} | (set(field.get("properties", {})) if name == "stream_options" else set())
    return names


def test_each_field_of_the_parser_is_documented():
    assert len(parsed_names()) > 60
    assert parsed_names() - documented_names() == set()


@pytest.mark.parametrize("path", BODIES)
def test_each_documented_field_is_known(start_fake, path):
    daemon = start_fake()
    absent = {name: None for name in fields_of(path)} | {"no_such_field": None}
    answer = requests.post(daemon.url + path, json=absent | BODIES[path], timeout=10)
    assert answer.status_code == 200, answer.text
    if "completions" in path:
        daemon.wait_log("no_such_field is unknown")
        assert re.findall(r"request field (\w+) is unknown", daemon.log) == ["no_such_field"]


@pytest.mark.parametrize("path", BODIES)
def test_each_typed_field_is_checked(fake, path):
    """A type that the document does not allow is refused, and the refusal names the field."""
    checked = 0
    for name, field in fields_of(path).items():
        types = field.get("type", [])
        if "object" in types or not types:
            continue
        answer = requests.post(fake.url + path, json=BODIES[path] | {name: {"a": 1}}, timeout=10)
        assert answer.status_code == 400, name
        assert answer.json()["error"]["param"] == name
        checked += 1
    assert checked >= (1 if path == "/detokenize" else 4)


@pytest.mark.parametrize("path", DOCUMENT["paths"])
def test_the_methods_are_the_documented_ones(fake, path):
    allowed = {method for documented, method, _ in OPERATIONS if documented == path}
    for method in METHODS:
        answer = requests.request(method, fake.url + path.replace("{id}", "tiny"), timeout=10)
        if method in allowed:
            assert answer.status_code in (200, 415), method
        else:
            assert answer.status_code == 405 and answer.headers["Allow"].split(", ")[0] in allowed, method


def status_of(connection):
    answer = connection.recv(65536)
    return answer[9:12].decode()


def test_what_the_server_refuses_is_documented(start_fake):
    """By its limits, before a handler is asked: each can meet each path."""
    daemon = start_fake("--header-seconds", "0.3", "--body-seconds", "5", "--header-bytes-max", "2000", "--connections-max", "8",
                        "--body-bytes-max", "1000000", "--reading-bytes-max", "1048576")

    def connect(stack):
        return stack.enter_context(socket.create_connection(("127.0.0.1", daemon.http_port), timeout=10))

    def ask(head):
        with ExitStack() as stack:
            connection = connect(stack)
            connection.sendall(head)
            return status_of(connection)

    for path, method, operation in OPERATIONS:
        line = f"{method} {path.replace('{id}', 'tiny')} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
        seen = {"400": ask(line + b"Transfer-Encoding: gzip\r\n\r\n"), "408": ask(line),
                "413": ask(line + b"Content-Length: 2000000\r\n\r\n"), "431": ask(line + b"X: " + b"x" * 3000 + b"\r\n\r\n")}
        with ExitStack() as stack:
            holding = connect(stack)
            holding.sendall(line + b"Content-Length: 900000\r\n\r\n" + b"x" * 800000)
            time.sleep(0.1)
            seen |= {"429": ask(line + b"Content-Length: 900000\r\n\r\n" + b"x" * 800000)}
        with ExitStack() as stack:
            for _ in range(8):
                connect(stack)
            time.sleep(0.1)
            seen |= {"503": status_of(connect(stack))}
        assert all(wanted == status for wanted, status in seen.items()), (path, seen)
        assert set(seen) <= set(operation["responses"]), path
        time.sleep(0.1)  # for the held connections to be seen closed


def test_a_path_that_is_not_documented_is_not_there(fake):
    for path in ("/", "/v1", "/v1/embeddings", "/openapi.json", "/v1/chat/completions/"):
        assert requests.get(fake.url + path, timeout=10).status_code == 404, path


def test_keys_are_asked_for_where_the_document_says(start_fake):
    daemon = start_fake(MOED_API_KEY="secret")
    for path, method, operation in OPERATIONS:
        answer = requests.request(method, daemon.url + path.replace("{id}", "tiny"), json={}, timeout=10)
        open_to_all = operation.get("security") == []
        assert (answer.status_code != 401) == open_to_all, path
        assert open_to_all or "401" in operation["responses"]
