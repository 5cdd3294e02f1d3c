"""The demonstration: converts the small model that ships with kvrewrite and compares both; offline, on a CPU."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvrewrite.errors import ArtifactError

POLICY, SHARE = "snapkv", 0.125
TASK, TOKENS, QUESTIONS = "needle_multikey", 1024, 4
COMPARED = ("full", "locret", "attention_gate", "snapkv", "h2o", "streaming_llm", "random")
# Locret's stabilizers, tail and chunk in proportion to the budget; its heads ship with the small model.
OWN_SHARE = ("full", "attention_gate")  # their gates, or nobody, decide how much stays
OPTIONS = {"locret": {"chunk": 64, "stabilizers": 32, "local_tail": 16, "positions": "original"}}


def full_cache_bytes(cache: Any) -> int:
    """Returns the bytes of keys and values in a transformers cache."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def run(out: Path | None = None, *, force: bool = False, questions: int = QUESTIONS) -> None:
    """Runs the demo; out: keeps the checkpoint in out/original and the converted model in out/converted.

    questions: how many each policy is asked in the comparison; 0 skips it.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that threads only wait for each other
    try:
        _place(out, force, console, questions)
    finally:
        torch.set_num_threads(threads)


def _place(out: Path | None, force: bool, console: Console, questions: int) -> None:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="kvrewrite-demo-") as folder:
            _run(Path(folder), console, questions)
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        ours = {"original", "converted"}
        if not force or not out.is_dir() or not {p.name for p in out.iterdir()} <= ours:
            raise ArtifactError(
                f"{out} is not empty; choose another directory, or replace an earlier demo with --force"
            )
    # Made beside `out` and moved when complete, so that an interruption leaves nothing.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.resolve().parent) as folder:
        _run(Path(folder), console, questions)
        out.mkdir(exist_ok=True)
        for name in ("original", "converted"):
            if (out / name).exists():
                shutil.rmtree(out / name)
            (Path(folder) / name).rename(out / name)
    shown = escape(str(out))
    console.print(f"\nkept: {shown}/original and {shown}/converted. Try:", soft_wrap=True)
    console.print(f'  kvrewrite generate {shown}/converted --prompt "import os"', soft_wrap=True)
    console.print(f"  kvrewrite verify {shown}/converted", soft_wrap=True)


def _run(folder: Path, console: Console, questions: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import kvrewrite
    from kvrewrite.analysis.memory import plan_memory
    from kvrewrite.assets import small_model
    from kvrewrite.cache.memory import human
    from kvrewrite.runtime.model import CACHE_NAME
    from kvrewrite.tools.evaluation import tasks
    from kvrewrite.tools.tables import memory_table, sites_table

    logging.disable_progress_bar()
    started = time.perf_counter()
    base = folder / "original"
    shutil.copytree(small_model(), base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    config, size = original.config, sum(p.numel() for p in original.parameters())
    console.print(
        f"[bold]1. a model[/]: the small one that ships with kvrewrite, Llama-shaped, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} heads,\n   {config.num_key_value_heads} kv heads, {size / 1e6:.1f} M parameters, trained "
        "to find things in texts of up to 4096 tokens"
    )

    console.print(f"\n[bold]2. converted[/]: {POLICY}, {SHARE:.1%} of the cache; the same as")
    console.print(f"   kvrewrite convert original --policy {POLICY} --budget {SHARE} --out converted\n")
    contexts = [1024, 4096, 131072]
    begun = time.perf_counter()
    done = kvrewrite.convert(base, folder / "converted", POLICY, budget=SHARE, contexts=contexts)
    took = time.perf_counter() - begun
    console.print(sites_table(done.program.sites))
    console.print(f"   and proved by running it beside the original; {took:.1f} s")

    begun = time.perf_counter()
    small: Any = kvrewrite.load(folder / "converted")
    console.print(f"\n[bold]3. loaded[/] in {time.perf_counter() - begun:.1f} s from graph.json and the safetensors")
    sample = tasks.make(TASK, tokens=TOKENS, seed=1, tokenizer=tokenizer)
    prompt = torch.tensor([tokenizer(sample.context + sample.question)["input_ids"]])
    settings: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "use_cache": True,
    }
    full = original.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    cache = small.new_cache(1)
    dtype = small.dtype
    evicted = small.generate(prompt, attention_mask=torch.ones_like(prompt), cache=cache, **settings)
    console.print(
        f"   {prompt.shape[1]} tokens, one of many needles asked for: {escape(repr(sample.question.strip()))}\n"
        f"   the answer is {', '.join(sample.answers)}",
        soft_wrap=True,
    )
    for title, result in (("full cache", full), (f"{SHARE:.1%} of it", evicted)):
        words = tokenizer.decode(result.sequences[0, prompt.shape[1] :], skip_special_tokens=True)
        console.print(f"   [bold]{title}[/]: {escape(repr(words))}", soft_wrap=True)

    console.print("\n[bold]4. memory[/]")
    original_cache = full[CACHE_NAME]
    before, memory = full_cache_bytes(original_cache) * dtype.itemsize // 4, cache.memory()
    table = Table(title=f"cache memory, measured after the answer, {str(dtype)[6:]}", title_justify="left")
    for name in ("cache", "bytes", "slots a head"):
        table.add_column(name, justify="right")
    slots = max(int(lens.max()) for lens in cache.live_slots().values())
    table.add_row("full (transformers)", human(before), str(original_cache.get_seq_length()))
    table.add_row("evicted, live slots", human(memory.live), str(slots))
    table.add_row("evicted, leased pages", human(memory.leased), "")
    console.print(table)
    console.print(f"   saved: {1 - memory.leased / before:.1%} ({human(before)} -> {human(memory.leased)} leased)")
    plans = [plan_memory(small.sites, small.policy, dtype.itemsize, n) for n in contexts]
    console.print(memory_table(plans))
    if questions:
        console.print("\n[bold]5. which policy?[/]\n")
        _compare(original, tokenizer, questions, console)
    console.print(f"done in {time.perf_counter() - started:.0f} s; more with `kvrewrite eval`")


def _compare(original: Any, tokenizer: Any, questions: int, console: Console) -> None:
    """Asks every policy the same questions, all in one batch."""
    from kvrewrite.api import Rewriter
    from kvrewrite.assets import small_policies
    from kvrewrite.tools.evaluation import tasks

    table = Table(title=f"{questions} questions of {TOKENS} tokens, {SHARE:.1%} kept", title_justify="left")
    for name in ("policy", "right", "slots kept a head"):
        table.add_column(name, justify="right" if name != "policy" else "left")
    samples = [tasks.make(TASK, tokens=TOKENS, seed=100 + i, tokenizer=tokenizer) for i in range(questions)]
    tokenizer.padding_side = "left"
    prompts = tokenizer([s.context + s.question for s in samples], return_tensors="pt", padding=True)
    rewriter = Rewriter(original, check="off")  # what is proved was proved when the model was converted
    for policy in COMPARED:
        budget = None if policy in OWN_SHARE else SHARE
        options = {"budget": budget, **OPTIONS.get(policy, {})}
        small: Any = rewriter.rewrite(policy, policy_weights=small_policies().get(policy), **options)
        cache = small.new_cache(questions)
        out = small.generate(
            prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            cache=cache,
            max_new_tokens=6,
            do_sample=False,
        )
        answers = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        right = sum(tasks.score(sample, answer) for sample, answer in zip(samples, answers))
        kept = float(torch.cat([lens.flatten() for lens in cache.live_slots().values()]).double().mean())
        table.add_row(policy, f"{right:g} of {questions}", f"{kept:.0f}")
    console.print(table)
    console.print("   attention_gate: what its gates let pass. A glimpse, no measurement.")
