"""Caches of the compressed latent (mla=latent): the original's function, in fewer bytes, one set of tokens per layer."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F

import kvrewrite
from kvrewrite.analysis.flops import attention_of
from kvrewrite.analysis.memory import plan_layers, plan_memory
from kvrewrite.cache.pages import PAGE, SLOT_EXTRA
from kvrewrite.capture.captured import Captured
from kvrewrite.capture.frontend import capture
from kvrewrite.cli.app import main
from kvrewrite.errors import OptionError
from kvrewrite.ir.site import AttentionSite
from kvrewrite.kernels.latent import reference
from kvrewrite.ops.dispatch import kernels
from kvrewrite.passes.canonical.find_latent import find_latent
from kvrewrite.passes.insert.cache import site_nodes
from kvrewrite.passes.pipeline import canonical
from kvrewrite.policies import make as make_policy
from kvrewrite.runtime import decode_graph, prompt_graph
from kvrewrite.verification import verify
from tests.runtime.test_decoding import same, static
from tests.support import rewritten, zoo
from tests.support.foreign import HEADS, HIDDEN, VOCAB, RopeTable

pytestmark = pytest.mark.xdist_group("deepseek_v3")  # whose capture is shared
ops = torch.ops.kvrewrite

N, P, DV, RANK = 4, 8, 6, 12


class LatentAttention(nn.Module):
    """MLA in an order of its own: a key is [rotated part, part of the latent]; in the weight of the latent's projection all keys
    stand in front of all values."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.q, self.out = nn.Linear(HIDDEN, HEADS * (P + N)), nn.Linear(HEADS * DV, HIDDEN)
        self.down, self.rotary = nn.Linear(HIDDEN, RANK), nn.Linear(HIDDEN, P)
        if variant == "own rotation":
            self.rotary = nn.Linear(HIDDEN, HEADS * P)
        self.up = nn.Linear(RANK, HEADS * (N + DV), bias=variant == "bias")
        self.up_k, self.up_v = (nn.Linear(RANK, HEADS * d, bias=False) for d in (N, DV))

    def forward(self, x: Tensor, rotate: Any) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, HEADS, P + N).transpose(1, 2)
        c = F.rms_norm(self.down(x), (RANK,))
        k, v = self.up(c).split([HEADS * N, HEADS * DV], -1)
        if self.variant == "two projections":
            k, v = self.up_k(c), self.up_v(c)
        if self.variant == "scaled":
            v = v * 2
        k, v = (y.view(b, s, HEADS, -1).transpose(1, 2) for y in (k, v))
        turned = rotate(self.rotary(x).view(b, s, -1, P).transpose(1, 2)).expand(-1, HEADS, -1, -1)
        q = torch.cat([rotate(q[..., :P]), q[..., P:]], -1)
        y = F.scaled_dot_product_attention(q, torch.cat([turned, k], -1), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


class LatentDecoder(RopeTable):
    """A decoder with latent attention that is not from transformers."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        super().__init__()
        self.blocks = self.blocks[:1]
        self.eval()

    def make_attention(self) -> nn.Module:
        return LatentAttention(self.variant)


# name -> what differs from the zoo's deepseek_v3. With rank 24, and 8 and 12 channels, chunks of 17 tokens and more expand.
DENSE = {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "qk_rope_head_dim": 4,
}
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "deepseek_v3, fp64": DENSE,
    "deepseek_v2": {"model_type": "deepseek_v2", **DENSE},
    "minicpm3": {"model_type": "minicpm3", "num_hidden_layers": 1, "v_head_dim": 12},
}
NAMES = ["deepseek_v3", *HUGGING_FACE, "one projection", "two projections"]


@functools.cache
def original(name: str) -> nn.Module:
    """A model whose heads attend to different tokens (fresh weights attend to all alike)."""
    if name == "deepseek_v3":
        return rewritten.original(name)
    torch.manual_seed(0)
    model = zoo.make("deepseek_v3", **HUGGING_FACE[name]) if name in HUGGING_FACE else LatentDecoder(name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(("q_b_proj.weight", "kv_b_proj.weight", "attention.q.weight", "attention.up.weight")):
                parameter.mul_(8)
    return model.double() if name != "minicpm3" else model


@functools.cache
def captured(name: str) -> Captured:
    if name == "deepseek_v3":
        return rewritten.captured(name)
    found = capture(original(name))
    canonical(found)
    return found


@functools.cache
def model(name: str, policy: str, **options: Any) -> Any:
    return rewritten.rewrite(original(name), captured(name), policy, None, **options)


def tokens(rows: int = 2, length: int = 60) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_evicted_is_the_original(name: str) -> None:
    """Chunks that expand and chunks that do not, then single tokens; a row padded on the left."""
    ours, ids = model(name, "full", mla="latent"), tokens()
    site = ours.sites[0]
    assert site.latent_cached and (site.kv_heads, site.head_dim) == (1, site.latent + site.latent_rotary)
    expected = rewritten.logits(original(name), ids)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    shifted = torch.cat([ids[1:, :5], ids[1:, :-5]], 1)  # five columns of padding in front of the same text
    given = torch.cat([ids[:1], shifted])
    cache, outs, at = ours.new_cache(2), [], 0
    for width in (33, 7, *[1] * 5, 12, *[1] * 3):
        part = slice(at, at + width)
        outs.append(ours(given[:, part], attention_mask=mask[:, part], past_key_values=cache).logits)
        at += width
    assert at == 60
    got = torch.cat(outs, 1)
    tolerance = 1e-5 if got.dtype == torch.float32 else 1e-12
    if name in HUGGING_FACE and got.dtype == torch.float64:
        tolerance = 1e-6  # their norms compute in fp32
    assert relative(got[0], expected[0]) < tolerance
    assert relative(got[1, 5:], expected[1, :55]) < tolerance


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("tova", {"budget": 20}),
        ("streaming_llm", {"budget": 20, "chunk": 25}),
        ("sirllm", {"budget": 20, "chunk": 25, "positions": "original"}),
    ],
)
def test_where_heads_keep_the_same_nothing_changes(policy: str, options: dict[str, Any]) -> None:
    """These keep one set of tokens per layer in any case: the same positions and logits as with keys and values of every head."""
    name, ids = "deepseek_v3, fp64", tokens()
    both = [model(name, policy, mla=mla, **options) for mla in ("latent", "expanded")]
    caches = [m.new_cache(2) for m in both]
    for part in (ids[:, :50], *ids[:, 50:].split(1, dim=1)):
        got, expected = [m(part, past_key_values=c).logits for m, c in zip(both, caches)]
        assert relative(got, expected) < 1e-6
    kept, each = [c.positions() for c in caches]
    assert all(heads == kept[layer][b] * 4 for layer, rows in each.items() for b, heads in enumerate(rows))
    assert len(kept[0][0][0]) == 20


def test_heavy_hitters_are_those_of_all_heads() -> None:
    """H2O on latents: by the attention of all heads, as transformers' own model reports it."""
    name, ids = "deepseek_v3, fp64", tokens(1)
    ours = model(name, "h2o", mla="latent", budget=20, recent_tokens=5)
    cache = ours.new_cache(1)
    ours(ids, past_key_values=cache)
    theirs = copy.deepcopy(original(name))
    theirs.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        weights = theirs(ids, use_cache=False, output_attentions=True).attentions
    for layer, kept in cache.positions().items():
        mass = weights[layer][0].sum((0, 1))
        mass[-5:] = float("inf")
        assert kept[0][0] == sorted(mass.topk(20).indices.tolist()), layer


@pytest.mark.parametrize(
    ("policy", "options"),
    [("h2o", {"budget": 16}), ("nacl", {"budget": 16, "interval": 3})],
)
def test_decoding_from_static_buffers(policy: str, options: dict[str, Any]) -> None:
    """Lowered for single tokens, absorbed queries serve attention and its mass alike."""
    options = {"mla": "latent", **options}
    both = [rewritten.rewritten("deepseek_v3", policy, **options), static("deepseek_v3", policy, **options)]
    caches = [m.new_cache(2) for m in both]
    for part in (tokens()[:, :40], *tokens()[:, 40:48].split(1, dim=1)):
        expected, got = [m(part, past_key_values=c).logits for m, c in zip(both, caches)]
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    same(*caches)


REFUSED = [
    *[(p, {}, "its scores are defined by the keys, values or budgets of single heads") for p in (
        "keydiff", "knorm", "expected_attention", "locret", "kvzap", "fast_kvzip", "trim_kv", "duo_attention", "attention_gate",
        "adakv", "criticalkv", "lagkv", "leverage", "non_causal_attn", "compactor", "qfilters", "r_kv",
    )],
    ("h2o", {"quantize": "int8"}, "quantize=int8 codes keys by channel and values by token, and a latent is both"),
    ("h2o", {"merge": True}, "merge=True"),
    ("h2o", {"head_budgets": "adakv"}, "head_budgets=adakv shares a budget between heads, and there is one"),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "options", "words"), REFUSED)
def test_refused(policy: str, options: dict[str, Any], words: str) -> None:
    """What would mean something else, or can't be had, on latents."""
    with pytest.raises(OptionError, match=f"{policy}: mla=latent is not possible: {words}.*use mla=expanded"):
        make_policy(policy, mla="latent", **options)


def test_unknown_word() -> None:
    with pytest.raises(OptionError, match="h2o: mla is 'compressed', expected one of expanded, latent"):
        make_policy("h2o", mla="compressed")


def test_contiguous_positions_are_refused() -> None:
    with pytest.raises(OptionError, match=r"positions=contiguous is not possible.*MLA.*use positions=original"):
        model("deepseek_v3", "h2o", mla="latent", positions="contiguous")


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("bias", "the projection of the latent has a bias"),
        ("scaled", "its keys and values are not copies of what the latent is projected to"),
        ("own rotation", "the rotated part of its keys is not one that all heads share"),
    ],
)
def test_what_is_no_latent(variant: str, words: str) -> None:
    """A model that differs in one respect is refused with the reason."""
    found = captured(variant)
    node = site_nodes(found.graph)[0]
    assert find_latent(found, node).reason == words  # type: ignore[union-attr]
    assert node.meta["kvrewrite_site"].latent == 0
    with pytest.raises(
        OptionError, match=rf"h2o: mla=latent, layer 0 \(blocks.0.attention\).*{words}.*use mla=expanded"
    ):
        model(variant, "h2o", mla="latent")


@pytest.mark.parametrize(("policy", "options"), [("h2o", {"budget": 80}), ("full", {"chunk": 64})])
@pytest.mark.parametrize("length", [20, 150])
def test_memory(policy: str, options: dict[str, Any], length: int) -> None:
    """The plan is what is leased; a slot has the latent and the shared key once, and nothing else."""
    ours = model("deepseek_v3", policy, mla="latent", **options)
    cache = ours.new_cache(2)
    ours(tokens(2, length), past_key_values=cache)
    plan = plan_memory(ours.sites, ours.policy, 4, length, batch=2)
    assert plan.evicted == cache.memory().leased and plan.peak > plan.evicted
    slots = min(length, 80 if policy == "h2o" else length)
    assert cache.memory().live == 2 * len(ours.sites) * slots * ((16 + 8) * 4 + SLOT_EXTRA)
    assert all(lease.store.v_pages.numel() == 0 for lease in cache.leases)


def test_memory_of_a_known_shape() -> None:
    """DeepSeek-V2-Lite's layers: 16 heads of 192 and 128 channels, a latent of 512 and a shared key of 64."""
    expanded = AttentionSite(0, "", 16, 16, 192, 128, 1.0, "config")
    cached = AttentionSite(
        0, "", 16, 1, 576, 512, 1.0, "config", latent=512, latent_rotary=64, latent_cached=True, expanded=[16, 192, 128]
    )
    plans = [plan_layers([s], make_policy("h2o", budget=1024), 2, 4096)[0] for s in (expanded, cached)]
    assert [p.full for p in plans] == [4096 * 16 * (192 + 128) * 2, 4096 * 576 * 2]
    flops = [attention_of([s], 4096, make_policy("full", chunk=2048)).flops[0] for s in (expanded, cached)]
    pairs, again = 4096 * 4097 // 2, 2048 * 512 * (128 + 128)  # the second chunk expands what the first one left
    assert flops == [2 * 16 * pairs * (192 + 128), 2 * 16 * (pairs * (192 + 128) + again)]
    pages = 1024 // PAGE
    assert [p.evicted for p in plans] == [
        16 * pages * PAGE * ((192 + 128) * 2 + SLOT_EXTRA),
        pages * PAGE * (576 * 2 + SLOT_EXTRA),
    ]


def test_artifact(tmp_path: Path) -> None:
    """Saved, loaded, generated with, shown and verified."""
    name, ids = "minicpm3", tokens()
    ours = model(name, "tova", mla="latent", budget=20)
    ours.save_pretrained(tmp_path / "out")
    loaded = kvrewrite.load(tmp_path / "out")
    assert [s.as_dict() for s in loaded.sites] == [s.as_dict() for s in ours.sites]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(loaded.generate(ids, **options), ours.generate(ids, **options))
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--no-code"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "16 + 8, cached" in shown.output and "mla=latent" in shown.output, shown.output
    loaded.compile(static_decode=True, backend="eager")
    assert torch.equal(loaded.generate(ids, **options), ours.generate(ids, **options))
    report = verify(tmp_path / "out")
    assert all(check.ok is not False for check in report.checks), report.checks


# ------------------------------------------------------------------------------------------------------------ the operator
def arguments(tokens: int = 5, **changes: Any) -> tuple[Any, ...]:
    """Of `latent_attention`: fp64, two rows of 9 and 0 live slots, dead slots full of NaN, one row with a token less."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given: dict[str, Any] = {"window": 0, "chunk": 0, "softcap": 0.0, "sinks": None, "alibi": None, **changes}
    pages, page, lens = 5, 4, [9, 0]
    k_pages = torch.full((pages, page, RANK + P), float("nan"), dtype=torch.float64)
    pos = torch.zeros(pages, page, 2, dtype=torch.int32)
    table = torch.tensor([[[3, 1, 4]], [[0, 0, 0]]], dtype=torch.int32)
    for slot in range(lens[0]):
        k_pages[table[0, 0, slot // page], slot % page] = draw(RANK + P)
        pos[table[0, 0, slot // page], slot % page] = 2 * slot
    seen = torch.tensor([20, 0])
    positions = seen[:, None] + torch.arange(tokens)
    q, k, up = draw(2, HEADS, tokens, N + P), draw(2, 1, tokens, RANK + P), draw(HEADS * (N + DV), RANK)
    where = (table, torch.tensor(lens, dtype=torch.int32)[:, None], positions, torch.tensor([tokens, tokens - 1]))
    shape = (0.3, given["softcap"], given["window"], given["chunk"], [HEADS, RANK, 0, N + DV, N, N, N + DV, DV])
    return q, k, up, up, k_pages, k_pages.new_empty(pages, page, 0), pos, *where, given["sinks"], given["alibi"], *shape


MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 12},
    "everything": {
        "chunk": 18, "softcap": 2.0, "sinks": torch.linspace(-1, 1, HEADS).double(),
        "alibi": torch.linspace(0.1, 0.4, HEADS).double(),
    },
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
def test_forms_are_equal(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absorbed, expanded, and expanded head by head, against a sum written out."""
    given = arguments(**MASKS[mask])
    found = []
    for expands, limit in ((False, 1 << 28), (True, 1 << 28), (True, 1)):
        monkeypatch.setattr(reference, "expanding_is_cheaper", lambda *_, e=expands: e)
        monkeypatch.setattr(reference, "EXPANDED_BYTES", limit)
        found.append(ops.latent_attention(*given))
    q, k, up, _, k_pages, _, pos, table, lens, positions, valid, sinks, alibi, scale, softcap, window, chunk, _ = given
    weight = up.reshape(HEADS, N + DV, RANK)
    real = torch.arange(q.shape[2]) < valid[:, None, None].expand(-1, HEADS, -1)
    for b, h, t in real.nonzero().tolist():
        slots = [(int(table[b, 0, s // 4]), s % 4) for s in range(int(lens[b, 0]))]
        seen = [(int(pos[at][0]), k_pages[at]) for at in slots]
        seen += [(int(positions[b, i]), k[b, 0, i]) for i in range(t + 1)]
        at = int(positions[b, t])
        seen = [(p, x) for p, x in seen if (not window or at - p < window) and (not chunk or p // chunk == at // chunk)]
        own = torch.stack([torch.cat([weight[h, :N] @ x[:RANK], x[RANK:]]) for _, x in seen])
        logits = own @ q[b, h, t] * scale
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        if alibi is not None:
            logits = logits - alibi[h] * (at - torch.tensor([p for p, _ in seen]))
        parts = logits.exp()
        total = parts.sum() + (0 if sinks is None else sinks[h].exp())
        expected = sum(w / total * (weight[h, N:] @ x[:RANK]) for w, (_, x) in zip(parts, seen))
        for out, lse in found:
            torch.testing.assert_close(out[b, h, t], expected)
            torch.testing.assert_close(lse[b, h, t], total.log().float())


def test_opcheck() -> None:
    torch.library.opcheck(ops.latent_attention.default, arguments(5))
    torch.library.opcheck(ops.latent_attention.default, arguments(40))


def test_the_cheaper_form() -> None:
    """DeepSeek's shape: a chunk of a prompt expands, single and few tokens do not, whatever is cached."""
    shape = {"n": 128, "dv": 128, "rank": 512, "rotary": 64}
    for cached in (4096, 131072):
        assert not reference.expanding_is_cheaper(1, cached, **shape)
        assert not reference.expanding_is_cheaper(160, cached, **shape)
        assert reference.expanding_is_cheaper(171, cached, **shape)
    assert reference.expanding_is_cheaper(2, 0, **shape)
    assert not reference.expanding_is_cheaper(1, 0, **shape)


def test_kernels_say_what_they_can() -> None:
    """There is no kernel for values inside of keys; asked for, that is an error. Expanded chunks have one."""
    single, given = (
        [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments(n)] for n in (1, 40)
    )
    expected = ops.latent_attention(*given)[0]
    with kernels("fused"):
        torch.testing.assert_close(ops.latent_attention(*given)[0][0], expected[0], rtol=1e-4, atol=1e-4)
        with pytest.raises(OptionError, match="cached_attention has no kernel here: a cache of latents"):
            ops.latent_attention(*single)


def test_experts_that_look_at_the_host_are_not_captured() -> None:
    """In fp32 transformers multiplies experts by an op that asks how many tokens each has, which a CUDA graph can't."""
    experts, cuda = model("deepseek_v3", "tova", mla="latent", budget=20), torch.device("cuda")
    for why_not in (decode_graph.why_not, prompt_graph.why_not):
        found = why_not(experts.program, experts.policy, cuda)
        assert "grouped_mm_fallback looks at results on the host" in found
    dense = model("minicpm3", "tova", mla="latent", budget=20)
    assert decode_graph.why_not(dense.program, dense.policy, cuda) is None


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:decoding is compiled, but not captured")
@pytest.mark.parametrize("name", ["minicpm3", "deepseek_v3"])
@pytest.mark.parametrize(("policy", "options"), [("full", {"chunk": 9}), ("h2o", {"budget": 24, "chunk": 9})])
def test_on_a_gpu(policy: str, options: dict[str, Any], name: str) -> None:
    """Caches of latents, op by op and through Inductor with CUDA graphs: the unmodified model where nothing is evicted, and else
    what a CPU keeps and computes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cpu = model(name, policy, mla="latent", **options)
    plain: Any = copy.deepcopy(original(name)).to(device)
    small = kvrewrite.transform(plain, policy, mla="latent", **options)
    text = tokens(2, 53)
    expected = rewritten.logits(plain, text.to(device)).cpu()
    for compiled in (False, True):
        if compiled:
            small.compile(**({} if device == "cuda" else {"backend": "eager", "static_decode": True}))
        both = [m.new_cache(2) for m in (cpu, small)]
        for begin, end in ((0, 45), *((t, t + 1) for t in range(45, 53))):
            want = cpu(text[:, begin:end], past_key_values=both[0], logits_to_keep=1).logits
            got = small(text[:, begin:end].to(device), past_key_values=both[1], logits_to_keep=1).logits.cpu()
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
            if policy == "full":
                torch.testing.assert_close(got, expected[:, end - 1 : end], rtol=0, atol=1e-4)
        assert both[1].positions() == both[0].positions()
    if device == "cuda" and name == "minicpm3":  # the other has experts
        assert small.decoder.captures == 1 and small.executor.prompt.captures >= 1
