"""Small changes that make the code wrong, and the tests that have to fail with each.

`make mutants` (tests/mutants/run.py) tries them one by one in a copy of the tree, after the same
tests have passed without any. An ordinary test checks that what they replace is still there.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One wrong change."""

    name: str
    file: str
    """From the root of the tree"""
    old: str
    """What is replaced; it occurs once"""
    new: str
    tests: str
    """A file of tests, or one of them, at least one of which has to fail"""


_PRUNING = "tests/tuning/test_pruning_learns.py"
_FLOATS = "tests/tuning/test_tune_floats.py"
_SEARCH = "tests/evaluation/test_calibrate_search.py"
_BITS = "tests/planning/test_measured_bits.py"
_BEST_BITS = f"{_BITS}::test_the_bits_of_an_average_are_the_best_there_are"

MUTANTS = (
    Mutant(
        name="a settled run that forgets the reserve its refusal counted",
        file="moe_tool/runtime/plan_run.py",
        old="within(max(process_bytes, plan.process_bytes), available_bytes)",
        new="within(process_bytes, available_bytes)",
        tests="tests/runtime/test_least_budget.py",
    ),
    Mutant(
        name="mask routers that learn nothing",
        file="moe_tool/tuning/train_mask_router.py",
        old="\n_LEARNING_RATE = 0.03",
        new="\n_LEARNING_RATE = 0.0",
        tests=_PRUNING,
    ),
    Mutant(
        name="mask routers trained to keep what adds nothing",
        file="moe_tool/tuning/train_mask_router.py",
        old="loss = kl + penalty",
        new="loss = -kl + penalty",
        tests=_PRUNING,
    ),
    Mutant(
        name="a training of mask routers that is kept though it harms",
        file="moe_tool/tuning/blend_routers.py",
        old="score[0] = 0.0",
        new="score[0] = np.inf",
        tests=_PRUNING,
    ),
    Mutant(
        name="norms and routers that are kept though other text does not say that it pays",
        file="moe_tool/tuning/judge_floats.py",
        old="pays = high < 0",
        new="pays = True",
        tests="tests/tuning/test_streamed_bundle.py",
    ),
    Mutant(
        name="routers that learn nothing of their gate weights",
        file="moe_tool/tuning/weighed_experts.py",
        old="by_weight[rows, slots] = (coming * y.detach()).sum(dim=1)",
        new="by_weight[rows, slots] = 0",
        tests="tests/tuning/test_streamed_bundle.py",
    ),
    Mutant(
        name="trained norms that stay out of the bundle",
        file="moe_tool/tuning/copied_bundle.py",
        old="self._floats = dict(values)",
        new="self._floats = {}",
        tests=f"{_FLOATS}::test_only_norms_and_routers_are_other_tensors_and_they_are_floats",
    ),
    Mutant(
        name="the gate-ratio rule judged at half of the rate",
        file="moe_tool/tuning/judge_pruning.py",
        old="np.array([share])",
        new="np.array([share / 2])",
        tests=_PRUNING,
    ),
    Mutant(
        name="a hobbit cache that ignores the weight lhu",
        file="moe_tool/policies/eviction/hobbit.py",
        old="mixed += self._of_precise",
        new="mixed += 0 * self._of_precise",
        tests="tests/policies/test_eviction.py",
    ),
    Mutant(
        name="a hobbit cache that never forgets a sequence",
        file="moe_tool/policies/eviction/hobbit.py",
        old="        if self._is_reset:",
        new="        if False:",
        tests="tests/policies/test_hobbit_records.py",
    ),
    Mutant(
        name="a hobbit cache that knows only one layer distance",
        file="moe_tool/policies/eviction/hobbit.py",
        old="nearness = until if self._is_printed else",
        new="nearness =",
        tests="tests/policies/test_hobbit_records.py",
    ),
    Mutant(
        name="a run that freezes the caches it was planned with",
        file="moe_tool/runtime/run_options.py",
        old="        return plan.residency",
        new='        return "frozen"',
        tests="tests/planning/test_cached_replica.py::test_a_bundle_planned_so_runs_as_planned",
    ),
    Mutant(
        name="a price of two caches that forgets what the primary one held",
        file="moe_tool/simulator/two_caches.py",
        old="given = [WHOLE if k in whole else int(a) for",
        new="given = [int(a) for",
        tests="tests/simulator/test_two_caches.py",
    ),
    Mutant(
        name="stacked gates one layer off",
        file="moe_tool/runtime/stacked_gates.py",
        old="yield self.gates.choose(first + ahead, logits[ahead])",
        new="yield self.gates.choose(first + ahead, logits[0])",
        tests="tests/runtime/test_stacked_gates.py",
    ),
    Mutant(
        name="stacked gates of routers that scale their input",
        file="moe_tool/runtime/stacked_gates.py",
        old="return gates if _agrees(gates, layers) else None",
        new="return gates",
        tests="tests/runtime/test_stacked_gates.py",
    ),
    Mutant(
        name="a prefetch that shares the disk with demanded reads",
        file="moe_tool/store/reader.py",
        old="            return self._give_way(job)",
        new="            return not job.is_dropped",
        tests="tests/store/test_pausing.py",
    ),
    Mutant(
        name="a replay of two caches that keeps prefetches nobody named",
        file="moe_tool/simulator/prefetching_cache.py",
        old="                self._cache.discard(key)\n",
        new="                pass\n",
        tests="tests/runtime/test_two_caches.py",
    ),
    Mutant(
        name="a trace without what a part of a layer foretold",
        file="moe_tool/runtime/moe_layer.py",
        old="        if self.recorder is None:\n            return\n        n_experts",
        new="        if True:\n            return\n        n_experts",
        tests="tests/runtime/test_partial_prefetch.py",
    ),
    Mutant(
        name="a division of misses that ignores measured times",
        file="moe_tool/policies/misses/smoe.py",
        old="self.costs_ms if routing.costs_ms is None else routing.costs_ms",
        new="self.costs_ms",
        tests="tests/runtime/test_measured_costs.py",
    ),
    Mutant(
        name="a session that does not say when a sequence begins",
        file="moe_tool/runtime/session.py",
        old="            self.runner.store.begin_sequence()\n",
        new="",
        tests="tests/runtime/test_two_caches.py",
    ),
    Mutant(
        name="the hobbit mix that finds least",
        file="moe_tool/planning/hobbit_weights.py",
        old="return min(tried,",
        new="return max(tried,",
        tests="tests/planning/test_hobbit_mix.py",
    ),
    Mutant(
        name="a calibration without some of its domains",
        file="moe_tool/evaluation/calibrate.py",
        old="in best.domains.items()",
        new="in list(best.domains.items())[:1]",
        tests=_SEARCH,
    ),
    Mutant(
        name="a calibration to the weakest setting",
        file="moe_tool/evaluation/calibrate.py",
        old="trials[max(kept)])",
        new="trials[min(kept)])",
        tests=_SEARCH,
    ),
    Mutant(
        name="a calibration whose interval may leave the limit",
        file="moe_tool/evaluation/calibrate.py",
        old="return self.figures.kl_mean.high",
        new="return self.figures.kl_mean.low",
        tests=_SEARCH,
    ),
    Mutant(
        name="a search that stops after its first round",
        file="moe_tool/evaluation/calibrate.py",
        old="_ROUNDS = 3",
        new="_ROUNDS = 1",
        tests=_SEARCH,
    ),
    Mutant(
        name="costs of bits that forget how often an expert is used",
        file="moe_tool/planning/bit_costs.py",
        old="kl_ratio * each.nats * use * squared",
        new="kl_ratio * each.nats * use.mean() * squared",
        tests=_BEST_BITS,
    ),
    Mutant(
        name="a planner that minimizes something else",
        file="moe_tool/planning/mixed_allocations.py",
        old="cost.reshape(-1, n_widths),",
        new="np.sqrt(cost).reshape(-1, n_widths),",
        tests=_BEST_BITS,
    ),
    Mutant(
        name="a planner that spends more bytes than the limit asks for",
        file="moe_tool/planning/mixed_allocations.py",
        old="_nats(costs, found) <= max_nats",
        new="_nats(costs, found) <= max_nats / 2",
        tests=f"{_BITS}::test_no_fewer_bytes_keep_a_limit_of_loss",
    ),
    Mutant(
        name="layers that all feel the same",
        file="moe_tool/packing/measure_bit_prices.py",
        old="np.clip(measured / expected,",
        new="np.clip(1.0,",
        tests=_BITS,
    ),
    Mutant(
        name="errors of experts judged by another width",
        file="moe_tool/packing/measure_bit_prices.py",
        old="eps[at, expert] = found.eps",
        new="eps[at - 1, expert] = found.eps",
        tests=_BITS,
    ),
    Mutant(
        name="zero points moved once",
        file="moe_tool/quantization/hqq.py",
        old="_TURNS = 20",
        new="_TURNS = 1",
        tests="tests/quantization/test_hqq.py",
    ),
    Mutant(
        name="a norm that minds outliers",
        file="moe_tool/quantization/hqq.py",
        old="_NORM = 0.7",
        new="_NORM = 1.9",
        tests="tests/quantization/test_hqq.py",
    ),
    Mutant(
        name="a cache per layer with fewer slots than layers",
        file="moe_tool/store/slot_book.py",
        old="if per_layer and 0 < capacity",
        new="if per_layer and 0 > capacity",
        tests="tests/runtime/test_eviction.py::test_a_store_without_a_slot_for_each_layer_is_refused",
    ),
    Mutant(
        name="buddies drawn at random",
        file="moe_tool/policies/misses/buddy.py",
        old="make=Buddy,",
        new="make=__import__(f'{__package__}.random_resident', fromlist=['_']).RandomResident,",
        tests="tests/evaluation/test_buddies_against_controls.py",
    ),
    Mutant(
        name="a hub that is tried without asking whether it answers",
        file="moe_tool/text/hub_datasets.py",
        old="online = not offline and hub_is_reachable()",
        new="online = not offline",
        tests="tests/text/test_sources.py",
    ),
    Mutant(
        name="waiting that counts nothing",
        file="moe_tool/store/record_store.py",
        old="counters.stall_seconds += time.perf_counter() - started",
        new="counters.stall_seconds += 0 * (time.perf_counter() - started)",
        tests="tests/store/test_record_store.py",
    ),
    Mutant(
        name="an interval over tokens in place of sequences",
        file="moe_tool/evaluation/bootstrap.py",
        old="size=(n_resamples, n_sequences)",
        new="size=(n_resamples, values.size)",
        tests="tests/evaluation/test_bootstrap.py",
    ),
    Mutant(
        name="lookup experts without their layer's norm",
        file="moe_tool/models/mole/modeling.py",
        old="normed = self.expert_layernorm(embedded)",
        new="normed = embedded",
        tests="tests/lookup/test_mole_model.py",
    ),
    Mutant(
        name="two codes of a row the wrong way round",
        file="moe_tool/quantization/row_codes.py",
        old="torch.stack((codes >> 4, codes & 15), dim=2)",
        new="torch.stack((codes & 15, codes >> 4), dim=2)",
        tests="tests/lookup/test_lookup_bundle.py",
    ),
    Mutant(
        name="a slow disk that rows of tables do not pass",
        file="moe_tool/formats/bundle_tables.py",
        old="self._rows[-1].pace = self.pace",
        new="self._rows[-1].pace = full_speed",
        tests="tests/runtime/test_throttled_disk.py",
    ),
    Mutant(
        name="embedding tables that are copied whole in memory",
        file="moe_tool/tuning/copied_bundle.py",
        old="if name in codes:",
        new="if True:",
        tests="tests/tuning/test_copied_tables.py",
    ),
    Mutant(
        name="a profile whose budget counts tables on disk",
        file="moe_tool/profiling/profile_memory.py",
        old="opened.skeleton.n_loaded",
        new="opened.skeleton.n_weights",
        tests="tests/profiling/test_profile_memory.py::"
        "test_a_table_of_which_rows_are_read_is_not_counted",
    ),
    Mutant(
        name="rows of an interrupted pack that are taken over unread",
        file="moe_tool/formats/lookup_writer.py",
        old="return digest.hexdigest() == entry.xxh3",
        new="return True",
        tests="tests/lookup/test_resumed_pack.py",
    ),
    Mutant(
        name="lookup bundles that are compared with themselves",
        file="moe_tool/evaluation/evaluate_lookup.py",
        old="theirs = _logits(truth, sequence)[scored]",
        new="theirs = _logits(model, sequence)[scored]",
        tests="tests/lookup/test_measured_lookup.py",
    ),
    Mutant(
        name="prefetches always in full",
        file="moe_tool/policies/misses/replica.py",
        old="chooses_prefetches = True",
        new="chooses_prefetches = False",
        tests="tests/runtime/test_mixtures.py"
        "::test_a_prefetch_reads_the_form_that_the_policy_would_answer_with",
    ),
    Mutant(
        name="a stacked replay that never looks past the next layer",
        file="moe_tool/simulator/naive_replay.py",
        old="if target <= layer + depth",
        new="if target <= layer + min(depth, 1)",
        tests="tests/simulator/test_replay.py"
        "::test_a_layer_two_ahead_is_prefetched_once_the_next_one_is_there",
    ),
)
