"""A driven oscillator in every form that a state may have, and how two libraries' results are compared."""

import torch

from fmkernels.integrations import torchdiffeq as ours


class Oscillator(torch.nn.Module):
    """A driven pendulum, with its calls counted; ``form`` says what its state looks like."""

    def __init__(self, form="tensor", callbacks=()):
        super().__init__()
        self.form, self.calls, self.seen = form, 0, []
        for name in callbacks:
            setattr(self, name, lambda t, y, dt, name=name: self.seen.append((name, t, y, dt)))

    def forward(self, t, y):
        self.calls += 1
        if self.form == "tensor":
            x, v = y.unbind(-1)
            return torch.stack((v, -2 * torch.sin(x) - 0.1 * v + 0.3 * torch.sin(3 * t)), -1)
        if self.form == "complex":
            return (1j - 0.2) * y * torch.cos(t) - 0.1j * y.abs() ** 2 * y
        x, v = y
        if self.form == "complex tuple":
            return 1j * v * torch.cos(t), -x.sum(-1, keepdim=True).expand_as(v) * 0.2
        return v[:, :3], torch.cat([-x, v[:, 3:] * torch.cos(3 * t)], 1)

    def start(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(3)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
        match self.form:
            case "tensor":
                return normal(3, 5, 2).to(dtype)
            case "complex":
                return torch.complex(normal(4, 3).to(real), normal(4, 3).to(real))
            case "complex tuple":
                return tuple(torch.complex(normal(2, n).to(real), normal(2, n).to(real)) for n in (3, 3))
        return normal(2, 3).to(dtype), normal(2, 5).to(dtype)


FORMS = ("tensor", "tuple", "complex", "complex tuple")


def grid(direction, dtype=torch.float64):
    t = 0.5 + torch.tensor([0, 0.3, 1.0, 1.1, 2.5, 3.0], dtype=torch.float64)
    return (t if direction > 0 else t.flip(0)).to(dtype)


def parts(x):
    return x if isinstance(x, tuple) else (x,)


def assert_same(a, b, tolerance=1e-11):
    for x, y in zip(parts(a), parts(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype and x.device == y.device
        assert (x - y).abs().max() <= tolerance * max(1.0, float(y.abs().max()))


def both(theirs, func, t, function="odeint", **arguments):
    """What each library returns and what its func saw, for the same call."""
    results = []
    for library in (ours, theirs):
        f = func()
        results.append((getattr(library, function)(f, f.start(), t, **arguments), f))
    return results
