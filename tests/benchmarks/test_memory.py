"""The benchmark of memory: that it measures every method and says all of it, never how much."""

import json
from pathlib import Path

import pytest

from benchmarks import memory


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command_writes_every_method(ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "memory.json"
    assert memory.main(["--tiny", "--ranks", str(ranks), "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert set(written) == {"version", "date", "machine", "versions", "summary"}
    (row,) = written["summary"]
    for method in memory.METHODS:
        assert row[method]["bytes"] > 0
        assert row[method]["seconds"] > 0
        assert method == "plain" or row[f"{method}_over_plain"] == row[method]["bytes"] / row["plain"]["bytes"]
    assert (row["ranks"], row["chosen"]) == (ranks, ranks)
    assert row["pieces"]["pieces"] == 2 * ranks
    assert row["pieces"]["second_pass_samples"] == row["pieces"]["selected"] == row["chosen"]
    assert row["whole"]["second_pass_samples"] == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(memory.METHODS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--json"),
        (["--json", "no-such-directory/x.json"], "cannot be written"),
        (["--json", "x.json", "--ranks", "5"], "set it to 4"),
    ],
)
def test_a_bad_option_ends_in_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        memory.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert says in said
