"""What the scheduler of :mod:`fmkernels.integrations.diffusers` inherits: diffusers' own class where diffusers is
installed, else a small one with the same configuration interface, reading and writing the same files."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

__all__ = ["HOME", "SchedulerBase", "SchedulerOutput", "logger", "register_to_config"]


class Configuration(dict[str, Any]):
    """The arguments of a scheduler: a read-only mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{name}: expected one of {', '.join(self)}") from None

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("config: expected no change in place; use register_to_config")

    __setitem__ = __delitem__ = __setattr__ = __ior__ = pop = popitem = update = setdefault = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return Configuration, (dict(self),)


def record_arguments(init: Any) -> Any:
    """Decorator of ``__init__``: its arguments become the entries of ``self.config``."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        private = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("_")}
        bound = signature.bind(self, *args, **kwargs)
        defaults = [name for name in named(signature) if name not in bound.arguments]
        bound.apply_defaults()
        arguments = {name: bound.arguments[name] for name in named(signature)}
        if defaults:
            arguments["_use_default_values"] = defaults
        self.register_to_config(**private, **arguments)
        init(self, *args, **kwargs)

    return recorded


def named(signature: inspect.Signature) -> list[str]:
    """The parameters that have a name of their own, less self."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, parameter in signature.parameters.items() if parameter.kind not in several][1:]


def plain(entry: Any) -> Any:
    """An entry that JSON does not know, an array or a path, as one that it does."""
    return entry.tolist() if hasattr(entry, "tolist") else str(entry)


class ConfiguredScheduler:
    """The configuration interface of diffusers' schedulers: ``config``, JSON files, :meth:`from_config`.

    Files are those of diffusers, in either direction. Names of a hub need diffusers itself.
    """

    config_name = "scheduler_config.json"
    _internal_dict: Configuration

    @property
    def config(self) -> Configuration:
        return self._internal_dict

    @property
    def compatibles(self) -> list[type]:
        return [type(self)]

    def register_to_config(self, **kwargs: Any) -> None:
        self._internal_dict = Configuration({**getattr(self, "_internal_dict", {}), **kwargs})

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler from a mapping of arguments; ``kwargs`` replace entries, unknown entries stay in ``config``."""
        if config is None:
            raise ValueError("config: expected a mapping of the scheduler's arguments, got None")
        if not isinstance(config, dict):
            raise TypeError(f"config: expected a dict, got {type(config).__name__}; a folder is for from_pretrained")
        defaults = config.get("_use_default_values", [])
        given = {name: v for name, v in config.items() if name not in defaults and name != "_use_default_values"}
        names = named(inspect.signature(cls.__init__))
        arguments = {name: kwargs.pop(name, given.get(name)) for name in names if name in kwargs or name in given}
        scheduler = cls(**arguments)
        hidden = {name: value for name, value in given.items() if name not in arguments}
        if "_class_name" in hidden:
            hidden["_class_name"] = cls.__name__
        scheduler.register_to_config(**hidden)
        return (scheduler, {**kwargs, **hidden}) if return_unused_kwargs else scheduler

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None) -> dict[str, Any]:
        """The entries of the configuration file in a folder."""
        folder = Path(pretrained_model_name_or_path)
        candidates = [folder / subfolder / cls.config_name] if subfolder else []
        for file in [*candidates, folder / cls.config_name, folder]:
            if file.is_file():
                entries: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
                return entries
        raise OSError(
            f"pretrained_model_name_or_path: expected a folder with {cls.config_name}, got {str(folder)!r}; "
            "a hub needs diffusers installed"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        config = cls.load_config(pretrained_model_name_or_path, subfolder)
        return cls.from_config(config, return_unused_kwargs, **kwargs)

    def save_config(self, save_directory: Any, push_to_hub: bool = False) -> None:
        """Write the configuration file into a folder, made where it is missing."""
        if push_to_hub:
            raise ValueError("push_to_hub: expected False, a hub needs diffusers installed")
        folder = Path(save_directory)
        if folder.is_file():
            raise AssertionError(f"save_directory: expected a folder, got the file {str(save_directory)!r}")
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / self.config_name)

    save_pretrained = save_config

    def to_json_string(self) -> str:
        entries = {name: v for name, v in self.config.items() if name not in ("_use_default_values", "_ignore_files")}
        entries["_class_name"] = type(self).__name__
        return json.dumps(entries, indent=2, sort_keys=True, default=plain) + "\n"

    def to_json_file(self, json_file_path: Any) -> None:
        Path(json_file_path).write_text(self.to_json_string(), encoding="utf-8")

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


@dataclass
class FlowMatchEulerDiscreteSchedulerOutput:
    """What ``step`` returns: ``prev_sample``, by attribute, by name or by place."""

    prev_sample: torch.Tensor

    def __getitem__(self, key: Any) -> Any:
        return {"prev_sample": self.prev_sample}[key] if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[torch.Tensor]:
        return (self.prev_sample,)


FOUND = importlib.util.find_spec("diffusers")
if TYPE_CHECKING or FOUND is None or FOUND.origin is None:  # without origin: a folder of that name, no package
    HOME = ""  # the module that the class has in diffusers
    SchedulerBase = ConfiguredScheduler
    SchedulerOutput = FlowMatchEulerDiscreteSchedulerOutput
    register_to_config = record_arguments
    logger = logging.getLogger(__name__)
else:  # an installed diffusers that cannot be imported says why: pipelines would refuse the other class
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler as SchedulerBase,
    )
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteSchedulerOutput as SchedulerOutput,
    )
    from diffusers.utils import logging as diffusers_logging

    HOME = SchedulerBase.__module__
    logger = diffusers_logging.get_logger(HOME)  # so that it follows diffusers' verbosity
