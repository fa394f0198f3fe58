"""The uniform draw."""

import torch
from gradient_selectors.draw.uniform import draw_uniform


def test_every_candidate_is_drawn_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(8)
    for _ in range(2000):
        drawn = draw_uniform(8, 2, generator)
        assert drawn == sorted(set(drawn))
        assert len(drawn) == 2
        counts[drawn] += 1
    assert ((counts - 500).abs() < 90).all()


def test_all_are_drawn_where_there_are_no_more() -> None:
    assert draw_uniform(3, 5, torch.Generator().manual_seed(0)) == [0, 1, 2]
