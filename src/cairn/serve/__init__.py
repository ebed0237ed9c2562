"""Services over the network: what they share (tokenizers, bodies, access), and each in a folder of its own."""
