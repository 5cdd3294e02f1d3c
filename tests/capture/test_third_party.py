"""Models as other libraries leave them: dispatched by accelerate, with adapters of peft, quantized by torchao."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import QuantizationMethod

import kvrewrite
from kvrewrite.cache.eviction_cache import CACHE_NAME
from kvrewrite.capture.frontend import capture
from kvrewrite.capture.third_party import check_layers, without_hooks
from kvrewrite.errors import ArtifactError, UnsupportedModelError
from tests.support.tiny import make_checkpoint

pytestmark = pytest.mark.xdist_group("wrapped")  # whose fixtures are made once

IDS = torch.randint(2, 200, (2, 12), generator=torch.Generator().manual_seed(0))
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
TOLERANCE = 1e-6  # fp32, logits below 1


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = make_checkpoint(tmp_path_factory.mktemp("wrapped") / "model", hidden_size=64, intermediate_size=96)
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture
def base(deep: Any) -> Any:
    return deep


@pytest.fixture(scope="module")
def shallow(deep: Any) -> Any:
    """One layer of it, where the number of layers is not what is tested."""
    model = copy.deepcopy(deep)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    return model


def fresh(base: Any) -> Any:
    return copy.deepcopy(base)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def tokens(model: Any) -> Tensor:
    return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **GREEDY)


def check(model: Any, small: Any, tolerance: float = TOLERANCE) -> None:
    """The rewrite with a full cache computes what the wrapped model computes, and leaves that as it was."""
    expected = logits(model)
    assert (logits(small) - expected).abs().max() <= tolerance
    assert torch.equal(tokens(small), tokens(model))
    assert torch.equal(logits(model), expected)


# ---------------------------------------------------------------------------------------------------------- accelerate
class TestAccelerate:
    @pytest.fixture(autouse=True)
    def _accelerate(self) -> None:
        pytest.importorskip("accelerate")

    def test_a_dispatched_model(self, base: Any) -> None:
        """Hooks on every module, which capture takes off and puts back."""
        from accelerate import dispatch_model

        places = {"model.layers.0": "cpu", "model.layers.1": "cpu"}
        rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        model = dispatch_model(
            fresh(base), {**places, **dict.fromkeys(rest, "cpu")}, main_device="cpu", force_hooks=True
        )
        hooked = [m.forward for m in model.modules() if hasattr(m, "_hf_hook")]
        assert len(hooked) > 10
        small = kvrewrite.transform(model, "full")
        assert [m.forward for m in model.modules() if hasattr(m, "_hf_hook")] == hooked
        assert "to.device" not in str(small.graph_module.graph)
        check(model, small)

    def test_hooks_come_back_after_an_error(self, base: Any) -> None:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        model = fresh(base)
        add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        hooked = model.lm_head.forward
        with pytest.raises(RuntimeError, match="on purpose"), without_hooks(model):
            assert model.lm_head.forward != hooked
            raise RuntimeError("on purpose")
        assert model.lm_head.forward == hooked

    def test_device_map_auto(self, base: Any, tmp_path: Any) -> None:
        base.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
        check(model, kvrewrite.transform(model, "full"))

    def test_offloaded_weights_are_refused(self, base: Any) -> None:
        from accelerate import cpu_offload

        model = cpu_offload(fresh(base), execution_device=torch.device("cpu"))
        with pytest.raises(UnsupportedModelError, match=r"offloaded by accelerate.*kvrewrite convert"):
            kvrewrite.transform(model, "full")
        assert logits(model).isfinite().all()

    def test_hooks_that_do_more_are_refused(self, base: Any) -> None:
        from accelerate.hooks import ModelHook, add_hook_to_module

        class Twice(ModelHook):
            def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
                return output * 2

        model = fresh(base)
        add_hook_to_module(model.lm_head, Twice(), append=True)
        with pytest.raises(UnsupportedModelError, match="lm_head has the hook Twice"):
            kvrewrite.transform(model, "full")


def test_a_model_that_is_half_there_is_refused(base: Any) -> None:
    model = fresh(base)
    model.model.layers[1].to("meta")
    with pytest.raises(
        UnsupportedModelError, match=r"lie on cpu, meta, and model\.layers\.1.*no values.*kvrewrite convert"
    ):
        kvrewrite.transform(model, "full")
    with pytest.raises(UnsupportedModelError, match=r"lie on cpu, meta, which only kvrewrite\.transform takes"):
        capture(model)  # what training and the torch.compile backend call


@pytest.mark.gpu
def test_a_model_on_a_gpu_and_the_cpu_is_refused(base: Any) -> None:
    pytest.importorskip("accelerate")
    from accelerate import dispatch_model

    places = {"model.layers.0": 0, "model.layers.1": "cpu"}
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    model = dispatch_model(fresh(base), {**places, **dict.fromkeys(rest, 0)})
    with pytest.raises(UnsupportedModelError, match="offloaded by accelerate"):
        kvrewrite.transform(model, "full")


# ---------------------------------------------------------------------------------------------------------------- peft
class TestPeft:
    @pytest.fixture(autouse=True)
    def _peft(self) -> None:
        pytest.importorskip("peft")

    @pytest.fixture
    def base(self, shallow: Any) -> Any:
        return shallow

    @staticmethod
    def adapted(base: Any, **options: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        where = ["q_proj", "v_proj", "down_proj"]
        config = LoraConfig(target_modules=where, r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
        return get_peft_model(fresh(base), config).eval()

    def test_unmerged(self, base: Any, tmp_path: Any) -> None:
        """The adapter's weights are parameters of the graph, and a change of them is seen."""
        model = self.adapted(base)
        assert (logits(model) - logits(base)).abs().max() > 1e-2
        small = kvrewrite.transform(model, "full")
        assert small.config.model_type == "llama" and small.program.frontend == "interface"
        assert sum("lora_A" in name for name in small.program.base) == 3
        check(model, small)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        assert (logits(small) - logits(base)).abs().max() <= TOLERANCE
        with pytest.raises(ArtifactError, match=r"adapters of peft.*merge_and_unload"):
            small.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_merged(self, base: Any, tmp_path: Any) -> None:
        adapted = self.adapted(base)
        expected = logits(adapted)
        model = adapted.merge_and_unload()
        small = kvrewrite.transform(model, "full")
        check(model, small)
        assert (logits(small) - expected).abs().max() <= 1e-5
        small.save_pretrained(tmp_path / "out")
        assert torch.equal(logits(kvrewrite.load(tmp_path / "out")), logits(small))
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(logits(stock), logits(model))

    @staticmethod
    def changes(model: Any) -> dict[str, Any]:
        """What is done to adapters while a rewritten model exists, and how it is undone."""
        from peft import LoraConfig

        model.add_adapter("other", LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
        model.set_adapter("default")
        layers = [m for m in model.modules() if hasattr(m, "scale_layer")]
        return {
            "merged": (model.merge_adapter, model.unmerge_adapter),
            "disabled": (model.base_model.disable_adapter_layers, model.base_model.enable_adapter_layers),
            "active": (lambda: model.set_adapter("other"), lambda: model.set_adapter("default")),
            "scaled": (lambda: [m.scale_layer(2.0) for m in layers], lambda: [m.unscale_layer(2.0) for m in layers]),
        }

    def test_adapters_that_change_after_the_rewrite_are_refused(self, base: Any) -> None:
        """Its graph has them as they were; once they are that again it goes on, and a copy has adapters of its own."""
        model = self.adapted(base)
        small = kvrewrite.transform(model, "full")
        expected, copied = logits(small), copy.deepcopy(small)
        for what, (change, undo) in self.changes(model).items():
            assert (logits(small) - expected).abs().max() <= TOLERANCE
            change()
            message = rf"adapters of model\.layers\.0\.self_attn\.q_proj .* have changed \({what}: .*transform the model as it is"
            with pytest.raises(UnsupportedModelError, match=message):
                logits(small)
            with pytest.raises(UnsupportedModelError, match=message):
                tokens(small)
            assert (logits(copied) - expected).abs().max() <= TOLERANCE
            if what != "merged":
                assert (logits(kvrewrite.transform(model, "full")) - logits(model)).abs().max() <= TOLERANCE
            undo()
        assert (logits(small) - expected).abs().max() <= TOLERANCE

    def test_evicting(self, base: Any) -> None:
        """With a policy that reads hidden layers' keys and values behind the adapters: that of the merged model."""
        model = self.adapted(base)
        found = tokens(kvrewrite.transform(model, "h2o", budget=8, recent_tokens=2))
        merged = kvrewrite.transform(model.merge_and_unload(), "h2o", budget=8, recent_tokens=2)
        assert torch.equal(found, tokens(merged))

    def test_compiled_by_torch(self, base: Any) -> None:
        """peft's generate calls the model inside of the adapters, which then has to be the compiled one; a wrapper whose inner
        model nobody compiled is an error, and not run unmodified."""

        class Wrapper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = base

            def generate(self, **kwargs: Any) -> Tensor:
                return self.inner.generate(**kwargs)

        options = {"policy": "streaming_llm", "budget": 8, "chunk": 12, "inductor": False}
        settings = {
            **GREEDY,
            "max_new_tokens": 1,
            "input_ids": IDS,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        model = self.adapted(base)
        out = torch.compile(model, backend="kvrewrite", options=options).generate(**settings)
        assert out[CACHE_NAME].layers[0].keys.shape[2] == 8
        assert (
            out.logits[0] - logits(model)[:, -1]
        ).abs().max() <= TOLERANCE  # one chunk, evicted from behind its logits
        with pytest.raises(UnsupportedModelError, match="ran a model inside of it that is not compiled"):
            torch.compile(Wrapper(), backend="kvrewrite", options=options).generate(**settings)

    @pytest.mark.parametrize(
        "kind", ["DoRA", "IA3", *(pytest.param(k, marks=pytest.mark.thorough) for k in ("LoHa", "LoKr"))]
    )
    def test_other_adapters(self, base: Any, kind: str) -> None:
        import peft

        if kind == "DoRA":
            model = self.adapted(base, use_dora=True)
        else:
            where = {"target_modules": ["k_proj", "down_proj"], "task_type": "CAUSAL_LM"}
            if kind == "IA3":
                config = peft.IA3Config(**where, feedforward_modules=["down_proj"], init_ia3_weights=False)
            else:
                config = getattr(peft, f"{kind}Config")(**where, r=4, init_weights=False)
            torch.manual_seed(2)
            model = peft.get_peft_model(fresh(base), config).eval()
        check(model, kvrewrite.transform(model, "full"))

    def test_adapters_that_are_more_than_their_layers_are_refused(self, base: Any) -> None:
        from peft import LoraConfig, PromptTuningConfig, get_peft_model

        activated = LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
        with pytest.raises(UnsupportedModelError, match=r"activated LoRA .*a part of the text only"):
            kvrewrite.transform(get_peft_model(fresh(base), activated), "full")
        model = get_peft_model(fresh(base), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
        with pytest.raises(UnsupportedModelError, match="type PROMPT_TUNING, which changes the model's input"):
            kvrewrite.transform(model, "full")

    def test_an_adapter_beside_the_weights_is_not_overlooked(self, base: Any, tmp_path: Any) -> None:
        """transformers loads it with the directory, so converting without it would be another model."""
        base.save_pretrained(tmp_path)
        self.adapted(base).save_pretrained(tmp_path)
        with pytest.raises(ArtifactError, match=r"adapter_config\.json.*Merge it first"):
            kvrewrite.convert(tmp_path, None)


# ----------------------------------------------------------------------------------------------------- quantized weights
class TestQuantized:
    @pytest.fixture
    def base(self, shallow: Any) -> Any:
        return shallow

    @pytest.mark.parametrize(
        "config",
        [
            pytest.param("Int8WeightOnlyConfig", marks=pytest.mark.thorough),  # test_torchao_evicting has it
            "IntxWeightOnlyConfig",
            pytest.param("Float8WeightOnlyConfig", marks=pytest.mark.thorough),
        ],
    )
    def test_torchao(self, base: Any, config: str, tmp_path: Any) -> None:
        quantization = pytest.importorskip("torchao.quantization")
        options = {"weight_dtype": torch.int4} if config == "IntxWeightOnlyConfig" else {}
        model = fresh(base)
        quantization.quantize_(model, getattr(quantization, config)(**options))
        assert (logits(model) - logits(base)).abs().max() > 1e-5
        small = kvrewrite.transform(model, "full")
        check(model, small)
        floating = sum(p.numel() for p in small.parameters() if p.dtype == torch.float32)
        assert floating < 0.5 * sum(p.numel() for p in base.parameters())  # the codes are what it holds
        with pytest.raises(ArtifactError, match="weights are quantized"):
            small.save_pretrained(tmp_path / "out")

    def test_torchao_evicting(self, base: Any) -> None:
        """What a policy keeps, and what follows, is that of the model with the dequantized weights."""
        quantization = pytest.importorskip("torchao.quantization")
        model, plain = fresh(base), fresh(base)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                plain.get_parameter(name).copy_(parameter.dequantize() if hasattr(parameter, "qdata") else parameter)
        options = {"budget": 8, "recent_tokens": 2}
        a, b = kvrewrite.transform(model, "h2o", **options), kvrewrite.transform(plain, "h2o", **options)
        cache_a, cache_b = a.prefill(IDS), b.prefill(IDS)
        assert cache_a.positions() == cache_b.positions()
        assert torch.equal(tokens(a), tokens(b))

    @pytest.mark.parametrize("double", [False, True])
    def test_4_bit_layers_of_bitsandbytes(self, base: Any, double: bool, tmp_path: Any) -> None:
        bnb = pytest.importorskip("bitsandbytes")
        model = fresh(base)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and name != "lm_head":
                new = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, quant_type="nf4", compress_statistics=double
                )
                new.weight = bnb.nn.Params4bit(
                    layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=double, module=new
                )
                model.set_submodule(name, new.to("cpu"))
        if model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
            pytest.skip("bitsandbytes packs weights for this CPU at the first call")
        assert (logits(model) - logits(base)).abs().max() > 1e-5
        before = list(model.modules())
        small = kvrewrite.transform(model, "full")
        assert all(a is b for a, b in zip(model.modules(), before, strict=True))
        check(model, small)
        assert any(p.dtype == torch.uint8 for p in small.parameters())
        with pytest.raises(ArtifactError, match="weights are quantized"):
            small.save_pretrained(tmp_path / "out")

    @pytest.mark.parametrize("own", [{"dequantize": False}, {"run_compressed": True}, {}])
    def test_compressed_tensors_as_they_are_loaded_are_refused(self, base: Any, own: dict[str, bool]) -> None:
        """With the way out, which is taken: old and new names of the option."""
        model = fresh(base)
        model.quantization_method = QuantizationMethod.COMPRESSED_TENSORS
        model.config.quantization_config = SimpleNamespace(**own)
        with pytest.raises(
            UnsupportedModelError, match=r"CompressedTensorsConfig\(run_compressed=False\).*dequantize=True"
        ):
            kvrewrite.transform(model, "full")
        for plain in ({"dequantize": True}, {"run_compressed": False}):
            model.config.quantization_config = SimpleNamespace(**plain)
            check_layers(model)

    def test_other_layers_of_bitsandbytes_are_refused(self, base: Any) -> None:
        bnb = pytest.importorskip("bitsandbytes")
        model = fresh(base)
        weight = model.lm_head.weight.data
        model.lm_head = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False)
        with pytest.raises(UnsupportedModelError, match=r"lm_head is a bitsandbytes.*not quantized yet.*torchao"):
            kvrewrite.transform(model, "full")
        model.lm_head = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False)
        with pytest.raises(
            UnsupportedModelError, match=r"lm_head is a bitsandbytes.*Linear8bitLt.*by all tokens of a call"
        ):
            kvrewrite.transform(model, "full")

    @pytest.mark.filterwarnings("ignore")
    def test_packed_weights_are_refused(self, base: Any) -> None:
        model = torch.ao.quantization.quantize_dynamic(fresh(base), {nn.Linear}, dtype=torch.qint8)
        with pytest.raises(UnsupportedModelError, match=r"is a torch\.ao\.nn\.quantized.*can't be captured"):
            kvrewrite.transform(model, "full")
