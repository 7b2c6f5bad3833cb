r"""diffusers' names: import from here what a program imports from ``diffusers`` and ``diffusers.training_utils``.

:class:`FlowMatchEulerDiscreteScheduler` takes every step of a sampler without asking the device for a number;
:func:`noise_for_training` and :func:`flow_matching_loss` are what diffusers' flow-matching training scripts write
between the autoencoder and the optimiser, in one pass over the latents each.

The scheduler is derived from diffusers' own class where diffusers is installed, because pipelines check for that class
and loading and saving are its own; every method that computes is ours, so nothing of the original runs but its
configuration. A pipeline saves it as diffusers' and so loads diffusers' again, to be replaced as any scheduler is, by
``pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)``. Without diffusers it has a
small base with the same ``config``, files and ``from_config``.

Contract: diffusers 0.42.1 (Apache 2.0). Before 0.42 ``set_timesteps(timesteps=…)`` made the timesteps anew from σ.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _checks, _registration
from ..ops.guided_euler import guided_euler
from ._diffusers_base import HOME, SchedulerBase, SchedulerOutput, logger, register_to_config
from ._diffusers_training import (
    NoisedLatents,
    add_noise,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    flow_matching_loss,
    get_sigmas,
    lookup_sigmas,
    noise_for_training,
)

FlowMatchEulerDiscreteSchedulerOutput = SchedulerOutput

__all__ = [
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteSchedulerOutput",
    "NoisedLatents",
    "compute_density_for_timestep_sampling",
    "compute_loss_weighting_for_sd3",
    "flow_matching_loss",
    "get_sigmas",
    "noise_for_training",
]


class Content(NamedTuple):
    """The numbers of a tensor on the CPU, which writes change that no counter sees."""

    pointer: int
    view: np.ndarray  # of the tensor's memory, which is faster to read by it
    numbers: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> Content:
        view = tensor.detach().numpy()
        return cls(tensor.data_ptr(), view, view.tobytes())

    def holds(self, tensor: Tensor) -> bool:
        return self.pointer == tensor.data_ptr() and self.numbers == self.view.tobytes()


@dataclass
class HostSchedule:
    """The schedule as numbers of the host, valid while the tensors it was read from are the scheduler's, unwritten."""

    sigmas: Tensor
    timesteps: Tensor
    writes: tuple[int | None, ...]
    contents: tuple[Content, ...] | None
    sigma_values: list[float]
    timestep_values: list[float]
    steps: list[float]  # σ of the next step minus σ of this one, in σ's dtype
    copies: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, sigmas: Tensor, timesteps: Tensor, host_sigmas: Tensor, host_timesteps: Tensor) -> HostSchedule:
        steps = (host_sigmas[1:] - host_sigmas[:-1]).tolist()
        known = writes(sigmas, timesteps), contents(sigmas, timesteps)
        return cls(sigmas, timesteps, *known, host_sigmas.tolist(), host_timesteps.tolist(), steps)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies of the tensors count their writes anew

    def holds(self, sigmas: Tensor, timesteps: Tensor) -> bool:
        same = self.sigmas is sigmas and self.timesteps is timesteps
        if same and self.contents is not None and not torch._C._len_torch_dispatch_stack():
            return all(known.holds(tensor) for known, tensor in zip(self.contents, (sigmas, timesteps)))
        return same and None not in self.writes and self.writes == writes(sigmas, timesteps)

    @functools.cached_property
    def index(self) -> dict[float, int]:
        """The place of each timestep; of one that occurs several times the second."""
        first: dict[float, int] = {}
        second: dict[float, int] = {}
        for i, t in enumerate(self.timestep_values):
            if t in first:
                second.setdefault(t, i)
            else:
                first[t] = i
        return {**first, **second}

    @property
    def comparable(self) -> bool:
        """Whether a timestep of one element is compared in float32: so are the schedules that set_timesteps makes."""
        return self.timesteps.dtype == torch.float32

    def place_of(self, value: float) -> int:
        if value not in self.index:
            raise IndexError(f"timestep: expected one of scheduler.timesteps, got {value:g}")
        return self.index[value]

    def value_of(self, timestep: float | Tensor) -> float | None:
        """A timestep as the number it is compared as, or None where only a device has it."""
        if not self.comparable:
            return None
        if not isinstance(timestep, Tensor):
            return float(np.float32(timestep))
        if timestep.dim() == 0 and timestep.device.type == "cpu":
            value: Any = timestep.to(torch.float32).tolist()
            return float(value)
        return self.value_at(timestep)

    def value_at(self, timestep: Tensor) -> float | None:
        """The value of a view of one element of the schedule, from its place in memory."""
        schedule = self.timesteps
        same = timestep.numel() == 1 and timestep.dtype == schedule.dtype and timestep.device == schedule.device
        same = same and schedule.stride(0) > 0
        if not same or timestep.untyped_storage().data_ptr() != schedule.untyped_storage().data_ptr():
            return None
        offset = int(timestep.storage_offset()) - int(schedule.storage_offset())
        place, rest = divmod(offset, int(schedule.stride(0)))
        return self.timestep_values[place] if rest == 0 and 0 <= place < len(self.timestep_values) else None

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """σ and timesteps on a device, copied there once."""
        if device not in self.copies:
            self.copies[device] = (self.sigmas.to(device), self.timesteps.to(device))
        return self.copies[device]


def writes(*tensors: Tensor) -> tuple[int | None, ...]:
    """Counters of in-place writes; None for an inference tensor, which has none."""
    return tuple(None if tensor.is_inference() else tensor._version for tensor in tensors)


def contents(*tensors: Tensor) -> tuple[Content, ...] | None:
    """The contents of tensors on the CPU; None where they are not at hand."""
    if torch._C._len_torch_dispatch_stack() or _registration.transforming():
        return None
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64) or tensor.is_neg():
            return None
    return tuple(map(Content.of, tensors))


class FlowMatchEulerDiscreteScheduler(SchedulerBase):
    r"""Euler steps x ← x + (σ_next − σ)·v down a schedule of noise levels σ, as diffusers' class of this name.

    All arguments, attributes, methods and random numbers are those of the original. What differs:

    - The schedule is kept in numbers of the host beside the tensors ``timesteps`` and ``sigmas``, so that no step waits
      for the device. A schedule that a program writes into or replaces is noticed: on the CPU it is read again, on
      another device, where writes through ``.data`` go unseen, its steps are taken from the tensors there.
    - The index of the first step comes from ``set_begin_index`` or, for an element of ``scheduler.timesteps`` (what
      ``for t in scheduler.timesteps`` gives), from its place in memory; a number or a CPU tensor is looked up on the
      host. For any other device tensor, or a schedule written to there, it is read from the device, **once a
      trajectory**; nothing else reads.
    - :meth:`step` and :meth:`scale_noise` make one pass over contiguous tensors of one shape and device. On the CPU in
      float32 the results are the original's to the bit. In half precision the sum is formed in float32 and rounded
      once, where the original rounds the product first; an infinite prediction gives NaN in place of infinity. With
      gradients, under ``torch.compile`` and for other layouts and dtypes the formula stands in PyTorch, as there.
    - :meth:`scale_noise` on a device cannot raise for a timestep that is not in the schedule: those samples are NaN.

    Args:
        num_train_timesteps: N, steps of the training schedule; timesteps are N·σ.
        shift: s of the static shift σ ← s·σ/(1 + (s − 1)·σ).
        use_dynamic_shifting: shift by ``mu`` of :meth:`set_timesteps` instead.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: read by pipelines to choose ``mu``.
        invert_sigmas: use 1 − σ, ending at 1.
        shift_terminal: stretch the schedule so that it ends at this σ.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: spacing of the schedule, at most one; the last
            needs scipy.
        time_shift_type: dynamic shift e^μ/(e^μ + 1/σ − 1), "exponential", or μ/(μ + 1/σ − 1), "linear".
        stochastic_sampling: at each step go to x̂0 = x − σ·v and noise it anew: (1 − σ_next)·x̂0 + σ_next·ε.

    Raises: ValueError, ImportError as the original.

    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (2024); Karras et
    al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), for the spacing of that name.
    """

    _compatibles: list[str] = []
    order = 1
    _host: HostSchedule | None = None  # a subclass may set the schedule in an __init__ of its own

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
    ) -> None:
        if use_beta_sigmas and importlib.util.find_spec("scipy") is None:
            raise ImportError("use_beta_sigmas: expected scipy installed, its quantiles are needed: pip install scipy")
        if use_karras_sigmas + use_exponential_sigmas + use_beta_sigmas > 1:
            raise ValueError(
                "use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: expected at most one of them True"
            )
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type: expected 'exponential' or 'linear', got {time_shift_type!r}")
        ascending = np.linspace(1, num_train_timesteps, num_train_timesteps, dtype=np.float32)
        sigmas = torch.from_numpy(ascending[::-1].copy()) / num_train_timesteps
        if not use_dynamic_shifting:
            sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        self._shift = shift
        self._set_schedule(sigmas, sigmas * num_train_timesteps, None)
        self.sigma_min, self.sigma_max = float(sigmas[-1].numpy()), float(sigmas[0].numpy())
        if HOME and type(self) is FlowMatchEulerDiscreteScheduler:
            self.__module__ = HOME  # what pipelines save as its origin: they then load where fmkernels is not, too

    def _set_schedule(self, sigmas: Tensor, timesteps: Tensor, device: str | torch.device | None) -> None:
        """Take the schedule from tensors of the host; what is kept of it as numbers is never read back."""
        with torch.inference_mode(False):  # tensors made in inference mode would not count writes
            self.sigmas, self.timesteps = sigmas.to(device, copy=True), timesteps.to(device, copy=True)
        host = HostSchedule.of(self.sigmas, self.timesteps, sigmas, timesteps)
        self._host = host
        self._step_index: Any = None
        self._begin_index: Any = None

    def _schedule(self) -> HostSchedule | None:
        """The schedule as numbers; None where only a device has it, it is no tensors, or gradients go to it."""
        if torch.compiler.is_compiling() or not (
            isinstance(self.sigmas, Tensor) and isinstance(self.timesteps, Tensor)
        ):
            return None
        if self.sigmas.requires_grad or self.timesteps.requires_grad or _registration.transforming():
            return None
        if self._host is None or not self._host.holds(self.sigmas, self.timesteps):
            on_host = self.sigmas.device.type == self.timesteps.device.type == "cpu"
            self._host = HostSchedule.of(*(self.sigmas, self.timesteps) * 2) if on_host else None
        return self._host

    @property
    def shift(self) -> float:
        """The static shift."""
        return self._shift

    @property
    def step_index(self) -> int | None:
        """Place of the next step in the schedule; None before the first."""
        index: int | None = self._step_index
        return index

    @property
    def begin_index(self) -> int | None:
        """Place of the first step, where :meth:`set_begin_index` gave one."""
        index: int | None = self._begin_index
        return index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Let a trajectory start at place ``begin_index`` of the schedule; called after :meth:`set_timesteps`."""
        self._begin_index = begin_index

    def set_shift(self, shift: float) -> None:
        """Change the static shift, from the next :meth:`set_timesteps` on."""
        self._shift = shift

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def _sigma_to_t(self, sigma: Any) -> Any:
        return sigma * self.config.num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Set ``timesteps`` [T] and ``sigmas`` [T + 1] for T steps on a device, and forget any trajectory.

        Both are float32; ``sigmas`` float64 where that is torch's default dtype.

        Args:
            num_inference_steps: T; not needed with ``sigmas`` or ``timesteps``, which must agree with it.
            device: of both tensors; None is the CPU.
            sigmas: noise levels in place of T equidistant ones, still shifted, stretched and respaced.
            mu: μ of the dynamic shift; needed with ``use_dynamic_shifting``.
            timesteps: timesteps as they are; without ``sigmas`` the levels are these over N, then shifted.
        """
        if self.config.use_dynamic_shifting and mu is None:
            raise ValueError("mu: expected a number, use_dynamic_shifting needs one, got None")
        if num_inference_steps is None:
            given = timesteps if sigmas is None else sigmas
            if given is None:
                raise TypeError("num_inference_steps: expected an int unless sigmas or timesteps are given, got None")
            num_inference_steps = len(given)
        for name, values in (("sigmas", sigmas), ("timesteps", timesteps)):
            if values is not None and len(values) != num_inference_steps:
                raise ValueError(f"{name}: expected {num_inference_steps} of them, one a step, got {len(values)}")
        if timesteps is not None and sigmas is None:
            logger.warning(
                "timesteps given without sigmas: timesteps are used as they are, but the sigmas made from them are "
                "shifted; give both to choose both"
            )
        self.num_inference_steps = num_inference_steps
        steps, config = self.config.num_train_timesteps, self.config

        times = None if timesteps is None else np.array(timesteps).astype(np.float32)
        levels: Any  # of the host, until the end
        if sigmas is not None:
            levels = np.array(sigmas).astype(np.float32)
        elif times is not None:
            levels = times / steps
        else:
            ends = self._sigma_to_t(self.sigma_max), self._sigma_to_t(self.sigma_min)
            levels = np.linspace(*ends, num_inference_steps) / steps
        if config.use_dynamic_shifting:
            levels = self.time_shift(mu, 1.0, levels)
        else:
            levels = self.shift * levels / (1 + (self.shift - 1) * levels)
        if config.shift_terminal:
            levels = self.stretch_shift_to_terminal(levels)
        if config.use_karras_sigmas:
            levels = self._convert_to_karras(levels, num_inference_steps)
        elif config.use_exponential_sigmas:
            levels = self._convert_to_exponential(levels, num_inference_steps)
        elif config.use_beta_sigmas:
            levels = self._convert_to_beta(levels, num_inference_steps)

        host_sigmas = torch.from_numpy(levels).to(torch.float32)
        if config.invert_sigmas:
            host_sigmas = 1.0 - host_sigmas
        host_timesteps = host_sigmas * steps if times is None or config.invert_sigmas else torch.from_numpy(times)
        last = torch.full((1,), 1.0 if config.invert_sigmas else 0.0, device="cpu")
        self._set_schedule(torch.cat([host_sigmas, last]), host_timesteps, device)

    def time_shift(self, mu: Any, sigma: float, t: Any) -> Any:
        """Noise levels ``t`` shifted dynamically: m/(m + (1/t − 1)^sigma), m = e^mu or, "linear", mu."""
        if self.config.time_shift_type == "exponential":
            return self._time_shift_exponential(mu, sigma, t)
        return self._time_shift_linear(mu, sigma, t)

    def _time_shift_exponential(self, mu: float, sigma: float, t: Any) -> Any:
        return shifted(math.exp(mu), sigma, t)

    def _time_shift_linear(self, mu: float, sigma: float, t: Any) -> Any:
        return shifted(mu, sigma, t)

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """Noise levels ``t`` with 1 − t scaled so that the last is ``shift_terminal``."""
        rest = 1 - t
        return 1 - rest / (rest[-1] / (1 - self.config.shift_terminal))

    def _ends(self, sigmas: Any) -> tuple[float, float]:
        """The largest and the smallest noise level: of the configuration, where it has them, or of the schedule."""
        high, low = (self.config.get(name) for name in ("sigma_max", "sigma_min"))
        return float(sigmas[0]) if high is None else high, float(sigmas[-1]) if low is None else low

    def _convert_to_karras(self, in_sigmas: Any, num_inference_steps: int) -> Any:
        rho = 7.0
        high, low = (sigma ** (1 / rho) for sigma in self._ends(in_sigmas))
        return (high + np.linspace(0, 1, num_inference_steps) * (low - high)) ** rho

    def _convert_to_exponential(self, in_sigmas: Any, num_inference_steps: int) -> Any:
        high, low = self._ends(in_sigmas)
        return np.exp(np.linspace(math.log(high), math.log(low), num_inference_steps))

    def _convert_to_beta(self, in_sigmas: Any, num_inference_steps: int, alpha: float = 0.6, beta: float = 0.6) -> Any:
        statistics: Any = importlib.import_module("scipy.stats")
        high, low = self._ends(in_sigmas)
        quantiles = statistics.beta.ppf(1 - np.linspace(0, 1, num_inference_steps), alpha, beta)
        return low + quantiles * (high - low)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The place of a timestep in the schedule, or in ``schedule_timesteps``; the second where it occurs again.

        Raises: IndexError where the schedule lacks it.
        """
        host = self._schedule()
        if host is not None and (schedule_timesteps is None or schedule_timesteps is host.timesteps):
            value = host.value_of(timestep)
            if value is not None:
                return host.place_of(value)
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        if isinstance(timestep, Tensor):
            if timestep.dim() > 1:
                raise ValueError(f"timestep: expected one element, of shape [] or [1], got {list(timestep.shape)}")
            timestep = timestep.to(schedule.device)
        places = [i for i, same in enumerate((schedule == timestep).tolist()) if same]  # the one read from a device
        if not places:
            raise IndexError(f"timestep: expected one of the schedule's, got {timestep}")
        return places[1] if len(places) > 1 else places[0]

    def _init_step_index(self, timestep: float | Tensor) -> None:
        self._step_index = self.index_for_timestep(timestep) if self.begin_index is None else self._begin_index

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """(1 − σ)·sample + σ·noise with σ of each sample's timestep: the forward process, and its start in img2img.

        Args:
            sample, noise: ``[B, …]``.
            timestep: ``[B]`` or ``[1]``, of ``scheduler.timesteps``. After ``set_begin_index`` the current step's σ is
                used whatever it is.

        Returns: a tensor like ``sample``. σ and 1 − σ are rounded to its dtype, as in the original.

        Raises: IndexError for a timestep that the schedule lacks, where timestep and schedule are on the CPU.
        """
        if self.begin_index is None:
            sigma = self._sigmas_at(timestep, sample.device)
        else:
            index = self.begin_index if self.step_index is None else self.step_index
            sigma = self.sigmas[index].expand(timestep.shape[0])
        return add_noise(sample, noise, sigma.to(sample.device, sample.dtype))[0]

    def _sigmas_at(self, timestep: Tensor, device: torch.device) -> Tensor:
        """σ of each timestep, found on the device that has it."""
        host, overridden = self._schedule(), not is_own(self, "index_for_timestep")
        if overridden or timestep.dim() != 1:
            schedule = self.timesteps.to(device)
            return self.sigmas[[self.index_for_timestep(t, schedule) for t in timestep.to(device)]]
        if host is not None and host.comparable and timestep.device.type == "cpu":
            places = map(host.place_of, timestep.to(torch.float32).tolist())
            return torch.tensor([host.sigma_values[place] for place in places], dtype=torch.float32, device="cpu")
        sigmas, schedule = self._on(device)
        return lookup_sigmas(sigmas, schedule, timestep.to(device))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """σ and timesteps on a device, copied there once while they stay what they are."""
        host = self._schedule()
        return (self.sigmas.to(device), self.timesteps.to(device)) if host is None else host.on(device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One Euler step: sample + (σ_next − σ)·model_output, and the step index moves on.

        Args:
            model_output: velocity v ``[B, …]``.
            timestep: of ``scheduler.timesteps``; looked at in the first step only, to find where to start.
            sample: x ``[B, …]``.
            s_churn, s_tmin, s_tmax, s_noise: accepted and unused, as in the original.
            generator: of the noise of ``stochastic_sampling``; a list draws a sample from each.
            per_token_timesteps: ``[B, L]`` for ``[B, L, C]`` samples: each token goes to the next lower σ of the
                schedule. As in the original the step is added as (σ − σ_next)·v, with that sign, and not cast back.
            return_dict: whether to return an output object or the tuple (prev_sample,).

        Returns: the next sample in model_output's dtype, computed in float32.

        Raises: ValueError for an integer timestep; IndexError for one that the schedule lacks, or past its end.
        """
        if isinstance(timestep, (int, torch.IntTensor, torch.LongTensor)):
            raise ValueError(
                "timestep: expected one of scheduler.timesteps, got an integer, such as enumerate() counts; "
                "pass the timestep itself"
            )
        if self.step_index is None:
            self._init_step_index(timestep)
        if per_token_timesteps is not None:
            prev_sample = self._step_tokens(model_output, sample, per_token_timesteps, generator)
        else:
            prev_sample = self._step(model_output, sample, generator).to(model_output.dtype)
        self._step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _step(self, model_output: Tensor, sample: Tensor, generator: Any) -> Tensor:
        i, host, fused = self._step_index, self._schedule(), one_pass(model_output, sample)
        if fused and host is not None and type(i) is int and 0 <= i < len(host.steps):
            step: Any = host.steps[i]
            sigma: Any = host.sigma_values[i]
        else:
            step, sigma = self.sigmas[i + 1] - self.sigmas[i], self.sigmas[i]
        stochastic = self.config.stochastic_sampling
        if stochastic:
            step = -sigma  # all the way to x̂0
        moved: Tensor
        if not fused or stochastic or sample.dtype != model_output.dtype:
            sample = sample.to(torch.float32)
        if fused:
            step = step.to(sample.device) if isinstance(step, Tensor) else step
            moved = guided_euler(sample, model_output, model_output, step, 1.0)
        else:
            moved = sample + step * model_output
        if not stochastic:
            return moved
        noise = randn(sample.shape, generator, sample.device, sample.dtype)
        sigma_next = torch.as_tensor(self.sigmas[i + 1], device=moved.device)
        if moved.is_contiguous() and sigma_next.dtype == moved.dtype:
            return add_noise(moved, noise, sigma_next.reshape(1))[0]
        return (1.0 - sigma_next) * moved + sigma_next * noise  # in the layout of the sample

    def _step_tokens(self, model_output: Tensor, sample: Tensor, timesteps: Tensor, generator: Any) -> Tensor:
        """The step with a σ a token: to the largest σ of the schedule that is smaller by 1e-6 at least, else to 0."""
        sample = sample.to(torch.float32)
        sigma = timesteps / self.config.num_train_timesteps
        bound = (sigma - 1e-6).contiguous()
        common = torch.promote_types(bound.dtype, self.sigmas.dtype)
        ascending = self.sigmas.sort().values
        lower = torch.cat([ascending.new_zeros(1), ascending])  # before the smallest there is 0
        sigma_next = lower[torch.searchsorted(ascending.to(common), bound.to(common))][..., None]
        sigma = sigma[..., None]
        stochastic = self.config.stochastic_sampling
        step = -sigma if stochastic else sigma - sigma_next
        rows = step.dtype == torch.float32 and step.device == sample.device and sample.shape[:-1] == timesteps.shape
        moved: Tensor
        if rows and one_pass(model_output, sample):
            x, v = sample.flatten(0, -2), model_output.flatten(0, -2)
            moved = guided_euler(x, v, v, step.flatten(), 1.0).view(sample.shape)
        else:
            moved = sample + step * model_output
        if stochastic:
            noise = randn(sample.shape, generator, sample.device, sample.dtype)
            moved = (1.0 - sigma_next) * moved + sigma_next * noise
        return moved


def shifted(m: float, sigma: float, t: Any) -> Any:
    return m / (m + (1 / t - 1) ** sigma)


def is_own(scheduler: FlowMatchEulerDiscreteScheduler, name: str) -> bool:
    """Whether a method is this class's, not that of a subclass or an instance."""
    return name not in vars(scheduler) and getattr(type(scheduler), name) is vars(FlowMatchEulerDiscreteScheduler)[name]


def one_pass(model_output: Any, sample: Any) -> bool:
    """Whether the fused step gives what the formula in PyTorch does: plain tensors, elementwise, no gradient wanted."""
    return (
        type(sample) is type(model_output) is Tensor  # a subclass has its own arithmetic
        and sample.shape == model_output.shape
        and sample.device == model_output.device
        and sample.dtype in _checks.FLOATING
        and model_output.dtype in _checks.FLOATING
        and torch.float64 not in (sample.dtype, model_output.dtype)
        and sample.is_contiguous()  # whose layout the result would have
        and sample.dim() > 0
        and _registration.eager()
        and not _registration.requires_grad(sample, model_output)
    )


def randn(shape: Any, generator: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normals as diffusers draws them: with a CPU generator on the CPU, with a list a sample from each."""
    generators = generator if isinstance(generator, list) else [generator]
    source = device
    if generators[0] is not None and generators[0].device.type != device.type:
        if generators[0].device.type != "cpu":
            raise ValueError(f"generator: expected one of the CPU or of {device}, got {generators[0].device}")
        source = torch.device("cpu")
    if len(generators) == 1:
        return torch.randn(shape, generator=generators[0], device=source, dtype=dtype).to(device)
    row = (1, *shape[1:])
    rows = [torch.randn(row, generator=generators[i], device=source, dtype=dtype) for i in range(shape[0])]
    return torch.cat(rows).to(device)
