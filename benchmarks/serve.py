"""Load on `kvrewrite serve`: tokens a second, time to the first token and between tokens, beside what the model does alone.

    python -m benchmarks.serve [--model llama-3.1-8b] [--policy streaming_llm] [--budget 2048] [--chunk 1024]
        [--requests 64] [--prompt 8192] [--answer 256] [--rate inf] [--memory 40GiB] [--prompt-tokens 2048 1000000000]

The server runs in this process; the load comes from another one, over loopback, as server-sent events: N requests of random
prompts, all at once or at Poisson times (--rate a second). Before that, in the same process: the time of one prompt, and
the rate of `Batch.decode` at that batch with nothing else to do. --prompt-tokens: prompt tokens between two decode steps;
each value is a run. A huge one computes all prompts first, so that all answers decode together, which is where the share of
the lone step rate can be read off ("while all decode"). On a CPU: --model tiny --requests 4 --prompt 64 --answer 16 --budget 32.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np


# ---------------------------------------------------------------------------------------------------------- the client
async def ask(port: int, body: bytes) -> dict[str, Any]:
    """One stream: when it was sent, and when how many tokens came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    sent = time.perf_counter()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    times, counts, status = [], [], (await reader.readline()).split()[1]
    if status != b"200":
        raise RuntimeError(f"status {status!r}: {await reader.read(1000)!r}")
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            break
        choices = json.loads(line[6:])["choices"]
        if choices and (text := choices[0]["text"]):
            times.append(time.perf_counter() - sent)
            counts.append(len(text.split()))
    writer.close()
    return {"sent": sent, "times": times, "counts": counts}


async def send_all(port: int, bodies: list[bytes], rate: float, seed: int) -> list[dict[str, Any]]:
    generator, tasks = random.Random(seed), []
    for body in bodies:
        tasks.append(asyncio.create_task(ask(port, body)))
        if rate != float("inf"):
            await asyncio.sleep(generator.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def client(spec: dict[str, Any]) -> None:
    """What the other process does: sends the load, prints what came as JSON."""
    generator, bodies = random.Random(spec["seed"]), []
    for _ in range(spec["requests"]):
        prompt = [generator.randrange(spec["vocabulary"]) for _ in range(spec["prompt"])]
        body = {"prompt": prompt, "max_tokens": spec["answer"], "temperature": 0, "ignore_eos": True, "stream": True}
        bodies.append(json.dumps(body).encode())
    print(json.dumps(asyncio.run(send_all(spec["port"], bodies, float(spec["rate"]), spec["seed"]))))


# ---------------------------------------------------------------------------------------------------------- the server
def words(vocabulary: int) -> Any:
    """A tokenizer whose tokens are words, one each."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def lone_rates(engine: Any, args: Any) -> dict[str, float]:
    """Seconds of a prompt, and of a step of all requests, with nothing but the model at work."""
    import torch

    batch, model = engine.batch, engine.model
    generator = torch.Generator().manual_seed(1)

    def wait() -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    def prompt() -> Any:
        ids = torch.randint(0, model.program.vocab_size, (args.prompt,), generator=generator)
        running = batch.start(ids, max_length=args.prompt + args.answer)
        while (logits := batch.advance(running)) is None:
            pass
        wait()
        assert int(logits.argmax()) >= 0
        return running

    batch.end(prompt())
    wait()
    begin = time.perf_counter()
    running = prompt()
    seconds = time.perf_counter() - begin
    rows = [running, *(batch.fork(running) for _ in range(args.requests - 1))]
    tokens = torch.zeros(args.requests, dtype=torch.int64, device=model.device)
    for _ in range(8):
        tokens = batch.decode(rows, tokens).argmax(-1)
    wait()
    steps = min(64, args.answer - 9)
    begin = time.perf_counter()
    for _ in range(steps):
        tokens = batch.decode(rows, tokens).argmax(-1)
    wait()
    step = (time.perf_counter() - begin) / steps
    for row in rows:
        batch.end(row)
    return {"prompt": seconds, "step": step}


def report(found: list[dict[str, Any]], lone: dict[str, float], args: Any, steps: float) -> None:
    """Prints one run."""
    begin = min(f["sent"] for f in found)
    firsts = np.array([f["times"][0] for f in found])
    gaps = np.concatenate([np.diff(f["times"]) for f in found])
    times = np.concatenate([np.array(f["times"]) + f["sent"] for f in found])
    counts = np.concatenate([f["counts"] for f in found])
    end, tokens = times.max(), int(counts.sum())
    ideal = args.requests * lone["prompt"] + args.answer * lone["step"]
    rate = args.requests / lone["step"]
    print(f"  {tokens} tokens in {end - begin:.2f} s: {tokens / (end - begin):.0f} tokens/s, {steps:.0f} decode steps")
    print(f"  all prompts, then all steps, alone: {ideal:.2f} s, {ideal / (end - begin):.3f} of the time")
    print(f"  first token: median {np.median(firsts):.3f} s, p99 {np.quantile(firsts, 0.99):.3f} s")
    print(
        f"  between tokens: median {1e3 * np.median(gaps):.2f} ms, p99 {1e3 * np.quantile(gaps, 0.99):.2f} ms; "
        f"{tokens / len(times):.2f} tokens a chunk"
    )
    opens = max(f["sent"] + f["times"][0] for f in found)
    closes = min(f["sent"] + f["times"][-1] for f in found)
    if closes > opens:
        inside = int(counts[(times > opens) & (times <= closes)].sum())
        here = inside / (closes - opens)
        print(
            f"  while all decode: {here:.0f} tokens/s, {here / rate:.3f} of {rate:.0f} tokens/s of the model alone "
            f"({1e3 * lone['step']:.2f} ms a step)"
        )
    else:
        print(f"  never did all decode at once; the model alone makes {rate:.0f} tokens/s at that batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--policy", default="streaming_llm")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--answer", type=int, default=256)
    parser.add_argument("--rate", type=float, default=float("inf"))
    parser.add_argument("--memory", default="40GiB")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[2048, 1_000_000_000])
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        client(json.loads(args.client))
        return

    from kvrewrite import serving
    from kvrewrite.cli.options import parse_bytes
    from kvrewrite.serving.server import SWITCH_SECONDS
    from kvrewrite.tools.benchmark.shapes import open_source
    from kvrewrite.tools.subjects import Arm, PolicySpec

    sys.setswitchinterval(SWITCH_SECONDS)
    begin = time.perf_counter()
    source = open_source(args.model, device=args.device)
    model = source.rewritten(Arm(PolicySpec(args.policy, {"chunk": args.chunk}), args.budget))
    if not args.eager:
        model.compile()
    engine = serving.Engine(
        model,
        words(model.program.vocab_size),
        max_new_tokens=args.answer,
        max_prompt_tokens=args.prompt,
        waiting=args.requests + 1,
        capacity=serving.Capacity(max_requests=args.requests, memory=parse_bytes(args.memory, "--memory")),
    )
    engine.warm_up()
    limits = serving.Limits(connections=2 * args.requests + 32)
    server = serving.make_server(engine, "model", port=0, log_level="warning", limits=limits)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    print(f"{args.model}, {args.policy}, budget {args.budget}: ready after {time.perf_counter() - begin:.1f} s")
    lone = lone_rates(engine, args)
    print(f"alone: a prompt {lone['prompt']:.3f} s, a step of {args.requests} {1e3 * lone['step']:.2f} ms")
    spec = {
        "port": server.servers[0].sockets[0].getsockname()[1],
        "vocabulary": model.program.vocab_size,
        **{name: getattr(args, name) for name in ("requests", "prompt", "answer", "rate")},
    }
    for run, prompt_tokens in enumerate(args.prompt_tokens):
        engine.scheduler.capacity = dataclasses.replace(engine.scheduler.capacity, prompt_tokens=prompt_tokens)
        before = engine.metrics.steps._value.get()
        command = [sys.executable, "-m", "benchmarks.serve", "--client", json.dumps({**spec, "seed": run})]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        print(
            f"{args.requests} requests of {args.prompt} + {args.answer}, {prompt_tokens} prompt tokens between steps:"
        )
        report(json.loads(done.stdout), lone, args, engine.metrics.steps._value.get() - before)
    server.should_exit = True
    thread.join(20)


if __name__ == "__main__":
    main()
