"""What goes on in the decoder's process beside its steps: OpenMP's threads, and what Python's collector looks at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.checkpoints import make_idefics

ROOT = Path(__file__).resolve().parents[2]
NUM_THREADS = 3
LARGE = {"resampler_n_latents": 64}  # 16 pictures' latents are more than torch copies with one thread
CODE = """
import gc, os, sys, threading
from pathlib import Path

import numpy as np
import torch
from tests.decoder import triton_stand_in as stand_in

sys.modules["triton_python_backend_utils"] = stand_in
sys.path.insert(0, "model_repo/fused_decoder/1")
from model import TritonPythonModel
from service.contract import SamplingParams
from service.families import load_family

def as_tensor(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)

def num_openmp_threads():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

family = load_family(Path(os.environ["MODEL_PATH"]))
num_images, width = 16, family.vision.latents_shape
before = num_openmp_threads()
model = TritonPythonModel()
model.initialize({})
sampling = SamplingParams(max_tokens=8, ignore_eos=True).to_json().encode()
request = stand_in.Request(
    input_ids=torch.tensor([family.image_token_id] * num_images + [5] * 400, dtype=torch.int32),
    image_keys=torch.arange(num_images, dtype=torch.uint8)[:, None].repeat(1, 32),
    image_positions=torch.arange(num_images, dtype=torch.int32),
    latents=torch.from_numpy(np.ones((num_images, *width), dtype=np.float32)),  # torch.ones would be parallel
    latent_index=torch.arange(num_images, dtype=torch.int32),
    latents_checkpoint=as_tensor(bytes.fromhex(family.identity)).repeat(num_images, 1),
    config=as_tensor(bytes.fromhex(family.config_identity)),
    sampling=as_tensor(sampling),
)
model.execute([request])
assert len(stand_in.answer(request)) == 8
print("objects", len(gc.get_objects()))
print("openmp", num_openmp_threads() - before)
model.finalize()
"""


def measure(what: str, tmp_path: Path, **settings: str) -> int:
    """After a request, from loading to the last token. `openmp`: threads beside the one that computes."""
    environment = {
        **os.environ,
        "MODEL_PATH": str(make_idefics(tmp_path, perceiver=LARGE)),
        "DEVICE": "cpu",
        "CROSSGATE_NUM_THREADS": "",
        "OMP_NUM_THREADS": str(NUM_THREADS),
        "MKL_NUM_THREADS": str(NUM_THREADS),
        "MKL_DYNAMIC": "FALSE",  # else torch takes no more threads than there are cores
        "OPENBLAS_NUM_THREADS": "1",
        **settings,
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rpartition(f"{what} ")[2].split()[0])


def test_the_decoder_has_one_pool_of_openmp_threads(tmp_path: Path) -> None:
    """All that torch computes in parallel is computed by one thread: each that does has threads of its own.

    Also with latents large enough for Triton's thread to copy them in parallel.
    """
    assert measure("openmp", tmp_path, CROSSGATE_NUM_THREADS=str(NUM_THREADS)) == NUM_THREADS - 1


def test_a_small_decoder_leaves_the_other_cores_to_what_carries_its_tokens(tmp_path: Path) -> None:
    assert measure("openmp", tmp_path) == 0


def test_a_full_collection_looks_at_what_requests_left_behind_alone(tmp_path: Path) -> None:
    """Torch and the rest are 200,000 objects, which take an eighth of a second."""
    assert measure("objects", tmp_path) < 20_000
