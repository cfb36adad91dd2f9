"""Trains the connector: the Resampler through throw-away heads, then Resampler and gated blocks through the frozen LM.

    python -m demo.train heads --minutes 8
    python -m demo.train gated --minutes 30     # both go on from demo/runs/*.pt if they were stopped

Writes demo/runs/connector.safetensors every few minutes. Text generation is not run here: see demo.evaluate.
"""

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.concepts import demo_concepts
from demo.features import load_features
from demo.model import DemoModel, save_connector
from demo.recipe import RESAMPLER
from demo.samples import IGNORED, SceneLabel, make_batch, sample_scenes
from demo.scenes import COLOURS
from service.families.family import ResamplerConfig
from service.vision.resampler import PerceiverResampler

RUNS = Path(__file__).parent / "runs"
SAVE_EVERY_S = 240.0
HEADS_LR = 1e-3
BLOCKS_LR, RESAMPLER_LR, GATES_LR = 6e-4, 2e-4, 6e-3


class Heads(nn.Module):
    """What a scene shows, how many drawings and on which colour, read from the mean of its latents."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.concepts = nn.Linear(width, len(demo_concepts()))
        self.count = nn.Linear(width, 4)
        self.colour = nn.Linear(width, len(COLOURS))

    def loss(self, latents: Tensor, scenes: list[SceneLabel]) -> Tensor:
        pooled = latents.mean(dim=1)  # (B, E)
        wanted = torch.zeros(len(scenes), len(demo_concepts()))
        for row, (concepts, _) in enumerate(scenes):
            for concept in concepts:
                wanted[row, demo_concepts().index(concept)] += 1 / len(concepts)
        counts = torch.tensor([len(concepts) for concepts, _ in scenes])
        colours = torch.tensor([list(COLOURS).index(colour) for _, colour in scenes])
        named = -(wanted * F.log_softmax(self.concepts(pooled), dim=-1)).sum(-1).mean()
        others = F.cross_entropy(self.count(pooled), counts) + F.cross_entropy(self.colour(pooled), colours)
        loss: Tensor = named + 0.3 * others
        return loss


class Run:
    """A training run that can be stopped: parameters, optimizer, minutes and steps so far, kept in one file."""

    def __init__(self, path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, minutes: float) -> None:
        self.path, self.module, self.optimizer, self.minutes = path, module, optimizer, minutes
        self.step, self.before, self.started, self.saved = 0, 0.0, time.monotonic(), time.monotonic()
        self.rates = [group["lr"] for group in optimizer.param_groups]
        if path.exists():
            state: dict[str, Any] = torch.load(path, weights_only=True)
            self.trained_weights(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
            self.before, self.step = state["minutes"], state["step"]
            print(f"goes on at {self.before:.1f} minutes, step {self.step}")

    def trained_weights(self, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        own = {name: weight for name, weight in self.module.named_parameters() if weight.requires_grad}
        if given is not None:
            with torch.no_grad():
                for name, weight in own.items():
                    weight.copy_(given[name])
        return {name: weight.detach() for name, weight in own.items()}

    def elapsed(self) -> float:
        return self.before + (time.monotonic() - self.started) / 60

    def update(self, loss: Tensor, warm_up: int) -> None:
        """One step: learning rates rise over `warm_up` steps and fall on a cosine over the run's minutes."""
        fall = max(0.02, 0.5 * (1 + math.cos(math.pi * min(1.0, self.elapsed() / self.minutes))))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * min(1.0, (self.step + 1) / warm_up) * fall
        self.optimizer.zero_grad()
        loss.backward()
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        nn.utils.clip_grad_norm_(weights, 1.0)
        self.optimizer.step()
        self.step += 1

    def save_is_due(self) -> bool:
        return time.monotonic() - self.saved > SAVE_EVERY_S

    def save(self) -> None:
        self.saved = time.monotonic()
        state = {"weights": self.trained_weights(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"minutes": self.elapsed(), "step": self.step}, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").rename(self.path)


def train_heads(minutes: float, scenes_per_step: int = 64) -> None:
    torch.manual_seed(0)
    resampler = PerceiverResampler(ResamplerConfig(**RESAMPLER))
    assert resampler.positions is not None
    nn.init.normal_(resampler.positions, std=0.02)
    nn.init.normal_(resampler.latents, std=0.5)
    module = nn.ModuleDict({"resampler": resampler, "heads": Heads(RESAMPLER["width"])})
    optimizer = torch.optim.AdamW(module.parameters(), HEADS_LR, weight_decay=0.05, betas=(0.9, 0.98))
    run = Run(RUNS / "heads.pt", module, optimizer, minutes)
    train, blank, rng = load_features("train"), load_features("blank"), np.random.default_rng(1 + run.step)
    while run.elapsed() < minutes:
        features, scenes = sample_scenes(train, blank, scenes_per_step, rng)
        with torch.autocast("cpu", torch.bfloat16):
            latents = resampler(features)
        loss = module["heads"].loss(latents.float(), scenes)
        run.update(loss, warm_up=100)
        if run.step % 50 == 0:
            print(f"heads {run.elapsed():.1f} min, step {run.step}, loss {loss.item():.3f}", flush=True)
        if run.save_is_due():
            run.save()
    run.save()


def train_gated(minutes: float, scenes_per_step: int = 32) -> None:
    torch.manual_seed(0)
    model = DemoModel()
    model.freeze_in_bf16()
    if not (RUNS / "gated.pt").exists():
        heads = torch.load(RUNS / "heads.pt", weights_only=True)["weights"]
        own = {name.removeprefix("resampler."): w for name, w in heads.items() if name.startswith("resampler.")}
        model.resampler.load_state_dict(own)
    gates = [weight for name, weight in model.trained().items() if name.endswith("_gate")]
    blocks = [weight for name, weight in model.decoder.cross_layers.named_parameters() if not name.endswith("_gate")]
    groups: list[dict[str, Any]] = [
        {"params": blocks, "lr": BLOCKS_LR},
        {"params": list(model.resampler.parameters()), "lr": RESAMPLER_LR},
        {"params": gates, "lr": GATES_LR, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.03, betas=(0.9, 0.98))
    run = Run(RUNS / "gated.pt", model, optimizer, minutes)
    train, blank = load_features("train"), load_features("blank")
    rng, words = np.random.default_rng(100 + run.step), random.Random(100 + run.step)
    while run.elapsed() < minutes:
        features, scenes = sample_scenes(train, blank, scenes_per_step, rng)
        batch = make_batch(model, scenes, words)
        answered = batch.targets != IGNORED  # [B, L]
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.resampler(features)
            hidden = model.hidden(batch.sentences, latents[batch.scene_rows])
            logits = model.logits(hidden[answered])
        loss = F.cross_entropy(logits, batch.targets[answered])
        run.update(loss, warm_up=150)
        if run.step % 20 == 0:
            print(f"gated {run.elapsed():.1f} min, step {run.step}, loss {loss.item():.3f}", flush=True)
        if run.save_is_due():
            run.save()
            save_connector(model, RUNS / "connector.safetensors")
    run.save()
    save_connector(model, RUNS / "connector.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the connector.")
    parser.add_argument("stage", choices=("heads", "gated"))
    parser.add_argument("--minutes", type=float, required=True, help="of training, those of earlier runs included")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    RUNS.mkdir(parents=True, exist_ok=True)
    {"heads": train_heads, "gated": train_gated}[arguments.stage](arguments.minutes)


if __name__ == "__main__":
    main()
