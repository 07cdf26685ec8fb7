"""Derived numbers: what an objective computes from each pair's own embeddings, given to every method as numbers of the pairs.

They are computed once, before any method begins, and travel as the caller's numbers do. What the method finds each of them to be worth
goes back to the embeddings it was made of, on the rank that owns them.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from clipscale.contrast.pairs import Agreement, Request
from clipscale.contrast.result import Result


class Derived:
    """One call's derived numbers, and the way back through them."""

    request: Request
    """The call, with the numbers among those of its pairs."""
    agreement: Agreement
    """What the ranks agreed about, with gradients wanted for the numbers where they are for any view."""

    def __init__(self, request: Request, agreement: Agreement) -> None:
        views = request.pairs.features(request.objective)
        with torch.enable_grad():
            self.leaves = {view: features.detach().to(request.dtype).requires_grad_() for view, features in views.items()}
            self.numbers = request.objective.derived_numbers(self.leaves)
        known = {name: number.detach() for name, number in self.numbers.items()}
        self.request = replace(request, pairs=replace(request.pairs, numbers={**request.pairs.numbers, **known}))
        wanted = frozenset(known) if agreement.wanted & views.keys() else frozenset[str]()
        self.agreement = replace(agreement, wanted=agreement.wanted | wanted)

    def hand_back(self, result: Result) -> Result:
        """The same result, with the numbers' gradients added to those of the embeddings."""
        if result.gradients is None or not self.numbers:
            return result
        leaves = result.gradients.leaves
        worth = {name: leaves.pop(name) for name in self.numbers if name in leaves}
        if not worth:
            return result
        numbers = [self.numbers[name] for name in worth]
        found = torch.autograd.grad(numbers, list(self.leaves.values()), list(worth.values()), allow_unused=True)
        for view, gradient in zip(self.leaves, found, strict=True):
            if gradient is not None and view in leaves:
                leaves[view].add_(gradient)
        return result
