"""What ends a turn: the same for what is learnt, for the tokenizer, and for whoever generates with the model later."""

from typing import Any

from stream_trainer.samples.formatted import end_of_turn
from stream_trainer.samples.tokens.controls import controls_of


def name_end(tokenizer: Any, config: Any) -> None:
    """Let a tokenizer that names no end token have that of the model's configuration, if that is one of its tokens."""
    if tokenizer.eos_token is not None:
        return
    number = next(iter(_numbers(config.get_text_config().eos_token_id)), None)
    token = None if number is None or not 0 <= number < len(tokenizer) else tokenizer.convert_ids_to_tokens(number)
    if token is not None:
        tokenizer.eos_token = token


def end_as_learnt(model: Any, tokenizer: Any) -> None:
    """Have generation stop at whatever is learnt as an end, beside what it stops at already."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    known = _numbers(generation.eos_token_id)
    learnt = [tokenizer.eos_token_id, end_of_turn(tokenizer, controls_of(tokenizer))]
    more = [number for number in dict.fromkeys(learnt) if number is not None and number not in known]
    if more:
        found = [*known, *more]
        generation.eos_token_id = found[0] if len(found) == 1 else found


def _numbers(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
