"""Entries of torch.hub: torch.hub.load(CHECKOUT or "OWNER/REPOSITORY", "backbone", TARGET).

model = torch.hub.load("path/to/this/checkout", "backbone", "runs/demo", source="local")
features = model(images)     # images [B, C, H, W], normalised by model.mean and model.std; pooled [B, D], patches [B, D, h, w]
"""

from typing import Any

dependencies = ["torch", "torchvision", "timm", "safetensors", "pydantic", "yaml", "numpy"]


def backbone(target: str, **options: Any) -> Any:
    """A trained backbone in eval() mode: target is a run, a backbone folder, a .safetensors or a .pth file.

    options: see `selfsup.load_backbone`.
    """
    import selfsup

    return selfsup.load_backbone(target, **options)
