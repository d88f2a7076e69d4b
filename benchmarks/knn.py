"""k-NN votes at four k: our evaluation, dino's eval_knn.knn_classifier, and faiss's bare search for k = 200."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import peers_dino
from benchmarks.case import Timed

TEMPERATURE = 0.07
SPREAD = 0.3
"""Of the classes' centres, in standard deviations of a class: their cosines overlap, as a backbone's do."""


def inputs(options: dict[str, Any], folder: Path) -> None:
    """Features of Gaussian classes, not of length 1, and labels."""
    draw = torch.Generator().manual_seed(0)
    centres = SPREAD * torch.randn(options["classes"], options["width"], generator=draw)
    found = {}
    for name in ("bank", "queries"):
        labels = torch.randint(options["classes"], (options[name],), generator=draw)
        found[name] = centres[labels] + torch.randn(options[name], options["width"], generator=draw)
        found[f"{name}_labels"] = labels
    save_file(found, folder / "features.safetensors")


class Features(Timed):
    """Holds the features."""

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        super().__init__(options, folder)
        self.x = load_file(folder / "features.safetensors")

    def flops(self) -> int:
        return 2 * self.options["bank"] * self.options["queries"] * self.options["width"]


class Ours(Features):
    """knn.classify: one search, every k's votes."""

    disclosures = (
        "knn: features of both sides start in memory, not of length 1; normalising them is timed on both sides",
    )

    @staticmethod
    def imports(path: str | None) -> None:

        import selfsup.eval.knn  # noqa: F401

    def _classify(self) -> list[dict[str, Any]]:
        from selfsup.eval import knn

        rows, self.protocol = knn.classify(
            self.x["bank"].numpy(),
            self.x["bank_labels"].numpy(),
            self.x["queries"].numpy(),
            self.x["queries_labels"].numpy(),
            ks=self.options["k"],
            temperatures=(TEMPERATURE,),
            classes=self.options["classes"],
        )
        return rows

    def run(self, count: int) -> None:
        for _ in range(count):
            self._classify()

    def answer(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        from selfsup.eval.search import neighbours

        found = neighbours(self.x["bank"].numpy(), self.x["queries"].numpy(), max(self.options["k"]))
        rows = self._classify()
        return {
            "accuracy": torch.tensor([[row["top1"], row["top5"]] for row in rows], dtype=torch.float64),
            "neighbours": found.indices,
        }

    def facts(self) -> dict[str, Any]:
        return {"search": self.protocol["search"], "again_in_float64": self.protocol["searched_again_in_float64"]}


class Dino(Features):
    """knn_classifier for one k after another, as eval_knn's main program calls it, after its normalisation."""

    disclosures = ("dino: eval_knn.knn_classifier is called unmodified; it needs no .cuda()",)

    @staticmethod
    def imports(path: str | None) -> None:
        peers_dino.load(path, "eval_knn")

    def _classify(self) -> list[tuple[float, float]]:
        import eval_knn

        bank, queries = (torch.nn.functional.normalize(self.x[k], dim=1, p=2) for k in ("bank", "queries"))
        return [
            eval_knn.knn_classifier(
                bank, self.x["bank_labels"], queries, self.x["queries_labels"], k, TEMPERATURE, self.options["classes"]
            )
            for k in self.options["k"]
        ]

    def run(self, count: int) -> None:
        for _ in range(count):
            self._classify()

    def answer(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"accuracy": torch.tensor(self._classify(), dtype=torch.float64) / 100}


class Faiss(Features):
    """IndexFlatIP.search at the largest k over normalised features: no votes, and what it is given is ready."""

    disclosures = ("faiss: only index.search is timed; normalising and adding the bank came before",)

    @staticmethod
    def imports(path: str | None) -> None:
        import faiss  # noqa: F401

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        import faiss

        super().__init__(options, folder)
        bank, queries = (torch.nn.functional.normalize(self.x[k], dim=1).numpy() for k in ("bank", "queries"))
        faiss.omp_set_num_threads(torch.get_num_threads())
        self.index, self.queries = faiss.IndexFlatIP(options["width"]), queries
        self.index.add(bank)

    def run(self, count: int) -> None:
        for _ in range(count):
            self.found = self.index.search(self.queries, max(self.options["k"]))[1]

    def answer(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        self.run(1)
        return {"neighbours": torch.from_numpy(self.found)}


def differ(options: dict[str, Any], ours: dict[str, Tensor], peer: dict[str, Tensor]) -> str:
    """Votes: the same figures but for one query in a thousand, whose classes tie in float32. Neighbours: the same sets
    but for one in ten thousand, equal in float32 at the edge."""
    if "accuracy" in peer:
        off = (ours["accuracy"] - peer["accuracy"]).abs().max().item()
        if off > 1e-3 + 1e-9:
            return f"accuracies differ by {off:.4f}: {ours['accuracy'].tolist()} and {peer['accuracy'].tolist()}"
        if not 0.02 < peer["accuracy"][:, 0].min().item() < 0.999:
            return f"accuracies of {peer['accuracy'].tolist()} would hide a wrong vote"
        return ""
    shared = [len(np.intersect1d(a, b)) for a, b in zip(ours["neighbours"].numpy(), peer["neighbours"].numpy())]
    missing = 1 - sum(shared) / peer["neighbours"].numel()
    return f"{missing:.2%} of faiss's neighbours are not ours" if missing > 1e-4 else ""


SIDES: dict[str, type[Timed]] = {"ours": Ours, "dino": Dino, "faiss": Faiss}
