"""What the scripts that run `moed bench engine` share."""

import json
import subprocess
import sys
import tempfile


def figures(moed, device, flags):
    """The JSON of one run on a device; a run that fails ends the script with what it said."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [moed, "bench", "engine", "--device", device, "--json", file.name, "--log-level", "error", *flags.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        return json.load(file)


class BesideLongPrompt:
    """What a long prompt and eight decoders cost each other, as multiples of what each takes alone. `run` maps flags to
    figures."""

    DECODERS = "--clients 8 --prompt 64"

    def __init__(self, run, tokens, alone):
        self.run, self.tokens = run, tokens
        self.prompt_ms = run(f"{alone} --clients 1 --prompt {tokens} --new 1")["first_token"]["mean_ms"]
        self.token_ms = run(f"{alone} {self.DECODERS} --new 60")["token"]["mean_ms"]

    def slowdowns(self, flags, new=200):
        """(decode TPOT, prefill)"""
        both = self.run(f"{flags} {self.DECODERS} --new {new} --long-prompt {self.tokens}")
        return both["token_beside_long"]["mean_ms"] / self.token_ms, both["long_prompt_ms"] / self.prompt_ms
