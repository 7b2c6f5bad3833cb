"""`solve` on a GPU: what a step launches, that nothing waits for it, and that a captured step repeats it."""

import pytest
import torch

import fmkernels as fmk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@pytest.fixture
def y0():
    return torch.randn(64, 5, device="cuda", generator=torch.Generator("cuda").manual_seed(0))


def activity(call) -> tuple[int, int]:
    """Kernels launched and waits of the host."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        call()
    events = [event for event in profile.events() if not getattr(event, "is_user_annotation", False)]
    on_device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_device if not name.startswith(("Memcpy", "Memset"))]
    return len(kernels), sum(event.name in WAITS for event in events)


def test_a_step_is_seven_launches_and_no_wait(y0):
    """With a field that launches nothing, so that every kernel is ours; the difference of a long and a short solve."""
    k = torch.full_like(y0, 0.5)

    def counted(steps):
        return activity(lambda: fmk.solve(lambda t, y: k, y0, first_step=1e-3, max_step=1e-3, max_steps=steps))

    counted(10)
    (launches, waits), (more_launches, more_waits) = counted(10), counted(40)
    extra, rest = divmod(more_launches - launches, 7)
    assert rest == 0 and 28 <= extra <= 32  # 30, and a step or two queued when the last row is done
    assert more_waits == waits


def test_the_gpu_agrees_with_the_cpu(y0):
    def field(t, y):
        return torch.sin(3 * y) * t[:, None] - y

    times = torch.linspace(0, 2, 9)
    there = fmk.solve(field, y0.double(), (0.0, 2.0), times, rtol=1e-8, atol=1e-8)
    here = fmk.solve(field, y0.double().cpu(), (0.0, 2.0), times, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(there.y.cpu(), here.y, rtol=1e-7, atol=1e-9)
    assert torch.equal(there.status.cpu(), here.status)
    assert there.calls - here.calls in (0, 6, 12)  # a step or two may be queued when the last row is done


def test_a_captured_step_repeats_the_plain_one(y0):
    def field(t, y):
        return torch.sin(3 * y) * t[:, None] - y

    times = torch.linspace(0, 2, 9, device="cuda")
    plain = fmk.solve(field, y0, (0.0, 2.0), times)
    captured = fmk.solve(field, y0, (0.0, 2.0), times, cuda_graph=True)
    assert torch.equal(plain.y, captured.y)
    assert torch.equal(plain.accepted, captured.accepted)


def test_rows_of_different_lengths(y0):
    ends = torch.linspace(0, 1, 64, device="cuda")
    solution = fmk.solve(lambda t, y: -y, y0, (0.0, ends))
    torch.testing.assert_close(solution.y, y0 * torch.exp(-ends)[:, None], rtol=1e-4, atol=1e-5)
    assert (solution.status == 0).all()
