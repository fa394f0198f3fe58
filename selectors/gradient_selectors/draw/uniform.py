"""A uniform draw: what every other way to draw has to beat."""

import torch


def draw_uniform(num_candidates: int, num_drawn: int, generator: torch.Generator) -> list[int]:
    """Indices drawn without replacement, in ascending order."""
    drawn = torch.randperm(num_candidates, generator=generator)[:num_drawn]
    return sorted(drawn.tolist())
