"""Several clips of a video as one row of an evaluation."""

from collections.abc import Callable

from torch import Tensor

from selfsup.data.sources import Source


def over_clips(forward: Callable[[Tensor], list[Tensor]], source: Source) -> Callable[[Tensor], list[Tensor]]:
    """`forward` of each of `data.clips` clips, which a source puts behind one another in the channels; their mean.

    Images, and videos of one clip, go through as they are: [B, clips * T*C, S, S] -> what forward gives, [B, D] each.
    """
    clips = source.config.clips if source.config.frames is not None else 1
    if clips == 1:
        return forward

    def averaged(images: Tensor) -> list[Tensor]:
        found = forward(images.unflatten(1, (clips, -1)).flatten(0, 1))  # [B * clips, T*C, S, S]
        return [x.unflatten(0, (-1, clips)).mean(dim=1) for x in found]

    return averaged
