"""The command `kvrewrite generate`."""

from __future__ import annotations

import os
import time
from typing import Any

import click

from kvrewrite.cli.options import TRUST
from kvrewrite.cli.shared import Command, find_device, waiting
from kvrewrite.errors import OptionError


@click.command(cls=Command)
@click.argument("directory")
@click.option("--prompt", help="The prompt.")
@click.option("--prompt-file", type=click.Path(allow_dash=True), help="A file with the prompt; - reads stdin.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="The most tokens of the answer.",
)
@click.option("--sample", "--do-sample", "sample", is_flag=True, help="Sample instead of taking the likeliest token.")
@click.option("--temperature", type=float, help="With --sample.")
@click.option("--top-p", type=float, help="With --sample.")
@click.option("--seed", type=int, default=0, show_default=True, help="With --sample.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--chat", is_flag=True, help="Put the prompt into the tokenizer's chat template.")
@click.option("--cache", "document", help="A file of kvrewrite prefill; the prompt follows its document.")
@TRUST
def generate(
    directory: str,
    prompt: str | None,
    prompt_file: str | None,
    max_new_tokens: int,
    sample: bool,
    temperature: float | None,
    top_p: float | None,
    seed: int,
    device: str,
    chat: bool,
    document: str | None,
    trust_compiled: bool,
) -> None:
    """Generates text with the converted model in DIRECTORY; text on stdout, memory on stderr.

    Under torchrun the processes share the model (tensor parallelism), and the first one prints.

    \b
    Examples:
      kvrewrite generate small --prompt "Paris is" --max-new-tokens 20
      kvrewrite generate small --chat --prompt-file report.txt --device cuda
    """
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give one of --prompt and --prompt-file")
    if not sample and (temperature is not None or top_p is not None):
        raise click.UsageError("--temperature and --top-p need --sample")
    if chat and document is not None:
        raise click.UsageError("--chat begins a text, and the prompt follows that of --cache; leave one of them out")
    if prompt_file is not None:
        with click.open_file(prompt_file, encoding="utf-8") as file:
            prompt = file.read()
    from kvrewrite.artifact import directory as artifact

    artifact.read_manifest(directory)
    import torch
    from transformers import TextStreamer

    from kvrewrite import api
    from kvrewrite.artifact.companions import read_tokenizer
    from kvrewrite.runtime.parallel import leave
    from kvrewrite.runtime.saved_cache import load_cache

    shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    where = find_device(f"cuda:{os.environ['LOCAL_RANK']}" if shared and device == "cuda" else device)
    tokenizer = read_tokenizer(directory)
    if chat:
        if not tokenizer.chat_template:
            raise OptionError("--chat: this model's tokenizer has no chat template; leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=document is None)
    ids = tokens["input_ids"]
    if ids.shape[1] == 0:
        raise OptionError("the prompt has no tokens; expected some text in --prompt or --prompt-file")
    with waiting("loading the model"):
        plan = "auto" if shared else None
        model: Any = api.load(directory, device=where, trust_compiled=trust_compiled, tp_plan=plan)
    speaks, where = not shared or model.program.parallel.peers.rank == 0, model.device
    if document is None:
        cache = model.new_cache(1, max_length=ids.shape[1] + max_new_tokens)
    else:
        cache = load_cache(model, document)
        ids = torch.cat([cache.ids(), ids], dim=1)
    chosen = {"temperature": temperature, "top_p": top_p}
    settings = {k: v for k, v in chosen.items() if v is not None}
    torch.manual_seed(seed)
    started = time.perf_counter()
    with waiting(f"reading {ids.shape[1]} tokens") as status:

        class Streamer(TextStreamer):
            """Ends the status line before the first text."""

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                status.stop()
                super().on_finalized_text(text, stream_end)

        out = model.generate(
            ids.to(where),
            attention_mask=torch.ones_like(ids).to(where),
            cache=cache,
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if speaks else None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **settings,
        )
    seconds = time.perf_counter() - started
    made = out.shape[1] - ids.shape[1]
    if speaks:
        click.echo(memory_line(model, cache, int(ids.shape[1]), int(made), seconds), err=True)
    if shared:
        model = cache = None
        leave()


def memory_line(model: Any, cache: Any, prompt: int, made: int, seconds: float) -> str:
    """Compares what a generation's cache held with a full cache."""
    return f"{prompt} prompt + {made} new tokens in {seconds:.1f} s; cache{of_each(model)}: {cache.memory()}"


def of_each(model: Any) -> str:
    """Whose memory it is, where several processes share a model."""
    parallel = model.program.parallel
    return "" if parallel is None else f" of each of {parallel.peers.ranks} processes"
