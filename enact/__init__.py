"""ENACT: entropy-based clustering of the keys and values of an encoder's self-attention (arXiv 2409.07541).

Imports torch and nothing else, so that the folder can be copied into another project as it is.
"""

from enact.attention import EnactAttention
from enact.clustering import Clusters
from enact.plugin import apply, remove
from enact.row_column import EnactRowColumnAttention

__all__ = ["Clusters", "EnactAttention", "EnactRowColumnAttention", "apply", "remove"]
