"""One module per model family; a family is found by the `model_type` of a checkpoint's config.json."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

from service.errors import InvalidRequest
from service.families.family import Family


def load_family(folder: Path) -> Family:
    """Read a checkpoint folder's config files (no weights).

    Raises InvalidRequest, in one line for an operator, if the folder is no checkpoint or of a family that is not known.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise InvalidRequest(f"{folder} is not a checkpoint folder: it has no config.json.", param="MODEL_PATH")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{config_file} is not JSON with a model_type.", param="MODEL_PATH") from error
    known: list[str] = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        model_types: tuple[str, ...] = getattr(module, "MODEL_TYPES", ())
        if model_type in model_types:
            try:
                family: Family = module.load(folder, config)
            except KeyError as error:
                lack = f"{config_file} lacks {error}, which a {model_type} checkpoint needs."
                raise InvalidRequest(lack, param="MODEL_PATH") from error
            except (ValueError, TypeError, AttributeError, ArithmeticError) as error:  # not what a config may hold
                raise InvalidRequest(f"{config_file}: {error}.", param="MODEL_PATH") from error
            return family
        known.extend(model_types)
    raise InvalidRequest(
        f"{config_file} has model_type {model_type!r}; known are {', '.join(sorted(known))}.", param="MODEL_PATH"
    )


__all__ = ["Family", "load_family"]
