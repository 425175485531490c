"""Result of a run of a bundle: text, costs and quality."""

from dataclasses import dataclass
from typing import Literal

from moe_tool.artifacts.json_fields import Spread
from moe_tool.artifacts.run_stats import PhaseCounters

StopReason = Literal["end_of_text", "max_tokens", "context", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSetup(Spread):
    """How a bundle ran, after options, plan and defaults were put together."""

    policy: str
    residency: str
    eviction: str
    prefetch: str
    sparse_experts: float | None
    """Share of experts' channels that was to be left out; None: none"""
    threads: int
    memory_budget_bytes: int
    slots: int
    """Full expert records that the budget has room for; cheaper forms share it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerQuality(Spread):
    """Expected and measured cost of answers other than the wanted expert."""

    expected_kl: float | None
    """Nats per decoded token; None where the bundle has no prices"""
    expected_kl_limit: float | None
    """Nats per token that calibration allows; None: no limit"""
    exact_fallback_tokens: int
    """Tokens answered exactly to keep the limit"""
    prompt_expected_kl: float | None
    """Nats per prompt token, where the policy answered prompts too; None where they were exact"""
    shadow_tokens: int
    """Tokens computed also exactly"""
    shadow_kl: float | None
    """Nats per token: the loss of one step, measured on the shadowed tokens"""
    shadow_expected_kl: float | None
    """Nats per token that the shadowed tokens were expected to lose; None where none was shadowed,
    or without prices"""
    shadow_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A continued prompt. Rates are of decoding alone: the prompt is counted apart."""

    text: str
    token_ids: tuple[int, ...]
    """Generated tokens, an end-of-text token included"""
    setup: RunSetup
    staying: dict[str, int]
    """Experts that never leave memory, by form"""
    prompt: PhaseCounters
    decode: PhaseCounters
    quality: AnswerQuality
    seconds_to_first_token: float
    """From the call to the choice of the first token; loading not included"""
    seconds: float
    peak_rss_bytes: int
    """Largest resident size of the process, at the end"""
    interrupted: bool
    """Ended by Ctrl-C: the text is what there was by then"""
    stop_reason: StopReason
    """Cause of the end: an end-of-text token, --max-tokens, the end of the context or Ctrl-C"""

    @property
    def generated_tokens(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids)

    @property
    def decode_seconds(self) -> float:
        """Time from the first token to the end."""
        return self.seconds - self.seconds_to_first_token

    @property
    def tokens_per_second(self) -> float:
        """Rate of the tokens after the first; 0 where there are none."""
        seconds = self.decode_seconds
        return max(0, self.generated_tokens - 1) / seconds if seconds > 0 else 0.0
