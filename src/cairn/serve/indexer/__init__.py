"""`cairn index`: the fleet's index as a service, over HTTP and gRPC."""
