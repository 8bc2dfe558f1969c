"""Debian's Prometheus, set up as deploy/prometheus has it, scrapes a daemon; every query of the Grafana board in
deploy/grafana, and what fills its variables, is asked of Prometheus and must find a series."""

import json
import math
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import requests
from conftest import ROOT

KEY = "scrape-key"
SETUP = ROOT / "deploy/prometheus/prometheus.yml"
BOARD = json.loads((ROOT / "deploy/grafana/moed.json").read_text())
VARIABLES = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
# What only a device with memory of its own has to count: without one these are a share of nothing.
NOTHING_TO_SHARE = {"moed:expert_cache_hits_total", "moed:expert_cache_misses_total"}


def tool(name):
    found = shutil.which(name, path=f"{ROOT / '.venv/bin'}:/usr/bin:/usr/local/bin")
    assert found, f"{name} is missing: tools/install_deps.sh test brings it"
    return found


def queries():
    """(panel's title, query) for every target of the board, its variables set as Grafana sets them for All."""
    found = []
    for panel in BOARD["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$__rate_interval", "1m")
            found.append((panel["title"], query.replace("$model_name", VARIABLES["model_name"]["allValue"])))
    return found


def names_of(query):
    return {re.sub("_(bucket|sum|count)$", "", name) for name in re.findall(r"(?:vllm|moed):\w+", query)}


class Prometheus:
    """Scrapes `target` five times a second until stopped."""

    def __init__(self, folder: Path, target: str):
        (folder / "key").write_text(KEY)
        text = SETUP.read_text().replace("scrape_interval: 10s", "scrape_interval: 200ms")
        text = text.replace("127.0.0.1:8000", target).replace("# authorization:", "authorization:")
        text = text.replace("#   credentials_file: /etc/prometheus/moed.key", f"  credentials_file: {folder / 'key'}")
        (folder / "prometheus.yml").write_text(text)
        # Any free port: read from the log, as it does not say another way.
        self.process = subprocess.Popen(
            [tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
             "--web.listen-address=127.0.0.1:0"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(folder / "log").open("w"))
        self.log = folder / "log"
        address = self._wait_log(r"Listening on.*address=(127.0.0.1:\d+)")[1]
        self.url = f"http://{address}/api/v1/"
        self._wait_log("Server is ready")

    def _wait_log(self, pattern):
        end = time.monotonic() + 30
        while not (match := re.search(pattern, self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        return match

    def get(self, path, **parameters):
        answer = requests.get(self.url + path, params=parameters, timeout=10).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def query(self, query):
        """The values of the series that `query` finds now."""
        return [float(series["value"][1]) for series in self.get("query", query=query)["result"]]

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture
def daemon(start_fake):
    return start_fake(MOED_API_KEY=KEY, FAKE_LAYER_US="200")


@pytest.fixture
def prometheus(tmp_path, daemon):
    server = Prometheus(tmp_path, f"127.0.0.1:{daemon.http_port}")
    yield server
    server.stop()


def wait_for(prometheus, query):
    end = time.monotonic() + 20
    while not any(value > 0 for value in prometheus.query(query)):
        targets = prometheus.get("targets")["activeTargets"]
        assert time.monotonic() < end, (query, [target["lastError"] for target in targets])
        time.sleep(0.1)


def test_each_query_of_the_board_finds_a_series(daemon, prometheus):
    wait_for(prometheus, "up")
    for prompt in ("hello", "hello hello", "a longer prompt, for the prefix cache " * 4, "hello"):
        answer = requests.post(daemon.url + "/v1/completions", json={"prompt": prompt, "max_tokens": 12, "n": 2},
                               headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        assert answer.status_code == 200, answer.text
    wait_for(prometheus, "rate(vllm:e2e_request_latency_seconds_count[1m])")
    assert prometheus.query("vllm:there_is_no_such_series") == []

    asked = queries()
    found = {query: prometheus.query(query) for _, query in asked}
    assert len(asked) > 40
    assert [(title, query) for title, query in asked if not found[query]] == []
    lost = [query for _, query in asked if all(math.isnan(value) for value in found[query])]
    assert [query for query in lost if not names_of(query) & NOTHING_TO_SHARE] == []


def test_the_board_s_variables_are_filled(prometheus):
    wait_for(prometheus, "up")
    metric, label = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", VARIABLES["model_name"]["query"]["query"]).groups()
    assert prometheus.get(f"label/{label}/values", **{"match[]": metric}) == ["tiny"]


def test_a_scrape_without_the_key_is_refused(daemon):
    assert requests.get(daemon.url + "/metrics", timeout=10).status_code == 401


def test_promtool_takes_the_setup_as_it_is():
    done = subprocess.run([tool("promtool"), "check", "config", str(SETUP)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_board_is_whole():
    """Panels do not overlap, ids are unique, each has a title and says what it shows, each metric's name exists."""
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["title"] and (panel["type"] == "row" or panel["description"])
        assert panel["type"] == "row" or [target["refId"] for target in panel["targets"]] == sorted(
            {target["refId"] for target in panel["targets"]})
