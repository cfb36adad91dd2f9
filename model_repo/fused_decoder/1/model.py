"""Triton's side of stage 2: a request in, a decoupled stream of token events out. The work is `service.decoder`'s."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from service.contract import SamplingParams, TokenEvent, ValidRequest
from service.errors import CrossgateError, Internal, InvalidRequest
from service.families import load_family

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
GAUGES = {  # our metric -> its value from EngineStats
    "crossgate_decoder_num_requests_running": lambda stats: stats.num_running,
    "crossgate_decoder_num_requests_waiting": lambda stats: stats.num_waiting,
    "crossgate_kv_cache_usage_ratio": lambda stats: stats.kv_blocks_used / max(stats.kv_blocks_total, 1),
    "crossgate_image_kv_cache_bytes": lambda stats: stats.image_kv_bytes,
}
COUNTERS = {
    "crossgate_image_kv_cache_queries_total": lambda stats: stats.image_queries,
    "crossgate_image_kv_cache_hits_total": lambda stats: stats.image_hits,
    "crossgate_prefix_cache_queries_total": lambda stats: stats.prefix_queries,
    "crossgate_prefix_cache_hits_total": lambda stats: stats.prefix_hits,
    "crossgate_num_preemptions_total": lambda stats: stats.num_preemptions,
}
