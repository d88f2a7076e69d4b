"""Contrast of embeddings: NT-Xent and its form with labels, and InfoNCE against a queue or against the keys of a batch.

Each is a cross-entropy of similarities over a temperature. Embeddings have length 1. `everyone` and `keys` are of the global
batch: of all processes, this one's rows, of which there are as many as `own` has, beginning at `first`. A process's value is
the mean over its own rows, so that the mean of the processes' values is that over the global batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.losses.numerics import full_precision


@full_precision
def nt_xent(
    own: Tensor, everyone: Tensor, own_things: Tensor, things: Tensor, first: int, temperature: float
) -> Tensor:
    """What views show of one thing is alike, and unlike all else.

    With A(i) all views of all images but i itself, and P(i) those of them that show the same thing,

        loss = mean over i of -1 / |P(i)| sum over p in P(i) of log( e^(z_i.z_p / tau) / sum over a in A(i) of e^(z_i.z_a / tau))

    If each image is a thing of its own and has two views, this is NT-Xent (Chen et al., 2020, SimCLR, equation 1); if things are
    classes it is L_out of Khosla et al., 2020 (SupCon, equation 2), which their code for ImageNet multiplies by tau.

    own: [V, B, D]; everyone: [V, N, D], V >= 2; own_things: int64 [B], things: int64 [N], equal where they are the same.
    """
    views, batch, _ = own.shape
    total = everyone.shape[1]
    if views < 2:
        raise ValueError(f"contrast needs two views or more of an image, not {views}")
    logits = own.flatten(0, 1) @ everyone.flatten(0, 1).t() / temperature  # [V*B, V*N]
    view, row = torch.arange(views, device=own.device), torch.arange(batch, device=own.device)
    itself = (view[:, None] * total + first + row).reshape(-1, 1)  # [V*B, 1]: the column of each row's own embedding
    same = (own_things[:, None] == things).repeat(views, views).scatter(1, itself, False)  # [V*B, V*N]
    pulled = logits.masked_fill(~same, 0).sum(1) / same.sum(1)  # [V*B]
    return (torch.logsumexp(logits.scatter(1, itself, -torch.inf), 1) - pulled).mean()


@full_precision
def queue_info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE against a queue (He et al., 2020, MoCo, equation 1): each query's own key against all K of the queue.

    queries: [V, B, D], keys: [B, D], of the same images; queue: [K, D]. A mean over V and B.
    """
    own = (queries * keys).sum(-1, keepdim=True)  # [V, B, 1]
    logits = torch.cat((own, queries @ queue.t()), -1) / temperature  # [V, B, 1 + K]
    return (torch.logsumexp(logits, -1) - logits[..., 0]).mean()


@full_precision
def batch_info_nce(queries: Tensor, keys: Tensor, first: int, temperature: float) -> Tensor:
    """InfoNCE against the keys of the batch (Chen, Xie & He, 2021, MoCo v3, algorithm 1: `ctr`), 2 tau times cross-entropy.

    Twice the mean over pairs of a key's view and another view, keys being of the first T views: with two views this is the
    paper's symmetrised sum ctr(q1, k2) + ctr(q2, k1).

    queries: [V, B, D]; keys: [T, N, D].
    """
    views, targets = queries.shape[0], keys.shape[0]
    pairs = [(q, k) for q in range(views) for k in range(targets) if q != k]
    if not pairs:
        raise ValueError(f"views are compared with others: {views} of queries and {targets} of keys are too few")
    own = first + torch.arange(queries.shape[1], device=queries.device)  # [B]: each query's key
    losses = [F.cross_entropy(queries[q] @ keys[k].t() / temperature, own) for q, k in pairs]
    return 2 * 2 * temperature * torch.stack(losses).mean()
