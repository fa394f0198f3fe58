"""A tokenizer of bytes: no files, no download, every text round-trips.

It serves models that are built from a configuration: the demo, the tests, and runs that compare trainers. A token's
id is its byte, so `[72, 105]` reads as "Hi"; the three special tokens follow.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message.role }}: {{ message.content }}{{ eos_token if message.role == 'assistant' else '' }}\n"
    "{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt else '' }}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens of one byte each (id = byte), then padding (256), start (257) and end (258)."""
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_chars())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, BOS, EOS])  # here, for their order
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _byte_chars() -> list[str]:
    """The printable character by which the ByteLevel pre-tokenizer stands for each byte (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
