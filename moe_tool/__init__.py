"""Run Mixture-of-Experts language models on machines that are too small for them: measure, compile,
serve.

    profiling.recorder.record_profile     checkpoint + text -> router traces and expert statistics
    buddies.build_buddy_map               profile -> substitutes for every expert, with prices
    packing.pack_bundle                   checkpoint + profile + buddies -> bundle
    runtime.session.open_session          bundle + memory budget -> a model ready to generate
    evaluation.evaluate                   bundle + text -> perplexity, and KL against the exact
    model

Each of these is a function from artifacts to an artifact; the `moe-tool` commands wrap them.
"""

__version__ = "0.1.0"
