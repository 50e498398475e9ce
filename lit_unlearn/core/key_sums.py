"""Two sums over many edited keys that suffice for a closed form; their size does not depend on the number of keys.

If V1 is the output of other keys K1*, ``V1 = A K1*``, nothing but W and A differs between maps with the same keys:
``R K1ᵀ = A (K1* − K1) K1ᵀ + (A − W) K1 K1ᵀ``. So the two sums in it are made once for all maps and rounds
(with a tolerance, for which each map has a null space of its own, once for each map).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_unlearn.core.matrices import checked_matrix

MANY = 4
"""Sums replace the keys if there are more than this many keys for each input of a layer."""


class KeySums(NamedTuple):
    """Sums over the edited keys of one layer, float64.

    Attributes:
        moment: K1 K1ᵀ, (d_in, d_in).
        residual: R K1ᵀ with R = V1 − W K1, (d_out, d_in).
        num_keys: Number of keys.
        moved: (K1* − K1) K1ᵀ, (d_in, d_in), if the values are the outputs of K1*.
    """

    moment: Tensor
    residual: Tensor
    num_keys: int
    moved: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, keys: Tensor, values: Tensor, moment: Tensor | None = None) -> KeySums:
        """Sum up ``keys`` and ``values``, converting at most d_in rows to float64 at a time.

        Args:
            weight: W, (d_out, d_in).
            keys: K1 transposed, (n, d_in).
            values: V1 transposed, (n, d_out).
            moment: K1 K1ᵀ (d_in, d_in), if it is known already.

        Raises:
            ValueError: Shapes do not match, or values are not finite.
        """
        weight = checked_matrix("weight", weight, (None, None))
        d_out, d_in = weight.shape
        total, residual = weight.new_zeros(d_in, d_in) if moment is None else moment, torch.zeros_like(weight)
        for some_keys, some_values in zip(keys.split(d_in), values.split(d_in), strict=True):
            rows = checked_matrix("keys", some_keys, (None, d_in), weight.device)
            wished = checked_matrix("values", some_values, (len(rows), d_out), weight.device)
            if moment is None:
                total += rows.mT @ rows
            residual += (wished - rows @ weight.mT).mT @ rows
        return cls(total, residual, len(keys))

    @classmethod
    def of_anchors(
        cls,
        weight: Tensor,
        keys: Tensor,
        anchors: Tensor,
        anchor_weight: Tensor | None = None,
        moment: Tensor | None = None,
        moved: Tensor | None = None,
    ) -> KeySums:
        """As ``of`` with the values ``anchors @ anchor_weight.mT``, which are not computed.

        Args:
            weight: W, (d_out, d_in).
            keys: K1 transposed, (n, d_in).
            anchors: K1* transposed, (n, d_in).
            anchor_weight: A, (d_out, d_in); None: W.
            moment: K1 K1ᵀ (d_in, d_in), if it is known already.
            moved: (K1* − K1) K1ᵀ (d_in, d_in), likewise.

        Raises:
            ValueError: As in ``of``.
        """
        weight = checked_matrix("weight", weight, (None, None))
        d_in = weight.shape[1]
        if moment is None or moved is None:
            moment, moved = weight.new_zeros(d_in, d_in), weight.new_zeros(d_in, d_in)
            for some_keys, some_anchors in zip(keys.split(d_in), anchors.split(d_in), strict=True):
                rows = checked_matrix("keys", some_keys, (None, d_in), weight.device)
                moment += rows.mT @ rows
                moved += (checked_matrix("anchors", some_anchors, tuple(rows.shape), weight.device) - rows).mT @ rows
        if anchor_weight is None:
            return cls(moment, weight @ moved, len(keys), moved)
        own = checked_matrix("anchor_weight", anchor_weight, tuple(weight.shape), weight.device)
        return cls(moment, own @ moved + (own - weight) @ moment, len(keys), moved)
