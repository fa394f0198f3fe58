"""Which parameters are trained, by where they stand: the module and the name within it, never the object's identity.

Other libraries put other objects where a parameter was (shards, quantised or offloaded copies). Looked up by identity,
such a parameter would lose its factors without a word. Here its place keeps its name, and an object that is not the
one that was read is an error until `refresh` is called.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


class UnsupportedParameterError(ValueError):
    """A trainable parameter whose per-sample gradients cannot be computed exactly. Freeze it, or adapt it with LoRA.

    Examples:
        >>> from gradient_selectors import GradientCapture, UnsupportedParameterError
        >>> from gradient_selectors.examples import tiny_model
        >>> model = tiny_model()
        >>> model.set_input_embeddings(torch.nn.Embedding(32, 16, max_norm=1.0))  # rescales itself as it is used
        >>> try:
        ...     capture = GradientCapture(model)
        ... except UnsupportedParameterError as error:
        ...     print(str(error).partition(":")[0])
        no exact per-sample gradient for trainable parameter model.embed_tokens.weight
    """


class EntangledSamplesError(UnsupportedParameterError):
    """A part of the model computes a sample by chance, or in another way beside others than alone."""


class ReplacedParameterError(RuntimeError):
    """Another object stands where a trained parameter was when it was last looked at."""


class MissingFactorError(RuntimeError):
    """A pass left no factor of a trained parameter that used to have some."""


@dataclass(frozen=True)
class Place:
    """Where a trained parameter stands.

    Attributes:
        module_name: name of the module that owns it.
        local_name: its name within the module.
        name: its name in the whole model; tied parameters have several places and one name.
    """

    module: nn.Module
    module_name: str
    local_name: str
    name: str

    @property
    def parameter(self) -> Any:
        """What stands there now."""
        return self.module._parameters.get(self.local_name)


class Places:
    """The trained parameters of a model: those that require a gradient now.

    Attributes:
        parameters: the objects by name, as they were when last looked at.
        trained: names of the parameters by module and local name.
    """

    def __init__(self, model: nn.Module, root: nn.Module) -> None:
        """`root` is `model` or a module within it: places are named from there, parameters from `model`."""
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        names = {parameter: name for name, parameter in self.parameters.items()}
        self._places = [
            Place(module, module_name, local_name, names[parameter])
            for module_name, module in root.named_modules()
            for local_name, parameter in module._parameters.items()
            if parameter is not None and parameter in names
        ]
        self.trained: dict[str, dict[str, str]] = {}
        for place in self._places:
            self.trained.setdefault(place.module_name, {})[place.local_name] = place.name

    def below(self, module_name: str) -> bool:
        """Whether a module or one within it owns a trained parameter."""
        return any(name == module_name or name.startswith(f"{module_name}.") for name in self.trained)

    def refresh(self) -> None:
        """Look again at what stands at each place.

        Raises ReplacedParameterError where nothing does any more, or a tie has come undone.
        """
        found: dict[str, Any] = {}
        for place in self._places:
            if place.parameter is None:
                raise ReplacedParameterError(f"parameter {place.name} is gone from its module; make a new capture")
            if found.setdefault(place.name, place.parameter) is not place.parameter:
                raise ReplacedParameterError(
                    f"{place.module_name}.{place.local_name} was tied to {place.name} and is not any more; "
                    "make a new capture"
                )
        self.parameters.update(found)

    def check(self) -> None:
        """Raise ReplacedParameterError, naming the first, if what stands at a place is not what was read."""
        for place in self._replaced():
            raise ReplacedParameterError(
                f"parameter {place.name} was replaced in module {place.module_name or 'at the top'} since it was last "
                "looked at; call refresh() once a library has changed the model"
            )

    def _replaced(self) -> Iterator[Place]:
        return (place for place in self._places if place.parameter is not self.parameters[place.name])
