"""Values that are no sample, of every kind that a stream has been seen or feared to hold."""


def malformed_values(max_bytes: int = 1_000_000) -> list[tuple[str, bytes]]:
    """(kind, value) pairs, one of each kind. None is usable under any tokenizer that has a chat template.

    No value contains a newline, so all but `empty` can also be lines of a file. `max_bytes` is `samples.max_bytes`.
    """
    return [
        ("empty", b""),
        ("blank", b"   "),
        ("bad UTF-8", b'{"text": "\xff\xfe"}'),
        ("UTF-8 cut off", b'{"text": "\xe2\x82'),
        ("UTF-16", '{"text": "a"}'.encode("utf-16")),
        ("surrogate in UTF-8", b'{"text": "\xed\xa0\x80"}'),
        ("binary", bytes(byte for byte in range(256) if byte != 0x0A)),
        ("compressed", b"\x1f\x8b\x08\x00\x00\x00\x00\x00"),
        ("not JSON", b"hello"),
        ("JSON cut off", b'{"text": "hel'),
        ("two objects", b'{"text": "a"} {"text": "b"}'),
        ("trailing comma", b'{"text": "a",}'),
        ("single quotes", b"{'text': 'a'}"),
        ("raw control character", b'{"text": "a\x00b"}'),
        ("duplicate key", b'{"text": "a", "text": "b"}'),
        ("duplicate key inside", b'{"text": "a", "meta": {"k": 1, "k": 2}}'),
        ("null", b"null"),
        ("number", b"42"),
        ("string", b'"text"'),
        ("array", b'[{"text": "a"}]'),
        ("no fields", b"{}"),
        ("other fields", b'{"content": "a"}'),
        ("null text", b'{"text": null}'),
        ("prompt alone", b'{"prompt": "a"}'),
        ("response alone", b'{"response": "a"}'),
        ("text and prompt", b'{"text": "a", "prompt": "b", "response": "c"}'),
        ("text and messages", b'{"text": "a", "messages": [{"role": "assistant", "content": "b"}]}'),
        ("empty text", b'{"text": ""}'),
        ("blank text", b'{"text": " \\t\\n"}'),
        ("empty response", b'{"prompt": "a", "response": ""}'),
        ("text is a number", b'{"text": 1}'),
        ("text is a list", b'{"text": ["a"]}'),
        ("response is an object", b'{"prompt": "a", "response": {"b": 1}}'),
        ("NaN", b'{"text": "a", "weight": NaN}'),
        ("NaN in another field", b'{"text": "a", "score": NaN}'),
        ("Infinity", b'{"text": "a", "weight": Infinity}'),
        ("-Infinity", b'{"text": "a", "timestamp": -Infinity}'),
        ("weight overflows", b'{"text": "a", "weight": 1e999}'),
        ("weight is huge", b'{"text": "a", "weight": 1' + b"0" * 400 + b"}"),
        ("integer of 5000 digits", b'{"text": "a", "n": 1' + b"0" * 5000 + b"}"),
        ("weight is zero", b'{"text": "a", "weight": 0}'),
        ("weight is negative", b'{"text": "a", "weight": -1}'),
        ("weight is a string", b'{"text": "a", "weight": "1"}'),
        ("weight is true", b'{"text": "a", "weight": true}'),
        ("id is an object", b'{"text": "a", "id": {}}'),
        ("id is true", b'{"text": "a", "id": true}'),
        ("domain is a number", b'{"text": "a", "domain": 7}'),
        ("timestamp in milliseconds", b'{"text": "a", "timestamp": 1700000000000}'),
        ("timestamp is no date", b'{"text": "a", "timestamp": "yesterday"}'),
        ("timestamp is a list", b'{"text": "a", "timestamp": [2024]}'),
        ("timestamp before the calendar", b'{"text": "a", "timestamp": "0001-01-01T00:00:00+23:59"}'),
        ("lone surrogate", b'{"text": "a\\ud800b"}'),
        ("lone surrogate in the prompt", b'{"prompt": "\\udfff", "response": "b"}'),
        ("lone surrogate in the id", b'{"text": "a", "id": "\\ud83d"}'),
        ("lone surrogate in a message", b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}'),
        ("deeply nested lists", b"[" * 50_000 + b"]" * 50_000),
        ("deeply nested objects", b'{"text":' * 50_000 + b"1" + b"}" * 50_000),
        ("deeply nested, cut off", b"[" * 50_000),
        ("too large", b'{"text": "' + b"a" * max_bytes + b'"}'),
        *_malformed_messages(),
    ]


def malformed(count: int, max_bytes: int = 1_000_000) -> list[tuple[str, bytes]]:
    """`count` of them, every kind in turn."""
    values = malformed_values(max_bytes)
    return [values[number % len(values)] for number in range(count)]


def _malformed_messages() -> list[tuple[str, bytes]]:
    bodies = [
        ("messages is a string", b'"hi"'),
        ("messages is an object", b'{"role": "assistant", "content": "a"}'),
        ("no messages", b"[]"),
        ("a message is a string", b'["hi"]'),
        ("a message without a role", b'[{"content": "a"}]'),
        ("a message without content", b'[{"role": "assistant"}]'),
        ("unknown role", b'[{"role": "<|im_start|>system", "content": "a"}]'),
        ("role is a list", b'[{"role": ["assistant"], "content": "a"}]'),
        ("content in parts", b'[{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]'),
        ("blank content", b'[{"role": "assistant", "content": " "}]'),
        ("no assistant", b'[{"role": "user", "content": "a"}]'),
        ("noncharacter in a message", b'[{"role": "assistant", "content": "\\ufdd0"}]'),
        ("too many messages", b"[" + b",".join([b'{"role": "assistant", "content": "a"}'] * 300) + b"]"),
    ]
    return [(kind, b'{"messages": ' + body + b"}") for kind, body in bodies]
