"""Speed of a bundle: prompt and decode by depth, budget and policy."""
