"""Write a model's weights and read them back: a plain transformers checkpoint, and the adapters beside it.

A saved model is whole: adapters are merged into a copy of the weights and the user's own configuration comes along, so
servers load it without this package. Reading it back for a resume is bit for bit.

Where the base is held in fewer bits, the adapters alone are saved, in PEFT's own format. Merged into such a base, most
of what they learned would be rounded away.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from gradient_selectors.capture.shards import own_part, own_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stream_trainer.errors import CheckpointError
from stream_trainer.models.adapters import ADAPTER
from stream_trainer.models.loading import LoadedModel
from stream_trainer.models.peft_format import config_text, write_adapter

BASE = "base.safetensors"
SAMPLED = 16  # leading numbers of each frozen parameter, by which a base is known again
REMEDY = "restore the model settings it was made with, or set another checkpoint.dir"


def save_model(loaded: LoadedModel, directory: Path) -> None:
    """Write a checkpoint that `AutoModelForCausalLM` and `AutoTokenizer` load, adapters merged in.

    With `adapters_only` it is one that `PeftModel` loads onto the base. The live model is not touched. Raises OSError
    or SafetensorError if `directory` cannot be written.
    """
    model: Any = loaded.model
    if loaded.adapters_only:
        _save_as_peft(model, directory)
        save_file(_sampled(model), directory / BASE)
    else:
        model.save_pretrained(directory, state_dict=dict(_plain_weights(loaded)))
        loaded.config.save_pretrained(directory)  # over the one just written, whose dropouts are zero
    loaded.tokenizer.save_pretrained(directory)


def load_weights(loaded: LoadedModel, directory: Path) -> None:
    """Copy the weights that `save_model` wrote to `directory` into the live model without adapters, bit for bit.

    Raises CheckpointError, naming the first weight that is missing or has another shape.
    """
    saved = _read_saved(loaded, directory)
    with torch.no_grad():
        for name, tensor in loaded.model.state_dict().items():
            own_rows(tensor).copy_(own_rows(own_part(tensor, saved[name])))


def save_adapter(loaded: LoadedModel, path: Path) -> None:
    """Write the adapters' weights by parameter name. Raises OSError or SafetensorError."""
    save_file(_written(_adapters(loaded.model)), path)


def save_for_peft(loaded: LoadedModel, directory: Path) -> None:
    """Write the adapters to a new directory as `PeftModel` and servers load them onto the base model.

    Nothing where the model is saved so anyway. Raises OSError.
    """
    if not loaded.adapters_only:
        _save_as_peft(loaded.model, directory)


def load_adapter(loaded: LoadedModel, path: Path) -> None:
    """Copy the adapters' weights that `save_adapter` wrote to `path` into the live model, bit for bit.

    Raises CheckpointError, naming the first weight that is missing or has another shape.
    """
    weights = _adapters(loaded.model)
    with safe_open(path, framework="pt") as file, torch.no_grad():
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        check_shapes("adapter weight", {name: tuple(weight.shape) for name, weight in weights.items()}, shapes, path)
        for name, weight in weights.items():
            own_rows(weight).copy_(own_rows(own_part(weight, file.get_tensor(name))))


def check_base(loaded: LoadedModel, directory: Path) -> None:
    """Check that the live base model is the one below the adapters that `save_model` wrote to `directory`.

    The adapters alone do not tell which model they belong to. Raises CheckpointError if it was another one.
    """
    if (directory / BASE).exists() != loaded.adapters_only:
        raise CheckpointError(
            f"checkpoint {directory} was made with another model.lora.base; restore it, or set another checkpoint.dir"
        )
    if loaded.adapters_only:
        saved = load_file(directory / BASE)
        differing = (n for n, ours in _sampled(loaded.model).items() if n not in saved or not ours.equal(saved[n]))
    else:
        saved = _read_saved(loaded, directory)
        # The merge is a matrix product, whose rounding may differ between machines.
        ours_and_theirs = ((name, tensor.cpu(), saved[name]) for name, tensor in _plain_weights(loaded))
        differing = (n for n, ours, theirs in ours_and_theirs if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5))
    for name in differing:
        raise CheckpointError(
            f"checkpoint {directory} was trained from another base model ({name} differs); restore model.name, "
            f"model.revision, model.config, model.lora.base and training.seed, or set another checkpoint.dir"
        )


def check_shapes(
    noun: str, ours: Mapping[str, tuple[int, ...]], saved: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """Check that a checkpoint holds exactly what the live model has; CheckpointError names the first difference."""
    for name, shape in ours.items():
        if name not in saved:
            raise CheckpointError(f"checkpoint {path} lacks the {noun} {name}; {REMEDY}")
        if saved[name] != shape:
            raise CheckpointError(
                f"checkpoint {path} holds the {noun} {name} with shape {saved[name]}, the model has {shape}; {REMEDY}"
            )
    for name in saved:
        if name not in ours:
            raise CheckpointError(f"checkpoint {path} holds the {noun} {name}, which the model lacks; {REMEDY}")


def _adapters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The live weights of the adapters, with those that `model.freeze` leaves as they are."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if ".lora_" in name}


def _written(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.contiguous() for name, weight in weights.items()}


def _save_as_peft(model: Any, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.cpu().numpy() for name, weight in _written(_adapters(model)).items()}
    write_adapter(directory, config_text(model), weights)
    model.generation_config.save_pretrained(directory)  # where a turn ends


def _sampled(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The first numbers of every frozen parameter, as they are held."""
    frozen = ((name, p) for name, p in model.named_parameters() if not p.requires_grad and ".lora_" not in name)
    return {name: parameter.data.flatten()[:SAMPLED].cpu().clone() for name, parameter in frozen}


def _plain_weights(loaded: LoadedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights under the names of the plain model, adapters merged into a copy.

    peft's own merge adds to the live weights and subtracts again, which leaves rounding errors in them.
    """
    model = loaded.model
    if not loaded.lora:
        yield from model.state_dict().items()
        return
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        adapted, _, leaf = name.rpartition(".base_layer.")
        if leaf == "weight" and adapted:
            layer: Any = model.get_submodule(adapted)
            with torch.no_grad():
                tensor = tensor + layer.get_delta_weight(ADAPTER)
        yield f"{adapted}.{leaf}" if adapted else name, tensor


def _read_saved(loaded: LoadedModel, directory: Path) -> dict[str, torch.Tensor]:
    """Weights that `save_model` wrote, under the names of the plain model, on the CPU.

    transformers reads them: it knows which of them it renamed, split into shards or left out as tied.
    """
    plain = loaded.model if loaded.twin is None else loaded.twin  # the class of one that is cut is FSDP2's
    saved, report = type(plain).from_pretrained(  # type: ignore[attr-defined]
        directory,
        config=copy.deepcopy(loaded.config),
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        local_files_only=True,
    )
    for name, theirs, ours in sorted(report["mismatched_keys"]):
        raise CheckpointError(
            f"checkpoint {directory} holds {name} with shape {tuple(theirs)}, the model has {tuple(ours)}; {REMEDY}"
        )
    for problem, said in (("missing_keys", "lacks"), ("unexpected_keys", "holds what the model lacks:")):
        for name in sorted(report[problem]):
            raise CheckpointError(f"checkpoint {directory} {said} {name}; {REMEDY}")
    weights: dict[str, torch.Tensor] = saved.state_dict()
    return weights
