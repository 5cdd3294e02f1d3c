# %% [markdown]
# # Serving a model with OpenAI's API
# On the command line this is `kvrewrite serve small --port 8000`. Here the server runs in a thread, and several
# clients ask at once. Offline, on a CPU; it needs `pip install 'kvrewrite[serve]' openai`.

# %%
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvrewrite
from kvrewrite import serving
from kvrewrite.assets import small_model

# %% [markdown]
# Port 0 takes any that is free. A converted directory is loaded by `kvrewrite.load("small")`.

# %%
model = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)
small = kvrewrite.transform(model, policy="h2o", budget=256)
engine = serving.Engine(small, AutoTokenizer.from_pretrained(small_model()))
server = serving.make_server(engine, "small", port=0, log_level="warning")
thread = threading.Thread(target=server.run, daemon=True)
thread.start()
while not server.started:
    time.sleep(0.01)
port = server.servers[0].sockets[0].getsockname()[1]

# %%
client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")


def ask(n: int) -> str:
    prompt = f"The magic number of box {n} is {n * 111}. Q: The magic number of box {n} is"
    answer = client.completions.create(model="small", prompt=prompt, max_tokens=6, temperature=0)
    return f"{prompt} -> {answer.choices[0].text.strip()}"


with ThreadPoolExecutor() as clients:
    print(*clients.map(ask, range(1, 5)), sep="\n")

# %% [markdown]
# The server says what it did, for Prometheus.

# %%
metrics = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
print(*[line for line in metrics.splitlines() if line.startswith("kvrewrite_generation_tokens")], sep="\n")
server.should_exit = True
thread.join()
engine.close()
