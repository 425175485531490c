"""Memory budgets: sizes, what `--memory` asks for, the account that keeps it, the refusal."""
