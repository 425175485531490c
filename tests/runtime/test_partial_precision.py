"""On a trained model, part of a layer foretells the next one better than its input alone does."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from moe_tool.models.locate import locate_model
from moe_tool.models.skeleton import LayerCall
from moe_tool.policies.prefetch import Prediction
from moe_tool.runtime.partial_layer import PartialLayer
from moe_tool.runtime.prefetcher import Prefetcher, RouterPredictor
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sources import parse_sources, read_documents
from tests.packed import pack_bundle

N_TOKENS = 128


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "bundle"
    pack_bundle(locate_model("demo", offline=True, announce=print), out=out, bits="4")
    return out


@torch.inference_mode()
def test_more_of_what_is_foretold_is_wanted(demo_bundle: Path) -> None:
    options = run_options(memory="50%", prefetch="partial:alpha=0", context=N_TOKENS)
    with open_session(demo_bundle, options) as session:
        prefetcher, layers = session.runner.part_prefetcher, session.skeleton.layers
        assert prefetcher is not None
        pairs = zip(layers, layers[1:], strict=False)
        from_input = RouterPredictor(following={one.layer: [after] for one, after in pairs})
        foretold: dict[int, dict[str, set[int]]] = {}
        n_right = {"input": 0, "part": 0}
        n_foretold = 0

        class Both:
            def predict(self, at: PartialLayer) -> Iterator[Prediction]:
                ways = {"part": prefetcher.predictor.predict(at), "input": None}
                if at.call.layer != layers[-1].layer:
                    ways["input"] = from_input.predict(at.call)
                    foretold[at.call.layer + 1] = {
                        way: set(next(found).index[0].tolist()) for way, found in ways.items()
                    }
                yield from ()

        def judge(call: LayerCall) -> torch.Tensor:
            nonlocal n_foretold
            if (guessed := foretold.pop(call.layer, None)) is not None:
                wanted = set(call.index[0].tolist())
                n_foretold += len(wanted)
                for way, experts in guessed.items():
                    n_right[way] += len(experts & wanted)
            return session.runner(call)

        session.runner.part_prefetcher = Prefetcher(predictor=Both(), close=prefetcher.close)
        session.skeleton.set_experts_function(judge)
        source = parse_sources(["builtin:eval"])[0]
        text = " ".join(islice(read_documents(source, seed=0), 8))
        ids = torch.tensor(session.tokenizer(text)["input_ids"])[:N_TOKENS]
        cache = session.new_cache()
        for token in ids:
            session.model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
    shares = {way: right / n_foretold for way, right in n_right.items()}
    assert shares["part"] > shares["input"] + 0.05
