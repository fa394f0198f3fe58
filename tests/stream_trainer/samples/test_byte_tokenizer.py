"""The built-in tokenizer: ids are bytes, nothing is lost, and it survives being saved."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from stream_trainer.samples.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_ids_are_the_bytes_of_the_text(text: str) -> None:
    ids = TOKENIZER(text, split_special_tokens=True)["input_ids"]
    assert bytes(ids) == text.encode()
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_follow_the_bytes() -> None:
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (256, 257, 258)
    assert len(TOKENIZER) == 259
    assert TOKENIZER.decode([256, 72, 105, 258], skip_special_tokens=True) == "Hi"


def test_chat_template_marks_the_end_of_what_the_assistant_says() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == "user: Hi\nassistant: Hello</s>\n"
    prompt = TOKENIZER.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "user: Hi\nassistant: "


def test_a_saved_tokenizer_is_the_same_one(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "naïve \x00 \U0001f600  </s>\r\n"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.chat_template == TOKENIZER.chat_template
