"""Loading of a MoLE from files that are checked against its configuration first."""

from pathlib import Path

import torch

from moe_tool.errors import CorruptArtifactError, UnsupportedModelError
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.model_config import bad_config, read_config, read_raw_config
from moe_tool.models.mole.config import MODEL_TYPE, MoleConfig
from moe_tool.models.mole.modeling import MoleForCausalLM
from moe_tool.models.skeleton import make_unsaved_buffers

ROW_TABLE = "model.row_table.weight"
_FLOATS = ("F32", "BF16", "F16")
_AGAIN = "copy or pack the folder again"


def is_mole(folder: Path) -> bool:
    """Return whether a folder's config.json is a MoLE's.

    Raises:
        NotFoundError, CorruptArtifactError: as `read_raw_config`.
    """
    return read_raw_config(folder).get("model_type") == MODEL_TYPE


def build_mole(folder: Path) -> MoleForCausalLM:
    """Build the model of a folder's config.json on the meta device, in eval mode.

    Raises:
        NotFoundError, CorruptArtifactError, UnsupportedModelError: as `read_config`.
    """
    config = read_config(folder)
    if not isinstance(config, MoleConfig):
        raise UnsupportedModelError(
            f"{folder} holds no mixture of lookup experts but {config.model_type!r}",
            hint="moe-tool run takes bundles of both kinds",
        )
    try:
        with torch.device("meta"):
            model = MoleForCausalLM(config)
    except Exception as error:  # a constructor may fail on a value that fits the type only
        raise bad_config(folder / "config.json", error) from error
    model.eval()  # type: ignore[no-untyped-call]
    return model


def check_tensors(
    model: MoleForCausalLM, checkpoint: Checkpoint, folder: Path, *, without_table: bool = False
) -> None:
    """Refuse tensors that are not exactly those of the model; no weight is read.

    Args:
        without_table: whether the table of rows lies elsewhere.

    Raises:
        CorruptArtifactError: one is missing, unknown, misshapen or of no float type.
    """
    wanted = _wanted(model, without_table=without_table)
    found = checkpoint.tensors
    for name in sorted(wanted.keys() - found.keys()):
        raise CorruptArtifactError(f"{folder} lacks the tensor {quoted(name)}", hint=_AGAIN)
    for name in sorted(found.keys() - wanted.keys() - _tied(model)):
        raise CorruptArtifactError(
            f"{folder} holds {quoted(name)}, which this model does not use", hint=_AGAIN
        )
    for name, shape in wanted.items():
        if found[name].shape != shape or found[name].dtype not in _FLOATS:
            raise CorruptArtifactError(
                f"{folder}: tensor {quoted(name)} is {found[name].dtype} "
                f"{list(found[name].shape)}, the model wants floats {list(shape)}",
                hint=_AGAIN,
            )


def load_tensors(
    model: MoleForCausalLM, checkpoint: Checkpoint, *, without_table: bool = False
) -> None:
    """Read the tensors that `check_tensors` accepted, as float32; changes the model.

    Raises:
        CorruptArtifactError, StorageError: as `Checkpoint.read`.
    """
    for name in _wanted(model, without_table=without_table):
        owner, _, leaf = name.rpartition(".")
        value = checkpoint.read(name).float()
        module = model.get_submodule(owner)
        module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    make_unsaved_buffers(model)
    model.tie_weights()


def skeleton_bytes(model: MoleForCausalLM) -> int:
    """Return the bytes of everything but the table of rows, in float32."""
    return sum(_sizes(model))


def largest_bytes(model: MoleForCausalLM) -> int:
    """Return the bytes of the largest tensor but the table of rows, in float32."""
    return max(_sizes(model))


def _sizes(model: MoleForCausalLM) -> list[int]:
    shapes = _wanted(model, without_table=True).values()
    return [4 * torch.Size(shape).numel() for shape in shapes]


def _tied(model: MoleForCausalLM) -> set[str]:
    return {"lm_head.weight"} if model.config.tie_word_embeddings else set()


def _wanted(model: MoleForCausalLM, *, without_table: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that has to be read, by name."""
    left_out = _tied(model) | ({ROW_TABLE} if without_table else set())
    named = model.named_parameters(remove_duplicate=False)
    return {name: tuple(value.shape) for name, value in named if name not in left_out}
