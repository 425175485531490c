"""Tokenizer in a checkpoint's folder."""

import hashlib
from pathlib import Path
from typing import Any

from moe_tool.errors import (
    CorruptArtifactError,
    MoeToolError,
    NotFoundError,
    UnsupportedModelError,
)
from moe_tool.formats.foreign_files import foreign_file
from moe_tool.models.hub_cache import TOKENIZER_FILES

_FILES = (*TOKENIZER_FILES, "merges.txt", "tokenizer_config.json")
_PROBE = "The list"
_WITHOUT_CODE = (
    "if tokenizer.json holds the whole tokenizer, take auto_map out of tokenizer_config.json; "
    "otherwise give a folder with a tokenizer that transformers reads by itself: moe-tool pack and "
    "profile take --tokenizer FOLDER"
)


def load_tokenizer(folder: Path) -> Any:
    """Return the transformers tokenizer of a folder, without downloads and without running the
    folder's code.

    Raises:
        NotFoundError: the folder has no tokenizer.
        UnsupportedModelError: it needs Python code of its own.
        CorruptArtifactError: it cannot be read.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        is_tiktoken = any(folder.glob("*.tiktoken")) or (folder / "tiktoken.model").is_file()
        reason = ", only one that needs Python code of its own" if is_tiktoken else ""
        raise NotFoundError(
            f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)}){reason}",
            hint="give a folder that holds it: moe-tool pack and profile take --tokenizer FOLDER",
        )
    for name in _FILES:
        foreign = foreign_file(folder / name)
        if foreign is not None:
            raise foreign
    try:
        # By default transformers asks on stdin whether it may run the folder's code.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=_config(folder), local_files_only=True, trust_remote_code=False
        )
        tokenizer.decode(tokenizer.encode(_PROBE))  # settings of wrong types are found in use
        return tokenizer
    except Exception as error:  # tokenizers raises bare Exception, transformers half a dozen kinds
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"the tokenizer in {folder} needs Python code of its own, which is never executed",
                hint=_WITHOUT_CODE,
            ) from error
        reason = (
            str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        )
        raise CorruptArtifactError(
            f"the tokenizer in {folder} cannot be read: {reason}",
            hint="copy the tokenizer files of the checkpoint again",
        ) from error


def _config(folder: Path) -> Any:
    """Return the configuration as `read_config` cleans it, so that transformers does not fail on
    unrelated keys; None if it cannot be read."""
    from moe_tool.models.model_config import read_config

    try:
        config = read_config(folder)
    except MoeToolError:
        return None
    config._name_or_path = str(folder)
    return config


def tokenizer_sha256(folder: Path) -> str:
    """Return one sha256 over the tokenizer's files, names included."""
    digest = hashlib.sha256()
    for name in _FILES:
        if (folder / name).is_file():
            digest.update(f"{name}\n".encode())
            digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()
