"""Linear probes of a frozen ViT on augmented images: all heads on one forward pass, and dino's eval_linear, a run a head.

Both train one epoch on the same JPEG files with RandomResizedCrop and flips. dino's side runs one setting of each
pooling and counts it for all learning rates: the runs differ in a number only.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import peers_dino, photographs
from benchmarks.case import Timed
from selfsup.eval.settings import Pooling

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POOLINGS: tuple[Pooling, ...] = (
    "cls",
    "cls+patchmean",
)  # dino: --n_last_blocks 1, without and with --avgpool_patchtokens
CHECKED = (0.01, 0.1)
"""Learning rates whose heads are compared."""


def inputs(options: dict[str, Any], folder: Path) -> None:
    """Photographs, the backbone's weights, two batches in memory and the heads' first weights for the comparison."""
    import timm

    photographs.write(folder / "images", options["images"], options["classes"])
    torch.manual_seed(0)
    model: Any = timm.create_model(options["backbone"], num_classes=0)
    state = {f"backbone.{k}": v.contiguous().clone() for k, v in model.state_dict().items()}
    size, classes = options["size"], options["classes"]
    state["images"] = torch.randn(2, 4, 3, size, size)
    state["labels"] = torch.randint(classes, (2, 4))
    for width, name in zip((1, 2), POOLINGS):
        state[f"head.{name}"] = 0.01 * torch.randn(classes, width * model.num_features)
    save_file(state, folder / "state.safetensors")


class Ours(Timed):
    """`selfsup eval linear ... augment=true`: its training, without extraction for the choice and without val."""

    disclosures = (
        "linear: training alone is timed on both sides (decoding, crops, forward pass, heads), no validation; "
        "features are not standardised, as in dino",
    )

    @staticmethod
    def imports(path: str | None) -> None:

        import selfsup.eval.linear  # noqa: F401

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        import numpy as np

        from selfsup.backbones import create_backbone
        from selfsup.config import BackboneConfig
        from selfsup.data.sources import open_source
        from selfsup.eval.datasets import Images, LabelledPair
        from selfsup.eval.features import Transform, extract
        from selfsup.eval.linear import _Trainer
        from selfsup.eval.poolings import Request
        from selfsup.eval.settings import LinearSettings
        from selfsup.eval.targets import Target

        super().__init__(options, folder)
        self.state = load_file(folder / "state.safetensors")
        backbone = create_backbone(
            BackboneConfig(name=options["backbone"]), mean=MEAN, std=STD, input_size=options["size"]
        )
        weights = {k.removeprefix("backbone."): v for k, v in self.state.items() if k.startswith("backbone.")}
        backbone.model.load_state_dict(weights)
        backbone.eval().requires_grad_(False)
        self.target = Target("benchmark", "backbone", backbone, "benchmark", torch.device("cpu"))
        self.settings = LinearSettings(
            lr=RATES[: options["rates"]], pooling=POOLINGS, epochs=1, batch=options["images"], standardize=False,
            augment=True, workers=0, cache=False, device="cpu",
        )  # fmt: skip
        source = open_source(str(folder / "images"), channels=3)
        images = Images(source, np.arange(len(source)), str(folder))
        labels = source.labels
        assert labels is not None
        self.rows, self.requests = np.arange(len(source)), [Request(p) for p in POOLINGS]
        transform = Transform(options["size"], options["size"] * 256 // 224, "bicubic", MEAN, STD)
        pair = LabelledPair(images, images, labels, labels, source.classes, options["classes"])
        train = extract(self.target, images, self.settings, self.requests, transform, scratch=folder, quiet=True)
        self.trainer = _Trainer(self.target, self.settings, transform, pair, train)

    def run(self, count: int) -> None:
        for _ in range(count):
            self.trainer.train(self.requests, self.settings.lr, self.rows, "probe")

    def answer(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        from selfsup.eval.poolings import forward_function
        from selfsup.eval.probe import Probe, Recipe

        widths = [self.state[f"head.{name}"].shape[1] for name in POOLINGS]
        recipe = Recipe(CHECKED, 1, 4, self.options["classes"])
        probe = Probe(widths, recipe)
        for width, name in zip(widths, POOLINGS):
            probe.heads[width].weight.copy_(self.state[f"head.{name}"].T.repeat(1, len(CHECKED))[None])
        forward = forward_function(self.target, self.settings, self.requests)
        for images, labels in zip(self.state["images"], self.state["labels"]):
            probe.step(forward(images), labels, 4, 0.0)
        found: dict[str, Tensor] = {}
        for width, name in zip(widths, POOLINGS):
            both = probe.heads[width].weight[0].view(width, len(CHECKED), -1)  # [D, L, C]
            found |= {f"{name} {lr}": both[:, i].T for i, lr in enumerate(CHECKED)}
        return found


class Dino(Timed):
    """eval_linear.train, unmodified, for one learning rate of each pooling; its time counts for all of them."""

    disclosures = (
        "dino: eval_linear.train and LinearClassifier are called unmodified, with the transforms its main program "
        "builds, without DistributedDataParallel around the head; its global `args.arch` is set to vit_small",
        "dino: one learning rate of each pooling is run, and the time counts 13 times",
        peers_dino.NO_CUDA,
    )

    @staticmethod
    def imports(path: str | None) -> None:
        peers_dino.load(path, "eval_linear")
        peers_dino.without_cuda()

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        import eval_linear
        import vision_transformer as vits
        from torchvision import datasets, transforms

        super().__init__(options, folder)
        eval_linear.args = SimpleNamespace(arch="vit_small")  # a global of its main program
        self.train, self.classifier = eval_linear.train, eval_linear.LinearClassifier
        self.state = load_file(folder / "state.safetensors")
        arch = options["backbone"].removesuffix("_patch16_224")
        self.model = vits.__dict__[arch](patch_size=16, num_classes=0, img_size=[options["size"]])
        weights = {k.removeprefix("backbone."): v for k, v in self.state.items() if k.startswith("backbone.")}
        self.model.load_state_dict(weights)
        self.model.eval()
        steps = [
            transforms.RandomResizedCrop(options["size"]),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
        augment = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])
        dataset = datasets.ImageFolder(str(folder / "images"), transform=augment)
        self.loader = torch.utils.data.DataLoader(dataset, batch_size=options["images"], shuffle=True)

    def scale(self) -> float:
        return float(self.options["rates"])

    def _setting(self, pooling: str, lr: float, batch: int, loader: Any) -> Any:
        start = self.state[f"head.{pooling}"]
        head = self.classifier(start.shape[1], num_labels=len(start))
        if pooling != "cls":  # dino interleaves the two halves: [D, 2] flattened
            start = start.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
        head.linear.weight.data.copy_(start)
        optimizer = torch.optim.SGD(head.parameters(), lr * batch / 256, momentum=0.9, weight_decay=0)
        self.train(self.model, head, optimizer, loader, 0, 1, pooling != "cls")
        return head

    def run(self, count: int) -> None:
        for _ in range(count):
            for pooling in POOLINGS:
                self._setting(pooling, RATES[self.options["rates"] // 2], self.options["images"], self.loader)

    def answer(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        batches = list(zip(self.state["images"], self.state["labels"]))
        heads = {f"{p} {lr}": self._setting(p, lr, 4, batches) for p in POOLINGS for lr in CHECKED}
        found = {}
        for name, head in heads.items():
            weight = head.linear.weight.detach()
            if name.startswith("cls+"):
                weight = weight.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)
            found[name] = weight
        return found


def differ(options: dict[str, Any], ours: dict[str, Tensor], peer: dict[str, Tensor]) -> str:
    """The trained weights."""
    for name, theirs in peer.items():
        off = float((ours[name] - theirs).norm() / theirs.norm())
        if off > 1e-4:
            return f"the head {name} is off by {off:.1e}"
    return ""


SIDES: dict[str, type[Timed]] = {"ours": Ours, "dino": Dino}
