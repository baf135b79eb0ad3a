"""The Lua scripts of the store, one file a transition."""
