"""Loading weights: what goes where, what is refused, and how much memory it takes beside the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from service.checkpoint import load_weights
from service.errors import InvalidRequest
from service.families.family import Target

TARGETS = {
    "q": Target("fused.weight", 0),
    "k": Target("fused.weight", 1),
    "v": Target("fused.weight", 2),
    "plain": Target("plain.weight"),
    "bias": Target("plain.bias"),
    "gate": Target("gate"),
    "not.ours": None,
}


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(5, 12, bias=False)
        self.plain = nn.Linear(3, 4)
        self.gate = nn.Parameter(torch.zeros(1))


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shapes = {"q": (6, 5), "k": (2, 5), "v": (4, 5), "plain": (4, 3), "bias": (4,), "not.ours": (7,)}
    return {name: draw(*shape) for name, shape in shapes.items()} | {"gate": torch.tensor(0.5)}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Module:
    with torch.device("meta"):
        module = Module()
    load_weights(module, folder, TARGETS.__getitem__, "cpu", dtype)
    return module


def test_parts_out_of_order_over_several_files_are_joined_in_their_order(tmp_path: Path) -> None:
    published = weights()
    files = {"model-1": ("v", "bias"), "model-2": ("q", "gate", "not.ours"), "model-3": ("plain", "k")}
    for file, names in files.items():
        save_file({name: published[name] for name in names}, tmp_path / f"{file}.safetensors")
    module = load(tmp_path)
    torch.testing.assert_close(module.fused.weight, torch.cat((published["q"], published["k"], published["v"])))
    torch.testing.assert_close(module.plain.weight, published["plain"])
    torch.testing.assert_close(module.plain.bias, published["bias"])


@pytest.mark.parametrize(("published", "ours"), [((), (1,)), ((1,), ()), ((1, 1, 6), (6,)), ((4, 6, 1, 1), (4, 6))])
def test_axes_of_size_one_do_not_count(tmp_path: Path, published: tuple[int, ...], ours: tuple[int, ...]) -> None:
    """A gate of one number, IDEFICS' vector gates, a 1 × 1 convolution."""
    weight = torch.randn(published)
    save_file({"gate": weight}, tmp_path / "model.safetensors")
    module = nn.Module()
    module.gate = nn.Parameter(torch.empty(ours, device="meta"))
    load_weights(module, tmp_path, Target, "cpu", torch.float32)
    assert module.gate.shape == ours and torch.equal(module.gate.flatten(), weight.flatten())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_weights_are_converted_to_the_wanted_type(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    published = {name: weight.to(stored) for name, weight in weights().items()}
    save_file(published, tmp_path / "model.safetensors")
    module = load(tmp_path, wanted)
    expected = torch.cat((published["q"], published["k"], published["v"])).to(wanted)
    torch.testing.assert_close(module.fused.weight.detach(), expected, atol=0, rtol=0)
    assert {parameter.dtype for parameter in module.parameters()} == {wanted}


def test_weights_stay_when_the_file_is_overwritten(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    module = load(tmp_path)
    before = module.plain.weight.detach().clone()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * (tmp_path / "model.safetensors").stat().st_size)
    torch.testing.assert_close(module.plain.weight.detach(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plain": None}, "lacks the weight for plain.weight"),
        ({"v": None}, r"fused.weight has shape \(8, 5\), the config says \(12, 5\)"),
        ({"q": None}, "parts of the weight for fused.weight, but lacks number 0, counted from 0"),
        ({"k": None}, "parts of the weight for fused.weight, but lacks number 1, counted from 0"),
        ({"plain": torch.zeros(5, 3)}, r"plain.weight has shape \(5, 3\), the config says \(4, 3\)"),
        ({"plain": torch.zeros(3, 4)}, r"plain.weight has shape \(3, 4\), the config says \(4, 3\)"),
        ({"plain": torch.zeros(12)}, r"plain.weight has shape \(12,\), the config says \(4, 3\)"),
        ({"bias": torch.zeros(2, 2)}, r"plain.bias has shape \(2, 2\), the config says \(4,\)"),
        ({"plain.weight": torch.zeros(4, 3)}, "plain.weight twice: as plain.* in model.safetensors and as"),
        ({"k": torch.zeros(10, 1)}, r"fused.weight have shapes \(6, 5\), \(10, 1\), \(4, 5\), which do not join"),
        ({"k": torch.tensor(1.0)}, r"fused.weight have shapes \(6, 5\), \(\), \(4, 5\), which do not join"),
        ({"stray": torch.zeros(1)}, "does not explain: stray"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_in_one_line(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    changed = {name: weight for name, weight in (weights() | change).items() if weight is not None}
    save_file(changed, tmp_path / "model.safetensors")
    with torch.device("meta"):
        module = Module()
    with pytest.raises(InvalidRequest, match=message) as error:
        load_weights(module, tmp_path, lambda name: TARGETS.get(name, Target(name)), "cpu", torch.float32)
    assert error.value.param == "MODEL_PATH" and "\n" not in error.value.message


def test_a_weight_that_two_files_hold_is_refused_though_both_say_the_same(tmp_path: Path) -> None:
    """As in a folder with all weights in one file, and again in several."""
    save_file(weights(), tmp_path / "model.safetensors")
    save_file({"k": weights()["k"]}, tmp_path / "model-2.safetensors")
    twice = r"fused.weight twice: as k in model-2\.safetensors and as k in model\.safetensors"
    with pytest.raises(InvalidRequest, match=twice) as error:
        load(tmp_path)
    assert error.value.param == "MODEL_PATH" and "\n" not in error.value.message


def test_a_shard_that_is_missing_and_a_broken_index_are_named(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3, 2)}, tmp_path / "model-00001-of-00002.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    names = {"weight": "model-00001-of-00002.safetensors", "bias": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(InvalidRequest, match=r"lacks model-00002-of-00002\.safetensors, which its index names"):
        load(tmp_path)
    for content in ("{", "[]", '{"weight_map": [1]}'):
        index.write_text(content)
        with pytest.raises(InvalidRequest, match=r"index\.json is not an index of weights"):
            load(tmp_path)


def test_weights_that_are_pickled_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n")
    with pytest.raises(InvalidRequest, match=r"only pytorch_model\.bin, which may run code"):
        load(tmp_path)


def test_a_broken_file_and_a_folder_without_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"has no model\*\.safetensors file: save the model as safetensors"):
        load(tmp_path)
    save_file(weights(), tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(InvalidRequest, match=r"model\.safetensors is not a readable safetensors file"):
        load(tmp_path)


class Allocated(TorchDispatchMode):
    """Bytes of every storage that an operation makes on a device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.storages = device, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = storage  # kept, so that no address is used twice
        return out

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_nothing_but_the_parameters_is_allocated_on_the_device(tmp_path: Path, stored: torch.dtype) -> None:
    save_file({name: weight.to(stored) for name, weight in weights().items()}, tmp_path / "model.safetensors")
    with torch.device("meta"):  # a device of its own here: whatever else is made lies on the CPU
        module = Module()
    with Allocated("meta") as allocated:
        load_weights(module, tmp_path, TARGETS.__getitem__, "meta", torch.float32)
    assert allocated.num_bytes == sum(parameter.nbytes for parameter in module.parameters())


MEASURE = """
import json, os, sys
import torch
from pathlib import Path
from torch import nn
from service.checkpoint import load_weights
from service.families.family import Target

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name + ":"))

def target(name):
    layer, _, part = name.partition(".")
    return Target(f"{layer}.weight", "qkv".index(part) if part in tuple("qkv") else 0)

folder, stored = Path(sys.argv[1]), getattr(torch, sys.argv[2])
torch.set_num_threads(1)
with torch.device("meta"):
    module = nn.ModuleList(nn.Linear(1024, 3072, bias=False) for _ in range(12))
torch.zeros(1 << 20).to(stored).float()  # what torch sets up once
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before, threads = status("VmRSS"), len(os.listdir("/proc/self/task"))
load_weights(module, folder, target, "cpu", torch.float32)
weights = sum(parameter.nbytes for parameter in module.parameters())
started = len(os.listdir("/proc/self/task")) - threads
print(json.dumps({"peak": status("VmHWM") - before, "weights": weights, "threads": started}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux' /proc")
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_loading_takes_no_more_beside_the_weights_than_two_tensors_and_starts_no_thread(
    tmp_path: Path, stored: str
) -> None:
    names = [f"{layer}.{part}" for layer in range(12) for part in "qkv"]
    published = {name: torch.ones(1024, 1024, dtype=getattr(torch, stored)) for name in names}
    for index in range(2):
        part = {name: weight for place, (name, weight) in enumerate(published.items()) if place % 2 == index}
        save_file(part, tmp_path / f"model-{index}.safetensors")
    command = [sys.executable, "-c", MEASURE, str(tmp_path), stored]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    largest = 1024 * 1024 * 4
    assert measured["weights"] == 36 * largest
    assert measured["weights"] < measured["peak"] < measured["weights"] + 2 * largest
    assert measured["threads"] == 0
