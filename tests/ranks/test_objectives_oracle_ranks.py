"""Every objective gives the values and gradients of an oracle made outside this repository: dense, in tiles, and on four ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipscale.contrast import ContrastSettings, Pairs, contrastive_loss
from clipscale.objectives import Objective, Row, Side
from clipscale.objectives.alignment import Alignment
from clipscale.objectives.barlip import Barlip
from clipscale.objectives.cacr import Cacr
from clipscale.objectives.codiemb import Codiemb
from clipscale.objectives.cross_uniformity import CrossUniformity
from clipscale.objectives.dcl import Dcl
from clipscale.objectives.dclw import Dclw
from clipscale.objectives.decoupled import Decoupled
from clipscale.objectives.focal import Focal
from clipscale.objectives.gram import Gram
from clipscale.objectives.m2_grouped import M2Grouped
from clipscale.objectives.margin import Margin
from clipscale.objectives.multi_label import MultiLabel
from clipscale.objectives.mv_dhel import MvDhel
from clipscale.objectives.mv_infonce import MvInfonce
from clipscale.objectives.rgcl import Rgcl
from clipscale.objectives.soft_clip import SoftClip
from clipscale.objectives.supcon import Supcon
from clipscale.objectives.uniformity import Uniformity
from clipscale.objectives.z_loss import ZLoss
from clipscale.parallel.mesh import Mesh

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "objectives.json").read_text())


def from_x(kind: type[Objective]) -> type[Objective]:
    """The same objective with the direction from x alone, which is all that the oracle has of some."""

    class FromX(kind):
        def pair_loss(self, rows: Mapping[Side, Row]) -> Tensor:
            return 2 * self.row_loss(rows["x"])

    return FromX


class OfX(Uniformity):
    """The oracle has each modality alone."""

    def batch_loss(self, statistics: Mapping[str, Tensor], *, count: int) -> Tensor:
        return super().batch_loss({"x": statistics["x"], "y": statistics["x"]}, count=count)


CASES: dict[str, Objective] = {
    "dcl_crossmodal": Dcl(),
    "dcl_two_view_paper": Dcl(negatives="both"),
    "dclw_crossmodal": Dclw(),
    "dclw_two_view_paper": Dclw(negatives="both"),
    "m2_grouped_4": M2Grouped(num_groups=2),  # groups of 4 pairs
    "mv_infonce_paper_2": MvInfonce(),
    "mv_infonce_paper_3": MvInfonce(num_views=3),
    "mv_infonce_code_2": MvInfonce(same_view_negatives=True),
    "mv_infonce_code_3": MvInfonce(num_views=3, same_view_negatives=True),
    "mv_dhel_paper_2": MvDhel(),
    "mv_dhel_paper_3": MvDhel(num_views=3),
    "mv_dhel_code_2": MvDhel(form="code"),
    "mv_dhel_code_3": MvDhel(num_views=3, form="code"),
    "multipos_supcon_x2y": from_x(Supcon)(positives="label"),
    "multipos_softmax_x2y": from_x(Supcon)(positives="label", mean=False),
    "multipos_decoupled_x2y": from_x(Decoupled)(positives="label"),
    "multipos_bce_x2y": MultiLabel(positives="label"),
    "align": Alignment(),
    "uniform_x": OfX(),
    "xuniform": CrossUniformity(),
    "contrastive_gap_CUAXU": Objective.model_validate({"name": "clip", "add": ["alignment", "uniformity", "cross_uniformity"]}),
    "barlip": Barlip(),
    "focal_x2y": from_x(Focal)(),
    "focal_x2y_detached": from_x(Focal)(through_weight=False),
    "focal_both": Focal(),
    "interclr_margin_-0.5_row": from_x(Margin)(),
    "zloss_row_UNVERIFIED": from_x(ZLoss)(),
    "m3col_soft_clip": SoftClip(),
    "cacr_x_vs_y": from_x(Cacr)(sharpness=1.0),
    "cacr_symmetric": Cacr(sharpness=1.0),
    "gram_2": Gram(epsilon=0.0),
    "gram_3": Gram(num_views=3, epsilon=0.0),
    "gram_3_nosmooth": Gram(num_views=3, label_smoothing=0.0, epsilon=0.0),
    "codiemb_ir": Codiemb(num_positives=2),
    "fastclip_v3_rgcl_g": Rgcl(),
    "gcl_tau0.1": Rgcl(rho=0.0),
}
SCALES = {"codiemb_ir": 50.0, "m3col_soft_clip": 8.0, "fastclip_v3_rgcl_g": 1 / 0.07}
"""Where it is not 10."""


def compute(mesh: Mesh, name: str, method: str) -> dict[str, object]:
    inputs, each = GOLDEN["inputs"], 8 // mesh.world
    rows = slice(mesh.rank * each, (mesh.rank + 1) * each)
    leaves = {view: torch.tensor(inputs[view], dtype=torch.float64)[rows].requires_grad_() for view in ("x", "y", "z")}
    scale = torch.tensor(SCALES.get(name, 10.0), dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(inputs["labels"])[rows]
    settings = ContrastSettings(method=method, tile_rows=3, tile_columns=5)
    extra = torch.tensor(inputs["neg"], dtype=torch.float64)[rows].flatten(0, 1) if name == "codiemb_ir" else None
    pairs = Pairs(leaves["x"], leaves["y"], views={"z": leaves["z"]}, numbers={"label": labels}, extra_y=extra)
    loss = contrastive_loss(CASES[name], pairs, scale, settings=settings, mesh=mesh).loss
    loss.backward()
    gradients = {f"grad_{view}": leaf.grad.tolist() for view, leaf in leaves.items()}
    return {"value": loss.item(), **gradients, "d_ds": scale.grad.item()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("world", "method"), [(1, "dense"), (1, "tiled"), (4, "dense"), (4, "grid")])
def test_values_and_gradients_are_the_oracles(ranks, name, world, method):
    expected, answers = GOLDEN["values"][name], ranks(world)(compute, name, method)
    for answer in answers:
        assert answer["value"] == pytest.approx(expected["value"], rel=1e-12)
    for key in expected.keys() - {"value"}:
        found = torch.tensor([answer[key] for answer in answers], dtype=torch.float64)
        found = found.sum() if key == "d_ds" else found.flatten(0, 1)
        wanted = torch.tensor(expected[key], dtype=torch.float64)
        assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max(), key  # the oracle's are finite differences
