"""lightly's own examples of DINO, SimCLR, BYOL and VICReg for `methods.py`: its parts, put together as its documentation does,
on the images, crops and backbone of our `*_demo` recipe of the same name.

    python -m benchmarks.methods_lightly METHOD RECIPE.yaml OUT --steps N --snapshots S --seed K

What differs from the examples (docs.lightly.ai, "Examples"): the views are ours, the ones that our recipe sees, the widths of
heads are those of our recipe, and the optimizer is the one that our recipe names, at its learning rate, with the recipe's
schedule: so that the methods are compared, not recipes. A pass a view, losses, heads, momentum: theirs.
Writes OUT/backbone at the end, OUT/snapshots/STEP at S equal distances, and OUT/metrics.json.
"""

import argparse
import copy
import json
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Example(Protocol):
    """What an example is made of."""

    backbone: nn.Module
    """The one that is evaluated."""

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        ...

    def loss(self, views: Sequence[Tensor], progress: float) -> Tensor:
        """views [B, C, S, S] each, the global ones first; progress: part of the steps that are done."""
        ...


class SimCLR:
    """lightly's example: ResNet trunk, SimCLRProjectionHead, NTXentLoss."""

    def __init__(self, backbone: nn.Module, dim: int, options: dict[str, Any], views: int) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        self.backbone = backbone
        hidden, out = options.get("hidden_dim", dim), options.get("out_dim", 128)
        self.head = SimCLRProjectionHead(dim, hidden, out)
        self.criterion = NTXentLoss(temperature=options.get("temperature", 0.5))

    def parameters(self) -> list[nn.Parameter]:
        """Trunk and head."""
        return [*self.backbone.parameters(), *self.head.parameters()]

    def loss(self, views: Sequence[Tensor], progress: float) -> Tensor:
        """The example's training step."""
        z0, z1 = (self.head(self.backbone(x)) for x in views[:2])
        return self.criterion(z0, z1)


class VICReg:
    """lightly's example: VICRegProjectionHead, VICRegLoss."""

    def __init__(self, backbone: nn.Module, dim: int, options: dict[str, Any], views: int) -> None:
        from lightly.loss import VICRegLoss
        from lightly.models.modules.heads import VICRegProjectionHead

        self.backbone = backbone
        hidden, out = options.get("hidden_dim", 2048), options.get("out_dim", 2048)
        self.head = VICRegProjectionHead(dim, hidden, out, num_layers=options.get("head_layers", 3))
        self.criterion = VICRegLoss()

    def parameters(self) -> list[nn.Parameter]:
        """Trunk and head."""
        return [*self.backbone.parameters(), *self.head.parameters()]

    def loss(self, views: Sequence[Tensor], progress: float) -> Tensor:
        """The example's training step."""
        z0, z1 = (self.head(self.backbone(x)) for x in views[:2])
        return self.criterion(z0, z1)


class BYOL:
    """lightly's example: BYOLProjectionHead, BYOLPredictionHead, NegativeCosineSimilarity, momentum by its cosine schedule."""

    def __init__(self, backbone: nn.Module, dim: int, options: dict[str, Any], views: int) -> None:
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        hidden, out = options.get("hidden_dim", 4096), options.get("out_dim", 256)
        self.backbone = backbone
        self.head = BYOLProjectionHead(dim, hidden, out)
        self.predictor = BYOLPredictionHead(out, hidden, out)
        self.backbone_momentum, self.head_momentum = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.head_momentum)
        self.criterion = NegativeCosineSimilarity()
        self.momentum = options.get("momentum", 0.996)

    def parameters(self) -> list[nn.Parameter]:
        """Trunk, projection and prediction heads."""
        return [*self.backbone.parameters(), *self.head.parameters(), *self.predictor.parameters()]

    def loss(self, views: Sequence[Tensor], progress: float) -> Tensor:
        """The example's training step, the momentum update first as there."""
        from lightly.models.utils import update_momentum

        m = 1 - (1 - self.momentum) * (torch.cos(torch.tensor(torch.pi * progress)).item() + 1) / 2
        update_momentum(self.backbone, self.backbone_momentum, m=m)
        update_momentum(self.head, self.head_momentum, m=m)
        p0, p1 = (self.predictor(self.head(self.backbone(x))) for x in views[:2])
        with torch.no_grad():
            z0, z1 = (self.head_momentum(self.backbone_momentum(x)) for x in views[:2])
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))


class DINO:
    """lightly's example: DINOProjectionHead, DINOLoss, the teacher's momentum by a cosine schedule."""

    def __init__(self, backbone: nn.Module, dim: int, options: dict[str, Any], views: int) -> None:
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        warnings.filterwarnings("ignore", category=FutureWarning)  # weight_norm's
        hidden, bottleneck, out = (options[key] for key in ("hidden_dim", "bottleneck_dim", "out_dim"))
        self.student_backbone, self.student_head = backbone, DINOProjectionHead(dim, hidden, bottleneck, out)
        self.backbone = copy.deepcopy(backbone)  # the teacher's, which is evaluated, as ours is
        self.teacher_head = DINOProjectionHead(dim, hidden, bottleneck, out)
        self.teacher_head.load_state_dict(self.student_head.state_dict())
        deactivate_requires_grad(self.backbone)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(
            out,
            teacher_temp=options["teacher_temp"],
            student_temp=options["student_temp"],
            warmup_teacher_temp_epochs=1,
        )
        self.momentum = (options["momentum"], options["momentum_end"])

    def parameters(self) -> list[nn.Parameter]:
        """The student's."""
        return [p for m in (self.student_backbone, self.student_head) for p in m.parameters() if p.requires_grad]

    def loss(self, views: Sequence[Tensor], progress: float) -> Tensor:
        """The example's training step, the momentum update first as there."""
        from lightly.models.utils import update_momentum

        start, end = self.momentum
        m = end - (end - start) * (torch.cos(torch.tensor(torch.pi * progress)).item() + 1) / 2
        update_momentum(self.student_backbone, self.backbone, m=m)
        update_momentum(self.student_head, self.teacher_head, m=m)
        with torch.no_grad():
            taught = [self.teacher_head(self.backbone(x)) for x in views[:2]]
        seen = [self.student_head(self.student_backbone(x)) for x in views]
        return self.criterion(taught, seen, epoch=1)


EXAMPLES: dict[str, Any] = {"byol": BYOL, "dino": DINO, "simclr": SimCLR, "vicreg": VICReg}


def run(method: str, recipe: Path, out: Path, steps: int, snapshots: int, seed: int) -> dict[str, float]:
    """Train; what is to be known of it. recipe: a resolved configuration of ours (RUN/config.yaml)."""
    from selfsup import methods, runtime, schedules
    from selfsup.backbones.export import export_timm
    from selfsup.config import load
    from selfsup.data import photometric
    from selfsup.data.loader import Loader
    from selfsup.data.sources import open_source
    from selfsup.methods.network import build_backbone
    from selfsup.optim import create_optimizer, parameter_groups, set_hyperparameters
    from selfsup.schedules import optimizer_schedules, peak_learning_rate

    config = methods.complete(
        runtime.resolve(load(str(recipe), [f"steps={steps}", "epochs=null", "samples=null", f"seed={seed}"]))
    )
    torch.set_num_threads(1)
    source = open_source(config.data.path, channels=config.backbone.in_chans, config=config.data)
    ours = methods.create(config)  # for its views
    torch.manual_seed(config.seed)
    backbone = build_backbone(config)
    example: Example = EXAMPLES[method](backbone.model, backbone.embed_dim, config.method.options, len(ours.views()))
    named = [(f"backbone.{i}" if p.ndim else str(i), p) for i, p in enumerate(example.parameters())]
    groups = parameter_groups(named, config.optimizer.layer_decay, config.optimizer.decay_all)
    optimizer = create_optimizer(config.optimizer, groups, peak_learning_rate(config))
    plan = schedules.plan(config, len(source))
    rates = optimizer_schedules(config, plan)
    loader = Loader(source, ours.views(), seed=config.seed, global_batch=config.global_batch)
    kept = copy.copy(backbone)
    began, images = time.process_time(), 0
    evaluated = {round(steps * (i + 1) / snapshots) for i in range(snapshots)} if snapshots else set()
    spent = 0.0
    for step, (batch,) in enumerate(loader.stream(0, steps)):
        crops = [
            photometric.apply(c, p, config.mean, config.std, "cpu")
            for c, p in zip(batch.crops, batch.params, strict=True)
        ]
        views = [view for kind in crops for view in kind]
        s = schedules.evaluate(rates, step)
        set_hyperparameters(optimizer, s["lr"], s["wd"])
        optimizer.zero_grad()
        example.loss(views, step / steps).backward()
        optimizer.step()
        images += len(views[0])
        if step + 1 in evaluated:
            pause = time.process_time()
            kept.model = example.backbone
            export_timm(kept, out / "snapshots" / f"{step + 1:08d}")
            spent += time.process_time() - pause
    seconds = time.process_time() - began - spent
    kept.model = example.backbone
    export_timm(kept, out / "backbone")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"seconds": seconds, "img_per_s": images / seconds, "steps": steps, "peak_mb": peak}
    (out / "metrics.json").write_text(json.dumps(found) + "\n")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=sorted(EXAMPLES))
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--snapshots", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    print(json.dumps(run(args.method, args.recipe, args.out, args.steps, args.snapshots, args.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
