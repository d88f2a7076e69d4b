"""The vote: golden features against brute force, DINO's own formula, ties, tiny banks, missing labels."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from selfsup.errors import UserError
from selfsup.eval import knn


def _sibling(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


brute_force = _sibling("brute_force")
GOLDEN = Path(__file__).with_name("golden_features.npz")


def test_golden_file_is_what_the_script_makes():
    made, stored = _sibling("make_golden").make(), np.load(GOLDEN)
    assert GOLDEN.stat().st_size < 200_000
    for key, value in made.items():
        assert np.array_equal(stored[key], value) and stored[key].dtype == value.dtype


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("temperature", [0.07, 1.0, 0.002])
def test_golden_equals_brute_force(backend: str, temperature: float):
    """Every prediction and both accuracies for k = 1, 10, 20, 200, duplicates and equal votes included."""
    g = np.load(GOLDEN)
    ks = (1, 10, 20, 200)
    rows, facts = knn.classify(
        g["bank"], g["bank_labels"], g["queries"], g["labels"], ks=ks, temperatures=(temperature,), backend=backend
    )
    found = knn.neighbours(g["bank"], g["queries"], 200, backend=backend)
    near = torch.from_numpy(g["bank_labels"])[found.indices]
    for k, row in zip(ks, rows):
        ranked = knn.vote(found.similarities, near, 12, k, temperature)
        hits1 = hits5 = 0
        for i, query in enumerate(g["queries"]):
            # votes of exp(1 / 0.002) overflow; a common factor changes nothing
            shift = brute_force.nearest(g["bank"], query, 1)[0][0]
            classes = _predict(g["bank"], g["bank_labels"], query, k, temperature, shift)
            got = [c for c in ranked[i].tolist() if c >= 0]
            assert got == classes[:5], (k, i)
            hits1 += classes[0] == g["labels"][i]
            hits5 += g["labels"][i] in classes[: min(5, k)]
        assert row["top1"] == pytest.approx(hits1 / 120, abs=1e-12)
        assert row["top5"] == pytest.approx(hits5 / 120, abs=1e-12)
    assert facts["classes"] == 12 and facts["val_classes_not_in_train"] == 1


def _predict(bank, labels, query, k, temperature, shift):
    if temperature > 0.01:
        return brute_force.predict(bank, labels, query, k, temperature)
    cosines, rows = brute_force.nearest(bank, query, k)
    votes: dict[int, float] = {}
    for cosine, row in zip(cosines, rows):
        votes[int(labels[row])] = votes.get(int(labels[row]), 0.0) + float(np.exp((cosine - shift) / temperature))
    top = max(votes.values())
    return sorted(votes, key=lambda c: (-round(votes[c] / top * 2.0**30), c))


def test_dino_formula():
    """The vote of the paper's code on features without ties: one-hot times exp(similarity / T), summed, sorted."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(9, 16))
    labels, truth = rng.integers(0, 9, 500), rng.integers(0, 9, 90)
    bank = (centres[labels] + rng.normal(size=(500, 16))).astype("f")
    queries = (centres[truth] + rng.normal(size=(90, 16))).astype("f")
    rows, _ = knn.classify(bank, labels, queries, truth, ks=(20, 5), temperatures=(0.07, 0.5))
    b = torch.nn.functional.normalize(torch.from_numpy(bank))
    q = torch.nn.functional.normalize(torch.from_numpy(queries))
    for row in rows:
        similarity, index = (q @ b.T).topk(row["k"])
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels)[index], 9)  # [Q, k, 9]
        votes, order = (one_hot * (similarity / row["temperature"]).exp()[..., None]).sum(1).sort(1, True)
        # top5 here leaves out classes without a vote, which the paper's code ranks at random
        hit = (order == torch.from_numpy(truth)[:, None]) & (votes > 0)
        assert row["top1"] == pytest.approx(hit[:, 0].float().mean().item())
        assert row["top5"] == pytest.approx(hit[:, : min(5, row["k"])].any(1).float().mean().item())


def test_tie_rules_by_hand():
    similarities = torch.tensor([[0.5, 0.5, 0.2]])
    assert knn.vote(similarities, torch.tensor([[2, 1, 0]]), 4, 2, 0.07).tolist() == [[1, 2, -1, -1]]
    assert knn.vote(similarities, torch.tensor([[2, 1, 2]]), 4, 3, 0.07).tolist() == [[2, 1, -1, -1]]
    bank = np.array(
        [[1, 0], [1, 0], [0, 1]], dtype="f"
    )  # two equal images with different labels: the first one is nearer
    rows, _ = knn.classify(bank, np.array([1, 0, 0]), np.array([[2, 0]], dtype="f"), np.array([1]), ks=(1, 2))
    assert [r["top1"] for r in rows] == [1.0, 0.0]  # k=2: equal votes, the lower class wins


def test_vote_order_of_summation_does_not_matter():
    """Equal sets of weights in another order are equal votes, whatever float addition makes of them."""
    weights = torch.tensor([0.9, 0.7, 0.31, 0.11, 0.05]).double()
    similarities = torch.cat([weights, weights.flip(0)])[None]
    labels = torch.tensor([[3] * 5 + [1] * 5])
    assert knn.vote(similarities, labels, 5, 10, 0.07)[0, 0] == 1


def test_chunks_of_queries(monkeypatch: pytest.MonkeyPatch):
    g = np.load(GOLDEN)
    arguments = (g["bank"], g["bank_labels"], g["queries"], g["labels"])
    whole = knn.classify(*arguments, ks=(20,))[0]
    monkeypatch.setattr(knn, "_VOTE_BYTES", 8 * 12 * 7)
    assert knn.classify(*arguments, ks=(20,))[0] == whole


@pytest.mark.parametrize("n", [1, 2, 5, 99, 100])
def test_tiny_banks_clip_k_and_say_so(n: int):
    rng = np.random.default_rng(n)
    bank, labels = rng.normal(size=(n, 3)).astype("f"), np.arange(n) % 3
    rows, facts = knn.classify(bank, labels, bank, labels, ks=(1, 20, 200))
    assert rows[0]["top1"] == 1.0
    assert [r["k_used"] for r in rows] == [1, min(20, n), min(200, n)]
    assert ("20, 200" in facts["note"]) == (n < 20) and f"{n} images" in facts["note"]


def test_classes_are_counted_over_train_and_val():
    bank = np.eye(3, dtype="f")
    rows, facts = knn.classify(bank, np.array([0, 1, 2]), bank, np.array([0, 1, 7]), ks=(1,))
    assert rows[0]["top1"] == pytest.approx(2 / 3) and facts["classes"] == 8 and facts["val_classes_not_in_train"] == 1


def test_unlabelled_images_are_left_out_or_refused():
    bank = np.eye(4, dtype="f")
    rows, facts = knn.classify(bank, np.array([0, -1, 2, 1]), bank, np.array([0, 1, -1, 1]), ks=(1,))
    assert facts["unlabelled_left_out"] == {"train": 1, "val": 1} and facts["bank_images"] == 3
    assert rows[0]["top1"] == pytest.approx(2 / 3)
    for train, val, what in (([-1] * 4, [0] * 4, "train"), ([0] * 4, [-1] * 4, "val")):
        with pytest.raises(UserError, match=f"{what}: none of 4 images has a label"):
            knn.classify(bank, np.array(train), bank, np.array(val))
