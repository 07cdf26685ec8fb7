"""Fused kernels: tiles of the softmax and sigmoid losses in Triton; logits never leave the chip, their gradients leave it once.

Nothing here is imported before a call wants it: triton takes a second to import, and belongs to CUDA builds of torch alone.
"""
