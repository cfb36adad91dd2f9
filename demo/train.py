"""Trains the connector: first through throw-away heads, then through the frozen language model, heads beside it.

    python -m demo.train heads --minutes 12
    python -m demo.train gated --minutes 60     # both go on from demo/runs/*.pt if they were stopped

`--start FILE` begins from a connector trained before. Every few minutes demo/runs/connector.safetensors is written.
What is printed are losses on training scenes; no test vendor is looked at here: see demo.evaluate.
"""

import argparse
import ctypes
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.features import load_features
from demo.heads import PresenceHead, SceneHead, SceneLabel
from demo.model import DemoModel, load_connector, save_connector
from demo.samples import IGNORED, make_batch, sample_scenes

RUNS = Path(__file__).parent / "runs"
SAVE_EVERY_S = 180.0
PRINT_EVERY_S = 30.0
SCENES_PER_STEP = 64
ANSWERED_PER_STEP = 24  # of them, by the language model
WARM_UP = 50
HEADS_LR = {"resampler": 1e-3, "first block": 1e-3, "gates": 1e-2, "heads": 1e-3}
GATED_LR = {"resampler": 3e-4, "blocks": 1e-3, "gates": 1e-2, "heads": 1e-3}
WEIGHT_DECAY = 0.04
PRESENCE_WEIGHT = 2.0  # of the presence head beside the scene head
HEADS_WEIGHT = 0.5  # of both heads beside the language model


class Training(nn.Module):
    """The demo model with its throw-away heads."""

    def __init__(self, start: Path | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = DemoModel()
        if start is not None:
            load_connector(self.model, start)
        self.model.freeze_in_bf16()
        self.scene_head = SceneHead(self.model.resampler.latents.shape[1])
        with torch.autocast("cpu", torch.bfloat16):
            self.presence_head = PresenceHead(self.model)

    def groups(self, rates: dict[str, float]) -> list[dict[str, Any]]:
        """What an optimizer is to train, by learning rate; what has none is not trained."""
        first = f"decoder.cross_layers.{self.model.first_gated}."
        groups: dict[str, list[Tensor]] = {name: [] for name in rates}
        groups["heads"] += [*self.scene_head.parameters(), *self.presence_head.parameters()]
        for name, weight in self.model.trained().items():
            if name.startswith("vision."):
                groups["resampler"].append(weight)
            elif "blocks" in rates or name.startswith(first):
                kind = "blocks" if "blocks" in rates else "first block"
                groups["gates" if name.endswith("_gate") else kind].append(weight)
        return [
            {"params": groups[name], "lr": rate, "weight_decay": 0.0 if name == "gates" else WEIGHT_DECAY}
            for name, rate in rates.items()
        ]

    def heads_loss(self, latents: Tensor, scenes: list[SceneLabel], rng: random.Random, means: "Means") -> Tensor:
        named = self.scene_head.loss(latents, scenes)
        present, right = self.presence_head.loss(self.model, latents, scenes, rng)
        means.add("scene head", named)
        means.add("presence head", present)
        means.add("right at the concept", right[0])
        means.add("right at the end", right[1])
        return named + PRESENCE_WEIGHT * present

    def answers_loss(self, latents: Tensor, scenes: list[SceneLabel], rng: random.Random, means: "Means") -> Tensor:
        """Cross entropy of the answers' tokens, the mean over all: full stop and end count as tokens, too."""
        batch = make_batch(self.model, scenes, rng)
        answered = batch.targets != IGNORED  # [B, L]
        hidden = self.model.hidden(batch.sentences, latents[batch.scene_rows])
        by_token = F.cross_entropy(self.model.logits(hidden[answered]), batch.targets[answered], reduction="none")
        kinds = [batch.kinds[row] for row in answered.nonzero()[:, 0].tolist()]
        for kind in set(kinds):
            means.add(kind, by_token[torch.tensor([own == kind for own in kinds])].mean())
        loss: Tensor = by_token.mean()
        return loss


class Means:
    """Running means of what is printed."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add(self, name: str, value: Tensor) -> None:
        old = self.values.get(name, value.item())
        self.values[name] = old + 0.04 * (value.item() - old)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in sorted(self.values.items()))


class Run:
    """A training run that can be stopped: weights, optimizer, minutes and steps so far, kept in one file."""

    def __init__(self, path: Path, training: Training, rates: dict[str, float], minutes: float) -> None:
        self.path, self.training, self.minutes = path, training, minutes
        self.optimizer = torch.optim.AdamW(training.groups(rates), betas=(0.9, 0.98))
        self.rates = list(rates.values())
        self.step, self.before, self.started = 0, 0.0, time.monotonic()
        self.saved = self.printed = self.started
        self.means = Means()
        if path.exists():
            state: dict[str, Any] = torch.load(path, weights_only=True)
            load_trained(training, state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.before, self.step = state["minutes"], state["step"]
            print(f"goes on at {self.before:.1f} minutes, step {self.step}")

    def elapsed(self) -> float:
        return self.before + (time.monotonic() - self.started) / 60

    def goes_on(self) -> bool:
        now = time.monotonic()
        if now - self.printed > PRINT_EVERY_S:
            self.printed = now
            print(f"{self.path.stem} {self.elapsed():.1f} min, step {self.step}: {self.means}", flush=True)
        if self.elapsed() >= self.minutes or now - self.saved > SAVE_EVERY_S:
            self.saved = now
            self.save()
        return self.elapsed() < self.minutes

    def update(self, loss: Tensor) -> None:
        """One step: learning rates rise over WARM_UP steps and fall on a cosine over the run's minutes."""
        fall = max(0.02, 0.5 * (1 + math.cos(math.pi * min(1.0, self.elapsed() / self.minutes))))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * min(1.0, (self.step + 1) / WARM_UP) * fall
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([weight for group in self.optimizer.param_groups for weight in group["params"]], 1.0)
        self.optimizer.step()
        self.step += 1

    def save(self) -> None:
        state = {"weights": trained(self.training), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"minutes": self.elapsed(), "step": self.step}, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").rename(self.path)
        save_connector(self.training.model, RUNS / "connector.safetensors")


def keep_memory() -> None:
    """Tells glibc to keep what tensors free. Else most of a step on a CPU is spent in page faults."""
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8  # malloc.h
    for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28), (m_arena_max, 1)):
        mallopt(option, value)


def trained(training: Training) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in training.named_parameters() if weight.requires_grad}


@torch.no_grad()
def load_trained(training: Training, weights: dict[str, Tensor]) -> None:
    for name, weight in training.named_parameters():
        if weight.requires_grad:
            weight.copy_(weights[name])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the connector.")
    parser.add_argument("stage", choices=("heads", "gated"))
    parser.add_argument("--minutes", type=float, required=True, help="of training, those of earlier runs included")
    parser.add_argument("--start", type=Path, help="a connector to begin from, in `gated` instead of heads.pt")
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(2)
    RUNS.mkdir(parents=True, exist_ok=True)
    training, answers = Training(arguments.start), arguments.stage == "gated"
    if answers and arguments.start is None and not (RUNS / "gated.pt").exists():
        load_trained(training, torch.load(RUNS / "heads.pt", weights_only=True)["weights"])
    rates = GATED_LR if answers else HEADS_LR
    run = Run(RUNS / f"{arguments.stage}.pt", training, rates, arguments.minutes)
    train, blank = load_features("train"), load_features("blank")
    rng, words = np.random.default_rng(100 + run.step), random.Random(100 + run.step)
    while run.goes_on():
        features, scenes = sample_scenes(train, blank, SCENES_PER_STEP, rng)
        with torch.autocast("cpu", torch.bfloat16):
            latents = training.model.resampler(features).float()  # [B, R, E]
            loss = training.heads_loss(latents, scenes, words, run.means)
            if answers:
                answered = scenes[:ANSWERED_PER_STEP]
                loss = HEADS_WEIGHT * loss + training.answers_loss(latents, answered, words, run.means)
        run.update(loss)


if __name__ == "__main__":
    main()
