"""GPUs and links by name: what their data sheets say. Knows no models and no runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """memory: GB (10^9 bytes). bf16, fp32: dense FLOP/s, of tensor cores and of vector units. bandwidth: of its memory,
    bytes/s. in_node: of its links to the other GPUs of the node, bytes/s each way. capability: as nvcc writes it. link:
    the usual name of what connects nodes of eight."""

    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    in_node: float
    capability: int
    link: str


# NVIDIA's data sheets, SXM modules: "A100 Tensor Core GPU" (312 TFLOP/s bf16 without sparsity, 19.5 fp32; 40 GB HBM2 at
# 1,555 GB/s, 80 GB HBM2e at 2,039 GB/s; NVLink 600 GB/s both ways together), "H100 Tensor Core GPU" (1,979 TFLOP/s bf16
# with sparsity, half of it without, 67 fp32; 80 GB at 3.35 TB/s; NVLink 900 GB/s) and "H200 Tensor Core GPU" (as the
# H100, 141 GB at 4.8 TB/s).
GPUS = {
    "a100-40g": Gpu(40, 312e12, 19.5e12, 1555e9, 300e9, 80, "8x200gbit"),
    "a100-80g": Gpu(80, 312e12, 19.5e12, 2039e9, 300e9, 80, "8x200gbit"),
    "h100-80g": Gpu(80, 989.5e12, 67e12, 3350e9, 450e9, 90, "8x400gbit"),
    "h200": Gpu(141, 989.5e12, 67e12, 4800e9, 450e9, 90, "8x400gbit"),
}

# Bytes/s each way of a node's network cards together. A DGX A100 has eight of 200 Gbit/s for computing, a DGX H100 or
# H200 eight of 400 (their user guides); clouds rent A100 nodes with 400 Gbit/s and H100 nodes with 3200 (Amazon's p4d
# and p5, the latter as 8x400gbit here).
LINKS = {
    "10gbit": 1.25e9,
    "25gbit": 3.125e9,
    "100gbit": 12.5e9,
    "200gbit": 25e9,
    "400gbit": 50e9,
    "4x200gbit": 100e9,
    "8x200gbit": 200e9,
    "8x400gbit": 400e9,
}

# In a node, bytes/s each way of one GPU: NVLink of the third and fourth generation, 16 lanes of PCI Express 4 and 5.
IN_NODE = {"nvlink3": 300e9, "nvlink4": 450e9, "pcie4": 31.5e9, "pcie5": 63e9}
