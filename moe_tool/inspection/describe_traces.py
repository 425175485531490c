"""Facts of profiles and run traces."""

from pathlib import Path

from moe_tool.artifacts.json_fields import object_fields
from moe_tool.artifacts.routing_report import ProfileRouting
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.formats.run_trace_hdf5 import read_run_trace
from moe_tool.inspection.description import Description, model_facts, named_facts, shape_facts
from moe_tool.profiling.coverage import layer_coverages
from moe_tool.profiling.routing_report import report_routing
from moe_tool.progress import Progress


def describe_profile(path: Path, progress: Progress) -> Description:
    """Describe a profile; its report reads every array, so there is nothing left to verify."""
    with ProfileReader.open(path) as reader:
        header, tokens = reader.header, reader.tokens
        found = ProfileRouting(
            coverage=layer_coverages(reader), routing=report_routing(reader, progress)
        )
        facts = model_facts(header.identity) | shape_facts(header.shape)
        facts |= {
            "tokens": int(tokens.ids.size),
            "sequences": int(tokens.ids.shape[0]),
            "held_out_sequences": int(tokens.held_out.sum()),
            "domains": tokens.domains,
        }
        facts |= named_facts(header, "sources", "seed", "tokenizer_sha256", "tool_version")
        facts["sha256"] = reader.sha256
    return Description(
        kind="profile",
        path=path,
        checked="every array",
        facts=facts,
        details=object_fields(found),
        tabled=found,
    )


def describe_run_trace(path: Path) -> Description:
    """Describe a run trace; its reader checks every array against the others."""
    header, calls = read_run_trace(path)
    facts = model_facts(header.identity) | shape_facts(header.shape)
    facts |= {
        "bits": header.precision.name,
        "skeleton_bits": header.skeleton_precision.name,
        "threads": header.threads,
        "expert_slots": header.n_slots,
        "pinned": len(header.pinned),
        "eviction": header.eviction,
        "prefetch": header.prefetch,
        "layer_calls": len(calls.layer),
        "router_scores": "recorded" if calls.scores is not None else "not recorded",
    }
    facts |= named_facts(header, "prompt_tokens", "decode_tokens")
    facts["decode_seconds"] = round(header.decode_seconds, 3)
    facts |= named_facts(header, "hits", "misses", "tool_version")
    return Description(kind="trace of a run", path=path, checked="every array", facts=facts)
