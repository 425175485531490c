"""Names of the files and folders of a bundle that say what it is."""

PART_SUFFIX = ".part"
MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
