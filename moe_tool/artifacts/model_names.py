"""Short names of models, and what to type for the name in an artifact."""

from pathlib import Path

DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo" / "model"
"""The embedded model."""

ALIASES: dict[str, str] = {
    "demo": str(DEMO_FOLDER),
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-instruct": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-v0.1",
    "qwen1.5-moe": "Qwen/Qwen1.5-MoE-A2.7B",
    "qwen2-moe": "Qwen/Qwen2-57B-A14B",
    "qwen3-moe": "Qwen/Qwen3-30B-A3B",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
    "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite",
    "phi-moe": "microsoft/Phi-3.5-MoE-instruct",
    "granite-moe": "ibm-granite/granite-3.1-3b-a800m-base",
    "ernie-moe": "baidu/ERNIE-4.5-21B-A3B-PT",
    "glm-moe": "zai-org/GLM-4.5-Air",
    "hunyuan-moe": "tencent/Hunyuan-A13B-Instruct",
    "minimax-m2": "MiniMaxAI/MiniMax-M2",
    "gpt-oss": "openai/gpt-oss-20b",
}
"""Folder or hub id by short name, for MODEL"""


def model_to_type(name: str) -> str:
    """Return what to type as MODEL for the name in an artifact, which omits a folder's path."""
    return name if name in ALIASES or "/" in name else f"PATH/TO/{name}"
