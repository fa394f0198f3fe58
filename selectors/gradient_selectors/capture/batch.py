"""A pool as tensors, and which of its positions carry loss."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradient_selectors.capture.factors import Segments

IGNORE = -100  # transformers' label of a token without loss
FIELDS = frozenset({"input_ids", "labels", "attention_mask", "weights"})


@dataclass(frozen=True)
class Batch:
    """N samples padded on the right to T tokens.

    Attributes:
        input_ids_NT: token ids, int64.
        labels_NT: the same with -100 where a token carries no loss (prompt, padding). Not shifted.
        lengths: tokens of each sample without padding.
        weights_N: what each sample counts beside the others, above 0, float64; None where all count the same.

    From what a data collator makes:

    Examples:
        >>> from gradient_selectors import Batch
        >>> ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
        >>> batch = Batch.of({"input_ids": ids, "labels": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])})
        >>> batch.lengths, batch.labels_NT.tolist()
        ((3, 2), [[5, 6, 7], [8, 9, -100]])
    """

    input_ids_NT: Tensor
    labels_NT: Tensor
    lengths: tuple[int, ...]
    weights_N: Tensor | None = None

    @classmethod
    def of(cls, values: "Batch | Mapping[str, Any]") -> "Batch":
        """A batch from the dict of a data collator: `input_ids`, `labels`, and `attention_mask` if anything is padded.

        `weights` may say what each sample counts. Labels where the mask is 0 are taken as -100. Raises ValueError for
        padding before a token, missing or unknown names, other shapes, and a `Batch` that `check_lengths` refuses.
        """
        if isinstance(values, Batch):
            check_lengths(values)
            return values
        if unknown := sorted(values.keys() - FIELDS):
            raise ValueError(f"a batch of {', '.join(unknown)} is not understood; it holds {', '.join(sorted(FIELDS))}")
        if missing := [name for name in ("input_ids", "labels") if values.get(name) is None]:
            raise ValueError(f"a batch needs {' and '.join(missing)}; add them in the data collator")
        ids, labels, mask = values["input_ids"], values["labels"], values.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if not ids.shape == labels.shape == mask.shape or ids.ndim != 2:
            shapes = ", ".join(str(tuple(part.shape)) for part in (ids, labels, mask))
            raise ValueError(f"input_ids, labels and attention_mask must be (N, T), not {shapes}")
        inside = mask.bool()
        gaps_NT = inside[:, 1:] & ~inside[:, :-1]
        lengths, gaps = torch.stack([inside.sum(1), gaps_NT.sum(1)]).tolist()  # read back from a device once
        if any(gaps):
            sample, position = gaps_NT.nonzero()[0].tolist()
            raise ValueError(
                f"samples must be padded on the right, but position {position} of sample {sample} is padding before a "
                "token; set tokenizer.padding_side='right'"
            )
        weights = values.get("weights")
        stated = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        return cls(ids, labels.masked_fill(~inside, IGNORE), tuple(lengths), stated)

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> "Batch":
        return replace(self, input_ids_NT=self.input_ids_NT.to(device), labels_NT=self.labels_NT.to(device))

    def among(self, rows: Sequence[int]) -> "Batch":
        """Some of the samples, padded to the longest of them."""
        kept, lengths = list(rows), tuple(self.lengths[row] for row in rows)
        part = slice(0, max(lengths))
        weights_N = None if self.weights_N is None else self.weights_N[kept]
        return Batch(self.input_ids_NT[kept, part], self.labels_NT[kept, part], lengths, weights_N)

    def samples(self) -> Iterator["Batch"]:
        """Each sample as a batch of its own, without padding. Raises ValueError as `check_lengths` does."""
        check_lengths(self)
        for row, length in enumerate(self.lengths):
            part = slice(row, row + 1)
            weight = None if self.weights_N is None else self.weights_N[part]
            yield Batch(self.input_ids_NT[part, :length], self.labels_NT[part, :length], (length,), weight)


def check_lengths(batch: Batch, *, labelled: bool = False) -> None:
    """Refuse what gives another gradient than it seems to: a loss beyond the tokens that are counted.

    `labelled`: every sample needs a label that something predicts, too. Raises ValueError, naming sample, position and
    remedy. Cheap: nothing is looked at where nothing is padded, and one answer is read back from a device.
    """
    num_samples, num_tokens = batch.input_ids_NT.shape
    if len(batch.lengths) != num_samples or max(batch.lengths, default=0) > num_tokens:
        raise ValueError(
            f"lengths={list(batch.lengths)} do not fit input_ids of {num_samples} samples by {num_tokens} tokens; "
            "state for each sample how many of its tokens are no padding"
        )
    is_padded = min(batch.lengths, default=num_tokens) < num_tokens
    if not (is_padded or labelled):
        return
    has_loss_NT = batch.labels_NT != IGNORE
    lengths_N1 = torch.tensor(batch.lengths, device=has_loss_NT.device)[:, None]
    beyond_NT = has_loss_NT & (torch.arange(num_tokens, device=has_loss_NT.device) >= lengths_N1)
    beyond, all_labelled = torch.stack([beyond_NT.any(), has_loss_NT[:, 1:].any(1).all()]).tolist()
    if beyond:
        sample, position = beyond_NT.nonzero()[0].tolist()
        raise ValueError(
            f"sample {sample} has a label at position {position}, beyond its length of {batch.lengths[sample]} tokens; "
            "pad on the right and give padding the label -100"
        )
    if labelled and not all_labelled:
        raise ValueError("every sample needs at least one label after its first token")


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of all samples, in their order, padded to the longest. What padding holds makes no difference."""
    lengths = tuple(length for batch in batches for length in batch.lengths)
    stated = [batch.weights_N for batch in batches]
    weights = [
        torch.ones(len(b), dtype=torch.float64) if w is None else w for b, w in zip(batches, stated, strict=True)
    ]
    return Batch(
        _padded([batch.input_ids_NT for batch in batches], max(lengths), 0),
        _padded([batch.labels_NT for batch in batches], max(lengths), IGNORE),
        lengths,
        None if all(weight is None for weight in stated) else torch.cat(weights),
    )


def micro_batches(samples: Iterable[Batch], size: int) -> Iterator[Batch]:
    """All samples in batches of at most `size`, similar lengths together so that little is padding."""
    by_length = sorted(
        (sample for batch in samples for sample in batch.samples()), key=lambda sample: sample.lengths[0]
    )
    for start in range(0, len(by_length), size):
        yield join(by_length[start : start + size])


def _padded(parts: Sequence[Tensor], length: int, value: int) -> Tensor:
    return torch.cat([F.pad(part[:, :length], (0, max(0, length - part.shape[1])), value=value) for part in parts])


def loss_rows(labels_NT: Tensor) -> tuple[Tensor, Tensor, Segments]:
    """Which positions predict a label, (N, T) bool; the labels they predict; which sample owns them.

    Position t predicts label t + 1; labels of -100 carry no loss.
    """
    predicts_NT = torch.zeros_like(labels_NT, dtype=torch.bool)
    predicts_NT[:, :-1] = labels_NT[:, 1:] != IGNORE
    counts = predicts_NT.sum(1)
    offsets = (0, *counts.cumsum(0).tolist())
    return predicts_NT, labels_NT[:, 1:][predicts_NT[:, :-1]], Segments(offsets)


def mean_losses(logits_NTV: Tensor, labels_NT: Tensor) -> Tensor:
    """Mean cross-entropy of each sample over the positions that carry loss (nats per token), (N,)."""
    predicts_NT, labels_R, segments = loss_rows(labels_NT)
    token_losses_R = F.cross_entropy(logits_NTV[predicts_NT].float(), labels_R, reduction="none")
    counts_N = torch.tensor(segments.offsets).diff().to(token_losses_R)
    return segments.sum(token_losses_R) / counts_N
