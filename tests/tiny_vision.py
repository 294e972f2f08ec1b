"""Tiny vision-language models with their processors, made on the spot, and rows with pictures. Nothing is downloaded."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tiny import word_problems, word_tokenizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessorPil,
    Gemma4Processor,
    GotOcr2ImageProcessorPil,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

SIDE, PATCH = 12, 6
TEXT = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip
TEMPLATE = """{%- for message in messages -%}
{%- if message.content is string %} {{ message.content }}{% else -%}
{%- for part in message.content -%}
{%- if part.type == "image" %} IMAGE{% else %} {{ part.text }}{% endif -%}
{%- endfor -%}{%- endif -%}
{%- endfor -%}"""
"""What a picture is called takes the place of IMAGE."""


def tokenizer_with(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """Words, and the special tokens of a family; `named` are also its attributes, as in the family's own tokenizer."""
    tokenizer = word_tokenizer()
    tokens = [*special, *named.values()]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    if named:
        tokenizer.init_kwargs["extra_special_tokens"] = named
        tokenizer._set_model_specific_special_tokens(special_tokens=named)
    return tokenizer


def llama(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(**TEXT, vocab_size=len(tokenizer))


def template(picture: str) -> str:
    """With what the family calls a picture."""
    return TEMPLATE.replace("IMAGE", picture)


def llava(vision_feature_layer: int = -2) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = tokenizer_with("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER), text_config=llama(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=vision_feature_layer,
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        images, tokenizer, PATCH, "default", chat_template=template("<image>"), num_additional_image_tokens=1
    )
    return LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = tokenizer_with("<image>")
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER), text_config=llama(tokenizer), image_grid_pinpoints=pinpoints,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        images, tokenizer, PATCH, "default", chat_template=template("<image>"), num_additional_image_tokens=1
    )
    return LlavaNextForConditionalGeneration(config), processor


def qwen(
    config_class: type, model_class: type, processor_class: type, vision: dict[str, Any], text: dict[str, Any]
) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = tokenizer_with("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("vision_start", "<|vision_start|>"), ("vision_end", "<|vision_end|>"), ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
        )
    }  # fmt: skip
    config = config_class(text_config={**TEXT, "vocab_size": len(tokenizer), **text}, vision_config=vision, **ids)
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, min_pixels=(2 * PATCH) ** 2, max_pixels=(4 * PATCH) ** 2
    )

    class WithoutVideos(processor_class):
        """Their processor needs torchvision, which CPUs' builds of torch do not come with."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = ids["image_token_id"], ids["video_token_id"]
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    picture = "<|vision_start|> <|image_pad|> <|vision_end|>"
    return model_class(config), WithoutVideos(images, tokenizer, chat_template=template(picture))


ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}}


QWEN_TOWER = {"depth": 2, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
SINCE_2_5 = QWEN_TOWER | {"hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 40}


def qwen2_vl():
    vision = QWEN_TOWER | {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    return qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, vision, ROPE)


def qwen2_5_vl():
    vision = SINCE_2_5 | {"window_size": 24, "fullatt_block_indexes": [1]}
    return qwen(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, vision, ROPE)


def qwen3_vl():
    vision = SINCE_2_5 | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return qwen(Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, vision, ROPE | {"head_dim": 12})


LINEAR_ATTENTION = {
    "head_dim": 12, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
SINCE_3_5 = SINCE_2_5 | {"num_position_embeddings": 16}


def qwen3_5():
    """Every other layer has a recurrent state in the place of attention."""
    return qwen(Qwen3_5Config, Qwen3_5ForConditionalGeneration, Qwen3VLProcessor, SINCE_3_5, ROPE | LINEAR_ATTENTION)


def qwen3_5_moe():
    experts = {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 28,
    }  # fmt: skip
    text = ROPE | LINEAR_ATTENTION | experts
    return qwen(Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration, Qwen3VLProcessor, SINCE_3_5, text)


def gemma4():
    """Its pictures keep their shapes; the key and value of a layer may be one."""
    named = {"boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>"}
    tokenizer = tokenizer_with("<|video|>", **named)
    ids = {
        name.replace("token", "token_id"): tokenizer.convert_tokens_to_ids(token)
        for name, token in (named | {"video_token": "<|video|>"}).items()
    }
    text = {
        **TEXT, "vocab_size": len(tokenizer), "head_dim": 12, "global_head_dim": 24, "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": len(tokenizer),
        "hidden_size_per_layer_input": 8,
    }  # fmt: skip
    tower = {
        name: TOWER[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    vision = tower | {"num_key_value_heads": 4, "head_dim": 8, "patch_size": PATCH, "position_embedding_size": 64}
    config = Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **ids)
    images = Gemma4ImageProcessorPil(patch_size=PATCH, max_soft_tokens=70)

    class WithoutVideos(Gemma4Processor):
        """As above; without sounds, too."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
            self.image_seq_length = 70
            self.boi_token, self.eoi_token, self.image_token = (
                tokenizer.boi_token,
                tokenizer.eoi_token,
                tokenizer.image_token,
            )
            self.image_token_id, self.video_token_id = ids["image_token_id"], ids["video_token_id"]
            self.video_token = "<|video|>"
            self.audio_token, self.boa_token, self.eoa_token, self.audio_token_id = (
                "<|audio|>",
                "<|audio>",
                "<audio|>",
                -1,
            )

    return Gemma4ForConditionalGeneration(config), WithoutVideos(images, tokenizer, chat_template=template("<|image|>"))


def gemma3():
    tokenizer = tokenizer_with(
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    config = Gemma3Config(
        text_config={**TEXT, "vocab_size": len(tokenizer), "head_dim": 12, "sliding_window": 64},
        vision_config={**TOWER, "vision_use_head": False}, mm_tokens_per_image=4, boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id, image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_seq_length=4)
    processor = Gemma3Processor(images, tokenizer, chat_template=template("<start_of_image>"), image_seq_length=4)
    return Gemma3ForConditionalGeneration(config), processor


def internvl():
    tokenizer = tokenizer_with(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>")
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer)},
        vision_config={**TOWER, "image_size": [2 * SIDE, 2 * SIDE], "patch_size": [PATCH, PATCH]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
    )  # fmt: skip

    class WithoutVideos(InternVLProcessor):
        """As above."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
            self.image_seq_length = 4
            self.start_image_token, self.end_image_token = tokenizer.start_image_token, tokenizer.end_image_token
            self.start_image_token_id, self.end_image_token_id = tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
            self.image_token, self.video_token = tokenizer.context_image_token, "<video>"
            self.image_token_id = tokenizer.context_image_token_id
            self.multimodal_pattern = re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)")

    images = GotOcr2ImageProcessorPil(size={"height": 2 * SIDE, "width": 2 * SIDE}, crop_to_patches=False)
    processor = WithoutVideos(images, tokenizer, chat_template=template("<IMG_CONTEXT>"))
    return InternVLForConditionalGeneration(config), processor


def paligemma():
    tokenizer = tokenizer_with("<image>")
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", **TEXT, "vocab_size": len(tokenizer), "head_dim": 12},
        vision_config={"model_type": "siglip_vision_model", **TOWER, "projection_dim": 48, "vision_use_head": False},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), projection_dim=48, hidden_size=48,
    )  # fmt: skip
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_seq_length=4)
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, tokenizer, chat_template=template("<image>"))
    return PaliGemmaForConditionalGeneration(config), processor


def idefics3_parts(config_class: type, images_class: type) -> tuple[PreTrainedTokenizerFast, Any, Any]:
    """(tokenizer, configuration, processor of pictures) of Idefics 3 or SmolVLM, which has its design."""
    tokenizer = tokenizer_with("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    config = config_class(
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer)}, vision_config=TOWER, scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=0,
    )  # fmt: skip
    images = images_class(size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False)
    return tokenizer, config, images


def idefics3():
    tokenizer, config, images = idefics3_parts(Idefics3Config, Idefics3ImageProcessorPil)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=1, chat_template=template("<image>"))
    return Idefics3ForConditionalGeneration(config), processor


def smolvlm():
    tokenizer, config, images = idefics3_parts(SmolVLMConfig, SmolVLMImageProcessorPil)

    class WithoutVideos(SmolVLMProcessor):
        """As above."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
            self.image_seq_len = 1
            self.fake_image_token, self.image_token = "<fake_token_around_image>", "<image>"
            self.end_of_utterance_token, self.global_image_token = "<end_of_utterance>", "<global-img>"
            self.image_token_id, self.video_token = config.image_token_id, "<video>"
            self.video_processor = SimpleNamespace(num_frames=1, fps=1)

    processor = WithoutVideos(images, tokenizer, chat_template=template("<image>"))
    return SmolVLMForConditionalGeneration(config), processor


def idefics2():
    """A perceiver between the two parts."""
    tokenizer = tokenizer_with("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    config = Idefics2Config(
        text_config={"model_type": "mistral", **TEXT, "vocab_size": len(tokenizer)}, vision_config=TOWER,
        perceiver_config={
            "hidden_size": 48, "resampler_n_latents": 2, "resampler_depth": 2, "resampler_n_heads": 2,
            "resampler_head_dim": 12, "num_key_value_heads": 1,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=0,
    )  # fmt: skip
    images = Idefics2ImageProcessorPil(size={"shortest_edge": SIDE, "longest_edge": SIDE}, do_image_splitting=False)
    processor = Idefics2Processor(images, tokenizer, image_seq_len=2, chat_template=template("<image>"))
    return Idefics2ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "llava": llava, "llava_next": llava_next, "qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5, "qwen3_5_moe": qwen3_5_moe, "gemma3": gemma3, "gemma4": gemma4, "internvl": internvl,
    "paligemma": paligemma, "idefics2": idefics2, "idefics3": idefics3, "smolvlm": smolvlm,
}  # fmt: skip


def vision_model(family: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    return visible(model.eval()), processor


def visible(model: PreTrainedModel) -> PreTrainedModel:
    """With numbers in the place of zeros such as Gemma 3's projector, through which no picture would be seen."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def rows(pictures: tuple[int, ...], whole: bool = False) -> Dataset:
    """Word problems as conversations, each with one of `pictures` numbers of pictures, in turn.

    `whole` ones are not split in prompt and completion.
    """
    generator = np.random.default_rng(0)
    found = []
    for number, row in enumerate(word_problems()):
        count = pictures[number % len(pictures)]
        arrays = generator.integers(0, 255, (count, SIDE, 2 * SIDE, 3), dtype=np.uint8)
        content = [{"type": "image", "text": None}] * count + [{"type": "text", "text": row["prompt"]}]
        answer = [{"type": "text", "text": row["completion"]}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        conversation = {"messages": messages} if whole else {"prompt": messages[:1], "completion": messages[1:]}
        found.append({"images": [Image.fromarray(array) for array in arrays]} | conversation)
    return Dataset.from_list(found)
