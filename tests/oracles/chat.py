"""A small random model for chats: its tokens are bytes, and a template says which of them the assistant wrote."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
WORDS = 256 + 3

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in (START, END, PAD)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=PAD, chat_template=TEMPLATE)


def model(hidden: int = 32) -> LlamaForCausalLM:
    """Two layers with random weights, the same in every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=257,
        pad_token_id=258,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def save(folder: Path) -> Path:
    """Model and tokenizer in a folder, as a download of one would be."""
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def chats(count: int = 8) -> list[dict[str, list[dict[str, str]]]]:
    """Questions about numbers, and their answers."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"{n} plus {n}?"},
                {"role": "assistant", "content": f"{2 * n}."},
            ]
        }
        for n in range(count)
    ]
