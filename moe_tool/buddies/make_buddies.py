"""Work of `buddies`: build, summarize and write a profile's buddy map."""

from pathlib import Path

from moe_tool.artifacts.buddy_map import Similarity
from moe_tool.artifacts.buddy_summary import BuddyReport
from moe_tool.buddies.build_buddy_map import build_buddy_map
from moe_tool.buddies.summary import summarize_buddies
from moe_tool.formats.claimed_artifact import require_unclaimed
from moe_tool.formats.json_artifact import write_json_artifact
from moe_tool.formats.profile_hdf5 import ProfileReader


def make_buddies(
    profile: Path, *, k: int, by: Similarity, out: Path, may_replace: bool = True
) -> BuddyReport:
    """Build the buddy map of a profile and write it to `out`.

    Raises:
        NotFoundError, CorruptArtifactError: the profile cannot be read.
        UsageError: k is not below the number of experts, or `out` is another model's map and
            `may_replace` is False.
    """
    with ProfileReader.open(profile) as reader:
        if not may_replace:
            require_unclaimed(out, reader.header.identity)
        buddy_map = build_buddy_map(reader, k=k, by=by)
        summary = summarize_buddies(reader, buddy_map)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json_artifact(out, buddy_map)
    return BuddyReport(
        buddies=out, model=buddy_map.identity.name, profile=profile, k=k, by=by, summary=summary
    )
