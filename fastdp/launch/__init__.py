"""Our CUDA kernels (kernels/*.cu): compiled by NVRTC on first use, launched by one typed function each.

functions.py   one function per kernel: slice_rows, concat_rows, all_reduce_*, reduce_scatter, l2_norm, ...
    optimizers.py  fused_sgd and fused_adam
rows.py        how rows become launches;  peer_group.py  how ranks do
args.py        the kernels' argument structs, field by field
loader.py    the protocol of a device, and its loaded kernels
cubin.py       sources and the cache of machine code;  nvrtc.py  the compiler
"""

from fastdp.launch.args import SIGNALS_NBYTES, l2_norm_blocks
from fastdp.launch.functions import (
    all_reduce_one_shot,
    all_reduce_two_shot,
    check_finite,
    concat_rows,
    l2_norm,
    reduce_scatter,
    scale_cast,
    slice_rows,
)
from fastdp.launch.loader import Kernels, Launcher
from fastdp.launch.optimizers import fused_adam, fused_sgd
from fastdp.launch.peer_group import PeerGroup, coresident_blocks
from fastdp.launch.rows import RowPiece, RowSlice

__all__ = [
    "SIGNALS_NBYTES",
    "Kernels",
    "Launcher",
    "PeerGroup",
    "RowPiece",
    "RowSlice",
    "all_reduce_one_shot",
    "all_reduce_two_shot",
    "check_finite",
    "concat_rows",
    "coresident_blocks",
    "fused_adam",
    "fused_sgd",
    "l2_norm",
    "l2_norm_blocks",
    "reduce_scatter",
    "scale_cast",
    "slice_rows",
]
