"""AutoAugment, RandAugment and TrivialAugment of crops in the workers, by torchvision.

Cubuk et al., 2019, "AutoAugment: Learning Augmentation Policies from Data"; Cubuk et al., 2020, "RandAugment: Practical
Automated Data Augmentation with a Reduced Search Space"; Mueller and Hutter, 2021, "TrivialAugment: Tuning-free Yet
State-of-the-Art Data Augmentation" (its "Wide" space, which moves by up to 32 pixels: of smaller crops that may leave
nothing). torchvision's classes work on PIL images, so that the number of threads changes nothing.

They draw from torch's global generator. It is seeded for each crop, from (seed, epoch, image, view) alone, and its state is
put back after the batch. Measured once, on a busy core of an AMD EPYC (Zen 4): seeding takes 7 microseconds a crop, the policy
itself 140 (TrivialAugment) to 450 (RandAugment, two operations) at 28 pixels and 760 to 1,740 at 224, which is some tenth less
than on tensors.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from selfsup.config import Crops
from selfsup.data.views import View
from selfsup.errors import UserError
from selfsup.randomness import mix

_TAG = 0x90C1


class Policy:
    """The policy of one view, for images of this many channels. Raises UserError if these are neither 1 nor 3."""

    def __init__(self, view: View, channels: int) -> None:
        if channels not in (1, 3):
            raise UserError(
                f"views.{view.kind}.policy={view.crops.policy} is for images of 1 or 3 channels; these have {channels}; "
                f"use views.{view.kind}.policy=none"
            )
        fill = view.crops.policy_fill
        if isinstance(fill, tuple) and len(fill) != channels:
            raise UserError(
                f"views.{view.kind}.policy_fill holds {len(fill)} levels for {channels} channels; "
                "give one each, or one for all"
            )
        self.view = view
        _transform(view.crops)  # torchvision is imported here, before there are workers

    def __call__(self, crops: np.ndarray, seed: int, epochs: np.ndarray, ids: np.ndarray) -> None:
        """Change uint8 crops [B,S,S,C] in place; crop b depends on nothing but itself and (seed, epochs[b], ids[b], view)."""
        transform, probability = _transform(self.view.crops), self.view.crops.policy_probability
        generator = torch.default_generator  # not torch.manual_seed, which seeds those of all devices
        before = generator.get_state()
        try:
            for crop, epoch, index in zip(crops, epochs.tolist(), ids.tolist(), strict=True):
                generator.manual_seed(mix(seed, _TAG, self.view.number, epoch, index))
                if float(torch.rand(())) < probability:
                    image = Image.fromarray(crop[:, :, 0] if crop.shape[2] == 1 else crop)
                    crop[:] = np.asarray(transform(image)).reshape(crop.shape)
        finally:
            generator.set_state(before)


@lru_cache(maxsize=32)
def _transform(crops: Crops) -> Any:
    from torchvision.transforms import InterpolationMode, v2  # seconds

    interpolation = InterpolationMode(crops.policy_interpolation)
    fill = list(crops.policy_fill) if isinstance(crops.policy_fill, tuple) else crops.policy_fill
    if crops.policy == "randaugment":
        return v2.RandAugment(crops.policy_ops, crops.policy_magnitude, interpolation=interpolation, fill=fill)
    if crops.policy == "autoaugment":
        return v2.AutoAugment(v2.AutoAugmentPolicy(crops.policy_table), interpolation=interpolation, fill=fill)
    return v2.TrivialAugmentWide(interpolation=interpolation, fill=fill)
