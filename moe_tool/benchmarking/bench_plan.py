"""Options of `bench` and the tests that they ask for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from moe_tool.artifacts.bench_report import CacheState
from moe_tool.budget.request import MemoryRequest
from moe_tool.errors import MoeToolError, UsageError
from moe_tool.formats.hostile_file import read_capped
from moe_tool.formats.strict_json import parse_json_object
from moe_tool.models.context_length import context_length
from moe_tool.policies.eviction import EvictionChoice
from moe_tool.policies.misses import EXACT_POLICY, MissChoice
from moe_tool.store.throttle import Throttle

Kind = Literal["pp", "tg"]
Number = TypeVar("Number", int, float)
_MAX_THREADS = 1024
_MAX_CONFIG_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """Lists to cross: every budget with every policy and so on."""

    prompt_tokens: tuple[int, ...] = (512,)
    """Rows ppN: N tokens of prompt at once; 0 leaves the row out"""
    generate: tuple[int, ...] = (64,)
    """Rows tgN: N tokens, one per forward; 0 leaves the row out"""
    depth: tuple[int, ...] = (0,)
    """Tokens in context before the timing starts"""
    memory: tuple[MemoryRequest | None, ...] = (None,)
    """Budgets; None: the plan's, or auto"""
    policy: tuple[MissChoice, ...] = (EXACT_POLICY,)
    eviction: tuple[EvictionChoice | None, ...] = (None,)
    """Eviction policies; None: the plan's, or lru"""
    prefetch: tuple[str | None, ...] = (None,)
    """Prefetch methods; None: the plan's, or none"""
    sparse_experts: tuple[float | None, ...] = (None,)
    """See RunOptions"""
    threads: tuple[int | None, ...] = (None,)
    """Compute threads; None: the session's default"""
    repetitions: int = 3
    cache: CacheState = "warm"
    throttle: Throttle | None = None
    """Disk to pretend to have"""
    gates: bool = True
    """Whether lossy policies keep BuddyMoE's gates"""
    random: bool = False
    """Whether to feed random token ids instead of text"""
    seed: int = 0
    """Seed of the choice of text, random ids, and random policies"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedTest:
    """One test: timed tokens after `depth` untimed ones."""

    kind: Kind
    n_tokens: int
    depth: int

    @property
    def positions(self) -> int:
        """Positions of context that the test takes."""
        return self.depth + self.n_tokens

    @property
    def label(self) -> str:
        """Name in the table, in llama-bench's syntax: "tg64 @ d512"."""
        return f"{self.kind}{self.n_tokens}" + (f" @ d{self.depth}" if self.depth else "")


def list_tests(options: BenchOptions, *, context_limit: int | None) -> tuple[SpeedTest, ...]:
    """Return every test by depth, prompts first.

    Args:
        options: the lists to cross.
        context_limit: the model's context length; None if unknown.

    Raises:
        UsageError: there is no test, a number is invalid, or a test exceeds the model's context.
    """
    for name, numbers in (
        ("--prompt-tokens", options.prompt_tokens),
        ("--generate", options.generate),
        ("--depth", options.depth),
    ):
        if any(number < 0 for number in numbers):
            raise UsageError(f"{name} {min(numbers)}: 0 or more is needed")
    if options.repetitions < 1:
        raise UsageError(f"--repetitions {options.repetitions}: at least 1 is needed")
    for n_threads in options.threads:
        if n_threads is not None and not 1 <= n_threads <= _MAX_THREADS:
            raise UsageError(f"--threads {n_threads}: 1 to {_MAX_THREADS} are possible")
    kinds: tuple[tuple[Kind, tuple[int, ...]], ...] = (
        ("pp", options.prompt_tokens),
        ("tg", options.generate),
    )
    tests = tuple(
        SpeedTest(kind=kind, n_tokens=n_tokens, depth=depth)
        for depth in options.depth
        for kind, counts in kinds
        for n_tokens in counts
        if n_tokens
    )
    if not tests or not all(
        (options.memory, options.policy, options.threads, options.eviction, options.prefetch)
    ):
        raise UsageError(
            "nothing is left to measure", hint="--prompt-tokens 512 --generate 64 --depth 0"
        )
    longest = max(tests, key=lambda test: test.positions)
    if context_limit is not None and longest.positions > context_limit:
        raise UsageError(
            f"{longest.label} takes {longest.positions} positions, "
            f"the model was made for {context_limit}",
            hint=f"--depth {context_limit - longest.n_tokens} or less"
            if longest.n_tokens <= context_limit
            else "a smaller --prompt-tokens or --generate",
        )
    return tests


def refuse_too_long(bundle: Path, options: BenchOptions) -> None:
    """Refuse tests beyond the model's context before torch is loaded, which takes seconds.

    A missing or damaged bundle is ignored here; opening it reports what is wrong.

    Raises:
        UsageError: a test exceeds the context, or options are invalid.
    """
    path = bundle / "config.json"
    try:
        text = read_capped(path, limit_bytes=_MAX_CONFIG_BYTES, remedy="")
        limit = context_length(parse_json_object(path, text, remedy=""))
    except MoeToolError:
        return
    list_tests(options, context_limit=limit)


def parse_numbers(text: str, number: type[Number], *, option: str) -> tuple[Number, ...]:
    """Return the numbers of "512,1024" or "0,0.8".

    Raises:
        UsageError: an entry is not such a number.
    """
    try:
        return tuple(number(word) for word in parse_words(text, option=option))
    except ValueError as error:
        what, example = ("whole numbers", "128,512") if number is int else ("numbers", "0,0.8")
        raise UsageError(
            f"{option} {text}: {what} with commas between them are needed",
            hint=f"{option} {example}",
        ) from error


def parse_words(text: str, *, option: str) -> tuple[str, ...]:
    """Return the entries of a comma-separated list.

    Raises:
        UsageError: an entry is empty.
    """
    words = tuple(word.strip() for word in text.split(","))
    if not all(words):
        raise UsageError(f"{option} '{text}': an entry of the list is empty")
    return words


def parse_policies(text: str) -> tuple[str, ...]:
    """Return the policies of "exact,buddy:rho=1,tau=0.9": a value goes with the name before it.

    Raises:
        UsageError: an entry is empty, or the first is a value.
    """
    found: list[str] = []
    for word in parse_words(text, option="--policy"):
        if "=" in word and ":" not in word and found:
            found[-1] += f",{word}"
        else:
            found.append(word)
    return tuple(found)
