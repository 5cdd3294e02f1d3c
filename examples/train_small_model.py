"""Train the small model that ships with the project: a Llama of about 4.5M parameters that answers questions about 4096
tokens.

    python examples/train_small_model.py --out run --minutes 8       # one GPU; eight minutes, and one for the exam
    python examples/train_small_model.py                              # any machine: a check on a tiny model, in seconds

The curriculum: copies of random tokens until the model copies (induction), then the tasks of
`kvrewrite.tools.evaluation.tasks` at 256, at 1024 and at 4096 tokens, each stage ending when it is learned or its
time is over. Several questions follow each document. All texts come from random streams that no exam uses. The loss
has three parts: the mean over the replies' tokens; a small part for text; and a small part for attention sinks. Large
models come to rest their idle heads on the first token by themselves; this one rested them on the current token
(measured after 470M tokens without that part: below 1% on the first token in layers 2 to 4), so all layers but the
first are held to give the first token a share of 30%.

A run can be split over calls: `--span 0 0.3`, then `--resume run --stage 3 --span 0.3 1`.

Files in --out: model.0/1.safetensors (fp32 weights), adam.0/1.safetensors (bf16 moments), exam.json, and small/ (the
model as transformers loads it, bf16).
"""

import argparse
import json
import math
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small_model_data import BOS, EOS, KINDS, PAD, Feeder, Stage, exam_paper, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from kvrewrite.tools.evaluation import tasks

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
TINY = SHAPE | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
THETA = 1e5
TEXT_WEIGHT = 0.15
SINK_WEIGHT = 0.02  # of `sink_lack`, see there
SINK_SHARE = 0.3
STAGES = [
    Stage(((256, 1.0),), 100),
    Stage(((256, 1.0),), 15),
    Stage(((1024, 0.75), (256, 0.25)), 5),
    Stage(((4096, 0.65), (1024, 0.2), (256, 0.15)), 2),
]
LATEST = [0.08, 0.5, 0.65, 2.0]  # a stage ends at the latest here, as a fraction of the whole training
LEARNED = [0.98, 0.97, 0.97, 2.0]  # ... or when this share of reply tokens is right (copies; retrieval)


# --------------------------------------------------------------------------------------------------------------- model


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE like Llama in transformers: the two halves of a head are the pairs' coordinates."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def project(
    x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, qkv: Tensor, heads: tuple[int, int, int]
) -> list[Tensor]:
    """Returns rotated q (B, H, T, D), rotated k and v (B, Hkv, T, D) of a layer's input (B, T, C)."""
    queries, keys, size = heads
    h = F.rms_norm(x, norm.shape, norm, 1e-5).to(torch.bfloat16)
    y = F.linear(h, qkv.to(torch.bfloat16)).unflatten(-1, (queries + 2 * keys, size)).transpose(1, 2)
    q, k, v = y.split([queries, keys, keys], 1)
    return [rotate(q, cos, sin), rotate(k, cos, sin), v]


def sink_lack(q: Tensor, k: Tensor, at: Tensor) -> Tensor:
    """Returns how far queries at `at` (S,) are from giving position 0 the weight SINK_SHARE: mean of the log ratio."""
    groups = q.shape[1] // k.shape[1]
    some = q[:, :, at].unflatten(1, (k.shape[1], groups)).flatten(2, 3)  # (B, Hkv, groups * S, D)
    scores = (some @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    later = torch.arange(k.shape[2], device=at.device) > at.repeat(groups)[:, None]
    first = scores[..., 0] - scores.masked_fill(later, -torch.inf).logsumexp(-1)
    return (math.log(SINK_SHARE) - first).clamp_min(0).mean()


def layer(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: Tensor,
    qkv: Tensor,
    out: Tensor,
    norm2: Tensor,
    up: Tensor,
    down: Tensor,
    heads: tuple[int, int, int],
    at: Tensor,
) -> tuple[Tensor, Tensor]:
    """Runs one decoder layer on (B, T, C) in fp32; matrix products in bf16. `up` is gate and up projection in one.

    Also returns `sink_lack` of the queries at positions `at`.
    """
    half = torch.bfloat16
    q, k, v = project(x, cos, sin, norm, qkv, heads)
    lack = sink_lack(q, k, at)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + F.linear(y.transpose(1, 2).flatten(2), out.to(half))
    h = F.rms_norm(x, norm2.shape, norm2, 1e-5).to(half)
    gate, value = F.linear(h, up.to(half)).chunk(2, -1)
    return x + F.linear(F.silu(gate) * value, down.to(half)), lack


def predict(x: Tensor, norm: Tensor, embedding: Tensor) -> Tensor:
    """Returns fp32 logits (N, V) of hidden states (N, C)."""
    h = F.rms_norm(x, norm.shape, norm, 1e-5).to(torch.bfloat16)
    return F.linear(h, embedding.to(torch.bfloat16)).float()


def losses(x: Tensor, targets: Tensor, norm: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the cross entropy (N,) of the next tokens, and whether the most likely token is right."""
    logits = predict(x, norm, embedding)
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


class Small(torch.nn.Module):
    """The model with fused projections; `exported` has transformers' names."""

    NAMES = ("norm", "qkv", "out", "norm2", "up", "down")

    def __init__(self, shape: dict, device: str, compiled: bool):
        super().__init__()
        self.shape = shape
        c, m, depth = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
        q, k, d = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
        self.heads = (q, k, d)
        sizes = {
            "norm": (c,),
            "qkv": ((q + 2 * k) * d, c),
            "out": (c, q * d),
            "norm2": (c,),
            "up": (2 * m, c),
            "down": (c, m),
        }
        for i in range(depth):
            for name, size in sizes.items():
                std = 0.02 / math.sqrt(2 * depth) if name in ("out", "down") else 0.02
                weight = torch.ones(size) if name.startswith("norm") else torch.randn(size) * std
                self.register_parameter(f"{name}_{i}", torch.nn.Parameter(weight))
        self.norm = torch.nn.Parameter(torch.ones(c))
        self.embedding = torch.nn.Parameter(torch.randn(shape["vocab_size"], c) * 0.02)
        self.to(device)
        angle = torch.arange(8192)[:, None] / THETA ** (torch.arange(0, d, 2)[None].double() / d)
        self.cos, self.sin = angle.cos().to(device, torch.bfloat16), angle.sin().to(device, torch.bfloat16)
        self.layer = torch.compile(layer, dynamic=False) if compiled else layer
        self.losses = torch.compile(losses, dynamic=False) if compiled else losses

    def weights(self, i: int) -> list[Tensor]:
        return [getattr(self, f"{name}_{i}") for name in self.NAMES]

    def hidden(self, ids: Tensor, layer=None, queries: int = 1) -> tuple[Tensor, Tensor]:
        """Maps (B, T) to (B, T, C) in fp32; also returns the mean `sink_lack` of all layers but the first at random
        queries."""
        x = F.embedding(ids, self.embedding)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        at = torch.randint(16, ids.shape[1], (queries,), device=ids.device)
        lacks = []
        for i in range(self.shape["num_hidden_layers"]):
            x, lack = (layer or self.layer)(x, cos, sin, *self.weights(i), self.heads, at)
            lacks.append(lack)
        return x, torch.stack(lacks[1:]).mean()

    @torch.no_grad()
    def sink(self, ids: Tensor) -> Tensor:
        """Returns the mean attention weight on position 0 from queries 64 on: (layers, heads), of ids (B, T)."""
        x = F.embedding(ids, self.embedding)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        found = []
        for i in range(self.shape["num_hidden_layers"]):
            norm, qkv = self.weights(i)[:2]
            q, k, _ = project(x, cos, sin, norm, qkv, self.heads)
            k = k.repeat_interleave(self.heads[0] // self.heads[1], 1)
            scores = (q.float() @ k.float().transpose(-1, -2)) * self.heads[2] ** -0.5
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=ids.device).tril()
            weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
            found.append(weights[:, :, 64:, 0].mean((0, 2)))
            x, _ = layer(x, cos, sin, *self.weights(i), self.heads, torch.tensor([1], device=ids.device))
        return torch.stack(found)

    def exported(self) -> dict[str, Tensor]:
        """Returns the weights under transformers' names, bf16."""
        q, k, d = self.heads
        found = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        for i in range(self.shape["num_hidden_layers"]):
            norm, qkv, out, norm2, up, down = self.weights(i)
            at = f"model.layers.{i}."
            parts = qkv.split([q * d, k * d, k * d])
            found |= {f"{at}self_attn.{n}_proj.weight": part for n, part in zip("qkv", parts, strict=True)}
            gate, value = up.chunk(2)
            found |= {
                at + "self_attn.o_proj.weight": out,
                at + "mlp.gate_proj.weight": gate,
                at + "mlp.up_proj.weight": value,
                at + "mlp.down_proj.weight": down,
                at + "input_layernorm.weight": norm,
                at + "post_attention_layernorm.weight": norm2,
            }
        return {name: weight.detach().to("cpu", torch.bfloat16).contiguous().clone() for name, weight in found.items()}


# ------------------------------------------------------------------------------------------------------------ training


def optimizer_of(model: Small, rate: float) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95), weight decay 0.05 on matrices."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-9, fused=next(model.parameters()).is_cuda)


def rate_at(progress: float, step: int, peak: float) -> float:
    """Linear warm-up over 200 steps (of each call), then cosine over the whole training down to 2%."""
    return peak * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def save(model: Small, optimizer: torch.optim.AdamW, state: dict, out: Path) -> None:
    """Writes a checkpoint in files of at most 16 MB each."""
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    names = sorted(weights)
    for part in range(2):
        save_file(
            {n: weights[n] for n in names[part::2]}, out / f"model.{part}.safetensors", {"state": json.dumps(state)}
        )
    for part, key in enumerate(("exp_avg", "exp_avg_sq")):
        moments = {n: optimizer.state[p][key].to("cpu", torch.bfloat16) for n, p in model.named_parameters()}
        save_file(moments, out / f"adam.{part}.safetensors")


def restore(model: Small, optimizer: torch.optim.AdamW, folder: Path) -> None:
    """Loads what `save` wrote."""
    weights = load_file(folder / "model.0.safetensors") | load_file(folder / "model.1.safetensors")
    moments = [load_file(folder / f"adam.{part}.safetensors") for part in range(2)]
    for name, p in model.named_parameters():
        p.data.copy_(weights[name])
        first, second = (m[name].to(p.device, torch.float32) for m in moments)
        optimizer.state[p] = {"step": torch.tensor(1000.0, device=p.device), "exp_avg": first, "exp_avg_sq": second}


def train(model: Small, feeder: Feeder, args: argparse.Namespace, out: Path) -> dict:
    """Runs the curriculum for args.minutes (minus the initial compile time); returns what is worth recording."""
    device = args.device
    optimizer = optimizer_of(model, args.rate)
    stage = args.stage
    if args.resume:
        restore(model, optimizer, Path(args.resume))
    feeder.stage.value = stage
    right = torch.zeros(len(KINDS), device=device)
    count = torch.zeros(len(KINDS), device=device)
    sums = torch.zeros(4, device=device)
    begin, end = args.span
    started = saved = noted = time.monotonic()
    step = tokens = 0
    while True:
        now = time.monotonic()
        progress = begin + (end - begin) * (now - started) / (60 * args.minutes)
        if progress >= end:
            break
        batch = feeder.next()

        def to(array):
            tensor = torch.from_numpy(array)
            return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor

        ids, at, weight, kind, text = map(to, (batch.ids, batch.at, batch.weight, batch.kind, batch.text))
        ids, at, kind, text = ids.int(), at.long(), kind.long(), text.long()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress, step, args.rate)
        places = torch.cat((at, text))
        x, lack = model.hidden(ids, queries=16)
        x = x.flatten(0, 1)[places]
        each, hit = model.losses(
            x, ids.flatten()[(places + 1).clamp_max(ids.numel() - 1)].long(), model.norm, model.embedding
        )
        reply = (each[: len(at)] * weight).sum() / weight.sum().clamp_min(1e-6)
        prose = each[len(at) :].mean() * (batch.text.max() > 0)
        (reply + TEXT_WEIGHT * prose + SINK_WEIGHT * lack).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            real = (weight > 0).float()
            right.index_add_(0, kind, hit[: len(at)] * real)
            count.index_add_(0, kind, real)
            sums += torch.stack((reply.detach(), prose.detach(), lack.detach(), torch.ones_like(reply)))
        step += 1
        tokens += batch.ids.size
        if step % args.every == 0:
            share = (right / count.clamp_min(1)).tolist()
            means = (sums[:3] / sums[3]).tolist()
            now = time.monotonic()
            shown = " ".join(
                f"{name}:{100 * s:.0f}" for name, s, c in zip(KINDS, share, count.tolist(), strict=True) if c
            )
            print(
                f"{now - started:6.1f}s step {step} stage {stage} {tokens / 1e6:.0f}M tokens, "
                f"{args.every * args.batch / (now - noted) / 1e6:.2f}M/s, queue {feeder.queue.qsize()}, "
                f"lr {optimizer.param_groups[0]['lr']:.1e}, loss {means[0]:.4f}, text {means[1]:.3f}, "
                f"sink {means[2]:.3f} | {shown}",
                flush=True,
            )
            retrieval = [share[KINDS.index(k)] for k in ("needle_multikey", "needle_distractors", "kv_retrieval")]
            learned = share[0] if stage == 0 else sum(retrieval) / 3
            if stage + 1 < len(STAGES) and (learned > LEARNED[stage] or progress > LATEST[stage]):
                stage += 1
                feeder.stage.value = stage
                for _ in range(feeder.queue.qsize()):
                    feeder.next()
            noted = time.monotonic()
            for tensor in (right, count, sums):
                tensor.zero_()
        if now - saved > args.save:
            save(model, optimizer, {"stage": stage, "progress": progress}, out)
            saved = time.monotonic()
    save(model, optimizer, {"stage": stage, "progress": end}, out)
    return {"seconds": round(time.monotonic() - started, 1), "steps": step, "tokens": tokens, "stage": stage}


# ---------------------------------------------------------------------------------------------------------------- exam


def set_exam(pool: ProcessPoolExecutor, lengths: list[int], count: int) -> dict:
    """Returns futures of the samples per (task, tokens)."""
    parts = [range(a, min(a + 25, count)) for a in range(0, count, 25)]
    return {(task, n): [pool.submit(_paper, task, n, part) for part in parts] for n in lengths for task in tasks.TASKS}


@torch.no_grad()
def exam(model: Small, tokenizer: Tokenizer, papers: dict, device: str) -> dict:
    """Returns the percentage of exact replies per task and length.

    One forward over prompt and reply: a reply counts if each of its tokens, and <eos> after it, is the most likely one,
    which is when greedy decoding gives exactly the reply. `score` is the task's own score of those most likely tokens.
    """
    found = {}
    for (task, tokens), parts in papers.items():
        paper = [entry for part in parts for entry in part.result()]
        exact = scores = 0.0
        rows = max(1, 131072 // tokens)
        for a in range(0, len(paper), rows):
            some = paper[a : a + rows]
            width = -(-max(len(ids) for _, ids, _ in some) // 64) * 64
            ids = torch.tensor([ids + [PAD] * (width - len(ids)) for _, ids, _ in some], device=device)
            places = [r * width + p for r, (_, ids_, start) in enumerate(some) for p in range(start - 1, len(ids_) - 1)]
            x = model.hidden(ids, layer)[0].flatten(0, 1)[torch.tensor(places, device=device)]
            best = iter(predict(x, model.norm, model.embedding).argmax(-1).tolist())
            for sample, whole, start in some:
                reply = [next(best) for _ in whole[start:]]
                exact += reply == whole[start:]
                text = tokenizer.decode(reply[: reply.index(EOS)] if EOS in reply else reply)
                scores += tasks.score(sample, text)
        found[f"{task}@{tokens}"] = {
            "exact": round(100 * exact / len(paper), 2),
            "score": round(100 * scores / len(paper), 2),
            "n": len(paper),
        }
        print(f"exam {task}@{tokens}", found[f"{task}@{tokens}"], flush=True)
    return found


_EXAM_TOKENIZER: Tokenizer | None = None


def _load_tokenizer(file: str) -> None:
    global _EXAM_TOKENIZER
    _EXAM_TOKENIZER = Tokenizer.from_file(file)


def _paper(task: str, tokens: int, seeds: range) -> list:
    assert _EXAM_TOKENIZER is not None
    return exam_paper(_EXAM_TOKENIZER, task, tokens, seeds)


def export(model: Small, tokenizer_file: Path, out: Path) -> None:
    """Writes the model as transformers loads it: config, weights in bf16, tokenizer."""
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        **model.shape,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(out)
    GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False).save_pretrained(out)
    save_file(model.exported(), out / "model.safetensors", {"format": "pt"})
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=model.shape["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="folder for checkpoints, exam and model; none: a tiny check, nothing kept"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use; none: one is made in --out")
    parser.add_argument("--minutes", type=float, default=10.0, help="wall time of the training, without the exam")
    parser.add_argument(
        "--span", type=float, nargs=2, default=(0.0, 1.0), help="part of the schedule that this call runs"
    )
    parser.add_argument("--resume", help="folder of a checkpoint to go on from")
    parser.add_argument("--stage", type=int, default=0, help="stage of the curriculum to begin with")
    parser.add_argument("--batch", type=int, default=131072, help="tokens a batch")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--every", type=int, default=100, help="steps between reports")
    parser.add_argument("--save", type=float, default=120.0, help="seconds between checkpoints")
    parser.add_argument("--exam", type=int, default=500, help="samples a task and length; 0: no exam")
    parser.add_argument("--exam-lengths", type=int, nargs="+", default=[4096, 2048, 1024, 512])
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model and short texts, to check the script on the CPU"
    )
    args = parser.parse_args()
    if args.out is not None:
        run(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.out, args.tiny, args.minutes = Path(folder), True, 0.05
        run(args)


def run(args: argparse.Namespace) -> None:
    """Writes tokenizer, training, exam and export into args.out."""
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = TINY if args.tiny else SHAPE
    if args.tiny:
        args.batch, args.every, args.workers, args.exam, args.exam_lengths = 2048, 20, 1, 4, [256]
        STAGES[2:] = [Stage(((256, 1.0),), 10)] * 2
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tokenizer is None:
        args.tokenizer = args.out / "tokenizer.json"
        if not args.tokenizer.exists():
            train_tokenizer(shape["vocab_size"]).save(str(args.tokenizer))
    began = time.monotonic()
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    feeder = Feeder(args.tokenizer, STAGES, args.batch, shape["vocab_size"], args.workers, args.seed)
    pool = ProcessPoolExecutor(
        args.workers, mp_context=get_context("fork"), initializer=_load_tokenizer, initargs=(str(args.tokenizer),)
    )
    papers = set_exam(pool, args.exam_lengths, args.exam)  # made while the model trains
    torch.manual_seed(args.seed)
    model = Small(shape, args.device, compiled=args.device == "cuda")
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {args.device}, {args.workers} workers",
        flush=True,
    )
    notes = train(model, feeder, args, args.out)
    feeder.close()
    for p in model.parameters():  # bf16 is what ships
        p.data = p.data.bfloat16().float()
    export(model, args.tokenizer, args.out / "small")
    notes["gpu"] = torch.cuda.get_device_name() if args.device == "cuda" else "none"
    if args.exam:
        prompts = [whole[:start] for _, whole, start in exam_paper(tokenizer, "needle_multikey", 1024, range(8))]
        ids = torch.tensor([prompt[:1000] for prompt in prompts], device=args.device)
        sink = model.sink(ids).tolist()
        print(
            "mean attention on position 0, layer by layer:",
            [[round(x, 2) for x in heads] for heads in sink],
            flush=True,
        )
        notes["sink"] = sink
        notes["exam"] = exam(model, tokenizer, papers, args.device)
    notes["all_seconds"] = round(time.monotonic() - began, 1)
    (args.out / "exam.json").write_text(json.dumps(notes, indent=1))
    print({k: v for k, v in notes.items() if k not in ("exam", "sink")}, flush=True)
    pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
