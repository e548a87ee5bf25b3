"""Building blocks for training at longer contexts, usable in any training loop."""

from rope_scaling.training.data import Statistics, make_sequences, mix, statistics
from rope_scaling.training.loss import chunked_cross_entropy
from rope_scaling.training.packing import PackedCollator, document_ids, document_mask, pack_documents
from rope_scaling.training.pose import PoseCollator, distance_coverage, pose_positions
from rope_scaling.training.s2 import s2_attention


__all__ = [
    "PackedCollator",
    "PoseCollator",
    "Statistics",
    "chunked_cross_entropy",
    "distance_coverage",
    "document_ids",
    "document_mask",
    "make_sequences",
    "mix",
    "pack_documents",
    "pose_positions",
    "s2_attention",
    "statistics",
]
