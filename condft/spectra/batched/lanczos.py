"""The Lanczos process of `condft.spectra.lanczos` on many matrices of one shape at a time, one start vector each.

The result of a matrix is taken when its own ends are found. The product goes on over the whole batch as long as any
matrix needs it, which does not change the results taken before.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from condft.spectra.lanczos import MAX_VECTORS, Ends, next_look, ritz_ends, start_vectors

__all__ = ["run_batch"]


def run_batch(
    operator: Callable[[Tensor], Tensor], like: Tensor, until: Callable[[Ends], bool], needed: Sequence[bool]
) -> list[Ends | None]:
    """The ends of each operator's spectrum, by the process with start vector 0, when they first satisfy the caller.

    Args:
        operator: `(B, 1, n)` -> `(B, 1, n)`: one symmetric positive semidefinite map for each vector.
        like: `(B, n, n)` of the map's dtype and device.
        until: As of `BlockLanczos.run`, called for each matrix.
        needed: Whether the ends of each matrix are needed; those of the others are None.
    """
    count, n = like.shape[:2]
    limit = min(MAX_VECTORS, n)
    basis = like.new_empty(count, limit + 1, n)
    basis[:, 0] = start_vectors(n, 1, 0)[0].to(like)  # the one that a matrix alone starts with
    projection = torch.zeros(count, limit, limit, dtype=torch.float64, device=like.device)
    ends: list[Ends | None] = [None] * count
    left = {index for index, of_interest in enumerate(needed) if of_interest}
    look = min(next_look(0, n), limit)
    for vectors in range(1, limit + 1):
        norms = _step(operator, basis, projection, vectors)
        if vectors < look or not left:
            continue
        # One copy from the device for the whole batch.
        seen, couplings = projection[:, :vectors, :vectors].cpu(), norms.double().cpu()
        for index in sorted(left):  # a copy: the loop removes from the set
            found = ends[index] = ritz_ends(seen[index], couplings[index], n, like.dtype)
            if found.exhausted or until(found):
                left.remove(index)
        if not left:
            break
        look = min(next_look(vectors, n), limit)
    return ends


def _step(operator: Callable[[Tensor], Tensor], basis: Tensor, projection: Tensor, vectors: int) -> Tensor:
    """Product number `vectors` of each, orthogonalized twice; returns the norms of the new parts, `(B, 1, 1)`."""
    known = basis[:, :vectors]
    new = operator(known[:, -1:])
    inner = torch.bmm(new, known.mT)
    new = torch.baddbmm(new, inner, known, alpha=-1)
    again = torch.bmm(new, known.mT)
    new = torch.baddbmm(new, again, known, alpha=-1)
    projection[:, :vectors, vectors - 1] = (inner + again)[:, 0]
    norms = torch.linalg.vector_norm(new, dim=2, keepdim=True)
    torch.div(new[:, 0], norms[:, 0], out=basis[:, vectors])
    return norms
