"""gRPC: protocols, and the stubs generated from them by `make proto`."""
