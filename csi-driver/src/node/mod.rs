//! The service Node: devices and mounts of this node.
