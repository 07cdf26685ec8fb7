"""Devices: the arithmetic per second that makers publish for their GPUs, by precision.

NVIDIA's data sheets: V100 (2018), T4 (2018), A100 (2020), A30, A40, RTX A6000 (2021), H100 and H100 NVL (2023), L4, L40, L40S (2023), GH200
(2023), H20 and H800 as sold (2023), H200 (2024), HGX B100 and B200, GB200 (2024). Dense tensor-core rates: where a sheet gives them "with
sparsity", half of that. fp32 is the rate of ordinary cores, tf32 that of tensor cores, which torch uses where it is allowed to
(`torch.set_float32_matmul_precision`). A card that stands under several names is listed under each; one that is not listed is unknown:
slices of a card (MIG) too.
"""

from __future__ import annotations

import re

import torch

_RATES: dict[str, dict[str, float]] = {
    r"Tesla V100-SXM\d-\w+": {"fp16": 125, "fp32": 15.7},
    r"Tesla V100-PCIE-\w+": {"fp16": 112, "fp32": 14},
    r"Tesla T4": {"fp16": 65, "fp32": 8.1},
    r"NVIDIA A(100|800)[- ].*GB": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    r"NVIDIA A30": {"bf16": 165, "fp16": 165, "tf32": 82, "fp32": 10.3},
    r"NVIDIA A40": {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4},
    r"NVIDIA RTX A6000": {"bf16": 154.8, "fp16": 154.8, "tf32": 77.4, "fp32": 38.7},
    r"NVIDIA L4": {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3},
    r"NVIDIA L40": {"bf16": 181, "fp16": 181, "tf32": 90.5, "fp32": 90.5},
    r"NVIDIA L40S": {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6},
    r"NVIDIA H(100|800) PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51},
    r"NVIDIA H100 NVL": {"bf16": 835, "fp16": 835, "tf32": 417, "fp32": 60},
    r"NVIDIA H(100|800) 80GB HBM3|NVIDIA GH200 .*GB": {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67},
    r"NVIDIA H20": {"bf16": 148, "fp16": 148, "tf32": 74, "fp32": 44},
    r"NVIDIA H200": {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67},
    r"NVIDIA H200 NVL": {"bf16": 835, "fp16": 835, "tf32": 417, "fp32": 60},
    r"NVIDIA B100": {"bf16": 1750, "fp16": 1750, "tf32": 875, "fp32": 60},
    r"NVIDIA B200": {"bf16": 2250, "fp16": 2250, "tf32": 1125, "fp32": 75},
    r"NVIDIA GB200": {"bf16": 2500, "fp16": 2500, "tf32": 1250, "fp32": 80},
}  # in 10¹² a second


def peak_flops(device: torch.device, *, precision: str, told: float | None) -> float | None:
    """FLOPs a second that a device can do at most in a run's precision; None when nobody knows.

    Args:
        precision: under fp8 some layers are bf16, and MFU is told of the bf16 rate, of which it may be more than 1.
        told: what the settings say, in 10¹² a second; believed before the table.
    """
    if told is not None:
        return told * 1e12
    return published(torch.cuda.get_device_name(device), "bf16" if precision == "fp8" else precision) if device.type == "cuda" else None


def published(name: str, precision: str) -> float | None:
    """The table's answer for a device's name."""
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    for pattern, rates in _RATES.items():
        if re.fullmatch(pattern, name):
            return rates[precision] * 1e12 if precision in rates else None
    return None
