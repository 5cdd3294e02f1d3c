"""Kept positions next to those of kvpress 0.5.5, recorded in tests/data/kvpress.json (tests/peers/README.md: how).

Same model, same prompts. Where options can be chosen so that both define the same thing, the kept sets must be the same.
Where kvpress departs from what a method's authors do, a test computes both rules from the attention of the unmodified
model: one must give our sets and the other the recording, so that nothing but the rule differs.

kvpress never evicts in the middle of a prompt: so must we not (chunk=None).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvrewrite.capture.captured import Captured
from kvrewrite.capture.frontend import capture
from kvrewrite.passes.pipeline import canonical
from tests.peers import learned_heads as heads
from tests.peers.tiny_llama import fingerprint, prompt, tiny_llama
from tests.support.products import covering
from tests.support.rewritten import rewrite

pytestmark = pytest.mark.xdist_group("kvpress")
RECORD: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "kvpress.json").read_text())
PROMPTS: list[dict[str, Any]] = RECORD["prompts"]
RATIOS = ("0.3", "0.5", "0.75")  # of the tokens, removed
LAYERS, KV_HEADS, GROUP = 3, 2, 4
Kept = list[list[list[int]]]  # layer -> kv head -> positions


# -- both sides ------------------------------------------------------------------------------------------------------
@functools.cache
def original(attention: str = "sdpa") -> Any:
    return tiny_llama(attention)


@functools.cache
def captured() -> Captured:
    found = capture(original())
    canonical(found)
    return found


@functools.cache
def rewritten(policy: str, **options: Any) -> Any:
    return rewrite(original(), captured(), policy, None, **options)


def ids_of(entry: dict[str, Any]) -> Tensor:
    """(1, prompt and continuation)."""
    return torch.tensor([entry["ids"]])


class Ours:
    """One request: the prompt is in. kept: its positions."""

    def __init__(self, entry: dict[str, Any], policy: str, **options: Any):
        self.model, self.ids, self.at = rewritten(policy, **options), ids_of(entry), entry["length"]
        self.cache = self.model.new_cache(1)
        self.model(self.ids[:, : self.at], past_key_values=self.cache)

    @property
    def kept(self) -> Kept:
        return [self.cache.positions()[layer][0] for layer in range(LAYERS)]

    def step(self) -> Tensor:
        """Logits of the next token of the continuation."""
        token = self.ids[:, self.at : self.at + 1]
        self.at += 1
        return self.model(token, past_key_values=self.cache).logits[0, -1]


def theirs(entry: dict[str, Any], press: str, ratio: str) -> Kept:
    return entry["presses"][press][ratio]["kept"]


def decoded(entry: dict[str, Any], press: str) -> list[Kept]:
    """kvpress's cache after the prompt and after every generated token, in its own order."""
    return entry["decoding"][press]["0.5"]["order"]


def in_order(kept: Kept) -> Kept:
    """As we report it: sorted by position."""
    return [[sorted(head) for head in layer] for layer in kept]


def share(ratio: str) -> float:
    """kvpress states the share that goes, we the share that stays. One rewritten model serves all prompts then."""
    return 1 - float(ratio)


def size(length: int, ratio: str) -> int:
    """How many kvpress keeps: compute_n_kept."""
    return max(1, int(length * (1 - float(ratio))))


def best(scores: Tensor, count: int) -> list[int]:
    """Positions of the `count` largest of (T,) scores."""
    return sorted(scores.sort(descending=True, stable=True).indices[:count].tolist())


@functools.cache
def facts(index: int) -> tuple[list[Tensor], list[Tensor]]:
    """Of the unmodified model on a prompt, by layer: attention (H, T, T) and rotated keys (Hkv, T, d), fp64."""
    entry = PROMPTS[index]
    with torch.no_grad():
        out = original("eager")(ids_of(entry)[:, : entry["length"]], output_attentions=True, use_cache=True)
    keys = [layer.keys[0].double() for layer in out.past_key_values.layers]
    return [a[0].double() for a in out.attentions], keys


def snapkv_scores(index: int, layer: int, window: int, kernel: int) -> Tensor:
    """SnapKV's scores of the tokens before the window, (Hkv, T - window): attention from the window, average pooling."""
    seen = facts(index)[0][layer][:, -window:, :-window].sum(1)
    pooled = torch.nn.functional.avg_pool1d(seen, kernel, stride=1, padding=kernel // 2)
    return pooled.unflatten(0, (KV_HEADS, GROUP)).mean(1)


# -- the ground ------------------------------------------------------------------------------------------------------
def test_same_model_and_prompts() -> None:
    """The weights of this environment are those of the recording, bit for bit, and the model computes the same."""
    assert fingerprint(original()) == RECORD["model"]
    assert RECORD["versions"]["kvpress"] == "0.5.5"
    for entry in PROMPTS:
        assert prompt(entry["length"], entry["seed"])[0].tolist() == entry["ids"]
        with torch.no_grad():
            logits = original()(ids_of(entry)[:, : entry["length"]], use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits[: len(entry["logits"])], torch.tensor(entry["logits"]), rtol=0, atol=5e-5)


def test_recording_is_sharp() -> None:
    """Presses that are no variants of each other keep different tokens, in every prompt and at every ratio."""
    names = ["streaming_llm", "snapkv", "snapkv narrow", "tova", "knorm", "keydiff", "observed_attention eager"]
    names += ["expected_attention", "expected_attention no covariance", "expected_attention no values"]
    for entry in PROMPTS:
        for ratio in RATIOS:
            kept = [theirs(entry, name, ratio) for name in names]
            assert all(a != b for i, a in enumerate(kept) for b in kept[i + 1 :])


# -- identical -------------------------------------------------------------------------------------------------------
SNAPKV = {"window": 4, "kernel": 5, "pooling": "avg"}
EXPECTED = {"n_sink": 4, "n_future": 16}

# kvpress's press -> our policy and options with which both define the same thing
SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "streaming_llm": ("streaming_llm", {"start": 4, "chunk": None, "positions": "original"}),
    # The authors' own: keys re-ranked in the cache. kvpress rotates them back when the prompt ends.
    "streaming_llm rerotated": ("streaming_llm", {"start": 4, "chunk": None, "positions": "contiguous"}),
    # Mean over the group's queries: kvpress and we; the authors keep a set per query head (after repeat_kv).
    "snapkv": ("snapkv", SNAPKV),
    "snapkv narrow": ("snapkv", {**SNAPKV, "window": 5, "kernel": 1}),
    "snapkv eager": ("snapkv", SNAPKV),
    "snapkv rerotated": ("snapkv", {**SNAPKV, "positions": "contiguous"}),
    "knorm": ("knorm", {}),
    # One shot over the prompt; the authors work in blocks (below).
    "keydiff": ("keydiff", {"chunk": None}),
    "expected_attention": ("expected_attention", EXPECTED),
    "expected_attention epsilon": ("expected_attention", {**EXPECTED, "epsilon": 0.02}),
    # Without a floor both are the same global top-k; head_floor below.
    "adakv snapkv 0.0": ("snapkv", {**SNAPKV, "head_budgets": "adakv", "head_floor": 0.0}),
    "adakv knorm 0.0": ("knorm", {"head_budgets": "adakv", "head_floor": 0.0}),
    "adakv expected_attention 0.0": ("expected_attention", {**EXPECTED, "head_budgets": "adakv", "head_floor": 0.0}),
}


@covering({"press": 1})
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("press", SAME)
def test_identical(press: str, ratio: str) -> None:
    """The same kept sets, and the same logits of the tokens that follow."""
    policy, options = SAME[press]
    for entry in PROMPTS:
        request = Ours(entry, policy, budget=share(ratio), decode_eviction=False, **options)
        assert request.kept == theirs(entry, press, ratio), f"{entry['length']} tokens"
        for expected in entry["presses"][press][ratio].get("logits", []):
            got = request.step()[: len(expected)]
            torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("policy", ["knorm", "keydiff"])
def test_identical_in_decoding(policy: str) -> None:
    """One generated token at a time, each followed by an eviction (kvpress: DecodingPress, interval 1)."""
    for entry in PROMPTS:
        options = {"chunk": None} if policy == "keydiff" else {}
        request = Ours(entry, policy, budget=size(entry["length"], "0.5"), **options)
        for step, expected in enumerate(decoded(entry, policy)):
            if step:
                request.step()
            assert request.kept == in_order(expected), f"{entry['length']} tokens, step {step}"


def test_rounding_of_a_share() -> None:
    """int(n (1 - ratio)) is one short where the product is a whole number but for its last bit: ours is not."""
    counts = []
    for entry in PROMPTS:
        request = Ours(entry, "knorm", budget=share("0.9"), decode_eviction=False)
        kept = theirs(entry, "knorm", "0.9")
        exact = entry["length"] // 10
        assert all(len(head) == exact for layer in request.kept for head in layer)
        counts.append((exact, len(kept[0][0])))
        if exact == len(kept[0][0]):
            assert request.kept == kept
        else:
            assert Ours(entry, "knorm", budget=exact - 1, decode_eviction=False).kept == kept
    assert counts[-1] == (6, 5)  # 60 tokens


# -- different, and why ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", RATIOS)
def test_tova(ratio: str) -> None:
    """Authors (schwartz-lab-NLP/TOVA) and we: the newest token competes. kvpress: it always stays."""
    forced = 0
    for i, entry in enumerate(PROMPTS):
        n, count = entry["length"], size(entry["length"], ratio)
        request = Ours(entry, "tova", budget=share(ratio), decode_eviction=False)
        for layer, (ours, recorded) in enumerate(zip(request.kept, theirs(entry, "tova", ratio))):
            received = facts(i)[0][layer][:, -1].mean(0)
            assert ours == [best(received, count)] * KV_HEADS
            assert recorded == [[*best(received[:-1], count - 1), n - 1]] * KV_HEADS
            if n - 1 in ours[0]:
                assert ours == recorded
            else:
                forced += 1
                assert set(recorded[0]) - set(ours[0]) == {n - 1}
                assert set(ours[0]) - set(recorded[0]) == {min(ours[0], key=lambda p: received[p])}
    assert forced > 0 or ratio == "0.3"  # the difference does come up


@pytest.mark.parametrize("ratio", RATIOS)
def test_h2o(ratio: str) -> None:
    """Authors (FMInference/H2O) and we: attention received, summed, next to a recent window. kvpress
    (ObservedAttentionPress): divided by the number of queries that saw the key, no window. The window is set to 0 here."""
    for i, entry in enumerate(PROMPTS):
        n, count = entry["length"], size(entry["length"], ratio)
        request = Ours(entry, "h2o", budget=share(ratio), recent_tokens=0)
        recorded = theirs(entry, "observed_attention eager", ratio)
        for layer in range(LAYERS):
            received = facts(i)[0][layer].sum(1).unflatten(0, (KV_HEADS, GROUP)).sum(1)
            assert request.kept[layer] == [best(head, count) for head in received]
            queries = torch.arange(n, 0, -1)
            assert recorded[layer] == [best(head / queries, count) for head in received]
        assert request.kept != recorded


def kvpress_adakv(scores: Tensor, count: int, alpha: float) -> list[list[int]]:
    """kvpress's rule: int(alpha * count) tokens per head (at least one) are safe, then the best of all heads together."""
    scores = scores.clone()
    if alpha > 0:
        for head in scores:
            head[best(head, max(1, int(count * alpha)))] = torch.inf
    everywhere = best(scores.flatten(), KV_HEADS * count)
    return [[p - h * scores.shape[1] for p in everywhere if p // scores.shape[1] == h] for h in range(KV_HEADS)]


def authors_adakv(scores: Tensor, count: int, window: int, alpha: float) -> list[list[int]]:
    """FFY0/AdaKV's rule (snapkv_utils.py @ efe4e2e): heads win count_h of the Hkv * B best and keep
    round(count_h (1 - alpha) + int(alpha B)), half to even."""
    equal, n = count - window, scores.shape[1]
    everywhere = best(scores.flatten(), KV_HEADS * equal)
    kept = []
    for h, head in enumerate(scores):
        won = sum(p // n == h for p in everywhere)
        kept.append(best(head, round(won * (1 - alpha) + int(alpha * equal))) + list(range(n, n + window)))
    return kept


@pytest.mark.parametrize(
    ("policy", "alpha"), [("snapkv", 0.2), ("snapkv", 0.88), ("knorm", 0.88)]
)  # 0.88: no halves to round
@pytest.mark.parametrize("ratio", RATIOS)
def test_adakv(ratio: str, policy: str, alpha: float) -> None:
    """Authors (FFY0/AdaKV) and we: the floor moves every head's budget toward the equal one. kvpress: a floor under
    each head, counted over all tokens, so that SnapKV's window fills it first; without effect where no head is that poor."""
    window = 4 if policy == "snapkv" else 0
    options = {**(SNAPKV if window else {}), "head_budgets": "adakv", "head_floor": alpha}
    differ = binding = 0
    for i, entry in enumerate(PROMPTS):
        count = size(entry["length"], ratio)
        request = Ours(entry, policy, budget=share(ratio), decode_eviction=False, **options)
        recorded = theirs(entry, f"adakv {policy} {alpha}", ratio)
        unprotected = theirs(entry, f"adakv {policy} 0.0", ratio)
        for layer in range(LAYERS):
            scores = snapkv_scores(i, layer, 4, 5) if window else -facts(i)[1][layer].norm(dim=-1)
            padded = torch.nn.functional.pad(scores, (0, window), value=1e9)
            assert recorded[layer] == kvpress_adakv(padded, count, alpha)
            assert request.kept[layer] == authors_adakv(scores, count, window, alpha)
            binding += recorded[layer] != unprotected[layer]
            differ += recorded[layer] != request.kept[layer]
    assert differ > 0
    assert binding == 0 if alpha == 0.2 else binding > 0 or ratio == "0.3"


def kvpress_pyramid(length: int, ratio: str, window: int, beta: int) -> list[int]:
    """kvpress's layer budgets, its window included: fractions, rounded; all equal where the last would not hold a window."""
    mean = length * (1 - float(ratio))
    least = mean / beta
    most = 2 * mean - least
    if most >= length - window:
        most = length - window
        least = 2 * mean - most
    if not length >= most >= least >= window:
        return [max(1, round(mean))] * LAYERS
    return [round(most - layer * (most - least) / (LAYERS - 1)) for layer in range(LAYERS)]


def authors_pyramid(length: int, budget: int, window: int, beta: int) -> list[int]:
    """KVCache-Factory's layer budgets: whole numbers, of the tokens before the window; the window comes on top."""
    body = budget - window
    if length < 2 * body:
        return [budget] * LAYERS
    least = body // beta
    most = 2 * body - least
    if most > length - window:
        most = length - window
        least = 2 * body - most
    step = (most - least) // (LAYERS - 1)
    return [most - layer * step + window for layer in range(LAYERS)]


@covering({("press", "beta"): 2, "ratio": 1})
@pytest.mark.parametrize(("press", "beta"), [("pyramidkv", 4), ("pyramidkv steep", 20)])
@pytest.mark.parametrize("ratio", RATIOS)
def test_pyramidkv(ratio: str, press: str, beta: int) -> None:
    """The scores are SnapKV's and the same; the layer budgets are not (see the two rules above). With kvpress's budgets
    as a list we keep what it keeps, with the authors' we keep what pyramidkv keeps."""
    for i, entry in enumerate(PROMPTS):
        n, recorded = entry["length"], theirs(entry, press, ratio)
        budgets = kvpress_pyramid(n, ratio, 4, beta)
        assert [[len(head) for head in layer] for layer in recorded] == [[b] * KV_HEADS for b in budgets]
        # A layer with nothing but the window is refused here; it gets one slot more and is compared without it.
        listed = Ours(entry, "snapkv", budget=n, layer_budgets=",".join(str(max(b, 5)) for b in budgets), **SNAPKV)
        for ours, other, count in zip(listed.kept, recorded, budgets):
            assert [head[1:] if count == 4 else head for head in ours] == other
        authors = authors_pyramid(n, size(n, ratio), 4, beta)
        request = Ours(entry, "pyramidkv", budget=share(ratio), beta=beta, **SNAPKV)
        for layer, count in enumerate(authors):
            chosen = [best(head, count - 4) for head in snapkv_scores(i, layer, 4, 5)]
            assert request.kept[layer] == [[*head, *range(n - 4, n)] for head in chosen]


def test_keydiff_in_blocks() -> None:
    """Authors and we (chunk): a block goes through the model with the cache that the blocks before it left. kvpress
    (BlockPress): the blocks are made after the whole prompt went through, so only layer 0, whose keys depend on the tokens
    alone, can be the same. Blocks begin at the same places where the budget is a multiple of the block."""
    block, compared, differ = 8, 0, 0
    for i, entry in enumerate(PROMPTS):
        for ratio in RATIOS:
            n, count = entry["length"], size(entry["length"], ratio)
            recorded = theirs(entry, "keydiff in blocks", ratio)
            for layer, keys in enumerate(facts(i)[1]):
                assert recorded[layer] == [blockwise(head, count, block) for head in keys]
            if count % block == 0:
                request = Ours(entry, "keydiff", budget=count, chunk=block)
                assert request.kept[0] == recorded[0], (n, ratio)
                assert (n - count > block) or request.kept == recorded  # a single block sees the whole cache
                compared += 1
                differ += request.kept != recorded
    assert compared >= 3 and differ >= 1


def blockwise(keys: Tensor, count: int, block: int) -> list[int]:
    """kvpress's BlockPress(KeyDiffPress): the first `count` of (T, d) keys, then block after block."""
    kept = list(range(count))
    for at in range(count, len(keys), block):
        kept = kept + list(range(at, min(at + block, len(keys))))
        unit = torch.nn.functional.normalize(keys[kept], dim=-1)
        likeness = torch.nn.functional.cosine_similarity(unit, unit.mean(0, keepdim=True), dim=-1)
        kept = [kept[j] for j in best(-likeness, count)]
    return kept


def test_tova_in_decoding() -> None:
    """As with prompts: the same until the newest token would go, which kvpress never lets happen. At that step the
    difference is that one token; from then on the caches, and so the scores, are not the same ones."""
    same = forced = 0
    for entry in PROMPTS:
        count = size(entry["length"], "0.5")
        request = Ours(entry, "tova", budget=count)
        if request.kept != theirs(entry, "tova", "0.5"):
            continue
        for step, cache in enumerate(decoded(entry, "tova")[1:]):
            expected, newest = in_order(cache), entry["length"] + step
            request.step()
            for ours, recorded in zip(request.kept, expected):
                for mine, other in zip(ours, recorded):
                    if newest in mine:
                        assert mine == other, f"{entry['length']} tokens, step {step}"
                        same += 1
                    else:
                        assert set(other) - set(mine) == {newest} and len(set(mine) - set(other)) == 1
                        forced += 1
            if request.kept != expected:
                break
    assert same > 0 and forced > 0


def test_streaming_llm_in_decoding() -> None:
    """Authors and we: the oldest token behind the sinks goes. kvpress: the one in the slot behind the sinks; its slots are in
    the order that topk left them in (it sorts them only where it rotates keys), so that is another token."""
    differ = 0
    for entry in PROMPTS:
        n, count, options = entry["length"], size(entry["length"], "0.5"), SAME["streaming_llm"][1]
        request, before = Ours(entry, "streaming_llm", budget=count, **options), None
        for step, cache in enumerate(decoded(entry, "streaming_llm")):
            if before is not None:
                request.step()
                for layer, heads in enumerate(before):
                    for head, slots in enumerate(heads):
                        slots = [*slots, n + step - 1]
                        assert sorted(cache[layer][head]) == sorted(slots[:4] + slots[5:])
            newest = list(range(n + step - count + 4, n + step))
            assert request.kept == [[[0, 1, 2, 3, *newest]] * KV_HEADS] * LAYERS
            differ += request.kept != in_order(cache)
            before = cache
    assert differ > 0


# -- newer presses ---------------------------------------------------------------------------------------------------
NEWER: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "kvpress_newer.json").read_text())
LAG = {"n_sink": 2, "lag_size": 5}
# In kvpress the padding of a last block takes part; so prompts of whole blocks are compared.
BLOCKS = {"non_causal_attn": (0, 4), "compactor": (4, 4)}  # tokens that are in no block, and in one
NEWER_SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "finch rerotated": ("finch", {"window": 4}),
    "finch": ("finch", {"window": 4, "positions": "original"}),
    "finch plain": ("finch", {"window": 4, "positions": "original", "normalize": False}),
    "lagkv": ("lagkv", {**LAG, "across": True}),
    "leverage": ("leverage", {"sketch": 6}),
    "non_causal_attn": ("non_causal_attn", {"block": 4}),
    "compactor": ("compactor", {"start": 3, "recent_tokens": 1, "block": 4, "sketch": 6, "blending": 0.5}),
    "qfilters": ("qfilters", {"window": 0}),
    "criticalkv": ("criticalkv", {"window": 2, "kernel": 3}),
    "criticalkv late": ("criticalkv", {"window": 1, "kernel": 1, "epsilon": 0.01, "first_stage": 0.4}),
}


def newer(entry: dict[str, Any], press: str, ratio: str) -> Kept | None:
    """None: equal scores decide there (of LagKV, what the last block's tokens share)."""
    (found,) = (p for p in NEWER["prompts"] if p["length"] == entry["length"])
    return (found["presses"][press][ratio] or {}).get("kept")


@covering({"press": 1})
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("press", NEWER_SAME)
def test_newer(press: str, ratio: str) -> None:
    """The same kept sets; sketches are those of tests/support/oracle_newer.py on both sides."""
    assert NEWER["model"] == fingerprint(original()) and NEWER["versions"]["kvpress"] == "0.5.5"
    policy, options = NEWER_SAME[press]
    outside, block = BLOCKS.get(press, (0, 1))
    entries = [e for e in PROMPTS if (e["length"] - outside) % block == 0 and newer(e, press, ratio) is not None]
    weights = None
    if policy == "qfilters":
        weights = {f"q_filters.{i}": f for i, f in enumerate(heads.qfilters())}
        options = {**options, "decode_eviction": False}
    model = rewrite(original(), captured(), policy, weights, budget=share(ratio), **options)
    for entry in entries:
        cache = model.new_cache(1)
        model(ids_of(entry)[:, : entry["length"]], past_key_values=cache)
        kept = [cache.positions()[layer][0] for layer in range(LAYERS)]
        assert kept == newer(entry, press, ratio), f"{entry['length']} tokens"
    assert len(entries) >= (4 if press != "lagkv" or ratio == "0.3" else 2)


# -- trained heads ---------------------------------------------------------------------------------------------------
LEARNED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "kvpress_learned.json").read_text())


@functools.cache
def with_heads(press: str, budget: int) -> Any:
    """Ours as a press of the recording is: the same heads and options."""
    name, _, rest = press.partition(" ")
    if name == "kvzap":
        options = {"threshold": heads.THRESHOLD, "window": heads.WINDOW, "decode_eviction": "prompt only" not in rest}
        return rewrite(original(), captured(), name, heads.kvzap(rest.split(",")[0]), **options)
    if name == "fast_kvzip":
        gates = {f"gates.{i}.{n}": t for i, gate in enumerate(heads.fast_kvzip()) for n, t in gate.items()}
        scope = "layer" if "layerwise" in rest else "model"
        options = {"budget": budget, "scope": scope, "interval": 0, "chunk": None, **heads.FAST}
        return rewrite(original(), captured(), name, gates, **options)
    share = {"0.33": 1 / 3, "0.50": 0.5, "1.00": 1.0}[rest]
    options = {"sparsity": share, "start": heads.DUO_SINK, "budget": heads.DUO_SINK + heads.DUO_RECENT}
    weights = {"full_attention_heads": torch.tensor(heads.ALPHA)}
    return rewrite(original(), captured(), name, weights, chunk=None, decode_eviction=False, **options)


@pytest.mark.parametrize(
    "entry",
    [pytest.param(e, marks=pytest.mark.thorough) if i > 2 else e for i, e in enumerate(LEARNED["prompts"])],
    ids=lambda entry: str(entry["length"]),
)
def test_trained_heads(entry: dict[str, Any]) -> None:
    """KVzap under DMS in prompts and while decoding, Fast KVzip over all layers and by layer, DuoAttention: the same
    positions after every step, and the same logits."""
    assert LEARNED["model"] == fingerprint(original())
    ids, n, gone = ids_of(entry), entry["length"], set()
    for press, steps in entry["presses"].items():
        ratio = float(press.split()[1].rstrip(",")) if press.startswith("fast") else 0.0
        model = with_heads(press, int(n - n * ratio) if ratio else 0)
        cache, at = model.new_cache(1), 0
        for i, step in enumerate(steps):
            width = n if i == 0 else 1
            logits = model(ids[:, at : at + width], past_key_values=cache).logits[0, -1]
            at += width
            assert [cache.positions()[layer][0] for layer in range(LAYERS)] == step["kept"], (press, i)
            torch.testing.assert_close(logits[: len(step["logits"])], torch.tensor(step["logits"]), rtol=0, atol=1e-4)
            if any(len(head) < at for layer in step["kept"] for head in layer):
                gone.add(press)
    assert gone == set(entry["presses"]), "a press that drops nothing shows nothing"
