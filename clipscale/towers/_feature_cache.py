"""FeatureCache: features of captions that a locked text tower has seen before.

b captions, L tokens, d features.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from clipscale.towers._module import TowerModule
from clipscale.towers._transformer import widened


class FeatureCache:
    """Features by token ids; the least recently used are forgotten first.

    A caption that is not held is encoded alone and without padding. So its features do not depend, not even by rounding,
    on the batch in which it came first, and a resumed run with an empty cache repeats the run nobody stopped bit for bit.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def clear(self) -> None:
        """Forget everything: the weights changed or moved."""
        self._features.clear()

    def features(self, tower: TowerModule, inputs: dict[str, Tensor]) -> Tensor:
        """`tokens` and `mask` [b, L] to features [b, d] in fp32 or better."""
        tokens, mask = inputs["tokens"], inputs["mask"]
        on_host = tokens.cpu().numpy()
        found = []
        for row, length in enumerate(mask.sum(dim=1).tolist()):
            key = on_host[row, :length].tobytes()
            if key not in self._features:
                alone = {"tokens": tokens[row : row + 1, :length], "mask": mask[row : row + 1, :length]}
                self._features[key] = widened(tower(alone)[0])
            self._features.move_to_end(key)
            found.append(self._features[key])
            if len(self._features) > self.rows:
                self._features.popitem(last=False)
        return torch.stack(found)
