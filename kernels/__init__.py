"""The work around and inside the network, batched: each kernel with its plain-torch reference."""
