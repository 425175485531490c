"""Who can stand in for whom, from what a profile measured."""
