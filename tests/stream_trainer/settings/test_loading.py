"""Three layers in order, and every mistake as one line that names the setting, its value and the remedy."""

import re
from pathlib import Path

import pytest
import yaml

from stream_trainer.errors import SettingsError
from stream_trainer.settings.help import describe_settings, schema, show
from stream_trainer.settings.loading import CONFIG_VARIABLE, load_settings
from stream_trainer.settings.mistakes import fields, shown
from stream_trainer.settings.schema import Settings
from stream_trainer.settings.secrets import MASK

ENOUGH = ["--source.kafka.topic=samples", "--model.name=model", "--target.path=target.jsonl"]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def mistakes(path: Path | None, *overrides: str) -> list[str]:
    with pytest.raises(SettingsError) as raised:
        load_settings(path, overrides)
    return str(raised.value).splitlines()


def test_the_command_line_wins_over_the_environment_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "s.yaml", "buffer: {max_records: 400, max_bytes: 100, max_tokens: 100}")
    monkeypatch.setenv("STREAM_TRAINER_BUFFER__MAX_BYTES", "200")
    monkeypatch.setenv("STREAM_TRAINER_BUFFER__MAX_TOKENS", "200")
    settings = load_settings(file, [*ENOUGH, "--buffer.max_tokens=300"])
    assert (settings.buffer.max_records, settings.buffer.max_bytes, settings.buffer.max_tokens) == (400, 200, 300)


def test_a_variable_may_name_the_file_and_the_argument_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, str(write(tmp_path / "a.yaml", "training: {seed: 1}")))
    assert load_settings(None, ENOUGH).training.seed == 1
    assert load_settings(write(tmp_path / "b.yaml", "training: {seed: 2}"), ENOUGH).training.seed == 2


@pytest.mark.parametrize("separate", [True, False])
def test_structured_values_are_yaml(separate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAM_TRAINER_OPTIMIZER__CLIP_NORM", "null")
    monkeypatch.setenv("STREAM_TRAINER_MODEL__LORA", "{rank: 4}")
    options = ["--optimizer.betas=[0.8, 0.9]", "--model.lora.target_modules=[q, v]", "--source.kafka.topic=123"]
    options = [part for option in options for part in option.split("=")] if separate else options
    settings = load_settings(None, [*ENOUGH, *options])
    assert settings.optimizer.betas == (0.8, 0.9)
    assert settings.optimizer.clip_norm is None
    assert settings.model.lora is not None
    assert (settings.model.lora.rank, settings.model.lora.target_modules) == (4, ("q", "v"))
    assert settings.source.kafka.topic == "123"  # text where text is asked for


def test_a_model_configuration_keeps_its_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAM_TRAINER_MODEL__CONFIG", '{"model_type": "llama"}')
    monkeypatch.setenv("STREAM_TRAINER_MODEL__CONFIG__VOCAB_SIZE", "259")
    options = ["--model.config.hidden_size=64", "--model.config.rms_norm_eps=1e-6", "--model.tokenizer=bytes"]
    config = load_settings(None, ["--source.kafka.topic=t", "--target.path=t", *options]).model.config
    assert config == {"model_type": "llama", "vocab_size": 259, "hidden_size": 64, "rms_norm_eps": 1e-6}


def test_options_of_a_selector_keep_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAM_TRAINER_SELECTION__WEIGH_OPTIONS__SHARE", "0.5")
    options = ["--selection.weigh=halves:Halves", "--selection.weigh_options.names=[a, b]"]
    assert load_settings(None, [*ENOUGH, *options]).selection.weigh_options == {"share": 0.5, "names": ["a", "b"]}


def test_a_negative_number_and_a_dash_are_values() -> None:
    settings = load_settings(
        None, [*ENOUGH, "--training.seed", "-1", "--source.kind", "jsonl", "--source.jsonl.path", "-"]
    )
    assert (settings.training.seed, settings.source.jsonl.path) == (-1, "-")


def test_numbers_with_an_exponent_and_empty_headings_in_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", "optimizer:\n  learning_rate: 1e-4\nbuffer:\nmodel:\n  lora:\n")
    settings = load_settings(file, ENOUGH)
    assert settings.optimizer.learning_rate == 1e-4
    assert settings.model.lora is None


def test_settings_made_in_code_do_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(None, ENOUGH)
    monkeypatch.setenv("STREAM_TRAINER_TRAINING__SEED", "7")
    assert Settings(source=settings.source, model=settings.model, target=settings.target).training.seed == 0


def test_all_mistakes_are_told_at_once_with_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "s.yaml", "checkpoint: {keep: 1}\nsampels: {max_tokens: 9}")
    monkeypatch.setenv("STREAM_TRAINER_LOG__LEVEL", "debug")
    assert mistakes(file, *ENOUGH, "--server.port=99999", "--training.max_steps=ten") == [
        f"unknown setting sampels ({file}); did you mean samples?",
        "training.max_steps=ten (command line) is no whole number; give one",
        f"checkpoint.keep=1 ({file}) must be at least 2; raise it",
        "server.port=99999 (command line) must be at most 65535; lower it",
        "log.level=debug (environment) must be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'; did you mean DEBUG?",
    ]


def test_each_validator_has_its_line() -> None:
    assert mistakes(None) == [
        "source.kind=kafka needs source.kafka.topic; name the topic to train on",
        "model: exactly one of name and config must be set, neither is; set name to a model directory",
        "target.path needs a value; set it in the file, or as --target.path=VALUE",
    ]


def test_what_kubernetes_says_of_a_service_of_our_name_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_9464_TCP_ADDR"):
        monkeypatch.setenv(f"STREAM_TRAINER_{name}", "10.0.0.1")
    monkeypatch.setenv("STREAM_TRAINER_PORT", "tcp://10.0.0.1:9464")
    assert load_settings(None, ENOUGH).server.port == 9464
    monkeypatch.setenv("STREAM_TRAINER_PORT", "9000")
    assert mistakes(None, *ENOUGH) == ["unknown setting port (environment); did you mean server.port?"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("sorce.kind", "source.kind"),
        ("source.kafka.topc", "source.kafka.topic"),
        ("source.kafka.group-id", "source.kafka.group_id"),
        ("model.lora.rnak", "model.lora.rank"),
        ("learning_rate", "optimizer.learning_rate"),
        ("kafka.topic", "source.kafka.topic"),
        ("bufer.max_record", "buffer.max_records"),
    ],
)
@pytest.mark.parametrize("layer", ["file", "environment", "command line"])
def test_the_nearest_right_name_is_offered(
    name: str, meant: str, layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, file = list(ENOUGH), None
    if layer == "command line":
        overrides.append(f"--{name}=1")
    elif layer == "environment":
        monkeypatch.setenv("STREAM_TRAINER_" + name.upper().replace(".", "__"), "1")
    else:
        nested: object = 1
        for part in reversed(name.split(".")):
            nested = {part: nested}
        file = write(tmp_path / "s.yaml", yaml.safe_dump(nested))
    (line,) = mistakes(file, *overrides)
    assert line.startswith("unknown setting ")
    suggestion = line.partition("did you mean ")[2].rstrip("?")
    assert suggestion
    # A file nests, so there the line stops at the first unknown name.
    assert meant.startswith(suggestion) if layer == "file" else suggestion == meant


def test_a_name_like_no_other_gets_the_list() -> None:
    (line,) = mistakes(None, *ENOUGH, "--source.zzz=1")
    assert line == "unknown setting source.zzz (command line); source has kind, kafka, jsonl"


@pytest.mark.parametrize(
    "option",
    [
        "--source.kafka.sasl_pasword=hunter2",
        "--source.kafka.sasl_mechanism=user:hunter2@host",
        "--server.port=admin:hunter2@host",
        "--source.kafka={sasl_password: hunter2, start: never}",
        "--source.jsonl=[{password: hunter2}]",
    ],
)
def test_passwords_are_never_quoted(option: str) -> None:
    lines = mistakes(None, *ENOUGH, option)
    assert "hunter2" not in "".join(lines)


@pytest.mark.parametrize("password", ["*hunter2", "!hunter2", "!!hunter2", "hunter2: x: y"])
def test_a_password_that_is_no_yaml_is_not_quoted(password: str, tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", f"source:\n  kafka:\n    sasl_password: {password}\n")
    (line,) = mistakes(file, *ENOUGH)
    assert line.startswith(f"settings file {file}, line 3: ")
    assert "hunter2" not in line


def test_a_password_that_is_no_text_is_masked(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", "source: {kafka: {sasl_password: 31337}}")
    (line,) = mistakes(file, *ENOUGH)
    assert line == f"source.kafka.sasl_password={MASK} ({file}) is no text; put it in quotes"


def test_quoted_values_stay_on_one_short_line() -> None:
    assert shown("log.level", "a\nb") == "'a\\nb'"
    assert len(shown("log.level", "x" * 1000)) == 80
    assert shown("model.config", {"a": 1}) == "a dict"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- 1\n", "is no mapping at its top level"),
        ("log:\n  level: INFO\n level: INFO\n", ", line 3: "),
        ("log:\n  level: INFO\n  level: DEBUG\n", ", line 3: level is set twice"),
        ("log: {}\nserver: {}\nlog: {}\n", ", line 3: log is set twice"),
        ("a: 1\n---\nb: 2\n", ", line 2: "),
        ("a: 2024-13-45\n", "is not valid YAML"),
        ("? [a, b]\n: c\n", ", line 1: "),
        ("a: !!python/object:os.system x\n", ", line 1: "),
    ],
)
def test_a_file_that_is_no_settings_file(text: str, problem: str, tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", text)
    (line,) = mistakes(file, *ENOUGH)
    assert line.startswith(f"settings file {file}")
    assert problem in line


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (missing,) = mistakes(Path("none.yaml"), *ENOUGH)
    assert "none.yaml cannot be read (No such file or directory)" in missing
    (directory,) = mistakes(tmp_path, *ENOUGH)
    assert "(Is a directory)" in directory
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa\x00\x81")
    (binary,) = mistakes(tmp_path / "binary.yaml", *ENOUGH)
    assert "is not valid YAML" in binary


def test_what_show_prints_loads_again(tmp_path: Path) -> None:
    settings = load_settings(None, [*ENOUGH, "--model.lora.target_modules=[q, v]", "--optimizer.betas=[0.8, 0.9]"])
    assert load_settings(write(tmp_path / "s.yaml", show(settings)), []) == settings


def test_secrets_are_masked_when_shown_and_the_mask_is_no_password(tmp_path: Path) -> None:
    sasl = ["security_protocol=SASL_SSL", "sasl_mechanism=PLAIN", "sasl_username=u", "sasl_password=hunter2"]
    text = show(load_settings(None, [*ENOUGH, *(f"--source.kafka.{option}" for option in sasl)]))
    assert "hunter2" not in text
    assert MASK in text
    (line,) = mistakes(write(tmp_path / "s.yaml", text))
    assert "source.kafka.sasl_password" in line
    assert "masked" in line


def test_the_description_has_every_setting_with_default_and_meaning() -> None:
    text = describe_settings()
    for name, field in fields():
        assert f"--{name}=" in text or f"{name}: " in text
        assert field.description is None or field.description.split()[0].strip("`,") in text
    assert "--buffer.max_records=INTEGER  (default 512; >= 1)" in text
    assert "--target.path=PATH  (required)" in text
    assert "--optimizer.clip_norm=NUMBER  (default 1.0; > 0)" in text
    assert "--selection.pool_size=INTEGER  (default 6; >= 1)" in text


def test_the_schema_refuses_unknown_names() -> None:
    assert schema()["additionalProperties"] is False
    assert "source" in schema()["required"]


def test_the_example_loads() -> None:
    example = Path(__file__).parents[3] / "examples" / "stream-trainer.yaml"
    settings = load_settings(example, [])
    assert settings.source.kafka.topic == "samples"
    assert settings.optimizer.learning_rate == 2e-5


@pytest.mark.parametrize("name", ["\\n", "a\\nb", "\\x1f", "\\e[31m"])
def test_an_unknown_name_stays_on_its_line_whatever_it_holds(name: str, tmp_path: Path) -> None:
    """In a terminal it would also change what is shown."""
    (line,) = mistakes(write(tmp_path / "s.yaml", f'"{name}": 1'), *ENOUGH)
    assert line.startswith("unknown setting ")
    assert line.isprintable()


def test_two_directories_have_two_groups_unless_one_is_named(tmp_path: Path) -> None:
    """One group for both would have each end the other, begin where the other stands, and tell a lag of neither."""

    def group(name: str, *others: str) -> str | None:
        given = ("--source.kafka.topic=t", "--model.name=m", "--target.path=t.jsonl", *others)
        return load_settings(None, [*given, f"--checkpoint.dir={tmp_path / name}"]).source.kafka.group_id

    first, second = group("a"), group("b")
    assert first != second
    assert first == group("a")
    assert first is not None
    assert re.fullmatch(r"stream-trainer-[0-9a-f]{8}", first)
    assert group("a", "--source.kafka.group_id=mine") == group("b", "--source.kafka.group_id=mine") == "mine"
    assert group("a", "--source.kafka.group_id=null") is None
