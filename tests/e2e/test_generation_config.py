"""Sampling fields that a request leaves out come from the checkpoint's generation_config.json, by the real daemon."""

import json

import pytest
import requests
from conftest import MOED, Daemon, write_tiny_model


@pytest.mark.parametrize("generation, alike, warning", [
    ({}, False, None), ({"top_k": 1}, True, None), ({"temperature": 0}, True, None), ({"top_p": 0.0001}, True, None),
    # What requests may not ask for is brought into range: checkpoints that say so are served.
    ({"temperature": 2.5, "top_p": 0}, True, r"generation_config.json: .*temperature 2.5 becomes 2, top_p 0 becomes"),
])
def test_defaults_come_from_the_checkpoint(tmp_path, generation, alike, warning):
    """Answers of made-up weights, without a seed: alike where the defaults leave nothing to chance."""
    folder = write_tiny_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(generation))
    daemon = Daemon(MOED, folder, "--load-format", "dummy", "--kv-gib", "0.01")
    try:
        if warning:
            daemon.wait_log(warning)

        def answers(**more):
            body = {"prompt": "hello", "max_tokens": 24, "ignore_eos": True, "return_token_ids": True} | more
            return {tuple(requests.post(daemon.url + "/v1/completions", json=body, timeout=60).json()["choices"][0]["token_ids"])
                    for _ in range(3)}

        assert (len(answers()) == 1) == alike
        assert len(answers(temperature=1.5, top_k=0, top_p=1)) > 1, "the request's own fields win"
    finally:
        assert daemon.stop() == 0, daemon.log
