#!/usr/bin/env python3
"""Starts the daemons that tools/check_clients.sh wants, runs the clients against them and judges what they printed.
usage: check_clients.py FOLDER-OF-VENVS PART..."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/e2e"))
from conftest import DEMO, FAKE, MOED, Daemon, write_tiny_model  # noqa: E402

KEY = "check-key"
# What a document cannot say, or should not: limits of the tiny model and what keeps a run short.
TINY_VOCABULARY, TINY_TOKENS = 261, 64


def offline():
    """The tokenizer and the data are files: nobody needs to ask a hub."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def show(command, folder=ROOT):
    """Runs `command` in `folder`, printing it and what it says; that text, or None when it failed."""
    print("$ " + " ".join(str(word) for word in command), flush=True)
    done = subprocess.run([str(word) for word in command], cwd=folder, env=offline(), stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800)
    print(done.stdout, flush=True)
    return done.stdout if done.returncode == 0 else None


def run_calls(venvs, part, target):
    return show([venvs / "wire/bin/python", "tools/client_calls.py", part, target]) is not None


def run_lm_eval(venvs, daemon, folder):
    """lm-eval's own numbers against transformers'."""
    command = [venvs / "lm_eval/bin/lm_eval", "run", "--model", "local-completions", "--model_args",
               f"model=demo,base_url={daemon.url}/v1/completions,tokenizer_backend=huggingface,tokenizer={DEMO},num_concurrent=4",
               "--include_path", "tests/e2e/lm_eval", "--tasks", "moed_facts", "--log_samples", "--output_path", folder]
    if show(command) is None:
        return False
    samples = [json.loads(line) for line in next(folder.glob("**/samples_moed_facts_*.jsonl")).read_text().splitlines()]
    found = {(sample["doc_id"], choice): (float(answer[0][0]), answer[0][1] == "True")
             for sample in samples for choice, answer in enumerate(sample["resps"])}
    entries = json.loads((ROOT / "tests/golden/demo_loglikelihoods.json").read_text())["entries"]
    right, worst = True, 0.0
    for entry in entries:
        value, greedy = found[entry["item"], entry["choice"]]
        error = abs(value - sum(entry["logprobs"]))
        worst = max(worst, error / entry["sum_tolerance"])
        right &= error <= entry["sum_tolerance"] and entry["greedy"] in (None, greedy)
    print(f"{len(entries)} log-likelihoods against transformers': the largest error is {worst:.2f} of its tolerance")
    return right and len(found) == len(entries)


def run_guidellm(venvs, daemon, folder):
    command = [venvs / "guidellm/bin/guidellm", "run", "--backend", f"kind=openai_http,target={daemon.url}",
               "--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6",
               "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
               "--tokenizer", f"kind=huggingface_auto,model={DEMO}", "--disable-console-interactive",
               "--output", f"kind=json,path={folder / 'guidellm.json'}", "--output", "kind=console"]
    if show(command) is None:
        return False
    report = json.loads((folder / "guidellm.json").read_text())
    totals = report["benchmarks"][0]["metrics"]["request_totals"]
    print(f"requests: {totals}")
    return totals["successful"] == 6 and totals["errored"] == 0


def narrow(schema):
    """The document's schemas with the tiny model's limits, in place: else most of what is tried is beyond them."""
    import yaml

    document = yaml.safe_load((ROOT / "docs/openapi.yaml").read_text())
    schemas = document["components"]["schemas"]
    common = schemas["Common"]["properties"]
    ids = [schemas["TokenIds"]["items"], common["allowed_token_ids"]["items"],
           schemas["DetokenizeRequest"]["properties"]["tokens"]["items"]]
    completion = schemas["CompletionRequest"]["allOf"][1]["properties"]
    chat = schemas["ChatRequest"]["allOf"][1]["properties"]
    text, texts, tokens, token_lists = completion["prompt"]["anyOf"]
    text["minLength"] = texts["items"]["minLength"] = 1
    texts["maxItems"] = token_lists["maxItems"] = 3
    for field in (*ids, tokens["items"], token_lists["items"]["items"]):
        field["maximum"] = TINY_VOCABULARY - 1
    for field in (common["max_tokens"], chat["max_completion_tokens"]):
        field |= {"minimum": 1, "maximum": TINY_TOKENS}
    common["min_tokens"]["maximum"] = 1
    common["logit_bias"]["patternProperties"] = {"^([1-9]?[0-9])$": {"type": "number", "minimum": -100, "maximum": 100}}
    for field in (completion["logprobs"], chat["top_logprobs"], common["prompt_logprobs"]):
        field["maximum"] = 5
    common["truncate_prompt_tokens"] |= {"minimum": 1, "maximum": 1000}
    completion["best_of"] = {"enum": [1, None]}
    common["n"]["maximum"] = 3
    common["top_p"] = {"type": "number", "minimum": 0.01, "maximum": 1}
    schemas["TokenizeRequest"]["properties"]["prompt"] = {"type": "string"}
    # One field that needs another: always with it.
    chat["logprobs"] = {"const": True}
    schemas["ChatRequest"]["allOf"][1]["required"].append("logprobs")
    del common["stream_options"], chat["continue_final_message"]
    for fields in (common, schemas["TokenizeRequest"]["properties"], schemas["DetokenizeRequest"]["properties"]):
        fields["model"] = {"enum": ["tiny", "", None]}
    schema.write_text(yaml.safe_dump(document))


def run_openapi(venvs, folder):
    """The document as it is, then with a model's limits in it, so that more of what is tried is answered with 200."""
    daemon = Daemon(FAKE, write_tiny_model(folder / "tiny"), MOED_API_KEY=KEY)
    narrowed = folder / "openapi.yaml"
    narrow(narrowed)
    right = True
    try:
        for document, mode in ((ROOT / "docs/openapi.yaml", "all"), (narrowed, "positive")):
            # Not checked: that all which fits the document is accepted. It cannot say what fits the model's context.
            command = [venvs / "wire/bin/schemathesis", "run", document, "--url", daemon.url, "--header",
                       f"Authorization: Bearer {KEY}", "--exclude-checks", "positive_data_acceptance", "--mode", mode,
                       "--max-examples", os.environ.get("MOED_EXAMPLES", "100"), "--seed", "1", "--continue-on-failure", "--no-color",
                       "--request-timeout", "60"]
            right &= show(command, folder) is not None
    finally:
        right &= daemon.stop() == 0
    return right


def main():
    venvs, parts = Path(sys.argv[1]).resolve(), sys.argv[2:]
    results = {}
    daemon = Daemon(MOED, DEMO, "--kv-gib", "1", ready_seconds=300) if set(parts) != {"openapi"} else None
    try:
        with tempfile.TemporaryDirectory() as name:
            for part in parts:
                print(f"== {part}", flush=True)
                folder = Path(name) / part
                folder.mkdir()
                if part == "openapi":
                    results[part] = run_openapi(venvs, folder)
                elif part == "lm-eval":
                    results[part] = run_lm_eval(venvs, daemon, folder)
                elif part == "guidellm":
                    results[part] = run_guidellm(venvs, daemon, folder)
                else:
                    results[part] = run_calls(venvs, part, daemon.grpc_target if part == "grpc" else daemon.url)
    finally:
        if daemon is not None:
            assert daemon.stop() == 0, daemon.log
    print("clients: " + ", ".join(f"{part} {'passed' if good else 'FAILED'}" for part, good in results.items()))
    sys.exit(0 if all(results.values()) else 1)


if __name__ == "__main__":
    main()
