"""Models whose layers lie on several devices: where the graph and the caches are put, and that it computes the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import kvrewrite
import kvrewrite.runtime.exported
from kvrewrite import policies
from kvrewrite.capture.fake_parameters import capture_on_devices
from kvrewrite.compiler import compile_captured, quiet
from kvrewrite.errors import ArtifactError, InputError, UnsupportedModelError
from kvrewrite.ir.fx import get_attr, is_op
from kvrewrite.passes.insert.devices import DEVICE, site_devices
from kvrewrite.passes.pipeline import expected_weights, insert
from kvrewrite.runtime.model import RewrittenModel
from tests.support.rewritten import captured, fork, original, rewritten, traced

pytestmark = pytest.mark.xdist_group("llama")
POLICIES: dict[str, dict[str, Any]] = {
    "streaming_llm": {"budget": 24, "chunk": 8},  # contiguous positions: rotary tables
    "h2o": {"budget": 20, "chunk": 8, "recent_tokens": 4},
    "sirllm": {"budget": 24, "chunk": 8},  # scores from the logits, behind all layers
    "adakv": {"budget": 20, "window": 4},  # ragged
    "fast_kvzip": {"budget": 0.5},  # all layers share a budget
    "locret": {"budget": 24, "chunk": 8, "stabilizers": 4, "hidden_size": 8},
    "tova": {"budget": 24, "chunk": 8, "quantize": "int8", "quantize_residual": 0},
}


SIZE = torch.ops.aten.sym_size.int


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(length))


def placed(first: str, second: str, policy: str, name: str = "llama", **options: Any) -> Any:
    """The program of a tiny model whose second half lies on another device, which need not exist."""
    source, sites = fork(captured(name))
    params = [n for n, _ in original(name).named_parameters(remove_duplicate=False)]
    half = f"layers.{len(sites) // 2}."
    late = [n for n in params if half in n or n.startswith(("model.norm", "lm_head"))]
    source.devices = {n: second if n in late else first for n in params}
    assert set(source.devices.values()) == {first, second}
    chosen, weights = policies.make(policy, **options), None
    if chosen.needs_weights:
        generator = torch.Generator().manual_seed(7)
        shapes = expected_weights(source, sites, chosen)
        weights = ({n: torch.randn(s, generator=generator) / s[-1] ** 0.5 for n, s in shapes.items()}, {})
    return insert(source, sites, chosen, weights, {"activation": "silu"})


def inputs_of(program: Any) -> dict[str, Tensor]:
    """The inputs of one step of 2 rows, 5 tokens, each where the layout says that it lies."""
    layout, home = program.layout, program.layout.devices.inputs
    sizes = {"B": 2, "T": 5, "L": 1, "R": 80, "S": 70, "Z": 4096, "P": 9, "W": 2, "X": 2, "O": 4}
    states = {state.input: state.device for state in layout.states}
    out: dict[str, Tensor] = {}
    for spec in layout.inputs:
        shape = [sizes[s[0]] if isinstance(s, str) else s for s in spec.shape]
        where = states.get(spec.name, home) if spec.cls is None else layout.classes[spec.cls].device
        out[spec.name] = torch.empty(shape, dtype=spec.dtype, device=where)
    return out


@pytest.mark.parametrize("policy", POLICIES)
def test_every_op_finds_its_tensors_on_one_device(policy: str) -> None:
    """Run with fake tensors on two GPUs that are not there: torch's own rules refuse ops over several devices."""
    program = placed("cuda:0", "cuda:1", policy, **POLICIES[policy])
    devices = {**captured_devices(program), **program.layout.devices.attributes}
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    with mode:
        inputs = inputs_of(program)
        attributes = {
            n: torch.empty(get_attr(program.graph, n).shape, dtype=get_attr(program.graph, n).dtype, device=d)
            for n, d in devices.items()
        }

        class Run(fx.Interpreter):
            def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
                return attributes[target]

            def run_node(self, n: fx.Node) -> Any:
                if n.op == "call_function" and not n.kwargs.get("device"):  # fakes of our ops do not look
                    read = [self.env[i] for i in n.all_input_nodes if isinstance(self.env[i], FakeTensor)]
                    assert len({str(t.device) for t in read}) <= 1 or is_op(n, SIZE), n.format_node()
                result = super().run_node(n)
                if n.op == "call_function" and isinstance(result, FakeTensor):
                    assert str(result.device) == n.meta[DEVICE], n.format_node()
                return result

        logits = Run(program.graph).run(*inputs.values())
    assert logits.shape == (2, 1, program.vocab_size) and str(logits.device) == "cuda:0"
    assert [(c.device, c.layers) for c in program.layout.classes] == [("cuda:0", [0]), ("cuda:1", [1])]


def captured_devices(program: Any) -> dict[str, str]:
    """Where the original's parameters lie, as `placed` has put them."""
    return {
        name: "cuda:1" if "layers.1." in name or name.startswith(("model.norm", "lm_head")) else "cuda:0"
        for name in program.base
        if isinstance(get_attr(program.graph, name), torch.nn.Parameter)
    }


def test_transfers_stand_where_the_devices_change() -> None:
    program = placed("cuda:0", "cuda:1", "h2o", **POLICIES["h2o"])
    nodes = list(program.graph.graph.nodes)
    copies = [n for n in nodes if str(n.target) == "aten._to_copy.default" and "device" in n.kwargs]
    hidden = [n for n in copies if n.args[0].op == "call_function"]
    shared = {n.args[0].target for n in copies if n.args[0].op == "placeholder"}
    assert {"positions", "valid"} <= shared <= {"positions", "valid", "recent", "position_ids", "logit_index"}
    # The residual stream, the layer's rotation (cos, sin), and what all layers observe; the logits come back.
    assert 3 <= len(hidden) <= 6
    assert str(hidden[-1].kwargs["device"]) == "cuda:0" and hidden[-1].args[0].args[0].op == "call_function"
    assert all(str(n.kwargs["device"]) == "cuda:1" for n in copies if n is not hidden[-1])


def test_an_op_over_two_devices_is_refused() -> None:
    graph, root = fx.Graph(), torch.nn.Linear(4, 4)
    x, weight, bias = graph.placeholder("x"), graph.get_attr("weight"), graph.get_attr("bias")
    graph.output(graph.call_function(torch.ops.aten.linear.default, (x, weight, bias)))
    with pytest.raises(UnsupportedModelError, match=r"linear.*reads parameters of cuda:0 and cuda:1.*device_map"):
        site_devices(fx.GraphModule(root, graph), {"weight": "cuda:0", "bias": "cuda:1"})


def two_places(policy: str) -> Any:
    """A model over "cpu" and "cpu:0", which are two devices to the passes and the caches, and one to torch."""
    program, source = placed("cpu", "cpu:0", policy, **POLICIES[policy]), original("llama")
    return RewrittenModel(program, source.config, source.generation_config, source=source)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["streaming_llm", "sirllm", "adakv"])
@pytest.mark.filterwarnings("ignore:.*keeps what the end of the prompt asks for")
def test_the_same_logits_over_two_places(policy: str) -> None:
    model, one = two_places(policy), rewritten("llama", policy, **POLICIES[policy])
    prompt = ids(2, 31)
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0
    found, expected = (m.prefill(prompt, attention_mask=mask) for m in (model, one))
    assert len(found.leases) == 2 and len(expected.leases) == 1
    fork_of = found.fork()
    for token in ids(2, 3).split(1, dim=1):
        a, b = (m(token, past_key_values=c).logits for m, c in ((model, fork_of), (one, expected)))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert fork_of.positions() == expected.positions() != found.positions()
    assert fork_of.memory().live == expected.memory().live


@pytest.mark.parametrize(("family", "policy"), [("llama", "sirllm"), ("llama", "adakv"), ("lfm2", "streaming_llm")])
@pytest.mark.filterwarnings("ignore:.*keeps what the end of the prompt asks for")
def test_a_model_over_two_devices_is_proved_without_them(family: str, policy: str) -> None:
    """Validation runs on the CPU: neither caches nor carried states are made where the layers lie."""
    source, model = traced(family), original(family)
    late = ("layers.1.", "model.norm", "lm_head")
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    source.devices = {n: "cuda:1" if any(part in n for part in late) else "cuda:0" for n in names}
    chosen = policies.make(policy, **{**POLICIES[policy], "positions": "original"})
    program = compile_captured(source, chosen, None, model.config, None, quiet, "full")
    assert program.layout.devices is not None and {c.device for c in program.layout.classes} <= {"cuda:0", "cuda:1"}
    assert program.proof["whole"]


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_rotary_tables_lie_where_the_inputs_do(family: str) -> None:
    """Those of contiguous positions, and of longrope. The compiler makes them on the CPU."""
    program = placed("meta", "cpu", "streaming_llm", family, **POLICIES["streaming_llm"])
    model = RewrittenModel(program, original(family).config)
    tables = model.length_tables(None)
    assert bool(tables) == (family == "phi3")
    made = [*tables.values(), *(x for pair in model.make_rotary(8, tables) for x in pair)]
    assert {x.device.type for x in made} == {"meta"}


def test_what_needs_one_device_is_refused(tmp_path: Any) -> None:
    model = two_places("streaming_llm")
    for call, error, message in (
        (model.compile, InputError, "several devices can't be compiled.*on one device"),
        (lambda: model.to("meta"), InputError, "lies on cpu and can't be moved"),
        (lambda: model.save_pretrained(tmp_path / "out"), ArtifactError, "several devices.*kvrewrite convert"),
        (lambda: kvrewrite.runtime.exported.export_steps(model), InputError, "several devices can't be exported"),
    ):
        with pytest.raises(error, match=message):
            call()
    model.uncompile()
    assert model(ids(1, 4)).logits.shape == (1, 4, 97)


def test_capture_of_parameters_that_are_not_where_they_are_traced() -> None:
    """The graph has the model's own parameters, and the model has them again."""
    model = copy.deepcopy(original("llama"))
    before = dict(model.named_parameters())
    found = capture_on_devices(model)
    assert found.devices == dict.fromkeys(dict(model.named_parameters(remove_duplicate=False)), "cpu")
    assert all(p is before[n] for n, p in model.named_parameters())
    read = {n.target for n in found.graph.graph.nodes if n.op == "get_attr" and n.target in before}
    assert len(read) == len(before) and all(get_attr(found.graph, n) is before[n] for n in read)
    text = ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(found.graph(text, torch.arange(9).repeat(2, 1)), model(text).logits)


def test_a_models_own_gpu_is_the_current_one_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, so a model on another one makes that current and puts it back."""
    model, current, seen = rewritten("llama", "streaming_llm", **POLICIES["streaming_llm"]), [0], []

    class Device:
        def __init__(self, index: int):
            self.index = index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error: object) -> None:
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr("kvrewrite.runtime.model.check_ids", lambda *_: seen.append(current[0]))
    for gpu, expected in ((None, 0), (0, 0), (1, 1)):
        monkeypatch.setattr(model, "gpu", gpu)
        model(ids(1, 4))
        assert seen.pop() == expected and current == [0]
    with pytest.raises(InputError):
        model(ids(1, 4), pixel_values=ids(1, 4))
    assert current == [0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.filterwarnings("ignore:.*keeps what the end of the prompt asks for")
class TestTheSecondGpu:
    """A model on a GPU that is not the current one: kernels, streams and graphs are there, and what it gives is the same."""

    @pytest.mark.parametrize("how", ["eager", "captured"])
    @pytest.mark.parametrize("policy", ["streaming_llm", "h2o", "adakv", "tova"])
    def test_the_same(self, policy: str, how: str) -> None:
        models = []
        for device in ("cuda:0", "cuda:1"):  # the first one captures first: torch's stream for that would be there
            model: Any = copy.deepcopy(original("llama")).to(device)
            models.append(kvrewrite.transform(model, policy, **POLICIES[policy]))
            if how == "captured":
                models[-1].compile(backend="eager", static_decode=True)
        prompt, mask = ids(2, 61), torch.ones(2, 61, dtype=torch.int64)
        mask[0, :7] = 0
        found = []
        for model in models:
            cache = model.new_cache(2)
            steps = [
                model(prompt.to(model.device), attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits
            ]
            for token in ids(2, 6).to(model.device).split(1, dim=1):
                steps.append(model(token, past_key_values=cache).logits)
                assert torch.cuda.current_device() == 0
            assert {x.device for x in steps} == {model.device} == {cache.leases[0].store.k_pages.device}
            if how == "captured" and policy != "tova":
                assert model.decoder.captures == 1
            found.append((torch.cat(steps, 1).cpu(), cache.positions()))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-5)
        assert found[1][1] == found[0][1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
class TestTwoGpus:
    """The real thing: a model that accelerate has dispatched over two GPUs."""

    @staticmethod
    def dispatched(name: str = "llama") -> Any:
        """The first layer on one, the second on the other; the output layer where its weights are."""
        pytest.importorskip("accelerate")
        from accelerate import dispatch_model

        model: Any = copy.deepcopy(original(name))
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        parts = {f"model.{n}": 1 if "norm" in n else 0 for n, _ in model.model.named_children() if n != "layers"}
        layers = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": 0 if tied else 1}
        return dispatch_model(model, parts | layers)

    def test_a_hybrid(self) -> None:
        """A convolution on one, attention on the other: what it carries lies with its layer, and moves with forks."""
        model = self.dispatched("lfm2")
        small = kvrewrite.transform(model, "streaming_llm", budget=64, start=2, chunk=7, positions="original")
        text = ids(2, 30).to("cuda:0")
        expected, cache = model(text, use_cache=False).logits, small.new_cache(2)
        got = [small(text[:, :20], past_key_values=cache).logits]
        twin = cache.fork()
        for t in range(20, 30):
            got.append(small(text[:, t : t + 1], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            small(text[:, 20:], past_key_values=twin).logits, expected[:, 20:], rtol=0, atol=1e-4
        )
        assert {s.value.device.index for s in cache.states} == {0}
        assert [lease.store.k_pages.device.index for lease in cache.leases] == [1]

    def test_nothing_evicted_is_the_model(self) -> None:
        model = self.dispatched()
        small = kvrewrite.transform(model, "full")
        text = ids(2, 40).to("cuda:0")
        expected = model(text).logits
        torch.testing.assert_close(small(text).logits, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(model(text).logits, expected)
        devices = {str(p.device) for p in small.graph_module.parameters()}
        assert devices == {"cuda:0", "cuda:1"} and str(small.device) == "cuda:0"
        own = {p.data_ptr() for p in model.parameters()}
        assert {p.data_ptr() for p in small.graph_module.parameters()} <= own  # no copies of weights

    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.filterwarnings("ignore:.*keeps what the end of the prompt asks for")
    def test_evicting(self, policy: str) -> None:
        """The tokens that one GPU gives, from pools on both; kernels run on the device of their layer."""
        options = dict(POLICIES[policy])
        weights = None
        if policies.make(policy, **options).needs_weights:
            made = rewritten("llama", policy, **{k: v for k, v in options.items() if k != "hidden_size"})
            weights = {
                n.removeprefix("policy_weights."): made.graph_module.get_parameter(n)
                for n in made.program.policy_weights
            }
            options.pop("hidden_size", None)
        two = kvrewrite.transform(self.dispatched(), policy, policy_weights=weights, **options)
        one = kvrewrite.transform(
            copy.deepcopy(original("llama")).to("cuda:0"), policy, policy_weights=weights, **options
        )
        prompt = ids(2, 60).to("cuda:0")
        a, b = (m.prefill(prompt) for m in (two, one))
        assert [lease.store.k_pages.device.index for lease in a.leases] == [0, 1]
        assert a.positions() == b.positions()
        for token in ids(2, 4).to("cuda:0").split(1, dim=1):
            x, y = (m(token, past_key_values=c).logits for m, c in ((two, a), (one, b)))
            torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
        assert torch.cuda.current_device() == 0
