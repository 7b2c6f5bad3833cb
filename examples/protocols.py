"""The comparison of flow matching's paper: its five rows, how it trained and measured them, and what it found.

Source: Lipman, Chen, Ben-Hamu, Nickel and Le, "Flow Matching for Generative Modeling" (2023): tables 1 and 3, section 6
and appendix E. The digits are ours: small enough for two CPU cores.
"""

from __future__ import annotations

from dataclasses import dataclass

from networks import UNetSize

import fmkernels as fmk

TOLERANCE = 1e-5  # of dopri5, for samples and for densities


def objectives(timesteps: fmk.TimestepSampler) -> dict[str, fmk.FlowMatching]:
    """The rows of the table; β runs from 0.1 to 20 in all that diffuse, and every t is as likely."""
    diffusion = {name: fmk.VP() for name in ("ddpm", "score_matching", "scoreflow", "flow_matching")}
    rows = {name: fmk.FlowMatching.named(name, path, timesteps=timesteps) for name, path in diffusion.items()}
    return {
        "DDPM": rows["ddpm"],
        "Score Matching": rows["score_matching"],
        "ScoreFlow": rows["scoreflow"],
        "FM, diffusion path": rows["flow_matching"],
        "FM, OT path": fmk.FlowMatching.named("flow_matching", fmk.CondOT(), timesteps=timesteps),
    }


@dataclass(frozen=True)
class Protocol:
    """How a data set's networks are trained and measured, the same for every row.

    Attributes:
        network: sizes of the U-Net; None takes the small MLP.
        steps, batch, learning_rate, warmup: of Adam; the rate rises linearly over the warm-up.
        decays: whether it then falls linearly to zero, the paper's polynomial decay.
        ema: decay of the moving average of the weights that is measured.
        draws, probes: dequantisation draws of a test image; probes of each, signed Hadamard columns.
        scored: test images whose bits are counted, None for all.
        samples: images drawn for the Fréchet distance and for the number of evaluations.
        together: images in a batch of the solver.
        half: bfloat16 in the network on a GPU, where the paper used 16 bits.
    """

    network: UNetSize | None
    steps: int
    batch: int
    learning_rate: float
    warmup: int
    draws: int
    decays: bool = True
    ema: float = 0.9999
    probes: int = 1
    scored: int | None = None
    samples: int = 50_000
    together: int = 256
    half: bool = False


PROTOCOLS = {
    "digits": Protocol(
        None, 3000, 256, 2e-3, 300, 2, ema=0.999, probes=4, samples=2000, together=500,
    ),
    "cifar10": Protocol(UNetSize(256, (1, 2, 2, 2), 2, (16,)), 391_000, 256, 5e-4, 45_000, 50),
    "imagenet32": Protocol(UNetSize(256, (1, 2, 2, 2), 3, (16, 8)), 250_000, 1024, 1e-4, 20_000, 15),
    "imagenet64": Protocol(
        UNetSize(192, (1, 2, 3, 4), 3, (32, 16, 8)), 157_000, 2048, 1e-4, 0, 10, decays=False, half=True
    ),
}  # fmt: skip

# Bits per dimension, Fréchet inception distance and number of evaluations: table 1.
PUBLISHED = {
    "cifar10": {
        "DDPM": (3.12, 7.48, 274),
        "Score Matching": (3.16, 19.94, 242),
        "ScoreFlow": (3.09, 20.78, 428),
        "FM, diffusion path": (3.10, 8.06, 183),
        "FM, OT path": (2.99, 6.35, 142),
    },
    "imagenet32": {
        "DDPM": (3.54, 6.99, 262),
        "Score Matching": (3.56, 5.68, 178),
        "ScoreFlow": (3.55, 14.14, 195),
        "FM, diffusion path": (3.54, 6.37, 193),
        "FM, OT path": (3.53, 5.02, 122),
    },
    "imagenet64": {
        "DDPM": (3.32, 17.36, 264),
        "Score Matching": (3.40, 19.74, 441),
        "ScoreFlow": (3.36, 24.95, 601),
        "FM, diffusion path": (3.33, 16.88, 187),
        "FM, OT path": (3.31, 14.45, 138),
    },
}

# ImageNet 128 × 128, which nobody but the authors trained: bits per dimension and Fréchet inception distance, table 1.
IMAGENET_128 = {
    "MGAN": (None, 58.9),
    "PacGAN2": (None, 57.5),
    "Logo-GAN-AE": (None, 50.9),
    "Self-conditioned GAN": (None, 41.7),
    "Unconditional BigGAN": (None, 25.3),
    "PGMGAN": (None, 21.7),
    "FM, OT path": (2.90, 20.9),
}
