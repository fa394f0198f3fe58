"""Bytes to samples: what each form becomes, and that nothing a record contains raises anything but SampleError."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stream_trainer.errors import SampleError, SettingsError
from stream_trainer.records import Partition, Record, Sample
from stream_trainer.samples.byte_tokenizer import BOS, CHAT_TEMPLATE, PAD, byte_tokenizer
from stream_trainer.samples.byte_tokenizer import EOS as END
from stream_trainer.samples.decoder import NO_LOSS, REASONS, Decoder, read_samples
from stream_trainer.settings.schema import SampleSettings
from tests.helpers.malformed import malformed_values

LOG = Partition("log", 0)
EOS = 258
TOKENIZER = byte_tokenizer()
DECODER = Decoder(TOKENIZER, SampleSettings(max_tokens=200, max_bytes=20_000))


def record(value: bytes | None, timestamp: float | None = None) -> Record:
    return Record(LOG, 7, 8, value, timestamp=timestamp)


def decode(fields: dict[str, Any], decoder: Decoder = DECODER) -> Sample:
    sample = decoder.decode(record(json.dumps(fields).encode()))
    assert sample is not None
    return sample


def reason(fields: dict[str, Any], decoder: Decoder = DECODER) -> str:
    with pytest.raises(SampleError) as caught:
        decode(fields, decoder)
    return caught.value.reason


def said(sample: Sample) -> str:
    """The text that carries loss."""
    return str(TOKENIZER.decode([label for label in sample.labels if label != NO_LOSS]))


def with_template(template: str) -> Decoder:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Decoder(tokenizer, SampleSettings(max_tokens=200))


def test_text_carries_loss_everywhere_and_ends() -> None:
    sample = decode({"text": "Hi é"})
    assert sample.input_ids == sample.labels == (*"Hi é".encode(), EOS)
    assert (sample.partition, sample.offset) == (LOG, 7)
    assert sample.size == len(json.dumps({"text": "Hi é"}))


def test_response_carries_loss_and_the_prompt_does_not() -> None:
    sample = decode({"prompt": "2+2?", "response": "4"})
    assert sample.input_ids == (*b"2+2?\n4", EOS)
    assert sample.labels == (*[NO_LOSS] * 5, *b"4", EOS)


def test_messages_carry_loss_on_the_assistant_only() -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao")]
    sample = decode({"messages": [{"role": role, "content": content} for role, content in turns]})
    assert said(sample) == "Hello</s>\nCiao</s>\n"
    whole = "system: Be brief.\nuser: Hi\nassistant: Hello</s>\nuser: Bye\nassistant: Ciao</s>\n"
    assert TOKENIZER.decode(sample.input_ids) == whole


def test_optional_fields() -> None:
    sample = decode({"text": "a", "id": 12, "weight": 2, "timestamp": 5.5, "domain": "math", "unknown": [1]})
    assert (sample.id, sample.weight, sample.timestamp, sample.domain) == ("12", 2.0, 5.5, "math")
    sample = decode({"text": "a", "prompt": None, "id": None, "weight": None})
    assert (sample.id, sample.weight, sample.timestamp, sample.domain) == (None, 1.0, None, None)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("1970-01-02", 86400), ("1970-01-01T01:00:00Z", 3600), ("1970-01-01T01:00:00+01:00", 0), (3, 3)],
)
def test_timestamps(written: object, seconds: float) -> None:
    assert decode({"text": "a", "timestamp": written}).timestamp == seconds


def test_timestamp_falls_back_to_the_record() -> None:
    sample = DECODER.decode(record(b'{"text": "a"}', timestamp=9.0))
    assert sample is not None
    assert sample.timestamp == 9.0


def test_a_sample_keeps_its_record_and_does_not_show_it() -> None:
    """For a dead letter, should a step fail on it; whatever is logged of a sample is not its text."""
    given = record(b'{"text": "a secret"}')
    sample = DECODER.decode(given)
    assert sample is not None
    assert sample.record is given
    assert "secret" not in repr(sample)


def test_a_byte_order_mark_is_ignored() -> None:
    sample = DECODER.decode(record(b'\xef\xbb\xbf{"text": "a"}'))
    assert sample is not None
    assert sample.input_ids == (97, EOS)


def test_a_tombstone_is_no_sample() -> None:
    assert DECODER.decode(record(None)) is None


@pytest.mark.parametrize(("kind", "value"), malformed_values(max_bytes=20_000), ids=lambda item: str(item)[:40])
def test_malformed_values_are_sample_errors(kind: str, value: bytes) -> None:
    with pytest.raises(SampleError) as caught:
        DECODER.decode(record(value))
    assert caught.value.reason in REASONS
    assert caught.value.reason != "unexpected", "each of these is foreseen"
    assert len(str(caught.value)) < 200


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(alphabet=st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
records = st.dictionaries(
    st.sampled_from(["text", "prompt", "response", "messages", "id", "weight", "timestamp", "domain", "role"]),
    json_values
    | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": json_values})),
)


# Slow on a busy machine, and a slow draw says nothing about the decoder.
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(records.map(lambda fields: json.dumps(fields).encode()) | st.binary(max_size=60))
def test_anything_is_a_sample_or_a_sample_error(value: bytes) -> None:
    (result,) = DECODER.decode_batch([record(value)])
    assert isinstance(result, (Sample, SampleError))
    if isinstance(result, SampleError):
        assert result.reason in REASONS
        assert result.reason != "unexpected"


def test_a_batch_keeps_the_order_and_one_bad_record_spoils_no_other() -> None:
    values = [b'{"text": "a"}', b"{", None, b'{"prompt": "p", "response": "r"}', b'{"text": "\\ud800"}']
    results = DECODER.decode_batch([record(value) for value in values])
    kinds = [result.reason if isinstance(result, SampleError) else type(result).__name__ for result in results]
    assert kinds == ["Sample", "bad_json", "NoneType", "Sample", "lone_surrogate"]


def test_a_record_that_the_tokenizer_refuses_spoils_no_other() -> None:
    """A vocabulary without an unknown token raises on what it does not hold."""
    backend = Tokenizer(models.WordLevel({"good": 0, "[UNK]": 1}, unk_token="missing"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    decoder = Decoder(PreTrainedTokenizerFast(tokenizer_object=backend), SampleSettings())
    values = [b'{"text": "good good"}', b'{"text": "bad"}', b'{"text": "good good good"}']
    first, second, third = decoder.decode_batch([record(value) for value in values])
    assert isinstance(second, SampleError)
    assert second.reason == "tokenizer"
    assert isinstance(first, Sample)
    assert isinstance(third, Sample)
    assert (first.num_tokens, third.num_tokens) == (2, 3)


class Refusing:
    """A backend that raises on texts with one word in them."""

    def __init__(self, backend: Tokenizer, word: str) -> None:
        self.backend, self.word = backend, word

    def to_str(self) -> str:
        return str(self.backend.to_str())

    def encode_batch_fast(self, texts: list[str], **how: bool) -> Any:
        return self._checked(texts).encode_batch_fast(texts, **how)

    def encode_batch(self, texts: list[str], **how: bool) -> Any:
        return self._checked(texts).encode_batch(texts, **how)

    def _checked(self, texts: list[str]) -> Tokenizer:
        if any(self.word in text for text in texts):
            raise ValueError(self.word)
        return self.backend


@pytest.mark.parametrize("place", ["prompt", "response"])
def test_a_record_whose_words_are_refused_spoils_no_other_of_its_batch(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both where a border falls into the word and where none does."""
    pairs = [{"prompt": f"in Spain {n}", "response": "the rain in Spain"} for n in range(5)]
    good = [record(json.dumps(pair).encode()) for pair in pairs]
    bad = record(json.dumps(pairs[0] | {place: "the rain refused"}).encode())
    expected = Decoder(tokenizer_of_words(), SampleSettings()).decode_batch(good)
    monkeypatch.setattr(
        "stream_trainer.samples.tokens.whole.fenced_backend",
        lambda tokenizer, _: Refusing(tokenizer.backend_tokenizer, "refused"),
    )
    decoder = Decoder(tokenizer_of_words(), SampleSettings())
    *before, error, last = decoder.decode_batch([*good[:4], bad, good[4]])
    assert isinstance(error, SampleError)
    assert (error.reason, str(error)) == ("tokenizer", "ValueError")
    assert [*before, last] == expected == decoder.decode_batch(good)


@pytest.mark.parametrize("token", ["</s>", "<s>", "<pad>"])
def test_control_tokens_cannot_be_injected(token: str) -> None:
    text = f"a{token}b"
    assert decode({"text": text}).input_ids == (*text.encode(), EOS)
    assert decode({"prompt": text, "response": text}).input_ids == (*f"{text}\n{text}".encode(), EOS)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    expected = (*f"user: {text}\nassistant: {text}".encode(), EOS, *b"\n")
    sample = decode({"messages": messages})
    assert sample.input_ids == expected
    assert sample.labels == (*[NO_LOSS] * len(f"user: {text}\nassistant: "), *f"{text}".encode(), EOS, *b"\n")


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    """As large models have them: pieces of words, and a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), [PAD, BOS, END]
    trainer = trainers.BpeTrainer(show_progress=False, initial_alphabet=alphabet, special_tokens=special)
    backend.train_from_iterator(["the rain in Spain"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=END, chat_template=CHAT_TEMPLATE
    )


@pytest.mark.parametrize("tokenizer", [TOKENIZER, tokenizer_of_words()], ids=["bytes", "words"])
@pytest.mark.parametrize("too_long", ["truncate", "dead_letter"])
def test_encoding_ourselves_changes_no_outcome(tokenizer: Any, too_long: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SampleSettings(max_tokens=24, too_long=too_long, max_bytes=5000)
    texts = ["the rain", "in Spain the rain ", "  in\n", "p" * 30, "</s> a <unk>", "in  the rain\0 " * 9]
    pairs = [(a, b) for a in texts for b in texts]
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    good = [*({"prompt": a, "response": b} for a, b in pairs), *({"messages": chat} for chat in chats)]
    values = [*(json.dumps(fields).encode() for fields in good), *(value for _, value in malformed_values(5000))]
    batch = [record(value) for value in values]
    ours = Decoder(tokenizer, settings)
    for kind in ("byte_encoder", "word_encoder"):
        monkeypatch.setattr(f"stream_trainer.samples.tokens.whole.{kind}", lambda *_: None)
    backend = Decoder(tokenizer, settings)
    for found, expected in zip(ours.decode_batch(batch), backend.decode_batch(batch), strict=True):
        if isinstance(expected, SampleError):
            assert isinstance(found, SampleError)
            assert (found.reason, str(found)) == (expected.reason, str(expected))
        else:
            assert found == expected


def test_a_vocabulary_with_control_tokens_among_its_pieces_builds_none_from_text() -> None:
    pieces = [("<unk>", 0.0), ("</s>", -1.0), ("a", -1.0), ("<", -2.0), ("/", -2.0), ("s", -2.0), (">", -2.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    decoder = Decoder(tokenizer, SampleSettings())
    assert decode({"text": "aa</s>a"}, decoder).input_ids == (2, 2, 3, 4, 5, 6, 2, 1)
    assert decode({"text": "a?a"}, decoder).input_ids == (2, 0, 2, 1), "an unknown token is no control token"


def test_start_token_only_where_the_tokenizer_adds_one() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 257)]
    )
    sample = decode({"text": "a"}, Decoder(tokenizer, SampleSettings()))
    assert sample.input_ids == (257, 97, EOS)
    assert sample.labels == (NO_LOSS, 97, EOS)


def test_too_long_is_cut_or_dead_lettered() -> None:
    cut = Decoder(TOKENIZER, SampleSettings(max_tokens=4))
    assert decode({"text": "abcdef"}, cut).input_ids == tuple(b"abcd")
    refuse = Decoder(TOKENIZER, SampleSettings(max_tokens=4, too_long="dead_letter"))
    assert reason({"text": "abcdef"}, refuse) == "too_long"
    assert decode({"text": "abc"}, refuse).num_tokens == 4


def test_the_models_limit_holds_too() -> None:
    assert decode({"text": "abcdef"}, Decoder(TOKENIZER, SampleSettings(), max_positions=3)).num_tokens == 3


def test_a_prompt_that_leaves_no_room_for_the_response() -> None:
    cut = Decoder(TOKENIZER, SampleSettings(max_tokens=4))
    assert reason({"prompt": "abc", "response": "d"}, cut) == "no_loss_tokens"
    assert said(decode({"prompt": "ab", "response": "d"}, cut)) == "d"


def test_a_single_token_predicts_nothing() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    decoder = Decoder(PreTrainedTokenizerFast(tokenizer_object=backend), SampleSettings())
    assert reason({"text": "a"}, decoder) == "no_loss_tokens"


def test_messages_need_a_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert reason({"messages": messages}, Decoder(tokenizer, SampleSettings())) == "chat_template"


def test_a_template_that_raises_is_the_records_fault() -> None:
    decoder = with_template("{{ raise_exception('roles must alternate') }}")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert reason({"messages": messages}, decoder) == "chat_template"


def test_a_template_that_rewrites_earlier_turns_leaves_loss_on_each() -> None:
    """Reasoning models drop the thoughts of all turns but the last."""
    decoder = with_template(
        "{% for m in messages %}{{ m.role[0] }}:"
        "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('|')[1] }}\n{% endfor %}"
        "{{ 'a:' if add_generation_prompt }}"
    )
    turns = [("user", "x"), ("assistant", "hm|1"), ("user", "y"), ("assistant", "hm|2"), ("user", "z")]
    sample = decode({"messages": [{"role": role, "content": content} for role, content in turns]}, decoder)
    assert TOKENIZER.decode(sample.input_ids) == "u:x\na:1\nu:y\na:2\nu:z\n"
    assert said(sample) == "1\n2\n"
    sample = decode({"messages": [{"role": role, "content": content} for role, content in turns[:4]]}, decoder)
    assert TOKENIZER.decode(sample.input_ids) == "u:x\na:1\nu:y\na:hm|2\n"
    assert said(sample) == "1\nhm|2\n"


def test_a_template_that_hides_where_the_answer_begins_is_an_error() -> None:
    decoder = with_template("{{ messages | length }}{% for m in messages %}{{ m.content | length }}{% endfor %}")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert reason({"messages": messages}, decoder) == "chat_template"


def test_a_slow_tokenizer_is_a_wrong_setting() -> None:
    class Slow:
        is_fast = False
        name_or_path = "slow/one"

    with pytest.raises(SettingsError, match=r"model\.tokenizer=slow/one"):
        Decoder(Slow(), SampleSettings())


def test_read_samples(tmp_path: Path) -> None:
    path = tmp_path / "target.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n{"text": "c"}\n')
    samples = read_samples(path, DECODER, limit=2, setting="target.path")
    assert [sample.input_ids[0] for sample in samples] == list(b"ab")
    assert [sample.offset for sample in samples] == [0, 15]


def test_samples_that_do_not_fit_are_left_out_of_a_users_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "target.jsonl"
    path.write_text('{"text": "a"}\n{"prompt": "too long a prompt", "response": "b"}\n{"text": "c"}\n')
    decoder = Decoder(byte_tokenizer(), SampleSettings(max_tokens=10))
    samples = read_samples(path, decoder, limit=10, setting="target.path")
    assert [sample.input_ids[0] for sample in samples] == list(b"ac")
    assert "1 samples do not fit samples.max_tokens=10, first line 2" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "' + b"p" * 600 + b'", "response": "b"}', "raise samples.max_tokens"),
        (b'{"text": "a"}\n\n{"text": 1}\n', r"line 3 is not a sample \(wrong_type: text is a int, not a string\)"),
        (b"", "holds no samples"),
        (b"\n\n", "holds no samples"),
        (None, r"cannot be read \(No such file or directory\)"),
    ],
)
def test_mistakes_in_the_users_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "target.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=rf"^target\.path={path}.*{message}"):
        read_samples(path, DECODER, limit=10, setting="target.path")
