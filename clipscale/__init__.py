"""clipscale: contrastive pretraining of image, speech and text encoders, exact at any scale."""

__version__ = "0.1.0"
