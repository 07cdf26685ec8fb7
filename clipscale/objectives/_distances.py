"""Squared distances of embeddings, from their logits: for objectives that are written in distances instead of cosines.

‖a − b‖² = ‖a‖² + ‖b‖² − 2⟨a, b⟩. Embeddings are normalised, so this is 2 − 2 · cosine; the squares are kept all the same, so that gradients
are those of the formulas in the papers, also along the embeddings' own directions.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from clipscale.objectives import Block, Product, Row, View


def squares(views: Mapping[View, Tensor]) -> dict[str, Tensor]:
    """‖view‖² of every pair, as derived numbers: [b, D] -> [b]."""
    return {f"square of {view}": embeddings.square().sum(1) for view, embeddings in views.items()}


def block_distances(block: Block, product: Product) -> Tensor:
    """Squared distances of the rows' views to the columns': [n, m]."""
    rows, columns = block.numbers[f"square of {product[0]}"][0], block.numbers[f"square of {product[1]}"][1]
    return rows + columns - 2 * block.products[product] / block.scale


def pair_distances(row: Row) -> Tensor:
    """Squared distance of each pair's x to its y: [n]."""
    return row.numbers["square of x"] + row.numbers["square of y"] - 2 * row.positive / row.scale
