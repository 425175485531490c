"""Stand-ins of experts, from what a profile measured."""
