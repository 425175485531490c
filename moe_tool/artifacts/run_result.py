"""Result of a run of a bundle: text, costs and quality."""

from dataclasses import dataclass
from typing import Literal

from moe_tool.artifacts.json_fields import Spread
from moe_tool.artifacts.run_stats import PhaseCounters

StopReason = Literal["end_of_text", "max_tokens", "context", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSetup(Spread):
    """Effective settings of a run, from options, plan and defaults."""

    policy: str
    residency: str
    eviction: str
    prefetch: str
    sparse_experts: float | None
    """Share of experts' channels to skip; None: none"""
    activations: str
    """Precision of tokens in products with a checkpoint's own codes: float32 or int8"""
    table_bytes_on_disk: int
    """Bytes that embedding tables on disk, of which rows are read, would take in memory"""
    threads: int
    memory_budget_bytes: int
    slots: int
    """Primary records that fit into the budget, which cheaper forms share"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerQuality(Spread):
    """Expected and measured KL of lossy answers."""

    expected_kl: float | None
    """Nats per decoded token; None without prices in the bundle"""
    expected_kl_limit: float | None
    """Nats per token that calibration allows; None: no limit"""
    exact_fallback_tokens: int
    """Tokens answered exactly to keep the limit"""
    prompt_expected_kl: float | None
    """Nats per prompt token; None if prompts were answered exactly"""
    shadow_tokens: int
    """Tokens that were also computed exactly"""
    shadow_kl: float | None
    """Nats per token: KL of one step, measured on the shadowed tokens"""
    shadow_expected_kl: float | None
    """Nats per token expected on the shadowed tokens; None without any, or without prices"""
    shadow_seconds: float
    price_factor: float | None
    """Factor on expected losses by the measured ones, an upper bound; None: nothing is measured"""
    nats_per_mb: float | None
    """Worth of avoiding a read of 10^6 bytes that the text ended with; None: it was not steered"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftSeen:
    """Comparison of a text's routing with the profile's, window by window, prompt included."""

    window_tokens: int
    windows: int
    """Windows that were long enough for a verdict"""
    alarms: int
    """Windows routed unlike the profile's text"""
    first_alarm_tokens: int | None
    """Tokens from the start of the text to the first alarm; None: none"""
    is_drifting: bool
    """Whether the text's end is routed unlike the profile's"""
    score: float
    """Score of the last window over its threshold; above 1 is an alarm"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A continued prompt. Rates cover decoding alone; the prompt has counters of its own."""

    text: str
    token_ids: tuple[int, ...]
    """Generated tokens, an end-of-text token included"""
    setup: RunSetup
    staying: dict[str, int]
    """Number of pinned experts by form"""
    prompt: PhaseCounters
    decode: PhaseCounters
    quality: AnswerQuality
    drift: DriftSeen | None
    """Drift from the profile; None without a routing norm in the bundle"""
    row_bytes_read: int
    """Bytes read of embedding tables on disk, for prompt and decoding"""
    seconds_to_first_token: float
    """Time from the call to the choice of the first token, loading not included"""
    seconds: float
    peak_rss_bytes: int
    """Largest resident size of the process, at the end"""
    interrupted: bool
    """Whether Ctrl-C ended the run; the text is then incomplete"""
    stop_reason: StopReason
    """End-of-text token, --max-tokens, end of the context, or Ctrl-C"""

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def decode_seconds(self) -> float:
        """Time from the first token to the end."""
        return self.seconds - self.seconds_to_first_token

    @property
    def tokens_per_second(self) -> float:
        """Rate of the tokens after the first; 0 without any."""
        seconds = self.decode_seconds
        return max(0, self.generated_tokens - 1) / seconds if seconds > 0 else 0.0
