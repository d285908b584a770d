"""Other engines that generate with the same weights, each in a process of its own, for `offramp bench --peers`.

`packages` gets an engine's Python package, `weights` writes the files it loads, `answer` is what runs in its process,
`process` talks to it from here, and `starting` puts these together.
"""

from offramp.peers.process import Answer, Peer, PeerError
from offramp.peers.starting import LLAMA_CPP, NAMES, started

__all__ = ["LLAMA_CPP", "NAMES", "Answer", "Peer", "PeerError", "started"]
