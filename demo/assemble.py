"""Puts the demo checkpoint together: frozen parts from their packages, the connector that was trained here.

    python -m demo.assemble [target]     # default .cache/demo

The folder is in the layout that `service/families/flamingo.py` reads. It appears whole or not at all.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from demo.encoder import read_encoder_weights
from demo.packages import CACHE
from demo.recipe import IMAGE_TOKEN, IMAGE_TOKEN_ID, IMAGE_WORD, checkpoint_config
from demo.smollm2 import open_smollm2, read_text_config, read_tokenizer, read_weights

CONNECTOR = Path(__file__).parent / "connector.safetensors"
TARGET = CACHE.parent / "demo"


def assemble(target: Path = TARGET, connector: Path = CONNECTOR) -> Path:
    """Writes the checkpoint folder, replacing what was there, and returns it.

    Raises PackageError for a package that is not what was published, OSError for an unreadable connector.
    """
    language_model = open_smollm2()
    tokenizer = read_tokenizer(language_model)
    trained, sizes = read_connector(connector)
    config = checkpoint_config(read_text_config(language_model)) | sizes
    print("putting the demo checkpoint together …", flush=True)
    weights = {f"vision.encoder.{name}": weight for name, weight in read_encoder_weights().items()}
    weights |= {f"decoder.{name}": weight for name, weight in read_weights(language_model).items()}
    weights["decoder.embed_tokens.weight"] = with_image_row(
        weights["decoder.embed_tokens.weight"], tokenizer.token_to_id(IMAGE_WORD)
    )
    weights |= trained

    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
        tokenizer.save(str(folder / "tokenizer.json"))
        template = language_model.metadata["tokenizer.chat_template"]
        for name, content in side_files(config, template).items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        folder.chmod(0o755)  # safetensors and tempfile keep theirs private; a container's user must read them
        (folder / "model.safetensors").chmod(0o644)
        if target.exists():
            shutil.rmtree(target)
        os.replace(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return target


def read_connector(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trained weights in fp32, and the part of config.json that their shapes follow from."""
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
        config: dict[str, Any] = json.loads(file.metadata()["config"])
    return weights, config


def with_image_row(embedding: Tensor, word_id: int) -> Tensor:
    """[V, D] -> [V+1, D]: the picture's own token starts as, and stays, the word that means it."""
    return torch.cat((embedding, embedding[word_id : word_id + 1]))


def side_files(config: dict[str, Any], chat_template: str) -> dict[str, dict[str, Any]]:
    encoder = config["vision_config"]["encoder"]
    return {
        "config.json": config,
        "preprocessor_config.json": {
            "size": {"height": encoder["image_size"], "width": encoder["image_size"]},
            "image_mean": encoder["mean"],
            "image_std": encoder["std"],
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "additional_special_tokens": [IMAGE_TOKEN],
            "image_token_id": IMAGE_TOKEN_ID,
            "model_max_length": config["text_config"]["max_position_embeddings"],
            "chat_template": chat_template,
        },
        "generation_config.json": {"eos_token_id": config["eos_token_id"], "pad_token_id": 2, "do_sample": False},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Put the demo checkpoint together.")
    parser.add_argument("target", type=Path, nargs="?", default=TARGET)
    parser.add_argument("--connector", type=Path, default=CONNECTOR)
    arguments = parser.parse_args()
    print(assemble(arguments.target, arguments.connector))


if __name__ == "__main__":
    main()
