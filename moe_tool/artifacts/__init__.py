"""The frozen types that pass between the stages of the pipeline."""
