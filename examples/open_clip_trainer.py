"""open_clip's own trainer, with clipscale's exact loss in place of its own (needs `pip install "open_clip_torch[training]"`).

torchrun --nproc-per-node 8 examples/open_clip_trainer.py --model ViT-B-32 --train-data ... --local-loss --gather-with-grad
"""

import argparse
import sys

from torch import nn

from clipscale import ContrastiveLoss


def create_loss(args: argparse.Namespace) -> nn.Module:
    """What open_clip's flags ask for; its losses beside the contrastive one are not replaced."""
    if args.distill or "coca" in args.model.lower():
        raise SystemExit("clipscale's loss stands in for CLIP's and SigLIP's only: no --distill, no CoCa")
    return ContrastiveLoss("siglip" if args.siglip else "clip")


if __name__ == "__main__":
    import open_clip_train.main as trainer

    trainer.create_loss = create_loss
    trainer.main(sys.argv[1:])
