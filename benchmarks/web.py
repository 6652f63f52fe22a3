"""An exported ONNX folder in onnxruntime-web under headless Chromium: the tokens it writes, the time they take.

    npm install --ignore-scripts onnxruntime-web && apt-get install chromium
    python benchmarks/web.py DIR --runtime node_modules/onnxruntime-web/dist [--tokens 16]

Chromium runs a page that reads the folder over HTTP and answers with its greedy tokens; ours follow from a Session on
the same folder. Exit codes: 0 the same tokens, 1 others, 3 when Chromium or onnxruntime-web is missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from qwen_quant.runtime.session import Session

UNAVAILABLE = 3
PROMPT = "The history of the river is"
PAGE = """<!doctype html><script type="module">
import * as ort from "/runtime/ort.wasm.min.mjs";
const send = (result) => fetch("/result", {method: "POST", body: JSON.stringify(result)});
const integers = (values) => BigInt64Array.from(values.map(BigInt));
try {
  ort.env.wasm.wasmPaths = "/runtime/";
  ort.env.logLevel = "error";
  const job = await (await fetch("/job")).json();
  let began = performance.now();
  const session = await ort.InferenceSession.create(`/model/${job.graph}`, {
    executionProviders: ["wasm"],
    externalData: [{path: job.data.split("/").pop(), data: `/model/${job.data}`}],
  });
  const load = performance.now() - began;
  const past = {}, made = [], seconds = [];
  for (const name of session.inputNames.filter((name) => name.startsWith("past_key_values")))
    past[name] = new ort.Tensor("float32", new Float32Array(0), [1, job.heads, 0, job.size]);
  let tokens = job.prompt, read = 0;
  while (made.length < job.count) {
    began = performance.now();
    const total = read + tokens.length;
    const rows = {
      input_ids: tokens,
      attention_mask: Array(total).fill(1),
      position_ids: tokens.map((_, index) => read + index),
    };
    const feeds = {...past};
    for (const [name, row] of Object.entries(rows))
      feeds[name] = new ort.Tensor("int64", integers(row), [1, row.length]);
    const found = await session.run(feeds);
    const logits = found.logits.data.slice(-job.vocabulary);
    made.push(logits.reduce((best, value, index) => (value > logits[best] ? index : best), 0));
    for (const name of Object.keys(past)) past[name] = found[name.replace("past_key_values", "present")];
    [tokens, read] = [made.slice(-1), total];
    seconds.push((performance.now() - began) / 1000);
  }
  await send({tokens: made, load: load / 1000, seconds});
} catch (error) {
  await send({error: String(error)});
}
</script>"""


class Pages(SimpleHTTPRequestHandler):
    """The page, the job, the runtime's files and the model's; takes the result."""

    def __init__(
        self, *request: Any, folder: Path, runtime: Path, job: dict[str, Any], results: Queue
    ) -> None:
        self.places = {"/model/": folder, "/runtime/": runtime}
        self.job, self.results = job, results
        super().__init__(*request)

    def do_GET(self) -> None:
        if self.path in ("/", "/job"):
            text = PAGE if self.path == "/" else json.dumps(self.job)
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if self.path == "/" else "application/json")
            self.end_headers()
            self.wfile.write(text.encode())
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def end_headers(self) -> None:
        # Without these two a page gets no shared memory, and so no threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def translate_path(self, path: str) -> str:
        for start, place in self.places.items():
            if path.startswith(start):
                return str(place / path.removeprefix(start))
        return str(Path(tempfile.gettempdir()) / "no-such-file")

    def log_message(self, *message: Any) -> None:
        pass


def in_browser(
    chromium: str, folder: Path, runtime: Path, job: dict[str, Any], limit: float
) -> dict[str, Any]:
    """What the page answers within `limit` seconds."""
    results: Queue = Queue()
    pages = partial(Pages, folder=folder, runtime=runtime, job=job, results=results)
    server = ThreadingHTTPServer(("127.0.0.1", 0), pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        address = f"http://127.0.0.1:{server.server_port}/"
        browser = subprocess.Popen([*command, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            found: dict[str, Any] = results.get(timeout=limit)
        except Empty:
            found = {"error": f"no answer within {limit:.0f} s"}
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runtime", type=Path, required=True, help="the dist folder of onnxruntime-web")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--timeout", type=float, default=300)
    options = parser.parse_args(arguments)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None or not (options.runtime / "ort.wasm.min.mjs").is_file():
        print("Chromium or onnxruntime-web is not installed here")
        return UNAVAILABLE
    session = Session.open(options.folder)
    model = session.metadata
    graph = model["decoder"]["filename"]
    prompt = session.tokenizer.encode(PROMPT)
    job = {
        "graph": graph,
        "data": f"{graph}_data",
        "prompt": prompt,
        "count": options.tokens,
        "heads": model["decoder"]["num_key_value_heads"],
        "size": model["decoder"]["head_size"],
        "vocabulary": model["vocab_size"],
    }
    found = in_browser(chromium, options.folder, options.runtime, job, options.timeout)
    expected = list(session.generate(prompt, options.tokens))
    print(json.dumps({**found, "expected": expected}))
    return 0 if found.get("tokens") == expected else 1


if __name__ == "__main__":
    raise SystemExit(main())
