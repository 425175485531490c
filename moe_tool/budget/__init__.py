"""Memory budgets: sizes, the grammar of `--memory`, the plan of a run, the refusal."""
