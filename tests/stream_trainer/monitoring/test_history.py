"""History is bounded, whole, and says only what is new."""

from stream_trainer.monitoring.history import MAX_EVENTS, MAX_ROWS, History


def test_a_client_gets_what_came_after_its_last_answer() -> None:
    history = History()
    history.row(step=1)
    first = history.since(0)
    assert [row["step"] for row in first["rows"]] == [1]
    history.row(step=2)
    history.event(2, "rollback", "it died")
    history.evaluation(2, {"target": 3.0})
    second = history.since(first["number"])
    assert [row["step"] for row in second["rows"]] == [2]
    assert [event["kind"] for event in second["events"]] == ["rollback"]
    assert second["evaluations"][0]["losses"] == {"target": 3.0}
    last = history.since(second["number"])
    assert (last["rows"], last["events"], last["evaluations"]) == ([], [], [])
    assert last["run"] == first["run"]


def test_rows_are_bounded_and_reach_back_to_the_start() -> None:
    history = History()
    for step in range(20 * MAX_ROWS):
        history.row(step=step)
        history.event(step, "checkpoint", "")
    found = history.since(0)
    steps = [row["step"] for row in found["rows"]]
    assert len(steps) <= MAX_ROWS
    assert steps[0] == 0
    assert steps == sorted(steps)
    assert steps[-100:] == list(range(20 * MAX_ROWS - 100, 20 * MAX_ROWS)), "what is new is there in full"
    assert len(found["events"]) == MAX_EVENTS


def test_a_set_starts_with_its_first_loss_and_again_when_it_is_another_one() -> None:
    history = History()
    history.evaluation(0, {"target": 5.0, "retention": 2.0})
    history.evaluation(9, {"target": 4.0, "retention": 2.5})
    assert history.since(0)["start"] == {"target": 5.0, "retention": 2.0}
    history.restart("target")
    history.evaluation(9, {"target": 7.0, "retention": 2.5})
    assert history.since(0)["start"] == {"target": 7.0, "retention": 2.0}


def test_the_change_of_a_value_needs_two_rows_that_have_it() -> None:
    history = History()
    history.row(lag=10.0)
    history.row(lag=None)
    assert history.change("lag", 60) is None
    history.row(lag=4.0)
    change = history.change("lag", 60)
    assert change is not None
    assert change[0] == -6
    assert history.change("lag", -1) is None
