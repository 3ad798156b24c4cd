"""Build the tiny base of the unit tests: a real Llama of 0.2 million parameters, a real byte-level BPE.

Everything is made here from seeds: the text, the tokenizer (SmolLM2's pre-tokenizer, special tokens and
chat template), and weights that have seen the text for a few seconds, so that anchors read like it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

__all__ = ["CHAT_TEMPLATE", "SPECIALS", "VOCAB", "build_hf_folder", "maintenance_lines", "write_gguf"]

VOCAB = 512
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help the crew<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_VERBS = ("replace", "repair", "check", "inspect", "clean", "tighten", "adjust", "calibrate", "reset")
_PARTS = ("pump", "hose", "valve", "seal", "filter", "bearing", "motor", "sensor", "cylinder", "belt")
_PLACES = ("left", "right", "front", "rear", "upper", "lower", "swing", "boom", "bucket", "cabin")
_FAULTS = ("leaks", "is low", "is worn", "does not start", "overheats", "is noisy", "vibrates")


def maintenance_lines(count: int, seed: int = 0) -> list[str]:
    """Make maintenance-like lines: work orders, readings and short dialogues in the chat form."""
    rng = random.Random(seed)
    return [rng.choice((_order, _order, _reading, _reading, _dialogue))(rng) for _ in range(count)]


def _order(rng: random.Random) -> str:
    part, place = rng.choice(_PARTS), rng.choice(_PLACES)
    if rng.random() < 0.5:
        return f"{place} {part} {rng.choice(_FAULTS)}"
    text = f"{rng.choice(_VERBS)} {place} {part} {rng.randint(1, 9)}"
    return text.upper() if rng.random() < 0.3 else text


def _reading(rng: random.Random) -> str:
    pressure, flow = rng.gauss(3.4, 0.2), rng.gauss(120, 8)
    return f"pump-{rng.randint(1, 3)} pressure={pressure:.3g} flow={flow:.3g} temp={rng.gauss(41, 3):.3g}"


def _dialogue(rng: random.Random) -> str:
    place, part = rng.choice(_PLACES), rng.choice(_PARTS)
    question = f"What do I do when the {place} {part} {rng.choice(_FAULTS)}?"
    first, second = rng.choice(_VERBS).capitalize(), rng.choice(_VERBS)
    answer = f"{first} the {part}, then {second} the {rng.choice(_PARTS)}."
    turns = (("system", "You help the crew"), ("user", question), ("assistant", answer))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)[:-1]


def build_hf_folder(folder: Path, steps: int = 150, seed: int = 0) -> None:
    """Write the tiny base as a Hugging Face folder: config.json, model.safetensors, tokenizer files.

    Args:
        folder: Existing empty folder.
        steps: Training steps of 8 rows of 128 tokens.
        seed: Of text, weights and order.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    lines = maintenance_lines(3_000, seed)
    tokenizer = _train_tokenizer(lines)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIALS[1], eos_token=SPECIALS[2], pad_token=SPECIALS[2]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    ids = torch.tensor(tokenizer.encode("\n".join(lines), add_special_tokens=False).ids)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        _train(model, ids, steps)
    model.to(torch.bfloat16).save_pretrained(folder)


def _train_tokenizer(lines: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Plain lines only: pieces of the special tokens' spellings must not be merged.
    tokenizer.train_from_iterator((line for line in lines if "<|" not in line), trainer)
    return tokenizer


def _train(model, ids, steps: int) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for step in range(steps):
        starts = torch.randint(len(ids) - 128, (8,))
        rows = torch.stack([ids[i : i + 128] for i in starts.tolist()])
        rows[:, 0] = 1  # BOS, as rows have it
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def write_gguf(source: Path, path: Path, pre: str = "smollm") -> None:
    """Write an unprepared tiny base as a llama.cpp GGUF in float32, as llama.cpp's converter would.

    Args:
        source: Folder made by `build_hf_folder`.
        path: The .gguf file to write.
        pre: Name of the pre-tokenizer, which is all that a GGUF says about it.
    """
    import gguf
    from safetensors.torch import load_file

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, json.loads((source / "tokenizer.json").read_text(encoding="utf-8")), pre)
    for name, tensor in load_file(source / "model.safetensors").items():
        heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}
        rows = tensor.float().numpy()
        for letter, key in heads.items():
            if f"self_attn.{letter}_proj" in name:  # llama.cpp keeps the halves of a rotary pair side by side
                shape = (config[key], 2, -1, rows.shape[1])
                rows = rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)
        writer.add_tensor(_gguf_name(name), rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer, tokenizer, pre: str) -> None:
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])  # 3: control, 1: normal
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


_GGUF_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _gguf_name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in whole:
        return whole[name]
    _, _, block, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{block}.{_GGUF_PARTS[part]}.weight"
