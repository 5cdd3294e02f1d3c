"""Serves a converted model with OpenAI's API and asks it from several clients at once.

Runs offline on a CPU: python examples/serve_and_ask.py (needs pip install 'kvrewrite[serve]').
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import kvrewrite
from kvrewrite.assets import small_model

QUESTIONS = [f"The magic number of box {n} is {n * 111}. Q: The magic number of box {n} is" for n in range(1, 5)]


def ask(address: str, prompt: str) -> str:
    body = json.dumps({"model": "small", "prompt": prompt, "max_tokens": 6, "temperature": 0}).encode()
    with urlopen(Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"}), timeout=60) as reply:
        return json.load(reply)["choices"][0]["text"].strip()


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            urlopen(f"{address}/health", timeout=5).close()
            return
        except URLError:
            time.sleep(0.2)
    raise SystemExit("the server ended before it was ready")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        kvrewrite.convert(small_model(), Path(folder) / "small", policy="h2o", budget=256)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, "-m", "kvrewrite", "serve", f"{folder}/small", "--port", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(address := f"http://127.0.0.1:{port}", server)
            with ThreadPoolExecutor() as clients:
                for answer in clients.map(lambda prompt: f"{prompt} -> {ask(address, prompt)}", QUESTIONS):
                    print(answer)
        finally:
            server.terminate()
            server.wait(timeout=30)


if __name__ == "__main__":
    main()
