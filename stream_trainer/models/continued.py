"""An adapter that `model.name` comes with, in PEFT's format: training goes on from it, or its difference is named.

The model below it is the one beside it, where there is one, and otherwise the one that its configuration names. So does
transformers. What an adapter may have beyond ours would change what it computes: it is refused by name.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers.utils.peft_utils import find_adapter_config_file

from stream_trainer.errors import SettingsError
from stream_trainer.models.peft_format import CONFIG, WEIGHTS, peft_name
from stream_trainer.models.refusals import loading
from stream_trainer.settings.schema import ModelSettings

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
# What changes an adapter beyond rank, alpha and the modules that it adapts.
BEYOND = (
    *("use_dora", "use_rslora", "use_qalora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern"),
    *("target_parameters", "trainable_token_indices", "layer_replication", "alora_invocation_tokens"),
)
STARTS = (True, False, "gaussian")  # others take something out of the base


@dataclass(frozen=True)
class Continued:
    """An adapter on disk.

    Attributes:
        name: what `model.name` says.
        config: its `adapter_config.json`.
    """

    name: str
    directory: Path
    config: dict[str, Any]

    @property
    def is_beside(self) -> bool:
        """Whether the model below it lies in the same directory."""
        return (self.directory / "config.json").is_file()

    def below(self, settings: ModelSettings) -> ModelSettings:
        """Settings of the model below it. Raises SettingsError if it names none that could be there."""
        if self.is_beside:
            return settings.model_copy(update={"name": str(self.directory)})
        base = self.config.get("base_model_name_or_path")
        if not base or _is_gone(base):
            raise SettingsError(
                f"model.name={self.name} is an adapter of {base or 'a model without a name'}, which is not there; "
                f"correct base_model_name_or_path in its {CONFIG}"
            )
        own = settings.tokenizer is None and (self.directory / "tokenizer_config.json").is_file()
        tokenizer = str(self.directory) if own else settings.tokenizer
        below = settings.model_copy(
            update={"name": base, "revision": self.config.get("revision"), "tokenizer": tokenizer}
        )
        if continued(below) is not None:
            raise SettingsError(
                f"model.name={self.name} is an adapter of {base}, which holds an adapter too; merge that into its model"
            )
        return below

    def check(self, settings: ModelSettings) -> None:
        """Raises SettingsError, naming the first difference, if `settings.lora` would make another adapter."""
        here, config, lora = f"model.name={self.name} holds an adapter ({CONFIG})", self.config, settings.lora
        if config.get("peft_type") != "LORA":
            raise SettingsError(f"{here} of the type {config.get('peft_type')}; merge it, or name the model below it")
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if lora is None:
            as_it_is = f"rank: {rank}, alpha: {alpha}, target_modules: {self._targets}"
            raise SettingsError(
                f"{here}; name the model below it, one that it is merged into, or set model.lora to go on with it "
                f"({as_it_is})"
            )
        for setting, ours, theirs in (("rank", lora.rank, rank), ("alpha", lora.alpha, alpha)):
            if ours != theirs:
                raise SettingsError(f"{here} whose {setting} is {theirs}; model.lora.{setting}={ours}: set it so")
        beyond = [name for name in BEYOND if config.get(name)]
        beyond += [
            name
            for name, usual in (("bias", ("none",)), ("init_lora_weights", STARTS))
            if name in config and config[name] not in usual
        ]
        if beyond:
            raise SettingsError(
                f"{here} with {beyond[0]}={config[beyond[0]]}, which cannot be gone on with; merge it, or name the "
                "model below it"
            )

    @property
    def _targets(self) -> Any:
        found = self.config.get("target_modules")
        return sorted(found) if isinstance(found, list) else found

    def copy_into(self, model: torch.nn.Module, settings: ModelSettings) -> None:
        """Give the live adapters its weights. Raises SettingsError if it adapts other modules, or in another shape."""
        assert settings.lora is not None
        ours = {peft_name(n): parameter for n, parameter in model.named_parameters() if ".lora_" in n}
        with loading(f"model.name={self.name}: {WEIGHTS}", "save the adapter as safetensors"):
            theirs = load_file(self.directory / WEIGHTS)
        said = f"model.lora.target_modules={settings.lora.target_modules} against {self._targets}"
        for name in sorted(ours.keys() ^ theirs.keys()):
            who, other = ("model.lora has", "the adapter") if name in ours else ("the adapter has", "model.lora")
            raise SettingsError(f"model.name={self.name}: {who} {name}, which {other} has not ({said}); set it so")
        with torch.no_grad():
            for name, parameter in ours.items():
                if parameter.shape != theirs[name].shape:
                    shapes = f"{tuple(theirs[name].shape)}, the model has {tuple(parameter.shape)}"
                    raise SettingsError(f"model.name={self.name}: {name} has the shape {shapes}; correct its base")
                parameter.copy_(theirs[name])


def continued(settings: ModelSettings) -> Continued | None:
    """The adapter that `model.name` holds, if it does. Raises SettingsError if it cannot be read."""
    if settings.name is None or _is_gone(settings.name):
        return None
    name, revision = settings.name, settings.revision or "main"
    with loading(f"model.name={name}", "check its files and the network"):
        found = find_adapter_config_file(name, revision=revision)
        if found is None:
            return None
        at_home = Path(name).is_dir()
        directory = name if at_home else snapshot_download(name, revision=revision, allow_patterns=list(FILES))
        return Continued(name, Path(directory), json.loads(Path(found).read_text()))


def _is_gone(name: str) -> bool:
    """Whether a name is meant as a directory that is not there."""
    return name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir()


@contextmanager
def without_adapter(name: str) -> Iterator[str]:
    """A directory of the model alone, for transformers would put an adapter that lies beside it in its place."""
    if not (Path(name) / CONFIG).is_file():
        yield name
        return
    with TemporaryDirectory() as alone:
        for file in Path(name).iterdir():
            if not file.name.startswith("adapter_"):
                (Path(alone) / file.name).symlink_to(file.resolve())
        yield alone
