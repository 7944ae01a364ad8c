"""Names of other projects, each module one project's: the same functions and classes under the names known there."""
