"""The offline command from a saved model and files to a mask and a subset, and its mistakes."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stream_trainer.cli import _Parser
from stream_trainer.commands.select_dual_sft import add_arguments, run
from stream_trainer.errors import SettingsError
from stream_trainer.ingest.letter import read_dead_letters
from stream_trainer.models.loading import load_model
from stream_trainer.models.saving import save_model
from stream_trainer.samples.collate import collate
from stream_trainer.samples.decoder import Decoder, read_samples
from stream_trainer.settings.schema import ModelSettings, SampleSettings
from tests.helpers.oracle import dense, relative_error
from tests.helpers.tiny_models import settings_of, shake

MALFORMED = [b"not json", b'{"text": ""}', b'{"prompt": "alone"}', b'{"text": "a", "text": "b"}']
SAMPLES = 24
MAX_TOKENS = 24


def line(number: int) -> bytes:
    """Texts of different lengths, some with an id, some with fields of their own."""
    text = f"{number} " * (1 + number % 5) + "abcdefghij"[number % 10 :]
    fields = {"text": text, "note": "é"} if number % 3 else {"text": text, "id": f"sample-{number}"}
    return json.dumps(fields, ensure_ascii=False).encode()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    loaded = load_model(settings_of("llama"), seed=3)
    shake(loaded.model)
    save_model(loaded, tmp_path / "model")
    lines = [line(number) for number in range(SAMPLES)]
    (tmp_path / "pool.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "target.jsonl").write_bytes(b'{"text": "alpha beta"}\n{"text": "gamma"}\n')
    return tmp_path


def select(directory: Path, *options: str, out: str = "out") -> Path:
    parser = _Parser("stream-trainer select dual-sft")
    add_arguments(parser)
    paths = {"model": "model", "pool": "pool.jsonl", "target": "target.jsonl", "out": out}
    named = [f"--{name}={directory / path}" for name, path in paths.items()]
    assert run(parser.parse_args([*named, f"--max-tokens={MAX_TOKENS}", *options])) == 0
    return directory / out


def scores_in(out: Path) -> list[dict[str, object]]:
    return [json.loads(text) for text in (out / "scores.jsonl").read_text().splitlines()]


def test_first_order_scores_are_those_of_autograd(directory: Path) -> None:
    """Without a warm-up u is the target gradient alone."""
    out = select(directory, "--warm-up=0", "--params=20%")
    loaded = load_model(ModelSettings(name=str(directory / "model")), seed=0)
    decoder = Decoder(loaded.tokenizer, SampleSettings(max_tokens=MAX_TOKENS))
    pool, target = (read_samples(directory / f"{name}.jsonl", decoder, 99, name) for name in ("pool", "target"))
    oracle = dense(loaded.model, collate(pool, 0))
    u = dense(loaded.model, collate(target, 0)).gradients.mean(0)
    scores = {int(str(entry["line"])): entry["score"] for entry in scores_in(out)}
    got = torch.tensor([scores[number + 1] for number in range(SAMPLES)])
    assert relative_error(got, oracle.gradients @ u) < 1e-4
    mask = load_file(out / "mask.safetensors")
    kept = torch.cat([mask[name].flatten() for name in oracle.parameters])
    # Quotas take 40 % of the budget; the rest is simply the best.
    best = (u * oracle.gradients.mean(0)).topk(int(0.59 * round(0.2 * len(u)))).indices
    assert kept[best].all()


def test_t29_mask_and_subset_have_their_exact_sizes(directory: Path) -> None:
    out = select(directory, "--params=7%", "--data=25%")
    mask = load_file(out / "mask.safetensors")
    parameters = dict(load_model(ModelSettings(name=str(directory / "model")), seed=0).model.named_parameters())
    assert {name: values.shape for name, values in mask.items()} == {name: p.shape for name, p in parameters.items()}
    assert all(values.dtype == torch.bool for values in mask.values())
    total = sum(p.numel() for p in parameters.values())
    assert sum(int(values.sum()) for values in mask.values()) == round(0.07 * total)
    assert len((out / "subset.jsonl").read_bytes().splitlines()) == SAMPLES // 4


def test_the_subset_is_the_pools_own_lines_best_first(directory: Path) -> None:
    out = select(directory, "--data=0.5")
    entries = scores_in(out)
    values = [float(str(entry["score"])) for entry in entries]
    assert values == sorted(values, reverse=True)
    assert [entry["rank"] for entry in entries] == list(range(1, SAMPLES + 1))
    assert sorted(int(str(entry["line"])) for entry in entries) == list(range(1, SAMPLES + 1))
    for entry in entries:
        number = int(str(entry["line"])) - 1
        assert entry["id"] == (None if number % 3 else f"sample-{number}")
    chosen = [int(str(entry["line"])) - 1 for entry in entries[: SAMPLES // 2]]
    assert (out / "subset.jsonl").read_bytes() == b"".join(line(number) + b"\n" for number in chosen)


def test_a_run_is_repeated_bit_for_bit_and_replaces_what_was_there(directory: Path) -> None:
    first = select(directory, "--learning-rate=0.01")
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    assert before.keys() == {"mask.safetensors", "subset.jsonl", "scores.jsonl", "rejected.jsonl"}
    kept = [path for path in first.iterdir() if path.name != "rejected.jsonl"]  # that is for its owner alone
    assert len({path.stat().st_mode for path in kept}) == 1
    again = select(directory, "--learning-rate=0.01")
    assert {path.name: path.read_bytes() for path in again.iterdir()} == before
    other = select(directory, "--learning-rate=0.01", "--seed=1", out="other")
    assert (other / "scores.jsonl").read_bytes() != before["scores.jsonl"]


def test_the_prior_changes_the_scores(directory: Path) -> None:
    """After a warm-up only: the model has nothing to lose before it."""
    options = ("--learning-rate=0.05", "--warm-up=100%")
    without, guarded = (select(directory, *options, f"--lambda-prior={w}", out=f"out{w}") for w in ("0", "5"))
    assert (without / "scores.jsonl").read_bytes() != (guarded / "scores.jsonl").read_bytes()
    cold, cold_guarded = (select(directory, "--warm-up=0", f"--lambda-prior={w}", out=f"cold{w}") for w in ("0", "5"))
    assert (cold / "scores.jsonl").read_bytes() == (cold_guarded / "scores.jsonl").read_bytes()


def test_rows_are_kept_whole(directory: Path) -> None:
    mask = load_file(select(directory, "--granularity=row", "--params=20%") / "mask.safetensors")
    rows = [values.reshape(len(values), -1) for values in mask.values()]
    assert all(torch.equal(values.all(1), values.any(1)) for values in rows)
    assert any(values.any() for values in rows)


def test_lines_that_are_no_samples_are_counted_and_kept(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = select(directory, "--warm-up=0")
    pool = directory / "pool.jsonl"
    lines = pool.read_bytes().splitlines()
    pool.write_bytes(b"\n".join([MALFORMED[0], *lines[:10], b"", *MALFORMED[1:], *lines[10:]]) + b"\n")
    capsys.readouterr()
    out = select(directory, "--warm-up=0", out="other")
    said = capsys.readouterr()
    assert "rejected 4 lines (" in said.err
    assert "bad_json" in said.err
    assert [letter.record.value for letter in read_dead_letters(out / "rejected.jsonl")] == [
        value + b"\n" for value in MALFORMED
    ]
    assert (out / "subset.jsonl").read_bytes() == (good / "subset.jsonl").read_bytes()


def test_a_sample_without_a_finite_loss_neither_counts_nor_spoils_the_rest(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(ModelSettings(name=str(directory / "model")), seed=0)
    with torch.no_grad():
        loaded.model.get_parameter("model.embed_tokens.weight")[ord("~")] = torch.nan
    save_model(loaded, directory / "model")
    with (directory / "pool.jsonl").open("ab") as file:
        file.write(b'\n{"text": "a ~ b"}\n')
    out = select(directory, "--data=100%", "--warm-up=100%")
    entries = scores_in(out)
    assert entries[-1] == {"line": SAMPLES + 1, "id": None, "score": None, "rank": None}
    assert all(isinstance(entry["score"], float) for entry in entries[:-1])
    assert len((out / "subset.jsonl").read_bytes().splitlines()) == SAMPLES
    assert "without a score: 1 samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--data=0%", "--data.*0% is none"),
        ("--data=150%", "--data.*150% is no share"),
        ("--params=lots", "--params.*lots is no share"),
        ("--warm-up=-1%", "--warm-up.*-1% is no share"),
        ("--learning-rate=nan", "--learning-rate.*nan is no number"),
        ("--lambda-prior=-1", "--lambda-prior.*-1 is no number"),
        ("--max-tokens=1", "--max-tokens.*1 is no whole number"),
        ("--granularity=column", "--granularity.*column"),
        ("--pool=/no/such/file", "--pool=/no/such/file cannot be read"),
        ("--target=/no/such/file", "--target=/no/such/file cannot be read"),
        ("--model=/no/such/model", "/no/such/model is not a directory"),
        ("--gguf-file=none.gguf", "none.gguf"),
        ("--out=/dev/null/x", "--out=/dev/null/x cannot be written"),
    ],
)
def test_mistakes_are_told_in_one_line(directory: Path, option: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        select(directory, option)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_pool_without_samples_is_refused(directory: Path) -> None:
    (directory / "pool.jsonl").write_bytes(b"\n".join(MALFORMED))
    with pytest.raises(SettingsError, match=r"holds no samples \(4 lines rejected\)"):
        select(directory)


def test_the_help_can_be_shown() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert "--lambda-prior" in parser.format_help()
