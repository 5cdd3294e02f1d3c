"""The demonstration: a small model made on the spot, converted and compared with itself; offline, on a CPU."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from kvrewrite.errors import ArtifactError

BUDGET, CHUNK = 128, 64
PROMPT, NEW = 600, 40
VOCABULARY, MAX_LENGTH = 768, 2048
TRAIN_STEPS, TRAIN_SECONDS, BATCH, LENGTH = 150, 12.0, 8, 128
# Modules of Python's standard library: text that is on every machine. The prompt comes from one that is not trained on.
TEXTS = (
    "argparse.py",
    "ast.py",
    "difflib.py",
    "inspect.py",
    "pathlib.py",
    "pickle.py",
    "subprocess.py",
    "threading.py",
)
HELD_OUT = "textwrap.py"


def standard_library(names: tuple[str, ...]) -> str:
    """The source text of some modules of the standard library, those that are there."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [(folder / name).read_text(encoding="utf-8") for name in names if (folder / name).is_file()]
    if not texts:
        raise ArtifactError(f"none of {', '.join(names)} is in {folder}; the demo takes its text from there")
    return "\n".join(texts)


def make_tokenizer(text: str) -> Any:
    """A byte-level BPE tokenizer trained on `text`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(tokenizer: Any, seed: int = 0) -> Any:
    """A Llama-shaped model with grouped queries and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def train(model: Any, ids: Tensor, steps: int = TRAIN_STEPS, seconds: float = TRAIN_SECONDS) -> tuple[int, float]:
    """A few steps of next-token training, at most `seconds` long; returns the steps made and the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, start, loss = torch.Generator().manual_seed(0), time.perf_counter(), torch.tensor(float("nan"))
    model.train()
    step = 0
    while step < steps and time.perf_counter() - start < seconds:
        at = torch.randint(0, len(ids) - LENGTH, (BATCH, 1), generator=generator)
        batch = ids[at + torch.arange(LENGTH)]
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    model.eval()
    return step, float(loss.detach())


def full_cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a cache of transformers."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def run(out: Path | None = None, *, force: bool = False, train_seconds: float = TRAIN_SECONDS) -> None:
    """Runs the demo; out: keeps the checkpoint in out/original and the converted model in out/converted.

    train_seconds: 0 leaves the weights random.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that threads only wait for each other
    try:
        _place(out, force, console, train_seconds)
    finally:
        torch.set_num_threads(threads)


def _place(out: Path | None, force: bool, console: Console, train_seconds: float) -> None:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="kvrewrite-demo-") as folder:
            _run(Path(folder), console, train_seconds)
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        ours = {"original", "converted"}
        if not force or not out.is_dir() or not {p.name for p in out.iterdir()} <= ours:
            raise ArtifactError(
                f"{out} is not empty; choose another directory, or replace an earlier demo with --force"
            )
    # Made beside `out` and moved when it is complete, so that an interruption leaves nothing.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.resolve().parent) as folder:
        _run(Path(folder), console, train_seconds)
        out.mkdir(exist_ok=True)
        for name in ("original", "converted"):
            if (out / name).exists():
                shutil.rmtree(out / name)
            (Path(folder) / name).rename(out / name)
    shown = escape(str(out))
    console.print(f"\nkept: {shown}/original and {shown}/converted. Try:", soft_wrap=True)
    console.print(f'  kvrewrite generate {shown}/converted --prompt "import os"', soft_wrap=True)
    console.print(f"  kvrewrite verify {shown}/converted", soft_wrap=True)


def _run(folder: Path, console: Console, train_seconds: float) -> None:
    from transformers.utils import logging

    import kvrewrite
    from kvrewrite.cli import memory_table, sites_table
    from kvrewrite.memory import human, plan_memory

    logging.disable_progress_bar()
    started = time.perf_counter()
    text = standard_library(TEXTS)
    tokenizer = make_tokenizer(text)
    original = make_model(tokenizer)
    size = sum(p.numel() for p in original.parameters())
    console.print(f"[bold]1. a model[/]: Llama-shaped, 4 layers, 4 heads, 2 kv heads, {size / 1e6:.1f} M parameters,")
    if train_seconds > 0:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        begun = time.perf_counter()
        steps, loss = train(original, ids, seconds=train_seconds)
        took = time.perf_counter() - begun
        console.print(
            f"   weights trained just now for {steps} steps ({took:.0f} s) on sources of Python's standard library, "
            f"loss {loss:.2f}:\n   enough to run, and far too little for its text to say anything about quality"
        )
    else:
        console.print("   weights random: its text means nothing.")
    base = folder / "original"
    original.save_pretrained(base, max_shard_size="1MB")
    tokenizer.save_pretrained(base)
    shards = len(list(base.glob("*.safetensors")))
    console.print(f"   saved by save_pretrained in {shards} shards")

    console.print(f"\n[bold]2. converted[/]: streaming_llm, budget {BUDGET}; the same as")
    console.print(
        f"   kvrewrite convert original --policy streaming_llm --budget {BUDGET} --chunk {CHUNK} --out converted\n"
    )
    contexts = [1024, 8192, 131072]
    begun = time.perf_counter()
    done = kvrewrite.convert(base, folder / "converted", "streaming_llm", budget=BUDGET, chunk=CHUNK, contexts=contexts)
    took = time.perf_counter() - begun
    console.print(sites_table(done.program.sites, brief=True))
    inserted = sorted({name for site in done.program.sites for name in site.inserted})
    console.print(f"   inserted at every site: {', '.join(inserted)}; {took:.1f} s")

    begun = time.perf_counter()
    small: Any = kvrewrite.load(folder / "converted")
    console.print(f"\n[bold]3. loaded[/] in {time.perf_counter() - begun:.1f} s from graph.json and the safetensors")
    prompt = torch.tensor([tokenizer(standard_library((HELD_OUT,)))["input_ids"][:PROMPT]])
    mask = torch.ones_like(prompt)
    settings = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    full = original.generate(prompt, **settings)
    cache = small.new_cache(1)
    evicted = small.generate(prompt, past_key_values=cache, **settings)
    seen = full.sequences.shape[1] - 1  # the last token was never fed back
    console.print(
        f"   a prompt of {prompt.shape[1]} tokens ({HELD_OUT}, which it was not trained on), {NEW} new tokens:"
    )
    for title, result in (("full cache", full), (f"evicted, budget {BUDGET}", evicted)):
        words = tokenizer.decode(result.sequences[0, prompt.shape[1] :])
        console.print(f"   [bold]{title}[/]: {escape(repr(words))}", soft_wrap=True)
    ids, length = prompt[:, : BUDGET - CHUNK], BUDGET - CHUNK
    with torch.no_grad():
        difference = float((small(ids).logits - original(ids).logits).abs().max())
    console.print(
        f"   within the budget nothing changes: max logit difference on {length} tokens {difference:.1e} (fp32)"
    )

    console.print("\n[bold]4. memory[/]")
    before, memory = full_cache_bytes(full.past_key_values), cache.memory()
    table = Table(title=f"cache memory, measured after {seen} tokens, fp32", title_justify="left")
    for name in ("cache", "bytes", "slots a head"):
        table.add_column(name, justify="right")
    slots = max(int(lens.max()) for lens in cache.live_slots().values())
    table.add_row("full (transformers)", human(before), str(full.past_key_values.get_seq_length()))
    table.add_row("evicted, live slots", human(memory.live), str(slots))
    table.add_row("evicted, leased pages", human(memory.leased), "")
    console.print(table)
    console.print(f"   saved: {1 - memory.leased / before:.1%} ({human(before)} -> {human(memory.leased)} leased)")
    itemsize = small.dtype.itemsize
    plans = [plan_memory(small.sites, small.policy, itemsize, n) for n in contexts]
    console.print(memory_table(plans))
    console.print(f"done in {time.perf_counter() - started:.0f} s")
