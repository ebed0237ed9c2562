"""The messages of wire.proto, read from wire.desc; types in wire_pb2.pyi.

Written by hand, as what protoc generates runs only with a protobuf as new as protoc, and registers its names for the
whole process. This runs with the protobuf that is installed, and its pool is its own.
"""

from importlib.resources import files

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_set = descriptor_pb2.FileDescriptorSet.FromString(files(__package__).joinpath("wire.desc").read_bytes())
_pool = descriptor_pool.DescriptorPool()
_pool.AddSerializedFile(_set.file[0].SerializeToString())
DESCRIPTOR = _pool.FindFileByName(_set.file[0].name)

for _name, _message in DESCRIPTOR.message_types_by_name.items():
    globals()[_name] = message_factory.GetMessageClass(_message)
for _enum in DESCRIPTOR.enum_types_by_name.values():
    globals().update({_value.name: _value.number for _value in _enum.values})
