"""A sample's loss and gradient in a batch are those of the sample alone, or the family is refused by name."""

import pytest

from tests.families.configurations import BY_TITLE, FAMILIES
from tests.families.measuring import PAGE, YES, page, rows, verdict

QUICK = ("Phi 3 with LongRoPE", "Llama with dynamic scaling", "Mixtral", "gpt-oss", "OPT")


@pytest.mark.parametrize("title", QUICK)
def test_a_sample_in_a_batch_is_as_it_is_alone(title: str) -> None:
    assert verdict(BY_TITLE[title], lora=False) == YES


@pytest.mark.parametrize("title", ["Qwen 2 MoE", "Phi 3.5 MoE"])
def test_adapters_of_a_mixture_of_experts_are_around_the_experts(title: str) -> None:
    assert verdict(BY_TITLE[title], lora=True) == YES


def test_a_family_that_cannot_be_trained_in_full_is_refused_by_the_name_of_a_parameter() -> None:
    assert "model.layers.0.conv.conv.weight: a Conv1d of no known kind" in verdict(BY_TITLE["LFM 2"], lora=False)


def test_the_page_of_models_has_every_family() -> None:
    lines = PAGE.read_text().splitlines()
    for family in FAMILIES:
        assert any(line.startswith(f"| {family.title} | `{family.config['model_type']}` | ") for line in lines)
    assert len([line for line in lines if line.startswith("| ")]) == len(FAMILIES) + 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft, about tied weights and Mamba
def test_the_page_of_models_is_what_is_measured() -> None:
    assert PAGE.read_text() == page(rows())
