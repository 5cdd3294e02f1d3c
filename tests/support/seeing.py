"""Tiny vision-language models with random weights, and what their processors would make of images and text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as T
from torch import Tensor

from kvrewrite.api import Rewriter
from kvrewrite.vision.model import VisionModel

TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGE, VIDEO, START, END = 90, 91, 92, 93  # special ids; those of text are smaller
SIZE = 28  # of images, two patches on a side


def _towers() -> dict[str, Any]:
    return {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def _llava() -> Any:
    vision = T.CLIPVisionConfig(**_towers(), image_size=SIZE, patch_size=14)
    text = T.LlamaConfig(**TEXT)
    return T.LlavaForConditionalGeneration(
        T.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    )


def _vipllava() -> Any:
    vision = T.CLIPVisionConfig(**_towers(), image_size=SIZE, patch_size=14)
    text = T.LlamaConfig(**TEXT)
    config = T.VipLlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, vision_feature_layers=[-1, -2]
    )
    return T.VipLlavaForConditionalGeneration(config)


def _paligemma() -> Any:
    vision = T.SiglipVisionConfig(**_towers(), image_size=SIZE, patch_size=14, projection_dim=32)
    text = T.GemmaConfig(**TEXT, head_dim=8)
    config = T.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=32, hidden_size=32
    )
    return T.PaliGemmaForConditionalGeneration(config)


def _gemma3() -> Any:
    vision = T.SiglipVisionConfig(**_towers(), image_size=SIZE, patch_size=14)
    text = T.Gemma3TextConfig(
        **TEXT, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    )
    config = T.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE)
    return T.Gemma3ForConditionalGeneration(config)


def _idefics3() -> Any:
    vision = {**_towers(), "image_size": SIZE, "patch_size": 7}
    text = T.LlamaConfig(**TEXT)
    return T.Idefics3ForConditionalGeneration(
        T.Idefics3Config(text_config=text, vision_config=vision, image_token_id=IMAGE, scale_factor=2)
    )


def _smolvlm() -> Any:
    vision = {**_towers(), "image_size": SIZE, "patch_size": 7}
    text = T.LlamaConfig(**TEXT)
    return T.SmolVLMForConditionalGeneration(
        T.SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, scale_factor=2)
    )


def _internvl() -> Any:
    vision = {**_towers(), "image_size": [SIZE, SIZE], "patch_size": [7, 7]}
    text = T.Qwen2Config(**TEXT)
    return T.InternVLForConditionalGeneration(
        T.InternVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=4)
    )


def _mistral3() -> Any:
    vision = {**_towers(), "image_size": SIZE, "patch_size": 7, "head_dim": 12}
    text = T.MistralConfig(**TEXT, head_dim=8)
    return T.Mistral3ForConditionalGeneration(
        T.Mistral3Config(
            text_config=text,
            vision_config=T.PixtralVisionConfig(**vision),
            image_token_index=IMAGE,
            spatial_merge_size=2,
            vision_feature_layer=-1,
        )
    )


_QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _qwen2_vl() -> Any:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 7}
    text = {**TEXT, "rope_parameters": _MROPE}
    return T.Qwen2VLForConditionalGeneration(T.Qwen2VLConfig(text_config=text, vision_config=vision, **_QWEN))


def _qwen2_5_vl() -> Any:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": 7,
        "window_size": 28,
        "fullatt_block_indexes": [1],
    }
    text = {**TEXT, "rope_parameters": _MROPE}
    return T.Qwen2_5_VLForConditionalGeneration(T.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_QWEN))


def _qwen3_vl() -> Any:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": 7,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**_MROPE, "mrope_interleaved": True}}
    return T.Qwen3VLForConditionalGeneration(T.Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN))


MAKERS: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "vipllava": _vipllava,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
    "mistral3": _mistral3,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
}
GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # images as patches, with the size of each one's grid


@functools.cache
def original(name: str) -> Any:
    """The unmodified model. Tests must leave it as it is. Queries and keys grow, as fresh weights attend to all alike."""
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(8)
    return model


Part = int | tuple[int, int]  # so many tokens of text, or an image of so many merged patches (rows, columns)


def given(name: str, rows: list[list[Part]], seed: int = 0) -> dict[str, Any]:
    """What the original's processor would give: ids, a mask (padded on the left), images. Images of other sizes than (2, 2) are
    for models with grids."""
    made, texts, kinds, pixels, grids = torch.Generator().manual_seed(seed), [], [], [], []
    for row in rows:
        ids: list[int] = []
        kind: list[int] = []
        for part in row:
            if isinstance(part, int):
                ids += torch.randint(3, 80, (part,), generator=made).tolist()
                kind += [0] * part
                continue
            count = part[0] * part[1]
            if name in GRIDS:
                ids, kind = [*ids, START, *[IMAGE] * count, END], [*kind, 0, *[1] * count, 0]
                grids.append([1, 2 * part[0], 2 * part[1]])
                pixels.append(torch.randn(4 * count, 3 * 2 * 7 * 7, generator=made))
            else:
                ids, kind = [*ids, *[IMAGE] * count], [*kind, *[1] * count]
                pixels.append(torch.randn(3, SIZE, SIZE, generator=made))
        texts.append(ids)
        kinds.append(kind)
    width = max(map(len, texts))
    found: dict[str, Any] = {
        "input_ids": torch.tensor([[0] * (width - len(r)) + r for r in texts]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in texts]),
    }
    if not pixels:
        return found
    marks = torch.tensor([[0] * (width - len(r)) + r for r in kinds])
    if name in GRIDS:
        return {
            **found,
            "pixel_values": torch.cat(pixels),
            "image_grid_thw": torch.tensor(grids),
            "mm_token_type_ids": marks,
        }
    found["pixel_values"] = torch.stack(pixels)
    if name in ("paligemma", "gemma3"):
        found["token_type_ids"] = marks
    if name in ("idefics3", "smolvlm"):  # rows of images, padded with empty ones
        counts = [sum(not isinstance(p, int) for p in row) for row in rows]
        padded = torch.zeros(len(rows), max(counts), 3, SIZE, SIZE)
        for r, images in enumerate(found["pixel_values"].split(counts)):
            padded[r, : len(images)] = images
        found["pixel_values"] = padded
    if name == "mistral3":
        found["image_sizes"] = torch.tensor([[SIZE, SIZE]] * len(pixels))
    return found


@functools.cache
def rewriter(name: str) -> Rewriter:
    return Rewriter(original(name))


@functools.cache
def small(name: str, policy: str, **options: Any) -> VisionModel:
    made = rewriter(name).rewrite(policy, **options)
    assert isinstance(made, VisionModel)
    return made


def merged(name: str, inputs: dict[str, Any]) -> Tensor:
    """The embeddings that the unmodified model gives its language model."""
    found: list[Tensor] = []
    model = original(name)
    part = model.get_decoder()
    hook = part.register_forward_pre_hook(lambda _, __, kw: found.append(kw["inputs_embeds"]), with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    return found[0]
