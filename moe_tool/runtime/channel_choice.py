"""Which channels of its experts a layer call of one token needs."""

from collections.abc import Sequence

from moe_tool.experts.channel_forward import choose_channels
from moe_tool.models.skeleton import LayerCall
from moe_tool.quantization.channels import ChosenChannels
from moe_tool.store.channel_store import ChannelStore


def choose_for_call(
    call: LayerCall, experts: Sequence[int], store: ChannelStore, sparsity: float
) -> dict[int, ChosenChannels]:
    """Return the channels that a layer call of one token needs, from the layer's own input.

    Args:
        call: of one token.
        experts: that it names.
        store: of the bundle.
        sparsity: that was asked for.
    """
    return {
        expert: choose_channels(
            call.module, store.chooser(call.layer, expert), call.hidden, sparsity
        )
        for expert in experts
    }
