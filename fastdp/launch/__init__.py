"""Our CUDA kernels (kernels/*.cu): compiled by NVRTC on first use, launched by one typed function each.

functions.py   one function per kernel: slice_rows, concat_rows, all_reduce_*, reduce_scatter
rows.py        computes launches for rows;  peer_group.py  computes launches for ranks
args.py        the kernels' argument structs, field by field
loader.py      the protocol of a device, and its loaded kernels
cubin.py       sources and the cache of machine code;  nvrtc.py  the compiler
"""

from fastdp.launch.args import SIGNALS_NBYTES
from fastdp.launch.functions import (
    all_reduce_one_shot,
    all_reduce_two_shot,
    concat_rows,
    reduce_scatter,
    slice_rows,
)
from fastdp.launch.loader import Kernels, Launcher
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
    "concat_rows",
    "coresident_blocks",
    "reduce_scatter",
    "slice_rows",
]
