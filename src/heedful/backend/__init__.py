"""The ways to run attention, one folder each, behind the interface of `heedful.backend.base`."""
