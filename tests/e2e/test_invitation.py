"""The command that a daemon prints once it is ready, as a shell would read it."""

import re
import shlex
import socket

import pytest
import requests


def invitation(daemon):
    """The words of the command."""
    return shlex.split(daemon.wait_log(r"Try:\n +(curl .*)\n")[1])


def ask(words, **expanded):
    """What the command would print, as JSON."""
    headers = dict(words[i + 1].split(": ", 1) for i, word in enumerate(words) if word == "-H")
    for name, value in expanded.items():
        headers = {key: text.replace("$" + name, value) for key, text in headers.items()}
    return requests.post(words[1], data=words[words.index("-d") + 1], headers=headers, timeout=20).json()


def test_without_a_key(start_fake):
    words = invitation(start_fake())
    assert "Authorization" not in " ".join(words)
    assert ask(words)["choices"]


def test_with_a_key(start_fake):
    daemon = start_fake(MOED_API_KEY="the-key-of-this-test")
    words = invitation(daemon)
    assert "Authorization: Bearer $MOED_API_KEY" in words and "the-key" not in daemon.log
    assert ask(words)["error"]["code"] == "invalid_api_key"
    assert ask(words, MOED_API_KEY="the-key-of-this-test")["choices"]


def test_on_every_address(start_fake):
    words = invitation(start_fake("--host", "0.0.0.0", "--insecure"))
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1/chat/completions", words[1])
    assert ask(words)["choices"]


def test_on_an_address_in_brackets(start_fake):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no ::1")
    daemon = start_fake("--host", "[::1]")
    assert f"ready: http [::1]:{daemon.http_port}, grpc [::1]:{daemon.grpc_port}" in daemon.log
    words = invitation(daemon)
    assert words[1].startswith("http://[::1]:")
    assert ask(words)["choices"]
