"""What happens to the products of a graph that torch.compile has traced, before it is compiled."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from . import add_residuals, feed_products, join_products

__all__ = ["ProductPasses"]


class ProductPasses(CustomGraphPass):
    """The passes, one after the other, for inductor's config."""

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph."""
        join_products.join_all_products(graph)
        add_residuals.add_residuals(graph)
        feed_products.feed_products(graph)

    def uuid(self) -> Any:
        """What inductor's cache knows the passes by."""
        passes = join_products, add_residuals, feed_products
        return get_hash_for_files((__file__, *(module.__file__ for module in passes)))
